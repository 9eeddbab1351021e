"""Reads our checkpoints: parameters (orbax, in openpi's layout) and what a policy needs besides.

    <checkpoint_dir>/<config>/<exp>/<step>/params        {"params": parameters}; the moving average when there is one
                                          /train_state   what training needs to resume (`training/store.py`)
                                          /assets        config.json, tokenizer.model, norm_stats.json, subtasks.json

A step directory appears under its name only when it is complete (orbax writes beside it and renames).
"""

import dataclasses
import json
import logging
from pathlib import Path
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from openpi_ar import config_json
from openpi_ar.config import InferenceConfig, TrainConfig
from openpi_ar.data.normalize import FILE as NORM_STATS
from openpi_ar.data.normalize import NormStats, check_mode, load_norm_stats, save_norm_stats
from openpi_ar.errors import UserError
from openpi_ar.files import replace_text, writing
from openpi_ar.model_config import portable
from openpi_ar.models import family
from openpi_ar.models.vlm import VLA
from openpi_ar.params import check_fit, fill, flatten, pure_params
from openpi_ar.text.tokenizer import Tokenizer
from openpi_ar.textfile import read_text

CONFIG, TOKENIZER, SUBTASKS = "config.json", "tokenizer.model", "subtasks.json"
MARK = "_CHECKPOINT_METADATA"
COMMITTED = "commit_success.txt"
"""orbax's marks of success name the directory they were written in: they are not copied."""
_TENSORS = ("params/_METADATA", "_METADATA", "model.safetensors", "model.safetensors.index.json", "adapter_config.json")
_NEEDED = (MARK, "params/_METADATA", f"assets/{CONFIG}", f"assets/{TOKENIZER}", f"assets/{NORM_STATS}")

# orbax narrates every save at INFO and warns about its own defaults; the run says in one line that it saved.
logging.getLogger("absl").setLevel(logging.ERROR)
# After an error that was raised, its other reads go on in threads, and end on an event loop that is closed. That is
# reported as stack traces, behind the one line that says what is wrong.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)
_report_unraisable = sys.unraisablehook


