"""Trains a preset: `python train.py --config pi05_subtask_tabletop`. See `python train.py --help`.

One readable script: config, mesh, data, state, loop. What it calls lives in `openpi_ar/training`.
"""

from collections.abc import Sequence
import dataclasses
from pathlib import Path
import sys
import time
from typing import NoReturn

from configs import HELP, PRESETS, get_preset
from openpi_ar.config import TrainConfig
from openpi_ar.errors import UserError, command_line, replace_unwritable
from openpi_ar.training import cli
from openpi_ar.worlds import robot_file

if __name__ == "__main__":
    # Help and wrong flags are answered here, before what takes seconds to import.
    with command_line():
        cli.parse(sys.argv[1:], HELP, get_preset, robot_file=robot_file)

import jax
import numpy as np

from openpi_ar.checkpoints import store
from openpi_ar.compilation import counted, keep_compiled_programs
from openpi_ar.data import check
from openpi_ar.data.history import LateHistory
from openpi_ar.data.inputs import InputTransform
from openpi_ar.data.layout import TrainingSource
from openpi_ar.data.loader import Loader, in_turn
from openpi_ar.data.prompt_swap import PromptSwap
from openpi_ar.data.sources import load_sources
from openpi_ar.text.tokenizer import Tokenizer, load_tokenizer
from openpi_ar.training import distributed, experiment, memory
from openpi_ar.training.best import KeepBest
from openpi_ar.training.evaluate import Evaluator
from openpi_ar.training.initial import load_initial
from openpi_ar.training.metrics import Display, MetricsLog, Window
from openpi_ar.training.optimizer import check_schedule, make_optimizer, make_schedule
from openpi_ar.training.sharding import Placement, make_placement, shardings
from openpi_ar.training.state import TrainState, init_state, state_of, train_key
from openpi_ar.training.step import StepFn, make_train_step
from openpi_ar.training.store import CheckpointStore, restore_train_state
from openpi_ar.worlds import datasets

# ----------------------------------------------------------------------------------------------------------------------
# data
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Data:
    """What the loop draws from, and what a checkpoint must carry to be used without it."""

    loader: Loader
    train: TrainingSource
    held_out: TrainingSource
    transform: InputTransform
    assets: store.Assets


def check_tokenizer(cfg: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raises UserError if the tokenizer has ids that the model has no embedding for."""
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise UserError(
            f"tokenizer {cfg.text.tokenizer!r} has {tokenizer.vocab_size} pieces but model.vocab_size is "
            f"{cfg.model.vocab_size}: set --model.vocab-size to {tokenizer.vocab_size} or more"
        )


def dry_run(cfg: TrainConfig, plot: Path | None) -> None:
    """Shows what would be trained on, and trains nothing."""
    experiment.check_data(cfg)
    # Some frames are looked at: no need to decode all.
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, frames="decode"))
    tokenizer = load_tokenizer(cfg.text.tokenizer)
    check_tokenizer(cfg, tokenizer)
    source, held_out, remarks = load_sources(cfg, datasets.local)
    stats = source.norm_stats(cfg.model.norm_mode)
    check.dry_run(cfg, source, held_out, InputTransform.for_training(cfg, tokenizer, stats), remarks, plot)


def make_data(cfg: TrainConfig, placement: Placement, resume_from: Path | None) -> Data:
    """Sources, statistics and the loader. A resumed run takes tokenizer and statistics from its checkpoint."""
    experiment.check_data(cfg)
    began = time.perf_counter()
    distributed.say(f"reading {' and '.join((cfg.data.path, *cfg.data.mix))}")
    saved = None if resume_from is None else store.load_assets(resume_from)
    tokenizer = load_tokenizer(cfg.text.tokenizer) if saved is None else saved.tokenizer
    check_tokenizer(cfg, tokenizer)
    with distributed.primary_first("data"):
        train, held_out, remarks = load_sources(cfg, datasets.local)
    stats = train.norm_stats(cfg.model.norm_mode)
    if saved is not None:
        experiment.check_frames(cfg, saved.stats, stats)
        stats = saved.stats
    transform = InputTransform.for_training(cfg, tokenizer, stats)
    transform.sample(train[0])  # budgets and shapes that do not fit are reported here, not from a loader thread
    check.check_questions(train, transform)
    check.check_histories(cfg, train, transform)
    loader = Loader(
        train,
        transform,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        augment=in_turn(PromptSwap(sorted(train.prompts), cfg.data.prompt_swap), LateHistory(cfg.model.action_horizon)),
        sharding=placement.batch,
        workers=cfg.workers,
    )
    distributed.say(
        f"data: {len(train)} training frames, {len(held_out)} held out, read in {time.perf_counter() - began:.1f} s",
        *remarks,
    )
    # The checkpoint says what the dataset calls its actions.
    robot = cfg.data.robot
    robot = dataclasses.replace(robot, action_names=robot.action_names or tuple(train.layout.actions))
    named = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, robot=robot))
    return Data(loader, train, held_out, transform, store.Assets(named, tokenizer, stats, train.subtasks))


# ----------------------------------------------------------------------------------------------------------------------
# state
# ----------------------------------------------------------------------------------------------------------------------


def placed_state(cfg: TrainConfig, placement: Placement) -> TrainState:
    """The state's shapes, dtypes and shardings."""
    abstract = memory.abstract_state(cfg)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings(abstract, placement)
    )


