"""Checkpoints on disk: orbax, in openpi's layout.

    <checkpoint_dir>/<config>/<exp>/<step>/params        {"params": parameters}; the moving average when there is one
                                          /train_state   the rest: raw parameters, optimizer, step, data position
                                          /assets        config.json, tokenizer.model, norm_stats.json

A step directory appears under its name only when it is complete (orbax writes beside it and renames).
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from etils import epath
from flax import nnx
import jax
import numpy as np
import orbax.checkpoint as ocp

from openpi_ar import config_json
from openpi_ar.config import TrainConfig
from openpi_ar.data.normalize import FILE as NORM_STATS
from openpi_ar.data.normalize import NormStats, check_mode, load_norm_stats, needed_mode, save_norm_stats
from openpi_ar.errors import UserError
from openpi_ar.models.pi0 import Pi0
from openpi_ar.params import check_fit, fill, flatten, join, leaf_paths, pure_params, split
from openpi_ar.text.tokenizer import Tokenizer
from openpi_ar.training.state import TrainState

CONFIG, TOKENIZER = "config.json", "tokenizer.model"
MARK = "_CHECKPOINT_METADATA"
COMMITTED = "commit_success.txt"
"""orbax's marks of success name the directory they were written in: they are not copied."""
_NEEDED = (MARK, "params/_METADATA", f"assets/{CONFIG}", f"assets/{TOKENIZER}", f"assets/{NORM_STATS}")

# orbax narrates every save at INFO and warns about its own defaults; the run says in one line that it saved.
logging.getLogger("absl").setLevel(logging.ERROR)


@dataclasses.dataclass(frozen=True)
class Assets:
    """What a policy needs besides parameters."""

    config: TrainConfig
    tokenizer: Tokenizer
    stats: dict[str, NormStats]


@dataclasses.dataclass
class _AssetsArgs(ocp.args.CheckpointArgs):
    assets: Assets | None = None


class _AssetsHandler(ocp.CheckpointHandler):
    """Writes the assets as plain files, so that they can be read without orbax."""

    def save(self, directory: epath.Path, args: _AssetsArgs) -> None:
        assert args.assets is not None
        if jax.process_index() != 0:
            return
        folder = Path(directory)
        (folder / CONFIG).write_text(config_json.dumps(args.assets.config))
        (folder / TOKENIZER).write_bytes(args.assets.tokenizer.model_bytes)
        save_norm_stats(folder, args.assets.stats)

    def restore(self, directory: epath.Path, args: Any = None) -> None:
        # orbax's interface asks for the method; nothing calls it, since no orbax is needed to read plain files.
        raise TypeError(f"{directory} holds plain files: read them with store.load_assets")


# orbax accepts a handler only with a type of arguments for each direction.
ocp.args.register_with_handler(_AssetsHandler, for_save=True, for_restore=True)(_AssetsArgs)


class CheckpointStore:
    """The writer of one experiment's directory.

    Keeps the last `keep_last` checkpoints besides the newest, and those of steps that are multiples of `keep_every`. One save
    is in flight at a time: the next waits for it, so the host holds one copy of the state at most. What a killed run left
    half-written is deleted. Of several processes each writes what lies on its devices; all must make the same calls.
    """

    def __init__(self, directory: Path, *, keep_last: int, keep_every: int = 0):
        self.directory = directory
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            item_handlers={
                "params": ocp.PyTreeCheckpointHandler(),
                "train_state": ocp.PyTreeCheckpointHandler(),
                "assets": _AssetsHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep_last + 1, keep_period=keep_every or None, cleanup_tmp_directories=True
            ),
        )

    def save(self, state: TrainState, data_position: int, assets: Assets) -> None:
        """Saves the state under its step number; copies to the host now, writes in the background."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        rest = {
            "step": state.step,
            "data_position": np.asarray(data_position, np.int64),
            "opt_state": pure_params(state.opt_state),
        }
        if state.ema is not None:
            rest["params"] = pure_params(_trained(state.model, state.ema))
        self.save_for_policy(step, state.best_model, assets, train_state=ocp.args.PyTreeSave(rest))

    def save_for_policy(self, step: int, model: Pi0, assets: Assets, **more: Any) -> None:
        """Saves what a policy needs, and nothing else but `more`; training cannot be resumed from it."""
        params = ocp.args.PyTreeSave({"params": pure_params(model)})
        self._manager.save(step, args=ocp.args.Composite(params=params, assets=_AssetsArgs(assets), **more))

    def close(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


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
    return [part for part in _NEEDED if not (step_dir / part).exists()]


def load_assets(step_dir: Path) -> Assets:
    """Config, tokenizer and statistics of a step directory. Raises UserError naming what is missing or does not fit."""
    if missing := missing_parts(step_dir):
        raise UserError(
            f"{step_dir} is not a complete checkpoint: {', '.join(missing)} missing; give the directory of a step "
            f"(<config>/<exp>/<step>) or of an experiment that holds complete steps"
        )
    path = step_dir / "assets" / CONFIG
    config = config_json.loads(path.read_text(), source=str(path))
    return Assets(
        config=config,
        tokenizer=Tokenizer((step_dir / "assets" / TOKENIZER).read_bytes()),
        stats=load_norm_stats(step_dir / "assets", default_mode=needed_mode(config.model.pi05)),
    )


def resolve_step_dir(path: str | Path) -> Path:
    """A step directory as it is; an experiment directory as its newest complete step."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise UserError(f"{path} does not exist: expected the directory of a checkpoint step or of an experiment")
    if (step := latest_step(path)) is not None:
        return path / str(step)
    parts = [p.name for p in path.iterdir() if p.name.isdigit()]
    if parts:
        newest = path / max(parts, key=int)
        raise UserError(f"{path} holds no complete checkpoint: {newest.name} lacks {', '.join(missing_parts(newest))}")
    return path


