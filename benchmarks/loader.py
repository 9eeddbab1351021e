"""`python -m benchmarks.loader`: how fast samples are made, stage by stage, and whether data or compute is the
bottleneck."""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
import sys
import tempfile
import time
from typing import TypeVar

import jax
import numpy as np

from configs import HELP, PRESETS, get_preset
from openpi_ar.config import LeRobotData, TrainConfig
from openpi_ar.data.inputs import InputTransform, stack_rows
from openpi_ar.data.layout import TrainingSource
from openpi_ar.data.lerobot.columns import read_columns
from openpi_ar.data.lerobot.frame_cache import cached_frames
from openpi_ar.data.lerobot.load import map_cameras
from openpi_ar.data.lerobot.meta import choose_episodes, read_meta
from openpi_ar.data.lerobot.video import read_frames
from openpi_ar.data.loader import Loader
from openpi_ar.data.sources import load_sources
from openpi_ar.errors import UserError, command_line
from openpi_ar.files import cores
from openpi_ar.images import resize_with_pad
from openpi_ar.tables import console, new_table
from openpi_ar.text.templates import TEMPLATES
from openpi_ar.text.tokenizer import load_tokenizer, paligemma_paths
from openpi_ar.training import cli, experiment
from openpi_ar.training.optimizer import make_optimizer
from openpi_ar.training.sharding import make_placement, shardings
from openpi_ar.training.state import init_state, train_key
from openpi_ar.training.step import make_train_step
from openpi_ar.worlds import datasets

T = TypeVar("T")

USAGE = """\
usage: python -m benchmarks.loader PATH
       python -m benchmarks.loader --config NAME [any flag of train.py]

Measures how fast samples are made: decoding, resizing, reading, tokenizing, and the loader with threads, 1 and 2 worker
processes. PATH: a LeRobot dataset, for a model of full size. --config: as that run would, and the training step too;
tells whether data or compute is the bottleneck.
"""

WORKERS = (0, 1, 2)
_SECONDS = 3.0
"""That a figure is measured over, besides what comes before the first sample."""
_FRAMES = 1_000
"""Of a LeRobot dataset that are decoded; the rest is taken to be like them."""


def for_dataset(path: str, base: TrainConfig) -> TrainConfig:
    """`base` with the dataset's own cameras and dimensions: what its samples cost, whatever model is trained on them.

    Raises UserError as `read_meta`, and if it has no cameras.
    """
    meta = read_meta(path)
    if not meta.cameras:
        raise UserError(f"{meta.root} has no cameras: there is nothing to decode")
    data = LeRobotData(path=path)
    dims = (len([n for key in keys for n in meta.dimension_names(key)]) for keys in (data.state, data.actions))
    state, action = (max(32, n) for n in dims)
    cameras = tuple(key.rsplit(".", 1)[-1] for key in meta.cameras)
    model = dataclasses.replace(base.model, cameras=cameras, state_dim=state, action_dim=action)
    tokenizer = "paligemma" if any(p.is_file() for p in paligemma_paths()) else "embedded"
    text = dataclasses.replace(base.text, tokenizer=tokenizer, template="openpi", max_prompt_tokens=500)
    return dataclasses.replace(base, data=data, model=model, text=text)


def bench(cfg: TrainConfig, *, step: bool, workers: Sequence[int] = WORKERS) -> dict[str, float]:
    """Prints samples a second of each stage, of the loader for each number of workers, and (`step`) of the training
    step.

    A LeRobot dataset's first frames are decoded into a cache of their own. Returns the printed rates by name. Raises
    UserError for what does not fit, as training does.
    """
    out, rates = console(), {}
    workers = sorted({*workers, cfg.workers})
    table = new_table("stage", "a second", "", title=f"{cfg.name}: batches of {cfg.batch_size}")
    with tempfile.TemporaryDirectory() as folder:
        cfg = _some_frames(cfg, folder)
        rates |= _decoding(cfg, cfg.data)
        train, _, _ = load_sources(cfg)
        stats, seconds = _timed(lambda: train.norm_stats(cfg.model.norm_mode))
        rates["statistics (rows)"] = len(train) / seconds
        transform = InputTransform.for_training(cfg, load_tokenizer(cfg.text.tokenizer), stats)
        rates |= _stages(cfg, train, transform)
        for count in workers:
            rates[_loader(count)] = _loader_rate(cfg, train, transform, count)
        if step:
            rates["training step (samples)"] = _step_rate(cfg, train, transform)
    notes = _notes(cfg)
    for name, rate in rates.items():
        table.add_row(name, f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}", notes.get(name, ""))
    out.print(table)
    if step:
        out.print(
            verdict(rates["training step (samples)"], {w: rates[_loader(w)] for w in workers}, cfg.workers),
            soft_wrap=True,
        )
    return rates


def verdict(step: float, loader: dict[int, float], workers: int) -> str:
    """Which of the two limits training, from samples a second, and what to do about it."""
    now, best = loader.get(workers, loader[0]), max(loader, key=lambda w: loader[w])
    if now >= step:
        return (
            f"compute is the bottleneck: the step takes {step:,.0f} samples/s, the loader makes {now:,.0f} with "
            f"--workers {workers} ({now / step:.1f} times as many)"
        )
    advice = (
        f"--workers {best} makes {loader[best]:,.0f}"
        if loader[best] > 1.1 * now
        else "more workers do not help: cache the frames (--data.frames cache), or give the machine more cores"
    )
    return (
        f"data is the bottleneck: the step could take {step:,.0f} samples/s, the loader makes {now:,.0f} with "
        f"--workers {workers}; {advice}"
    )


