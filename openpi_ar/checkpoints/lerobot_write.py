"""Writes what LeRobot's pi0 and pi0.5 have beside their tensors, as LeRobot does it (`lerobot.py` reads it)."""

from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from openpi_ar.checkpoints.lerobot import (
    ACTION,
    MODES,
    POST,
    PRE,
    RELATIVE,
    STATE,
    TEMPLATES,
    feature_of,
    is_empty,
)
from openpi_ar.config import InferenceConfig
from openpi_ar.data.normalize import NormStats
from openpi_ar.robot_spec import RobotSpec

_Step = tuple[str, dict[str, Any]]
"""Registry name and configuration of a step."""
_TO_CPU: _Step = ("device_processor", {"device": "cpu", "float_dtype": None})


def write(folder: Path, cfg: InferenceConfig, stats: Mapping[str, NormStats] | None, dtype: str) -> list[str]:
    """Writes config.json and the processors of a policy into `folder`; returns what LeRobot has no place for.

    Only fields that LeRobot knows: it refuses others. Without statistics the normalising steps change nothing.
    """
    model, robot = cfg.model, cfg.robot or RobotSpec()
    dims = [model.state_dim, model.action_dim]
    if stats:  # the rest of longer ones is padding, which LeRobot's features do not have
        own = {"state": robot.state_dims, "actions": robot.action_dims}
        stats = {name: stats[name].first(count, name) for name, count in own.items()}
        dims = [stats["state"].dims, stats["actions"].dims]
    size, norm = list(model.siglip.image_size), MODES[model.norm_mode]
    inputs = {feature_of(c): {"type": "VISUAL", "shape": [3, *size]} for c in model.cameras}
    inputs[STATE] = {"type": "STATE", "shape": [dims[0]]}
    outputs = {ACTION: {"type": "ACTION", "shape": [dims[1]]}}
    norm_map = {"VISUAL": "IDENTITY", "STATE": norm, "ACTION": norm}
    mask = [*robot.delta, *[False] * dims[1]][: dims[1]]
    relative = {
        "enabled": any(mask),
        "exclude_joints": ["absolute"],
        "action_names": [f"{'relative' if is_relative else 'absolute'}_{i}" for i, is_relative in enumerate(mask)],
    }
    body = {
        "type": model.kind,
        "input_features": inputs,
        "output_features": outputs,
        "chunk_size": model.action_horizon,
        "n_action_steps": model.action_horizon,
        "max_state_dim": model.state_dim,
        "max_action_dim": model.action_dim,
        "image_resolution": size,
        "empty_cameras": sum(map(is_empty, model.cameras)),
        "normalization_mapping": norm_map,
        "tokenizer_max_length": cfg.text.max_prompt_tokens,
        "num_inference_steps": cfg.decode.denoise_steps,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "dtype": "bfloat16" if dtype == "bfloat16" else "float32",
    }
    if any(mask):  # younger than 0.4
        body |= {RELATIVE[key]: value for key, value in relative.items() if key in RELATIVE}
    (folder / "config.json").write_text(json.dumps(body, indent=2) + "\n")

    normalize = {"eps": 1e-8, "features": inputs | outputs, "norm_map": norm_map}
    relatives = [("relative_actions_processor", relative)] * any(mask)
    absolutes = [("absolute_actions_processor", {"enabled": True})] * any(mask)
    before = _before(model.kind, [*relatives, ("normalizer_processor", normalize)], cfg.text.max_prompt_tokens)
    _save(folder, PRE, before, stats)
    unnormalize = ("unnormalizer_processor", normalize | {"features": outputs})
    _save(folder, POST, [unnormalize, *absolutes, _TO_CPU], stats)
    lacking = [f"template {cfg.text.template}"] * (cfg.text.template != TEMPLATES[model.kind])
    lacking += [f"tokenizer {cfg.text.tokenizer}"] * (cfg.text.tokenizer != "paligemma")
    numbers = ("flips", "inverted_grippers", "aloha_grippers")
    return lacking + [f"the robot's {name}" for name in numbers if getattr(robot, name)]


def _before(kind: str, normalizers: list[_Step], tokens: int) -> list[_Step]:
    """The steps before a model of that kind, in LeRobot's order."""
    tokenize = {"max_length": tokens, "task_key": "task", "padding_side": "right", "padding": "max_length"}
    tokenize |= {"truncation": True, "tokenizer_name": "google/paligemma-3b-pt-224"}
    tokenizer = ("tokenizer_processor", tokenize)
    first = [("rename_observations_processor", {"rename_map": {}}), ("to_batch_processor", {})]
    if kind == "pi05":  # writes the normalised state into the prompt
        return [*first, *normalizers, ("pi05_prepare_state_tokenizer_processor_step", {}), tokenizer, _TO_CPU]
    return [*first, ("pi0_new_line_processor", {}), tokenizer, _TO_CPU, *normalizers]


def _save(folder: Path, name: str, steps: list[_Step], stats: Mapping[str, NormStats] | None) -> None:
    """One list of steps, and the statistics of its normalising step in the file that LeRobot's own would be called."""
    entries = []
    for i, (step, config) in enumerate(steps):
        entries.append({"registry_name": step, "config": config})
        if stats and "normalizer" in step:
            entries[-1]["state_file"] = f"{name}_step_{i}_{step}.safetensors"
            features = {STATE: stats["state"], ACTION: stats["actions"]}
            tensors = {
                f"{feature}.{array}": np.asarray(getattr(s, array), np.float32)
                for feature, s in features.items()
                for array in ("mean", "std", "q01", "q99")
            }
            save_file(tensors, folder / entries[-1]["state_file"])
    (folder / f"{name}.json").write_text(json.dumps({"name": name, "steps": entries}, indent=2) + "\n")