def make_state(cfg: TrainConfig, placement: Placement, resume_from: Path | None) -> tuple[TrainState, int]:
    """(state, data position): restored, started from `init_from`, or random."""
    tx = make_optimizer(cfg.optimizer, cfg.num_steps)
    abstract = placed_state(cfg, placement)
    if resume_from is not None:
        return restore_train_state(resume_from, abstract, placement.replicated)
    where = jax.tree.map(lambda x: x.sharding, abstract)
    if not cfg.init_from:
        distributed.say("drawing random parameters")
        # One program, stored by the compilation cache; eagerly it is a hundred small ones.
        return jax.jit(lambda: init_state(cfg, tx), out_shardings=where)(), 0
    distributed.say(f"starting from {cfg.init_from}")
    model, notes = load_initial(cfg)
    distributed.say(*notes)
    model = distributed.spread(model, where.model)
    return jax.jit(lambda model: state_of(cfg, tx, model), out_shardings=where)(model), 0


# ----------------------------------------------------------------------------------------------------------------------
# loop
# ----------------------------------------------------------------------------------------------------------------------


def train(
    cfg: TrainConfig, directory: Path, data: Data, state: TrainState, placement: Placement, step_fn: StepFn
) -> TrainState:
    """Runs to `num_steps`, or to the end of the step in which a signal asks to stop; saves either way."""
    step = start = int(state.step)
    schedule, key = make_schedule(cfg.optimizer, cfg.num_steps), train_key(cfg)
    evaluate = Evaluator(cfg, data.held_out, data.transform, placement)
    log = MetricsLog(directory, cfg, start_step=start)
    checkpoints = CheckpointStore(directory, keep_last=cfg.keep_last, keep_every=cfg.keep_every)
    best = KeepBest(cfg, directory, data.assets)
    with Display(cfg.num_steps, start, f"{cfg.name}/{cfg.exp_name}") as display, experiment.stop_on_signal() as stop:
        began = time.perf_counter()
        window = Window(cfg.batch_size)
        try:
            stopping = False  # asked once a step: a signal between two questions must not end the loop unsaved
            while step < cfg.num_steps and not stopping:
                state, metrics = step_fn(state, next(data.loader), key)
                step += 1
                window.add(step, metrics, data.loader.wait_seconds)
                display.step(step)
                interrupted = step == start + 1
                if interrupted:
                    jax.block_until_ready(state.step)
                    display.line(f"first step: {time.perf_counter() - began:.1f} s")
                stopping = bool(stop)
                last = stopping or step == cfg.num_steps
                if step % cfg.log_every == 0 or last:
                    values = {"learning_rate": np.asarray(schedule(step - 1)).item()} | window.report()
                    log.write("train", step, values)
                    display.metrics(step, values)
                if cfg.eval_every and (step % cfg.eval_every == 0 or step == cfg.num_steps):
                    with counted() as programs:
                        values, texts = evaluate(state.best_model)
                    if programs.compiled or programs.read:
                        display.line(f"first evaluation: {programs}")
                    log.write("eval", step, values)
                    display.evaluation(step, values, texts)
                    best.offer(step, values, state)
                    interrupted = True
                if step % cfg.save_every == 0 or last:
                    window.check_finite()
                    checkpoints.save(state, data.loader.position, data.assets)
                    interrupted = True
                if interrupted:
                    window.restart_clock()
        except FloatingPointError as e:
            raise FloatingPointError(f"{e}; {_last_saved(directory, checkpoints)}") from e
        except (jax.errors.JaxRuntimeError, ValueError) as e:
            if distributed.several():  # most likely another process died; closing would wait for it
                _lost(e, directory)
            raise
        finally:
            checkpoints.close()
            best.close()
            log.close()
            data.loader.close()
        if stopping:
            display.line(
                f"stopped by {stop.signal} at step {step}, saved in {directory / str(step)}; continue with --resume"
            )
        else:
            display.line(f"done: {directory / str(step)}")
    return state


