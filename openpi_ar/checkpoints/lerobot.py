"""What LeRobot's pi0 and pi0.5 have beside their tensors: config.json, processors, statistics.

LeRobot 0.4 and later put what is done before and after the model into `policy_preprocessor.json` and
`policy_postprocessor.json`, lists of steps, and the statistics of the normalising steps into files that those name
(`lerobot/processor/pipeline.py`, `normalize_processor.py`, `lerobot/policies/pi05/processor_pi05.py`). Before,
statistics were buffers among the parameters.
"""

from collections.abc import Mapping
import dataclasses
from pathlib import Path
import re
from typing import Any

import numpy as np

from openpi_ar.checkpoints.family import number
from openpi_ar.checkpoints.sources import Source, open_safetensors
from openpi_ar.config import DecodeConfig, InferenceConfig, TextConfig
from openpi_ar.data.normalize import Mode, NormStats, parse_stats
from openpi_ar.errors import UserError
from openpi_ar.model_config import ModelConfig
from openpi_ar.robot_spec import ANY, RobotSpec, mask_runs
from openpi_ar.textfile import read_object, whole_number

FILES = "policy_*processor*"
"""Pattern of the files of processors: steps and statistics."""
STATISTICS = r"(un)?normalize_(inputs|targets|outputs)\."
"""Pattern at the start of the names of statistics among the parameters."""
TEMPLATES = {"pi0": "openpi_pi0", "pi05": "openpi"}
"""The template that LeRobot's preprocessor of a kind of model amounts to."""
PROMPT_TOKENS = {"pi0": 48, "pi05": 200}
"""openpi's `Pi0Config.max_token_len` and LeRobot's `tokenizer_max_length`: pi0's prompt does not carry the state."""
PRE, POST = "policy_preprocessor", "policy_postprocessor"
IMAGES, STATE, ACTION, _EMPTY = "observation.images.", "observation.state", "action", "empty_camera_"
MODES: dict[Mode, str] = {"quantile": "QUANTILES", "z_score": "MEAN_STD"}
_ARRAYS = {
    "IDENTITY": (),
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
"""The statistics that each of LeRobot's ways to normalise applies."""

RELATIVE = {
    "enabled": "use_relative_actions",
    "exclude_joints": "relative_exclude_joints",
    "action_names": "action_feature_names",
}
"""Fields of the step that makes actions relative to the state, and of config.json."""

Tensors = dict[str, np.ndarray]


def is_policy(settings: Mapping[str, Any]) -> bool:
    """Whether a config.json is of one of the policies that this module knows."""
    return str(settings.get("type")) in TEMPLATES


def is_empty(camera: str) -> bool:
    """Whether a camera stands for none: LeRobot feeds its model a masked image."""
    return camera.startswith(_EMPTY)


def cameras(settings: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of the images that a config.json lists, in the order in which the policy stacks them; None: none."""
    return tuple(name.removeprefix(IMAGES) for name in _features(settings, "VISUAL")) or None


def read(
    root: Path, settings: Mapping[str, Any], source: Source | None, model: ModelConfig
) -> tuple[InferenceConfig, dict[str, NormStats] | None]:
    """(config of the policy, statistics or None) of the directory `root`; `source` may have statistics of old.

    The robot sends LeRobot's features. Statistics are such that `model.norm_mode` applies them: whatever LeRobot's
    `norm_map` says is a shift and a scale. Raises UserError if a file is not what LeRobot writes.
    """
    where = str(root / "config.json")
    pre, post = (_Pipeline.read(root, name, settings) for name in (PRE, POST))
    if source is not None and not pre.tensors and not post.tensors:
        pre = post = dataclasses.replace(pre, tensors=_buffers(source))
    stats, dims = None, [_dims(settings, "STATE", where), _dims(settings, "ACTION", where)]
    if pre.tensors or post.tensors:
        state = _stats(pre if pre.tensors else post, STATE, "STATE", settings, model)
        actions = _stats(post if post.tensors else pre, ACTION, "ACTION", settings, model)
        stats, dims = {"state": state, "actions": actions}, [state.dims, actions.dims]
    try:
        robot = RobotSpec(
            cameras={
                "|".join((*pre.raw_names(feature_of(c)), feature_of(c))): c for c in model.cameras if not is_empty(c)
            },
            state={STATE: dims[0]},
            action_dims=dims[1],
            delta_mask=mask_runs(pre.relative(settings, dims[1])),
            unused=(ANY,),
        )
    except ValueError as e:
        raise UserError(f"{root}: {e}") from e
    tokens = number(settings, "tokenizer_max_length") or PROMPT_TOKENS[model.kind]
    steps = number(settings, "num_inference_steps", "num_steps")
    text = TextConfig("paligemma", TEMPLATES[model.kind], max_prompt_tokens=tokens)
    return InferenceConfig(model, text, DecodeConfig(denoise_steps=steps or 10), robot), stats


@dataclasses.dataclass(frozen=True)
class _Pipeline:
    """One of the two lists of steps.

    where     the file, for messages.
    steps     configuration of each by its registry name.
    tensors   the statistics of its normalising step, by `feature.statistic`.
    """

    where: str
    steps: dict[str, dict[str, Any]]
    tensors: Tensors

    @classmethod
    def read(cls, root: Path, name: str, settings: Mapping[str, Any]) -> "_Pipeline":
        path, steps, tensors = root / f"{name}.json", {}, {}
        entries = read_object(path).get("steps", []) if path.is_file() else []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path}: steps must be a list of objects, found {entries!r:.80}")
        for entry in entries:
            # Without a registry name LeRobot writes the class.
            step = str(entry.get("registry_name") or entry.get("class"))
            config = entry.get("config") or {}
            if not isinstance(config, dict):
                raise UserError(f"{path}: the config of step {step} must be an object, found {config!r:.80}")
            steps[step] = config
            if "normalizer" in step.lower() and (file := entry.get("state_file")) is not None:
                if not isinstance(file, str) or not (root / file).is_file():
                    raise UserError(f"{path}: step {step} names the file {file!r}, which is not in {root}")
                opened = open_safetensors(root / file, [root / file])
                tensors = {key: opened.read(key) for key in opened.specs if key.startswith((STATE, ACTION))}
        return cls(str(path), steps, tensors)

    def norm(self, kind: str, settings: Mapping[str, Any]) -> str:
        """How features of a kind are normalised: of the step, else of config.json."""
        configs = [config for name, config in self.steps.items() if "normalizer" in name.lower()]
        found = next((c["norm_map"] for c in configs if "norm_map" in c), settings.get("normalization_mapping"))
        norm = str(found.get(kind, "IDENTITY") if isinstance(found, dict) else found)
        if norm not in _ARRAYS:
            raise UserError(f"{self.where}: {kind} is normalised by {norm!r}, expected one of {', '.join(_ARRAYS)}")
        return norm

    def raw_names(self, feature: str) -> list[str]:
        """What a feature is called before LeRobot renames it."""
        renames = self.steps.get("rename_observations_processor", {}).get("rename_map") or {}
        return [old for old, new in renames.items() if new == feature] if isinstance(renames, dict) else []

    def relative(self, settings: Mapping[str, Any], dims: int) -> list[bool]:
        """Which of `dims` actions are relative to the state (`relative_action_processor.py`); empty: none."""
        own = {key: settings.get(name) for key, name in RELATIVE.items()}
        step = self.steps.get("relative_actions_processor", own)
        names, excluded = step.get("action_names") or [], step.get("exclude_joints") or []
        if not step.get("enabled"):
            return []
        if not isinstance(names, list) or not isinstance(excluded, list):
            raise UserError(
                f"{self.where}: action_names and exclude_joints must be lists, found {names!r}, {excluded!r}"
            )
        mask = [not any(str(x).lower() in str(name).lower() for x in excluded if x) for name in names[:dims]]
        return mask + [True] * (dims - len(mask))


def _stats(pipeline: _Pipeline, feature: str, kind: str, settings: Mapping[str, Any], model: ModelConfig) -> NormStats:
    """The statistics of one feature as `model.norm_mode` applies them."""
    norm, mode = pipeline.norm(kind, settings), model.norm_mode
    own = {k.removeprefix(f"{feature}."): v for k, v in pipeline.tensors.items() if k.startswith(f"{feature}.")}
    own = {name: np.asarray(array, np.float64).reshape(-1) for name, array in own.items() if name != "count"}
    if not own or not _ARRAYS[norm]:  # LeRobot leaves alone what has no statistics
        dims = _dims(settings, kind, pipeline.where) or max((len(array) for array in own.values()), default=0)
        offset, scale, own = np.zeros(dims), np.ones(dims), {}
    elif missing := [name for name in _ARRAYS[norm] if name not in own]:
        raise UserError(f"{pipeline.where}: {feature} lacks {', '.join(missing)}, which {norm} needs")
    else:
        low, high = (own[name] for name in _ARRAYS[norm])
        if low.shape != high.shape:
            raise UserError(f"{pipeline.where}: {feature} holds {' and '.join(_ARRAYS[norm])} of different lengths")
        offset, scale = (low, high) if norm == "MEAN_STD" else ((low + high) / 2, (high - low) / 2)
    same_map = {"mean": offset, "std": scale, "q01": offset - scale, "q99": offset + scale}
    applied = () if norm == MODES[mode] else _ARRAYS[MODES[mode]]
    given = {name: own[name] for name in same_map if name in own and name not in applied}
    return parse_stats(pipeline.where, feature, same_map | given, mode)


def _buffers(source: Source) -> Tensors:
    """Statistics among the parameters, `normalize_inputs.buffer_observation_state.mean`, as `feature.statistic`."""
    found = {}
    for name in source.specs:
        if m := re.search(STATISTICS + r"buffer_(observation_state|action)\.(\w+)$", name):
            found[f"{m[3].replace('_', '.')}.{m[4]}"] = source.read(name)
    # Buffers that were never set are infinite.
    return found if all(np.isfinite(array).all() for array in found.values()) else {}


def _features(settings: Mapping[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """The features of a kind in a config.json."""
    listed = (settings.get(key) for key in ("input_features", "output_features"))
    every = [item for features in listed if isinstance(features, dict) for item in features.items()]
    return {name: f for name, f in every if isinstance(f, dict) and f.get("type") == kind}


def _dims(settings: Mapping[str, Any], kind: str, where: str) -> int:
    """Dimensions of the state or of the action by config.json; 0: it does not say."""
    shapes = [f.get("shape") for f in _features(settings, kind).values()]
    if not shapes:
        return 0
    if not isinstance(shapes[0], list) or len(shapes[0]) != 1:
        raise UserError(f"{where}: the shape of the {kind} must be [dimensions], found {shapes[0]!r}")
    return whole_number({"shape": shapes[0][0]}, "shape", where, 1)


def feature_of(camera: str) -> str:
    """LeRobot's name of a camera of the model."""
    return camera if camera.startswith("observation.") else IMAGES + camera
