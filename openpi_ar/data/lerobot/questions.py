"""Questions that a dataset holds: rows of style `vqa` in LeRobot's column `language_events` (0.6 and newer).

A row sits on its frame: one of role `user` asks, the one of role `assistant` with the same camera answers.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from openpi_ar.data.lerobot.meta import EVENTS
from openpi_ar.data.lerobot.parquet import read_table, to_rows
from openpi_ar.data.lerobot.source import LeRobotSource
from openpi_ar.data.lerobot.texts import text_of
from openpi_ar.data.questions import Question, QuestionSource
from openpi_ar.errors import UserError

_ROLES = ("user", "assistant")


def read_questions(source: LeRobotSource) -> list[Question]:
    """The questions on the frames of a source.

    A row shows the cameras that its question names, or all if it names none; the same question and answer for several
    cameras of a frame are one row. Questions about cameras that the model does not see are left out. Raises UserError
    naming the frame if a question has no answer.
    """
    table = source.table
    frames, named = table.frames, {feature: camera for camera, feature in table.layout.cameras.items() if feature}
    kept = set(source.rows.tolist())
    found = []
    for path in dict.fromkeys(episode.data for episode in frames.episodes):
        events = read_table(path, ["episode_index", "frame_index", EVENTS], where=EVENTS)
        place = {e.index: int(frames.starts[i]) for i, e in enumerate(frames.episodes) if e.data == path}
        for row in to_rows(events, path):
            frame = place.get(row["episode_index"], -1) + int(row["frame_index"] or 0)
            if frame in kept and row[EVENTS] and row["episode_index"] in place:
                pairs = _pairs(row[EVENTS], frames.where(frame))
                for (question, answer), cameras in pairs.items():
                    seen = list(named.values()) if None in cameras else [named[c] for c in cameras if c in named]
                    images = {camera: partial(table.images[camera], frame) for camera in seen}
                    episode = str(frames.place(frame)[0])
                    if images:
                        found.append(Question(question, answer, images, frames.where(frame), episode))
    return found


def questions_of(
    train: LeRobotSource, held_out: LeRobotSource, cameras: Sequence[str]
) -> tuple[QuestionSource, QuestionSource]:
    """The questions on the frames of both sources. Raises UserError as `read_questions`, or if one has none."""
    out = []
    for source, which in ((train, "training"), (held_out, "held-out")):
        if not (rows := read_questions(source)):
            raise UserError(
                f"{source.name}: no question is on any of the {len(source)} {which} frames: set --data.questions 0"
            )
        out.append(QuestionSource(f"questions of {source.name}", rows, tuple(cameras)))
    return out[0], out[1]


def _pairs(events: Any, where: str) -> dict[tuple[str, str], list[str | None]]:
    """(question, answer) -> the cameras that they are asked of."""
    if not isinstance(events, list) or not all(isinstance(row, dict) for row in events):
        raise UserError(f"{where}: {EVENTS} must be a list of rows, found {type(events).__name__}")
    texts: dict[str | None, dict[str, str]] = {}
    for row in events:
        if row.get("style") == "vqa" and row.get("role") in _ROLES:
            content = row.get("content")
            text = text_of(content, f"{where}: {EVENTS}")
            if isinstance(content, str):  # "none" is an answer, if no subtask
                text = content.strip()
            texts.setdefault(row.get("camera"), {})[row["role"]] = text
    pairs: dict[tuple[str, str], list[str | None]] = {}
    for camera, both in texts.items():
        question, answer = (both.get(role, "") for role in _ROLES)
        if not question or not answer:
            raise UserError(
                f"{where}: {EVENTS} has {'an answer without a question' if answer else 'a question without an answer'}"
                f" ({question or answer!r})"
            )
        pairs.setdefault((question, answer), []).append(camera)
    return pairs
