"""Writes the checkpoints of a run and restores its train state. `checkpoints/store.py` has the layout and reads the
rest.

<step>/train_state   step, data position, optimizer, and the raw parameters if `params` holds their moving average
"""

import dataclasses
from pathlib import Path
from typing import Any

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from openpi_ar import files
from openpi_ar.checkpoints.store import Assets, load_params, restore_args, save_assets
from openpi_ar.errors import UserError
from openpi_ar.models.vlm import VLA
from openpi_ar.params import fill, join, leaf_paths, pure_params, split
from openpi_ar.training.state import TrainState


@dataclasses.dataclass
class _AssetsArgs(ocp.args.CheckpointArgs):
    assets: Assets | None = None


class _AssetsHandler(ocp.CheckpointHandler):
    """Writes the assets as plain files, so that they can be read without orbax."""

    def save(self, directory: epath.Path, args: _AssetsArgs) -> None:
        assert args.assets is not None
        if jax.process_index() == 0:
            save_assets(Path(directory), args.assets)

    def restore(self, directory: epath.Path, args: Any = None) -> None:
        # orbax's interface asks for the method; nothing calls it, since no orbax is needed to read plain files.
        raise TypeError(f"{directory} holds plain files: read them with checkpoints.store.load_assets")


# orbax accepts a handler only with a type of arguments for each direction.
ocp.args.register_with_handler(_AssetsHandler, for_save=True, for_restore=True)(_AssetsArgs)


FULL = "free some space there, and continue from the last complete checkpoint with --resume"


class CheckpointStore:
    """The writer of one experiment's directory.

    Keeps the last `keep_last` checkpoints besides the newest, and those of steps that are multiples of `keep_every`.
    One save is in flight at a time: the next waits for it, so the host holds one copy of the state at most. What a
    killed run left half-written is deleted. Of several processes each writes what lies on its devices; all must make
    the same calls.
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
        if step not in self._manager.all_steps():
            rest = ocp.args.PyTreeSave(_resumable(state, data_position))
            self.save_for_policy(step, state.best_model, assets, train_state=rest)

    def save_for_policy(self, step: int, model: VLA, assets: Assets, **more: Any) -> None:
        """Saves what a policy needs, and nothing else but `more`; training cannot be resumed from it."""
        params = ocp.args.PyTreeSave({"params": pure_params(model)})
        # A disk that fills up while orbax writes ends in pages of errors from its threads.
        self._manager.wait_until_finished()
        size = sum(x.nbytes for x in jax.tree.leaves((params.item, [part.item for part in more.values()])))
        files.check_directory(self.directory, FULL, need=size)
        self._manager.save(step, args=ocp.args.Composite(params=params, assets=_AssetsArgs(assets), **more))

    def close(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def restore_train_state(
    step_dir: Path, template: TrainState, sharding: jax.sharding.Sharding | None = None
) -> tuple[TrainState, int]:
    """The state saved in a step directory and its data position. `template` may be abstract (`jax.eval_shape`); what in
    it carries a sharding is restored to that one, the rest to `sharding`.

    Raises UserError if the directory holds no train state, or one that does not fit the template.
    """
    folder = (step_dir / "train_state").absolute()
    if not (folder / "_METADATA").exists():
        raise UserError(f"{step_dir} holds no train_state, so training cannot resume from it (--init-from can use it)")
    want = _resumable(template, 0)
    rest = ocp.PyTreeCheckpointer().restore(folder, args=restore_args(want, sharding))
    best = load_params(step_dir, template.best_model, sharding)
    raw = None if template.ema is None else fill(_trained(template.model, template.ema), rest["params"])
    state = TrainState(
        step=rest["step"],
        model=best if raw is None else join(best, raw),
        opt_state=fill(template.opt_state, rest["opt_state"]),
        ema=None if raw is None else _trained(best, raw),
    )
    return state, int(rest["data_position"])


def _resumable(state: TrainState, data_position: int) -> dict[str, Any]:
    """What `train_state` holds of a state, concrete or abstract."""
    tree = {
        "step": state.step,
        "data_position": np.asarray(data_position, np.int64),  # numpy: jax would narrow it
        "opt_state": pure_params(state.opt_state),
    }
    return tree if state.ema is None else tree | {"params": pure_params(_trained(state.model, state.ema))}


def _trained(model: VLA, like: Any) -> Any:
    """The parameters of the model that `like` has; it is a module or, where something is frozen, a nested dict."""
    if not isinstance(like, dict):
        return model
    return split(model, frozenset(leaf_paths(model)) - frozenset(leaf_paths(like)))