def load_params(step_dir: Path, model: Pi0, sharding: jax.sharding.Sharding | None = None) -> Pi0:
    """The parameters of a step directory in the shape of `model` (abstract or concrete, stacked).

    Raises UserError that lists every parameter that is missing, left over or of another shape.
    """
    folder = (step_dir / "params").absolute()
    want = {"params": pure_params(model)}
    handler = ocp.PyTreeCheckpointer()
    try:
        metadata: Any = handler.metadata(folder).item_metadata
        check_fit(flatten(want), flatten(metadata.tree), str(step_dir))
        return fill(model, handler.restore(folder, args=_restore_args(want, sharding))["params"])
    except UserError:
        raise
    except (OSError, ValueError, KeyError, AttributeError) as e:
        raise UserError(f"{folder} cannot be read as orbax parameters: {' '.join(str(e).split())[:300]}") from e


def restore_train_state(
    step_dir: Path, template: TrainState, sharding: jax.sharding.Sharding | None = None
) -> tuple[TrainState, int]:
    """The state saved in a step directory and its data position. `template` may be abstract (`jax.eval_shape`); what in it
    carries a sharding is restored to that one, the rest to `sharding`.

    Raises UserError if the directory holds no train state, or one that does not fit the template.
    """
    folder = (step_dir / "train_state").absolute()
    if not (folder / "_METADATA").exists():
        raise UserError(f"{step_dir} holds no train_state, so training cannot go on from it (--init-from can use it)")
    want = {
        "step": template.step,
        "data_position": np.zeros((), np.int64),
        "opt_state": pure_params(template.opt_state),
    }
    if template.ema is not None:
        want["params"] = pure_params(_trained(template.model, template.ema))
    rest = ocp.PyTreeCheckpointer().restore(folder, args=_restore_args(want, sharding))
    best = load_params(step_dir, template.best_model, sharding)
    raw = None if template.ema is None else fill(_trained(template.model, template.ema), rest["params"])
    state = TrainState(
        step=rest["step"],
        model=best if raw is None else join(best, raw),
        opt_state=fill(template.opt_state, rest["opt_state"]),
        ema=None if raw is None else _trained(best, raw),
    )
    return state, int(rest["data_position"])


def _trained(model: Pi0, like: Any) -> Any:
    """The parameters of the model that `like` has; it is a module or, where something is frozen, a nested dict."""
    if not isinstance(like, dict):
        return model
    return split(model, frozenset(leaf_paths(model)) - frozenset(leaf_paths(like)))


def load_policy_checkpoint(path: str | Path) -> tuple[TrainConfig, Pi0, Tokenizer, dict[str, NormStats]]:
    """(config, model, tokenizer, statistics) of a step or experiment directory; float32 parameters, stacked layers.

    Raises UserError naming what is missing or does not fit.
    """
    step_dir = resolve_step_dir(path)
    assets = load_assets(step_dir)
    abstract = nnx.eval_shape(lambda: Pi0(assets.config.model, rngs=nnx.Rngs(0)))
    model = load_params(step_dir, abstract)
    check_mode(step_dir / "assets" / NORM_STATS, assets.stats["state"].mode, needed_mode(assets.config.model.pi05))
    return assets.config, model, assets.tokenizer, assets.stats


def _restore_args(want: Any, sharding: jax.sharding.Sharding | None) -> ocp.args.PyTreeRestore:
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def abstract(x: Any) -> Any:
        # The data position stays a numpy int64: jax would narrow it.
        if isinstance(x, np.ndarray):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or sharding)

    item = jax.tree.map(abstract, want)
    return ocp.args.PyTreeRestore(item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))
