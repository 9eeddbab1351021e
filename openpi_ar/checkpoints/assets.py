"""What the files of a checkpoint say besides its tensors, whatever its format: configuration, tokenizer, statistics.

Our own files, `assets/config.json` and `assets/tokenizer.model`, may lie in a checkpoint of any format: a conversion
writes there what the other layout has no place for. What a layout has a place for is read from there.
"""

from collections.abc import Sequence
import dataclasses
from pathlib import Path

import numpy as np

from openpi_ar import config_json
from openpi_ar.checkpoints import lerobot
from openpi_ar.checkpoints.sources import Source, root_of
from openpi_ar.checkpoints.store import CONFIG, SUBTASKS, TOKENIZER, read_subtasks
from openpi_ar.config import InferenceConfig, TextConfig, TrainConfig
from openpi_ar.data.normalize import NormStats, find_norm_stats, load_norm_stats
from openpi_ar.errors import UserError
from openpi_ar.model_config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Said:
    """What the files of a checkpoint say.

    root         the directory that holds them.
    config       of the run or the policy, with the model that was loaded. What no file says are openpi's defaults for
                 the kind of model.
    own          it is that of an `assets/config.json`.
    knows_robot  the files say which robot the model is for, and so its prompt.
    lerobot      the policy by LeRobot's own files; None: it is not in LeRobot's format.
    tokenizer    file; None: there is none.
    stats        None: there are none, or `problem` says what is wrong with them.
    subtasks     of the training data; none if no file has them.
    notes        what a user should know.
    """

    root: Path
    config: TrainConfig | InferenceConfig
    own: bool
    knows_robot: bool
    lerobot: InferenceConfig | None
    tokenizer: Path | None
    stats: dict[str, NormStats] | None
    problem: UserError | None
    subtasks: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def inference(self) -> InferenceConfig:
        """What inference needs of the config, and the subtasks."""
        cfg = self.config if isinstance(self.config, InferenceConfig) else self.config.inference
        return dataclasses.replace(cfg, subtasks=cfg.subtasks or self.subtasks)


def read(source: Source, model: ModelConfig, *, asset_id: str | None = None, known: Sequence[str] = ()) -> Said:
    """What the files beside the tensors of `model` say.

    `asset_id` and `known` choose among several norm_stats.json (`find_norm_stats`). Raises UserError for files that
    cannot be read.
    """
    root, notes = root_of(source.path), []
    theirs, stats = None, None
    if lerobot.is_policy(source.settings):
        theirs, stats = lerobot.read(root, source.settings, source, model)
    own = config_json.read(path) if (path := root / "assets" / CONFIG).is_file() else None
    if own is not None and theirs is not None and own.model.cameras != lerobot.cameras(source.settings):
        notes.append(
            f"{path} has other cameras than {root / 'config.json'}, which is taken: {', '.join(model.cameras)}"
        )
        own = None
    text = TextConfig("paligemma", lerobot.TEMPLATES[model.kind], max_prompt_tokens=lerobot.PROMPT_TOKENS[model.kind])
    config = dataclasses.replace(own, model=model) if own else theirs or InferenceConfig(model, text)
    knows_robot = isinstance(config, TrainConfig) or config.robot is not None
    problem = None
    try:
        folder = find_norm_stats(root, asset_id=asset_id, known=known)
        ours = load_norm_stats(folder, required_mode=model.norm_mode)
        if stats is None or asset_id is not None or same_map(stats, ours):
            stats = ours  # in full precision
        else:
            notes.append(f"statistics: those of LeRobot's processors, not of {folder}, which are others")
    except UserError as e:
        problem = e if stats is None or asset_id is not None else None
    tokenizer = next((file for file in (root / "assets" / TOKENIZER, root / TOKENIZER) if file.is_file()), None)
    subtasks = read_subtasks(root / "assets" / SUBTASKS)
    return Said(root, config, own is not None, knows_robot, theirs, tokenizer, stats, problem, subtasks, tuple(notes))


def same_map(a: dict[str, NormStats], b: dict[str, NormStats]) -> bool:
    """Whether two statistics normalise alike, up to float32; of a longer one the rest is padding."""
    pairs = [(x, y) for name in a for x, y in zip(a[name].offset_scale, b[name].offset_scale, strict=True)]
    shared = [(x[: len(y)], y[: len(x)]) for x, y in pairs]
    return all(np.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in shared)
