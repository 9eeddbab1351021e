"""What a policy needs of its checkpoint.

python -m openpi_ar.policy steps --ckpt RUN --data DATASET
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from openpi_ar import files, flags
from openpi_ar.data_config import LeRobotData
from openpi_ar.errors import UserError, command_line
from openpi_ar.policy.ladder import Ladder
from openpi_ar.robot_spec import RobotSpec
from openpi_ar.tables import console

if TYPE_CHECKING:
    from openpi_ar.policy import Policy


_LADDER = Ladder()


def steps(
    *,
    ckpt: str,
    data: str = "",
    frames: int = 128,
    ladder: Annotated[Ladder, tyro.conf.arg(name="")] = _LADDER,
    write: bool = False,
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Action error on held-out frames of a LeRobot dataset against number, method and spacing of the denoising steps.

    Args:
        ckpt: checkpoint, as for infer.py.
        data: directory of the dataset; empty: the one that the checkpoint was trained on.
        frames: how many, spread evenly.
        ladder: what is compared.
        write: write the fewest that are enough into the checkpoint (`decode.denoise_steps`, ...): its policy then uses
            them.
        json_path: write the table there too.
    """
    if frames < 2:
        raise UserError(f"--frames must be 2 or more, found {frames}")
    files.check_file(json_path, "--json")
    from openpi_ar.policy import Policy, steps

    compared = steps.ways(ladder)
    policy = Policy.from_checkpoint(ckpt)
    measured = steps.measure(policy, _held_out(policy, ckpt, data, frames), compared)
    chosen = steps.enough(measured)
    console().print(steps.table(measured, chosen))
    files.write_json(json_path, steps.as_dict(measured, chosen))
    if write:
        console().print(f"{steps.write(ckpt, chosen)}: {steps.describe(chosen)}", soft_wrap=True)


def _held_out(policy: "Policy", ckpt: str, path: str, frames: int) -> list[dict[str, Any]]:
    """Held-out frames, read as in training."""
    from openpi_ar.checkpoints import remote, store
    from openpi_ar.config import TrainConfig
    from openpi_ar.data.lerobot.load import load_lerobot

    step_dir = store.resolve_step_dir(remote.shipped(ckpt))
    found = None if store.missing_parts(step_dir) else store.load_assets(step_dir).config
    data = found.data if isinstance(found, TrainConfig) else LeRobotData(robot=policy.cfg.robot or RobotSpec())
    data = dataclasses.replace(data, path=path, episodes=()) if path else data
    if not data.path or "://" in data.path:
        raise UserError(
            f"--data must be the directory of a LeRobot dataset, found {data.path or 'none'!r}; the tabletop's is "
            "written by python -m openpi_ar.worlds.tabletop record OUT --images png"
        )
    cfg = policy.cfg.model
    told = policy.transform.writes_text
    source = load_lerobot(data, cfg.action_horizon, cfg.cameras, cfg.siglip.image_size, needs_subtask=told)[1]
    rows = np.linspace(0, len(source), min(frames, len(source)), endpoint=False).astype(int)
    return [source[i] for i in rows.tolist()]


def main(argv: list[str] | None = None) -> None:
    """Entry point. Bad input ends with one line on stderr and exit code 2."""
    with command_line():
        flags.parse({"steps": steps}, argv, "python -m openpi_ar.policy")()


if __name__ == "__main__":
    main()
