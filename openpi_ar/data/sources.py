"""The one place that knows every kind of training data: from a config to (training, held-out) sources of raw samples."""

from openpi_ar.config import LeRobotData, TrainConfig
from openpi_ar.data.layout import TrainingSource
from openpi_ar.data.lerobot import load_lerobot
from openpi_ar.data.tabletop import load_tabletop
from openpi_ar.text.prompts import TEMPLATES


def load_sources(cfg: TrainConfig) -> tuple[TrainingSource, TrainingSource, list[str]]:
    """(training, held-out, remarks for the user). Generates or decodes what is not cached yet, with a progress bar.

    Raises UserError in one line for anything that does not fit.
    """
    model = cfg.model
    if isinstance(cfg.data, LeRobotData):
        says_text = TEMPLATES[cfg.text.template].target is not None
        size = model.siglip.image_size
        return load_lerobot(cfg.data, model.action_horizon, model.cameras, size, says_text=says_text)
    train, held_out = load_tabletop(cfg.data, model.action_horizon, model.cameras)
    return train, held_out, []
