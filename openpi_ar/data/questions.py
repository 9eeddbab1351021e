"""Questions with answers as training rows without actions: a folder with `vqa.jsonl`, or those that a dataset holds.

    {"image": "a.png", "question": "what is on the table?", "answer": "a duck"}
    {"images": ["a.png", "b.png"], ...}              in the order of the model's cameras
    {"images": {"front": "a.png"}, ...}              by the model's cameras

Files are relative to the folder. A row is masked to the cameras that it has.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from openpi_ar.data.layout import Layout, Numbers, held_out_mask
from openpi_ar.data.normalize import Mode, NormStats
from openpi_ar.data.pictures import read_picture
from openpi_ar.errors import UserError
from openpi_ar.textfile import read_lines

FILE = "vqa.jsonl"
_NOWHERE = Layout({}, (), ())


@dataclasses.dataclass(frozen=True)
class Question:
    """One row.

    images  by model camera, what reads the picture that belongs to it, uint8 [h w 3].
    where   for messages.
    group   rows of one group are held out together.
    """

    question: str
    answer: str
    images: Mapping[str, Callable[[], np.ndarray]]
    where: str
    group: str


@dataclasses.dataclass(frozen=True)
class QuestionSource:
    """A `SingleSource` of questions: nothing in it has a state or actions.

    name     for messages.
    rows     the questions.
    cameras  the model's.
    """

    name: str
    rows: Sequence[Question]
    cameras: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        return {
            "images": {camera: read() for camera, read in row.images.items()},
            "masked": tuple(camera for camera in self.cameras if camera not in row.images),
            "question": row.question,
            "answer": row.answer,
            "template": "vqa",
        }

    @property
    def prompts(self) -> tuple[str, ...]:
        return ()

    @property
    def subtasks(self) -> tuple[str, ...]:
        return ()

    @property
    def histories(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return ()

    @property
    def layout(self) -> Layout:
        return _NOWHERE

    def where(self, index: int) -> str:
        return self.rows[index].where

    def unlabelled(self) -> list[str]:
        return []

    def numbers(self) -> Numbers:
        return {"state": [], "actions": []}

    def norm_stats(self, mode: Mode = "quantile") -> dict[str, NormStats]:
        raise UserError(f"{self.name} holds questions alone, so there are no statistics: mix it with a robot's data")


def is_folder(path: str) -> bool:
    """Whether it is a folder of questions."""
    return (Path(path).expanduser() / FILE).is_file()


def load_folder(path: str, cameras: Sequence[str], held_out: float) -> tuple[QuestionSource, QuestionSource]:
    """(training questions, held-out ones) of a folder; questions about one picture are not divided.

    Raises UserError naming file and line of an entry that is not as above, or whose picture is missing.
    """
    folder = Path(path).expanduser()
    file = folder / FILE
    rows = [_entry(entry, folder, f"{file} line {number}", cameras) for number, entry in read_lines(file)]
    return divide(str(folder), rows, cameras, held_out)


def divide(
    name: str, rows: Sequence[Question], cameras: Sequence[str], held_out: float
) -> tuple[QuestionSource, QuestionSource]:
    """(training questions, held-out ones): that fraction of the groups, at least one; 0: all are both.

    Raises UserError if one of them would be empty.
    """
    groups = sorted({row.group for row in rows})
    chosen = {groups[i] for i in np.flatnonzero(held_out_mask(np.ones(len(groups), bool), held_out))}
    train = [row for row in rows if row.group not in chosen]
    test = [row for row in rows if row.group in chosen] if held_out else train
    if not train or not test:
        raise UserError(
            f"{name}: {len(train)} questions for training and {len(test)} held out: add some about other pictures, or "
            "set --data.held-out 0 to evaluate on those of training"
        )
    return QuestionSource(name, train, tuple(cameras)), QuestionSource(name, test, tuple(cameras))


def _entry(entry: Mapping[str, Any], folder: Path, where: str, cameras: Sequence[str]) -> Question:
    texts = {}
    for key in ("question", "answer"):
        text = entry.get(key)
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: {key!r} must be a text, found {text!r}")
        texts[key] = text.strip()
    files = _files(entry, where, cameras)
    images = {}
    for camera, file in files.items():
        path = folder / file
        if not path.is_file():
            raise UserError(f"{where}: picture {file!r} is missing: expected {path}")
        images[camera] = partial(read_picture, path, where)
    return Question(**texts, images=images, where=where, group=next(iter(files.values())))


def _files(entry: Mapping[str, Any], where: str, cameras: Sequence[str]) -> dict[str, str]:
    """File of each camera that the entry shows."""
    given = entry.get("images", entry.get("image"))
    if isinstance(given, str):
        given = [given]
    if isinstance(given, list) and 0 < len(given) <= len(cameras):
        given = dict(zip(cameras, given, strict=False))
    if not isinstance(given, dict) or not given or set(given) - set(cameras):
        raise UserError(
            f"{where}: 'image' must be a file, or 'images' a list of at most {len(cameras)} files or one for each of "
            f"the model's cameras ({', '.join(cameras)}), found {given!r}"
        )
    if wrong := [file for file in given.values() if not isinstance(file, str) or not file]:
        raise UserError(f"{where}: {wrong[0]!r} is no file name")
    return given
