"""The directory of one experiment: what may be started, resumed or overwritten there, and how a run is stopped."""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
from pathlib import Path
import shutil
import signal

import jax

from openpi_ar import config_json, files
from openpi_ar.checkpoints import remote, store
from openpi_ar.config import TrainConfig
from openpi_ar.data.normalize import NormStats
from openpi_ar.errors import UserError
from openpi_ar.text.templates import get_template
from openpi_ar.training import distributed, memory
from openpi_ar.training.cli import Arguments

# Fields that a resumed run must share with the saved one: the shapes of the state and the order of the data.
_FIXED = ("model.", "text.", "data.", "seed", "batch_size", "frozen", "optimizer.moment_dtype")
_FREE = ("data.cache_dir", "data.frames", "text.tokenizer", "model.remat", "model.remat_policy", "model.dtype")
_FREE += ("model.attention",)
# Datasets may have moved, and be called otherwise: what they hold is compared (`check_frames`).
_FREE += ("data.path", "data.mix")

_ANOTHER_PLACE = "choose another --checkpoint-dir"


def check_config(cfg: TrainConfig) -> None:
    """Raises UserError for values that are invalid on any machine and with any data."""
    positive = ("batch_size", "num_steps", "log_every", "eval_batches", "save_every")
    wrong = [f"{name} is {getattr(cfg, name)}" for name in positive if getattr(cfg, name) < 1]
    wrong += [f"{name} is {v}" for name, v in config_json.flatten(cfg).items() if name.endswith("_lr") and not v > 0]
    if wrong:
        raise UserError(f"must be positive: {', '.join(wrong)}")
    for name in ("name", "exp_name"):
        value = getattr(cfg, name)
        if not value or value in (".", "..") or Path(value).name != value:
            raise UserError(f"{name} must be a plain directory name, found {value!r}")
    decay = cfg.optimizer.ema_decay
    if decay is not None and not 0 <= decay < 1:
        raise UserError(f"optimizer.ema_decay must lie in [0, 1) or be None, found {decay}")
    _check_optimizer(cfg)
    template = get_template(cfg.text.template)
    if not 0 <= cfg.data.prompt_swap <= 1:
        raise UserError(f"data.prompt_swap must lie in [0, 1], found {cfg.data.prompt_swap}")
    if cfg.data.prompt_swap and template.target is None:
        raise UserError(
            f"data.prompt_swap is {cfg.data.prompt_swap}, but template {cfg.text.template!r} writes no subtask, so "
            f"nothing would tell the actions what to do: set --data.prompt-swap 0"
        )
    if len(set(cfg.model.cameras)) < len(cfg.model.cameras):
        raise UserError(f"model.cameras names a camera twice: {', '.join(cfg.model.cameras)}")
    strange = [name for name in cfg.augment.uncropped if name not in cfg.model.cameras]
    if cfg.augment.crop and strange:
        raise UserError(
            f"augment.uncropped names {', '.join(strange)}, but the model's cameras are {', '.join(cfg.model.cameras)}"
        )
    for name in ("keep_last", "keep_every", "eval_every", "workers"):
        if getattr(cfg, name) < 0:
            raise UserError(f"{name} must be 0 or more, found {getattr(cfg, name)}")


def _check_optimizer(cfg: TrainConfig) -> None:
    o = cfg.optimizer
    if o.accumulate < 1 or cfg.batch_size % o.accumulate:
        raise UserError(
            f"batch_size {cfg.batch_size} does not divide into optimizer.accumulate {o.accumulate} slices: use a "
            "multiple"
        )
    # A bfloat16 has 8 bits: a second moment that moves by less than 1/512 of itself a step would never come down again.
    if o.moment_dtype == "bfloat16" and o.b2 > 0.99:
        raise UserError(f"optimizer.moment_dtype bfloat16 needs --optimizer.b2 0.99 or less, found {o.b2}")
    for name in ("crop", "brightness", "contrast", "saturation", "mistakes"):
        if not 0 <= getattr(cfg.augment, name) < 1:
            raise UserError(f"augment.{name} must lie in [0, 1), found {getattr(cfg.augment, name)}")


def experiment_dir(cfg: TrainConfig) -> Path:
    """`<checkpoint_dir>/<config>/<exp>`."""
    return Path(cfg.checkpoint_dir).expanduser() / cfg.name / cfg.exp_name


def what_to_do(cfg: TrainConfig, args: Arguments) -> tuple[bool, bool]:
    """(resume, overwrite) of a command line; `--auto-resume` is one of them, and deletes nothing that could be resumed.

    Raises UserError for flags that exclude each other.
    """
    if args.resume + args.auto_resume + args.overwrite > 1:
        raise UserError("--resume, --auto-resume and --overwrite exclude each other: give one of them")
    if not args.auto_resume:
        return args.resume, args.overwrite
    resume = store.latest_step(experiment_dir(cfg)) is not None
    return resume, not resume


def plan(cfg: TrainConfig, *, resume: bool, overwrite: bool) -> Path | None:
    """The step directory to resume from, None for a fresh start. Touches nothing.

    Raises UserError for an existing experiment without a flag, nothing to resume, a saved config that this one does not
    continue, or an `init_from` that is not there.
    """
    directory = experiment_dir(cfg)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file, expected a directory or nothing: choose another --exp-name")
    if resume:
        saved = saved_config(cfg)
        if saved is None:
            raise UserError(f"nothing to resume: {directory} holds no complete checkpoint; start without --resume")
        _check_continues(cfg, saved)
        return directory / str(store.latest_step(directory))
    # An address is looked at when it is needed: it may be gigabytes.
    if cfg.init_from and "://" not in cfg.init_from:
        local = remote.local_copy(cfg.init_from)
        if not local.is_file():
            store.resolve_step_dir(local)
    if not overwrite and directory.is_dir() and any(directory.iterdir()):
        raise UserError(
            f"{directory} already holds an experiment: add --resume to continue it, --overwrite to delete it and start "
            f"anew, or choose another --exp-name"
        )
    return None


