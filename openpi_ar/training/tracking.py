"""TensorBoard and Weights & Biases, the extras that show a run's metrics elsewhere; a resumed run continues its
curves."""

from pathlib import Path
import secrets
from typing import Any

from openpi_ar import config_json
from openpi_ar.config import TrainConfig
from openpi_ar.errors import UserError

ID_FILE = "wandb_id.txt"
"""Beside `metrics.jsonl`: the id of the experiment's W&B run."""


def tensorboard(directory: Path, start_step: int) -> Any:
    """A writer into `<exp>/tensorboard`. What an earlier part of the run wrote there of later steps is hidden.

    Raises UserError if tensorboardX is not installed.
    """
    try:
        import tensorboardX  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UserError("--tensorboard needs tensorboardX, which is not installed: uv sync --extra viz") from e
    # Purging is by steps from this one on; a fresh run has none to purge.
    return tensorboardX.SummaryWriter(str(directory / "tensorboard"), purge_step=start_step + 1 if start_step else None)


def wandb(directory: Path, cfg: TrainConfig) -> Any:
    """The W&B run of an experiment: the one whose id is kept in its directory, else a new one.

    Steps that were reported before the run was stopped come again with the same values, and W&B keeps the first. With
    `WANDB_MODE=offline` each part of the run is a folder of its own under `<exp>/wandb` with the same id, and `wandb
    sync` of all these folders puts them together (older versions of wandb: `wandb sync --append`). Raises UserError if
    wandb is not installed.
    """
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UserError("--wandb needs wandb, which is not installed: uv sync --extra wandb") from e
    kept = directory / ID_FILE
    if not kept.exists():
        kept.write_text(secrets.token_hex(4) + "\n")
    return wandb.init(
        project="openpi_ar",
        id=kept.read_text().strip(),
        name=f"{cfg.name}-{cfg.exp_name}",
        dir=str(directory),
        resume="allow",
        config=config_json.flatten(cfg),
    )