def _report_what_is_news(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        _report_unraisable(unraisable)


sys.unraisablehook = _report_what_is_news


@dataclasses.dataclass(frozen=True)
class Assets:
    """What a policy needs besides parameters. `config` is of the run that trained it, or of a converted checkpoint.

    subtasks  of the training data, the most frequent first.
    """

    config: TrainConfig | InferenceConfig
    tokenizer: Tokenizer
    stats: dict[str, NormStats]
    subtasks: tuple[str, ...] = ()

    @property
    def inference(self) -> InferenceConfig:
        """What inference needs of the config, and the subtasks."""
        if isinstance(self.config, InferenceConfig):
            return self.config
        return dataclasses.replace(self.config.inference, subtasks=self.subtasks)


def save_assets(folder: Path, assets: Assets) -> None:
    """Writes the assets as plain files into an existing directory."""
    (folder / CONFIG).write_text(config_json.dumps(assets.config))
    (folder / TOKENIZER).write_bytes(assets.tokenizer.model_bytes)
    save_norm_stats(folder, assets.stats)
    if assets.subtasks:
        (folder / SUBTASKS).write_text(json.dumps(assets.subtasks, indent=1, ensure_ascii=False) + "\n")


def write_decode(path: str | Path, **changes: Any) -> Path:
    """Changes fields of `DecodeConfig` in the config of a step directory, in one step, and returns the file.

    Raises UserError if it is not a complete checkpoint of openpi_ar, or cannot be written.
    """
    step_dir = resolve_step_dir(path)
    file, config = step_dir / "assets" / CONFIG, load_assets(step_dir).config
    with writing(file, "copy the checkpoint to a directory that can be written"):
        decode = dataclasses.replace(config.decode, **changes)
        replace_text(file, config_json.dumps(dataclasses.replace(config, decode=decode)))
    return file


def complete_steps(experiment: Path) -> list[int]:
    """Steps of an experiment directory that are whole, ascending."""
    if not experiment.is_dir():
        return []
    steps = [int(p.name) for p in experiment.iterdir() if p.name.isdigit() and not missing_parts(p)]
    return sorted(steps)


def latest_step(experiment: Path) -> int | None:
    """The newest complete step, None if there is none."""
    return max(complete_steps(experiment), default=None)


def missing_parts(step_dir: Path) -> list[str]:
    """Parts that a checkpoint needs to be used by a policy and that are not there."""
    return [part for part in _NEEDED if not (step_dir / part).is_file()]


def load_assets(step_dir: Path) -> Assets:
    """Config, tokenizer and statistics of a step directory. Raises UserError naming what is missing or does not fit."""
    if missing := missing_parts(step_dir):
        raise UserError(
            f"{step_dir} is not a complete checkpoint: {', '.join(missing)} missing; give the directory of a step "
            f"(<config>/<exp>/<step>) or of an experiment that holds complete steps"
        )
    path = step_dir / "assets" / CONFIG
    config = config_json.read(path)
    return Assets(
        config=config,
        tokenizer=Tokenizer((step_dir / "assets" / TOKENIZER).read_bytes()),
        stats=load_norm_stats(step_dir / "assets", default_mode=config.model.norm_mode),
        subtasks=read_subtasks(step_dir / "assets" / SUBTASKS),
    )


def read_subtasks(path: Path) -> tuple[str, ...]:
    """A JSON list of texts; checkpoints of earlier versions have none. Raises UserError if it is anything else."""
    if not path.exists():
        return ()
    try:
        texts = json.loads(read_text(path))
    except ValueError as e:
        raise UserError(f"{path} is not JSON: {e}") from e
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{path} must hold a list of texts, found {str(texts)[:80]}")
    return tuple(texts)


def resolve_step_dir(path: str | Path) -> Path:
    """The directory that holds a checkpoint's tensors: `path` itself, or of an experiment the newest step.

    Of ours the newest complete one, of openpi's the highest number, of LeRobot's that number's `pretrained_model`.
    Raises UserError if there is no such directory.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise UserError(f"{path} does not exist: expected the directory of a checkpoint step or of an experiment")
    if (step := latest_step(path)) is not None:
        return path / str(step)
    steps = [p for folder in (path, path / "checkpoints") for p in folder.glob("*") if p.name.isdecimal()]
    newest = sorted(steps, key=lambda p: int(p.name), reverse=True)
    inner = (folder for step in (path, *newest) for folder in (step, step / "pretrained_model"))
    found = (folder for folder in inner if any((folder / name).is_file() for name in _TENSORS))
    return next(found, newest[0] if newest else path)


def load_policy_checkpoint(path: str | Path) -> tuple[InferenceConfig, VLA, Tokenizer, dict[str, NormStats]]:
    """(config, model, tokenizer, statistics) of a step or experiment directory; float32 parameters, stacked layers.

    Raises UserError naming what is missing or does not fit.
    """
    step_dir = resolve_step_dir(path)
    assets = load_assets(step_dir)
    cfg = dataclasses.replace(assets.inference, model=portable(assets.inference.model))
    abstract = family.abstract(cfg.model)
    model = load_params(step_dir, abstract)
    check_mode(step_dir / "assets" / NORM_STATS, assets.stats["state"].mode, cfg.model.norm_mode)
    return cfg, model, assets.tokenizer, assets.stats


def load_params(step_dir: Path, model: VLA, sharding: jax.sharding.Sharding | None = None) -> VLA:
    """The parameters of a step directory in the shape of `model` (abstract or concrete, stacked).

    Raises UserError that lists every parameter that is missing, left over or of another shape.
    """
    folder = (step_dir / "params").absolute()
    want = {"params": pure_params(model)}
    handler = ocp.PyTreeCheckpointer()
    try:
        metadata: Any = handler.metadata(folder).item_metadata
        if metadata is None:
            raise ValueError("files of it are missing or damaged")
        check_fit(flatten(want), flatten(metadata.tree), str(step_dir))
        return fill(model, handler.restore(folder, args=restore_args(want, sharding))["params"])
    except UserError:
        raise
    except Exception as e:  # orbax and its backends have errors of their own
        raise UserError(f"{folder} cannot be read as orbax parameters: {' '.join(str(e).split())[:300]}") from e


def restore_args(want: Any, sharding: jax.sharding.Sharding | None) -> ocp.args.PyTreeRestore:
    """How orbax is to restore a tree: in the shapes and dtypes of `want`, each leaf to its own sharding, else to
    `sharding`, else to the first device. Numpy arrays stay numpy arrays."""
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def abstract(x: Any) -> Any:
        if isinstance(x, np.ndarray):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or sharding)

    item = jax.tree.map(abstract, want)
    return ocp.args.PyTreeRestore(item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))
