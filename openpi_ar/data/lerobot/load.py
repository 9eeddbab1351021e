"""The training source over a LeRobot dataset: from a config to (training, held-out) frames of it."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from openpi_ar.config import LeRobotData
from openpi_ar.data.layout import Layout, held_out_mask
from openpi_ar.data.lerobot.columns import (
    Frames,
    label_columns,
    read_columns,
    subtask_labels,
    subtask_source,
    task_labels,
)
from openpi_ar.data.lerobot.frame_cache import CachedReader, DecodingReader, cached_frames
from openpi_ar.data.lerobot.meta import SUPERVISE, Meta, choose_episodes, read_meta
from openpi_ar.data.lerobot.source import LeRobotSource, Table
from openpi_ar.errors import UserError
from openpi_ar.lookup import matches
from openpi_ar.robot_spec import MASKED, split_key


def load_lerobot(
    cfg: LeRobotData,
    horizon: int,
    cameras: Sequence[str],
    size: tuple[int, int],
    *,
    needs_subtask: bool,
    memory: int = 0,
) -> tuple[LeRobotSource, LeRobotSource, list[str]]:
    """(training source, held-out source, remarks for the user). Decodes and caches the frames on first use.

    Args:
        horizon: actions in a sample.
        cameras: the model's camera names.
        size: height and width that frames are cached at.
        needs_subtask: the model learns to write the subtask. Frames without one are then skipped; if it does not, those
            whose subtask does not follow from the prompt. Both are counted in the remarks.
        memory: completed subtasks that a sample tells.

    Raises:
        UserError: anything in the dataset or the config that does not fit; names file, episode and frame.
    """
    if not 0 <= cfg.held_out < 1:
        raise UserError(f"data.held_out is a fraction of the episodes, 0 to below 1, found {cfg.held_out}")
    cfg, meta = cfg.filled(cameras), read_meta(cfg.path)
    mapping = map_cameras(meta, cameras, cfg.cameras)
    source = subtask_source(meta, cfg.subtasks)
    if source == "task" and not cfg.prompt:
        raise UserError(
            'data.subtasks is "task": the tasks are the subtasks then, so --data.prompt must give the task of the '
            "whole episode"
        )
    optional = [SUPERVISE] if SUPERVISE in meta.features else []
    tasks = () if cfg.prompt else ("task_index",)
    keys = [*cfg.state, *cfg.actions, *tasks, *label_columns(source), *optional]
    frames = read_columns(meta, choose_episodes(meta, cfg.episodes), keys)
    table = _table(cfg, frames, mapping, source, size)
    remarks = _completed(meta, cfg, mapping)
    usable = np.ones(len(frames), bool)
    if needs_subtask:
        usable = _labelled(table, source)
        if not usable.all():
            first = frames.where(int(np.argmin(usable)))
            remarks.append(
                f"{int((~usable).sum())} of {len(frames)} frames have no subtask and are skipped (first: {first})"
            )
    elif not table.supervise.all():
        usable = table.supervise
        remarks.append(
            f"{int((~usable).sum())} of {len(frames)} frames follow a subtask that their prompt does not tell "
            f"({SUPERVISE}) and are skipped: this model has no subtask"
        )
    short = [e for e in frames.episodes if e.length < horizon]
    if short:
        remarks.append(
            f"{len(short)} of {len(frames.episodes)} episodes are shorter than a chunk of {horizon} actions and padded "
            f"(first: episode {short[0].index}, {short[0].length} frames)"
        )
    # A subtask that does not follow from the prompt cannot be predicted, so such episodes are not for evaluation.
    judged = usable & table.supervise
    episodes = np.bincount(frames.episode_of[judged], minlength=len(frames.episodes)) > 0
    held_out = held_out_mask(episodes, cfg.held_out)[frames.episode_of]
    robot = cfg.reader(cameras)
    robot.check_dims(table.state.shape[1], table.actions.shape[1])
    train = LeRobotSource(table, np.flatnonzero(usable & ~held_out), horizon, robot, memory)
    if cfg.held_out == 0:
        remarks.append("data.held_out is 0: evaluation runs on training frames")
    test = LeRobotSource(table, np.flatnonzero(judged & (held_out | (cfg.held_out == 0))), horizon, robot, memory)
    if not len(train) or not len(test):
        raise UserError(
            f"{meta.root}: {len(train)} usable training frames and {len(test)} held out: name more data.episodes, or "
            f"set --data.held-out 0 to evaluate on the training frames"
        )
    return train, test, remarks


def map_cameras(meta: Meta, cameras: Sequence[str], given: Sequence[str]) -> dict[str, str | None]:
    """Model camera -> feature; None: the dataset has no such camera, the model then sees none.

    `given` holds "model camera=feature" or "model camera=none", or both as "feature|none"; features are named as
    `openpi_ar/lookup.py` says. Cameras that are not given take the feature of their own name. Raises UserError that
    spells out a complete mapping, and if a feature cannot be read.
    """
    asked: dict[str, str] = {name: key for name, _, key in (entry.partition("=") for entry in given)}
    mapping: dict[str, str | None] = {}
    problems = [f"{entry!r} is not model camera=feature" for entry in given if "=" not in entry]
    problems += [f"{name!r} is no camera of the model" for name in asked if name not in cameras]
    if len(asked) < len(given):
        problems.append("a camera of the model is given twice")
    for name in cameras:
        keys = asked.get(name, name).split("|")
        found = next(filter(None, (matches(key, meta.cameras) for key in keys)), [])
        mapping[name] = found[0] if len(found) == 1 else None
        if len(found) > 1:
            problems.append(f"{name!r} may be {' or '.join(found)}")
        elif not found and not (name in asked and set(keys) & set(MASKED)):
            problems.append(
                f"nothing is known of {'|'.join(keys)!r}" if name in asked else f"model camera {name!r} has no feature"
            )
    if problems or not any(mapping.values()):
        spare = [key for key in meta.cameras if key not in mapping.values()]
        example = " ".join(f"{n}={k or (spare.pop(0) if spare else 'none')}" for n, k in mapping.items())
        raise UserError(
            f"cameras: {'; '.join(problems) or 'all are none'}. The model reads {', '.join(cameras)}; {meta.root} has "
            f"{', '.join(meta.cameras) or 'no cameras'}. Say which is which, for example --data.cameras {example}"
        )
    for key in filter(None, mapping.values()):
        meta.feature(key)
    return mapping


def _completed(meta: Meta, cfg: LeRobotData, mapping: Mapping[str, str | None]) -> list[str]:
    """A remark on the names in the config that are a feature's last part only; a robot's keys always are."""
    if cfg.robot.name:
        return []
    asked = {name for key in (*cfg.state, *cfg.actions) if (name := split_key(key)[0]) not in meta.features}
    found = {name: meta.find(name) for name in sorted(asked)}
    for entry in cfg.cameras:
        camera, _, keys = entry.partition("=")
        if (feature := mapping.get(camera)) is not None and feature not in keys.split("|"):
            found[keys] = feature
    return [f"by their last part: {', '.join(f'{name} is {key}' for name, key in found.items())}"] if found else []


def _table(
    cfg: LeRobotData, frames: Frames, mapping: Mapping[str, str | None], source: str, size: tuple[int, int]
) -> Table:
    state, actions = frames.vector(cfg.state), frames.vector(cfg.actions)
    prompts, prompt_id = ([cfg.prompt], np.zeros(len(frames), int)) if cfg.prompt else task_labels(frames)
    subtasks, subtask_id = ([], np.full(len(frames), -1)) if source == "none" else subtask_labels(frames, source)

    def reader(key: str) -> Callable[[int], np.ndarray]:
        if cfg.frames == "cache":
            return CachedReader(cached_frames(frames, key, size, cfg.cache_dir))
        return DecodingReader(frames, key)

    return Table(
        frames=frames,
        images={name: reader(key) for name, key in mapping.items() if key is not None},
        masked=tuple(name for name, key in mapping.items() if key is None),
        state=state,
        actions=actions,
        prompts=tuple(prompts),
        prompt_id=prompt_id,
        subtasks=tuple(subtasks),
        subtask_id=subtask_id,
        supervise=frames.index(SUPERVISE) > 0 if SUPERVISE in frames.columns else np.ones(len(frames), bool),
        last=np.repeat(frames.starts[1:] - 1, np.diff(frames.starts)),
        layout=Layout(
            {name: key or "" for name, key in mapping.items()},
            *([n for key in keys for n in frames.meta.dimension_names(key)] for keys in (cfg.state, cfg.actions)),
        ),
    )


def _labelled(table: Table, source: str) -> np.ndarray:
    usable = table.subtask_id >= 0
    if not usable.any():
        meta = table.frames.meta
        looked = "neither subtask_index with meta/subtasks.parquet nor language_persistent is there"
        raise UserError(
            f"{meta.root} has no subtask labels "
            f"({looked if source == 'none' else f'data.subtasks {source}: all empty'}), but "
            "the config trains a model to generate subtasks: annotate the data, name another column with "
            f"--data.subtasks, or train actions only with --text.template openpi"
        )
    return usable
