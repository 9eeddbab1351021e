"""Frames that the tabletop recorded, together with where its blocks truly are: what pre-training learns from."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from openpi_ar.data.layout import TrainingSource
from openpi_ar.data.lerobot.columns import read_columns
from openpi_ar.data.lerobot.source import LeRobotSource
from openpi_ar.errors import UserError
from openpi_ar.worlds.tabletop.dataset import POSES, decode_blocks
from openpi_ar.worlds.tabletop.scene import COLORS


@dataclasses.dataclass(frozen=True, eq=False)
class PosedFrames:
    """Rows of a source with the blocks' positions, float32 [rows O 3] in metres, NaN for blocks that are not there."""

    source: LeRobotSource
    blocks: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def poses(self, index: np.ndarray, cameras: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(images uint8 [B C h w 3], blocks [B O 3], tool [B 3]) of these rows."""
        table, rows = self.source.table, self.source.rows[index]
        images = np.stack([np.stack([table.images[name](int(row)) for name in cameras]) for row in rows])
        return images, self.blocks[index], table.state[rows, :3]


def posed(source: TrainingSource) -> PosedFrames:
    """The source with the positions that its dataset holds. Raises UserError if it holds none, or is a mixture."""
    if not isinstance(source, LeRobotSource):
        raise UserError(f"{source.name}: pre-training reads one dataset: leave out data.mix")
    frames = source.table.frames
    if POSES not in frames.meta.features:
        raise UserError(
            f"{frames.meta.root} has no feature {POSES!r}, which holds the places of the blocks in the tabletop's "
            f"recordings: use a dataset of its own, such as world://tabletop?episodes=1000"
        )
    encoded = read_columns(frames.meta, frames.episodes, [POSES]).columns[POSES]
    if encoded.shape[1] != 4 * len(COLORS):
        raise UserError(
            f"{frames.meta.root}: {POSES} must hold 4 numbers of {len(COLORS)} blocks, found {encoded.shape[1]}"
        )
    return PosedFrames(source, decode_blocks(encoded[source.rows]))