def _lost(error: Exception, directory: Path) -> NoReturn:
    reason = " ".join(str(error).split())[:200]
    print(
        f"error: process {jax.process_index()} of {jax.process_count()} lost the others or failed ({reason}); the last "
        f"checkpoint is of step {store.latest_step(directory)}: start all processes again with --resume",
        file=sys.stderr,
    )
    distributed.end_alone(1)


def _last_saved(directory: Path, checkpoints: CheckpointStore) -> str:
    checkpoints.close()
    step = store.latest_step(directory)
    saved = "no checkpoint had been saved" if step is None else f"the last good checkpoint is {directory / str(step)}"
    return f"{saved}; try a lower --optimizer.peak-lr or --optimizer.clip-norm"


# ----------------------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------------------


def compiled_step(cfg: TrainConfig, placement: Placement) -> StepFn:
    """The train step, compiled from shapes alone; the memory that it takes by the compiler's account is printed, and
    must be there."""
    state = placed_state(cfg, placement)
    where = jax.tree.map(lambda x: x.sharding, state)
    step_fn = make_train_step(cfg, make_optimizer(cfg.optimizer, cfg.num_steps), where)
    distributed.say("compiling the training step, or reading it from the cache of compiled programs")
    with counted() as programs:
        need = memory.measure(cfg, step_fn, state, memory.abstract_batch(cfg, placement.batch))
    distributed.say(f"training step: {programs}")
    have = memory.available()
    distributed.say(memory.describe(need, have, "memory of the compiled training step"))
    memory.check(cfg, need, have, PRESETS, devices=placement.devices)
    return step_fn


def run(argv: Sequence[str]) -> None:
    """Every check that can fail comes before anything is written: flags, config, experiment, memory, data."""
    args = cli.parse(argv, HELP, get_preset, experiment.saved_config, robot_file)
    cfg = args.config
    experiment.check_config(cfg)
    check_schedule(cfg.optimizer, cfg.num_steps)
    if args.dry_run:
        dry_run(cfg, args.plot)
        return
    resume, overwrite = experiment.what_to_do(cfg, args)
    resume_from = experiment.plan(cfg, resume=resume, overwrite=overwrite)
    keep_compiled_programs()
    distributed.start(args.distributed)  # nothing has computed until here
    resume_from = experiment.agreed_step(cfg, resume_from)
    if resume_from is not None:
        distributed.say(experiment.describe_resumed(cfg, resume_from))
        if int(resume_from.name) >= cfg.num_steps:
            distributed.say(f"nothing left to do of {cfg.num_steps} steps; raise --num-steps to continue")
            return
    placement = make_placement(cfg)
    need, have = memory.check_fits(cfg, PRESETS, devices=placement.devices)
    distributed.say(memory.describe(need, have))
    experiment.check_room(cfg, need)
    data = make_data(cfg, placement, resume_from)
    step_fn = compiled_step(cfg, placement)
    with counted() as programs:
        state, data.loader.position = make_state(cfg, placement, resume_from)
    distributed.say(f"parameters and optimizer: {programs}")
    directory = experiment.create(cfg, overwrite=overwrite)
    train(cfg, directory, data, state, placement, step_fn)


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    if jax.distributed.is_initialized():
        distributed.end_alone(code)
    raise SystemExit(code) from None


def main(argv: list[str] | None = None) -> None:
    """Entry point. Bad input ends with one line on stderr and exit code 2, a diverged run with exit code 1."""
    replace_unwritable()
    try:
        run(sys.argv[1:] if argv is None else argv)
    except UserError as e:
        _fail(str(e), 2)
    except FloatingPointError as e:
        _fail(str(e), 1)
    except KeyboardInterrupt:
        print("interrupted; nothing was saved since the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