def check_room(cfg: TrainConfig, need: memory.Estimate) -> None:
    """Raises UserError unless a checkpoint can be written: its parameters, optimizer and average are `need`'s."""
    size = cfg.fsdp_devices * (need.parameters + need.optimizer + need.average)
    files.check_directory(experiment_dir(cfg), _ANOTHER_PLACE, need=size)


def create(cfg: TrainConfig, *, overwrite: bool) -> Path:
    """Makes the experiment's directory, emptying it first if `overwrite`. Call when every other check has passed.

    Of several processes one makes it. Raises UserError if it cannot be written, or if a process does not see it then.
    """
    directory = experiment_dir(cfg)
    if distributed.is_primary():
        with files.writing(directory, _ANOTHER_PLACE):
            if overwrite and directory.exists():
                shutil.rmtree(directory)
            directory.mkdir(parents=True, exist_ok=True)
    distributed.check_shared(directory)
    return directory


def agreed_step(cfg: TrainConfig, resume_from: Path | None) -> Path | None:
    """What `plan` found, if all processes found the same. Raises UserError in those that found something else."""
    mine = -1 if resume_from is None else int(resume_from.name)
    first = int(distributed.agree(float(mine)))
    if mine != first:
        raise UserError(
            f"process {jax.process_index()} finds {f'step {mine}' if mine >= 0 else 'no step'} to resume from in "
            f"{experiment_dir(cfg)}, process 0 {f'step {first}' if first >= 0 else 'none'}: --checkpoint-dir must be "
            f"on storage that all machines share"
        )
    return resume_from


def saved_config(cfg: TrainConfig) -> TrainConfig | None:
    """The config of the newest complete checkpoint of the experiment that `cfg` names, in the place where it is now;
    None if there is none. Raises UserError if it was not trained."""
    directory = experiment_dir(cfg)
    step = store.latest_step(directory)
    if step is None:
        return None
    found = config_json.read(directory / str(step) / "assets" / store.CONFIG)
    if not isinstance(found, TrainConfig):
        raise UserError(f"{directory / str(step)} is a converted checkpoint: give it to --init-from, not to --resume")
    return dataclasses.replace(found, name=cfg.name, exp_name=cfg.exp_name, checkpoint_dir=cfg.checkpoint_dir)


def describe_resumed(cfg: TrainConfig, step_dir: Path) -> str:
    """A line: what is resumed, and which fields are not as they were saved."""
    saved = saved_config(cfg)
    found = changes(saved, cfg).values() if saved else ()
    return f"resuming {step_dir} with its config" + (f", but for {', '.join(found)}" if found else "")


def check_frames(cfg: TrainConfig, saved: Mapping[str, NormStats], stats: Mapping[str, NormStats]) -> None:
    """Raises UserError unless the statistics of the data are those that a resumed run was trained with: the dataset may
    be at another place, but its frames must be the same."""
    if any(not saved[name].is_close(stats[name]) for name in saved):
        raise UserError(
            f"{' and '.join((cfg.data.path, *cfg.data.mix))} holds other frames than this run was trained on (its "
            f"states or actions have other statistics): name the same data with --data.path, or start another "
            f"--exp-name with --init-from {experiment_dir(cfg)}"
        )


def changes(saved: TrainConfig, cfg: TrainConfig) -> dict[str, str]:
    """Fields in which a run differs from the saved one that it continues, in words."""
    old, new = config_json.flatten(saved), config_json.flatten(cfg)
    return {
        name: f"{name} ({old.get(name)!r} saved, {new.get(name)!r} given)"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name) and name != "data.robot.action_names"  # the dataset's, for people
    }


def _check_continues(cfg: TrainConfig, saved: TrainConfig) -> None:
    found = changes(saved, cfg)
    wrong = [name for name in found if name.startswith(_FIXED) and name not in _FREE]
    if (saved.optimizer.ema_decay is None) != (cfg.optimizer.ema_decay is None):
        wrong.append("optimizer.ema_decay")
    if [entry.rpartition("=")[2] for entry in saved.data.mix] != [e.rpartition("=")[2] for e in cfg.data.mix]:
        wrong.append("data.mix")
    if wrong:
        differ = ", ".join(found[name] for name in wrong)
        raise UserError(f"{experiment_dir(cfg)} was trained with another config: {differ}; use the saved values")


def check_data(cfg: TrainConfig) -> None:
    """Raises UserError if the configured data cannot be read."""
    if not cfg.data.path:
        raise UserError(
            f"config {cfg.name} trains on your data: data.path must name a LeRobot dataset (--data.path DIR); to see a "
            f"training run without one, use --config pi05_subtask_tabletop"
        )


class StopRequest:
    """Set by the first Ctrl-C or SIGTERM; the loop finishes its step, saves and ends. A second one ends at once."""

    def __init__(self):
        self.signal: str | None = None

    def _handle(self, number: int, frame: object) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

    def __bool__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest | distributed.PreemptionNotice]:
    """Catches SIGINT and SIGTERM within the block. Of several processes any may get it; all stop at the same step."""
    if distributed.several():
        notice = distributed.PreemptionNotice()
        previous = signal.signal(signal.SIGINT, notice.pass_on)
        try:
            yield notice
        finally:
            signal.signal(signal.SIGINT, previous)
        return
    request = StopRequest()
    previous = {s: signal.signal(s, request._handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