def _loader(workers: int) -> str:
    return f"loader, {workers} workers (samples)" if workers else "loader, threads (samples)"


def _notes(cfg: TrainConfig) -> dict[str, str]:
    height, width = cfg.model.siglip.image_size
    return {
        "decode (frames)": "one after the other, one core",
        "resize (frames)": f"to {height} x {width}, one core",
        "into the cache (frames)": f"decoded and resized, {cores()} cores",
        "read (samples)": f"{len(cfg.model.cameras)} cameras, in random order, one core",
        "tokenize, normalise (samples)": "one core",
        "batch (samples)": "one core",
    }


def _some_frames(cfg: TrainConfig, folder: str) -> TrainConfig:
    """The first episodes of a LeRobot dataset, to be cached in a folder of their own."""
    path = datasets.local(cfg.data.path, cfg.data.cache_dir)
    meta = read_meta(path)
    episodes, frames = [], 0
    for episode in choose_episodes(meta, cfg.data.episodes):
        if frames >= _FRAMES:
            break
        episodes.append(episode.index)
        frames += episode.length
    # Nothing is learnt, so no frame is held out and none needs a label.
    data = dataclasses.replace(cfg.data, path=path, episodes=tuple(episodes), cache_dir=folder, held_out=0.0)
    if TEMPLATES[cfg.text.template].target is None:
        data = dataclasses.replace(data, subtasks="none")
    return dataclasses.replace(cfg, data=data)


def _decoding(cfg: TrainConfig, data: LeRobotData) -> dict[str, float]:
    meta = read_meta(data.path)
    frames = read_columns(meta, choose_episodes(meta, data.episodes), [])
    camera = next(k for k in map_cameras(meta, cfg.model.cameras, data.cameras).values() if k is not None)

    def all_frames():
        for e, episode in enumerate(frames.episodes):
            a, b = frames.starts[e], frames.starts[e + 1]
            yield from read_frames(meta, episode, camera, frames.timestamps[a:b], range(b - a))

    images = all_frames()
    image = next(images)
    size = cfg.model.siglip.image_size
    rates = {"decode (frames)": _rate(lambda: next(images, None) is not None, 1)}
    rates["resize (frames)"] = _rate(lambda: resize_with_pad(image, *size), 1)
    if data.frames == "cache":
        _, seconds = _timed(lambda: cached_frames(frames, camera, size, data.cache_dir))
        rates["into the cache (frames)"] = len(frames) / seconds
    return rates


def _stages(cfg: TrainConfig, source: TrainingSource, transform: InputTransform) -> dict[str, float]:
    order = itertools.cycle(np.random.default_rng(0).permutation(len(source)).tolist())
    raw = source[0]
    small = {name: resize_with_pad(image, *cfg.model.siglip.image_size) for name, image in raw["images"].items()}
    row = transform.sample({**raw, "images": small})
    rows = [row] * cfg.batch_size
    return {
        "read (samples)": _rate(lambda: source[next(order)], 1),
        "tokenize, normalise (samples)": _rate(lambda: transform.sample({**raw, "images": small}), 1),
        "batch (samples)": _rate(lambda: stack_rows(rows), cfg.batch_size),
    }


def _loader_rate(cfg: TrainConfig, source: TrainingSource, transform: InputTransform, workers: int) -> float:
    loader = Loader(source, transform, batch_size=cfg.batch_size, seed=0, workers=workers)
    try:
        for _ in range(2 + 8 * max(workers, 1)):  # what was made ahead while the workers started
            next(loader)
        return _rate(lambda: next(loader), cfg.batch_size)
    finally:
        loader.close()


def _step_rate(cfg: TrainConfig, source: TrainingSource, transform: InputTransform) -> float:
    """On one batch, again and again: no data is waited for."""
    placement, tx = make_placement(cfg), make_optimizer(cfg.optimizer, cfg.num_steps)
    where = shardings(jax.eval_shape(lambda: init_state(cfg, tx)), placement)
    state = jax.jit(lambda: init_state(cfg, tx), out_shardings=where)()
    loader = Loader(source, transform, batch_size=cfg.batch_size, seed=0, sharding=placement.batch)
    batch, run, key = next(loader), make_train_step(cfg, tx, where), train_key(cfg)
    loader.close()

    def one() -> None:
        nonlocal state
        state, metrics = run(state, batch, key)
        jax.block_until_ready(metrics)

    one()
    return _rate(one, cfg.batch_size)


def _rate(once: Callable[[], object], count: int) -> float:
    """`count` a call, over some seconds or until a call returns False."""
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < _SECONDS:
        if once() is False:
            break
        calls += 1
    return count * calls / (time.perf_counter() - began)


def _timed(once: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    return once(), time.perf_counter() - began


def run(argv: Sequence[str]) -> None:
    """What the command line asks for. Raises UserError."""
    if "--config" in argv:
        cfg = cli.parse(argv, HELP, get_preset).config
        experiment.check_config(cfg)
        experiment.check_data(cfg)
        bench(cfg, step=True)
    elif len(argv) == 1 and not argv[0].startswith("-"):
        bench(for_dataset(argv[0], PRESETS["pi05_subtask"]), step=False)
    else:
        print(USAGE, end="")
        if not {"-h", "--help"} & set(argv):
            raise UserError("benchmarks.loader takes a dataset's PATH, or --config NAME with flags of train.py")


def main(argv: list[str] | None = None) -> None:
    """Entry point. Bad input ends with one line on stderr and exit code 2."""
    with command_line():
        run(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
