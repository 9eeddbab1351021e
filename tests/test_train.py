"""Broken if this fails: training does not learn, a resumed run differs from one never stopped, or bad input does
damage."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import get_preset
from openpi_ar.checkpoints import store
from openpi_ar.data.inputs import collate
from openpi_ar.errors import UserError
from openpi_ar.training import memory
from openpi_ar.training.metrics import MetricsLog, read_metrics
from openpi_ar.training.optimizer import make_optimizer, make_schedule
from openpi_ar.training.state import init_state, train_key
from openpi_ar.training.step import ema_decay, make_train_step
from openpi_ar.training.store import restore_train_state
from tests.data_fixtures import sources, transform
import train

ROOT = Path(__file__).parents[1]
CFG = get_preset("debug")
STEPS = 60
# One config for all runs, so that one compiled step (kept on disk, see `tests/__init__.py`) serves them all.
FLAGS = [
    "--config",
    "debug",
    "--num-steps",
    str(STEPS),
    "--eval-every",
    "0",
    "--save-every",
    "40",
    "--log-every",
    "1",
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Demonstrations of this file; subprocesses inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENPI_AR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def stop_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """A signal that arrives during the last of `steps` steps."""

    class Stop:
        signal, asked = "SIGTERM", 0

        def __bool__(self) -> bool:
            self.asked += 1
            return self.asked == steps

    patch.setattr(train.experiment, "stop_on_signal", lambda: contextlib.nullcontext(Stop()))


def saved(directory: Path, step: int):
    cfg = store.load_assets(directory / str(step)).config
    abstract = jax.eval_shape(lambda: init_state(cfg, make_optimizer(cfg.optimizer, cfg.num_steps)))
    return restore_train_state(directory / str(step), abstract)


def assert_same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def losses(directory: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_metrics(directory / "metrics.jsonl") if r["kind"] == "train"]


@pytest.fixture(scope="module")
def uninterrupted(cache, tmp_path_factory) -> Path:
    """The experiment directory of a run that was never stopped."""
    root = tmp_path_factory.mktemp("uninterrupted")
    train.main([*FLAGS, "--checkpoint-dir", str(root), "--eval-every", "1000"])  # at the end
    return root / "debug" / "default"


def test_run_leaves_everything_it_should(uninterrupted):
    assert store.complete_steps(uninterrupted) == [40, STEPS]
    assert (uninterrupted / "loss.png").read_bytes()[1:4] == b"PNG"
    records = read_metrics(uninterrupted / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, STEPS + 1))
    assert {
        "loss",
        "flow",
        "subtask_ce",
        "subtask_exact_match",
        "subtask_first_token",
        "grad_norm",
        "learning_rate",
        "wait_s",
    } < set(records[0])
    assert not any(name.startswith(("answer", "action_token")) or name.endswith("_count") for name in records[0])
    (evaluation,) = [r for r in records if r["kind"] == "eval"]
    assert {"loss", "subtask_generated_exact", "action_error", "action_error_3"} < set(evaluation)
    first, last = (
        np.mean([v for _, v in losses(uninterrupted)[:10]]),
        np.mean([v for _, v in losses(uninterrupted)[-10:]]),
    )
    assert last < 0.6 * first


def test_resumed_run_equals_one_never_stopped(uninterrupted, tmp_path, monkeypatch):
    flags = [*FLAGS, "--checkpoint-dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        stop_after(patch, 37)
        train.main(flags)
    directory = tmp_path / "debug" / "default"
    assert store.complete_steps(directory) == [37]
    # Nothing else is given: the number of steps and all other fields are those of the saved run, not the preset's.
    train.main(["--config", "debug", "--checkpoint-dir", str(tmp_path), "--resume"])
    (a, a_position), (b, b_position) = saved(directory, STEPS), saved(uninterrupted, STEPS)
    assert_same(a, b)
    assert a_position == b_position == STEPS
    assert losses(directory) == losses(uninterrupted)
    # Negative control: the comparison tells step 40 from step 60.
    with pytest.raises(AssertionError):
        assert_same(saved(uninterrupted, 40)[0].model, b.model)


@pytest.mark.slow
def test_sigterm_saves_and_resume_goes_on(uninterrupted, tmp_path):
    command = [sys.executable, "train.py", *FLAGS, "--checkpoint-dir", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(f"step 2/{STEPS}"):
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert err == ""
    assert out.splitlines()[-1].startswith("stopped by SIGTERM at step ")
    directory = tmp_path / "debug" / "default"
    (step,) = store.complete_steps(directory)
    assert 2 <= step < STEPS
    train.main([*FLAGS, "--checkpoint-dir", str(tmp_path), "--resume"])
    assert_same(saved(directory, STEPS), saved(uninterrupted, STEPS))


def test_finished_run_has_nothing_left_to_do(uninterrupted, capsys):
    before = snapshot(uninterrupted)
    train.main([*FLAGS, "--checkpoint-dir", str(uninterrupted.parents[1]), "--resume"])
    assert "nothing left to do" in capsys.readouterr().out
    assert snapshot(uninterrupted) == before


def test_init_from_starts_at_the_averaged_parameters(uninterrupted):
    cfg = dataclasses.replace(CFG, init_from=str(uninterrupted))
    state, position = train.make_state(cfg, train.make_placement(cfg), None)
    expected = saved(uninterrupted, STEPS)[0].ema
    assert_same(state.model, expected)
    assert_same(state.ema, expected)
    assert (int(state.step), position) == (0, 0)


def test_overfits_one_batch_keeps_its_average_and_compiles_once():
    cfg = dataclasses.replace(CFG, num_steps=STEPS)
    placement = train.make_placement(cfg)
    step = train.compiled_step(cfg, placement)
    t, data = transform(), sources()[0]
    batch = jax.device_put(collate([t.sample(data[i]) for i in range(4)]), placement.batch)
    state, _ = train.make_state(cfg, placement, None)
    history = []
    for n in range(STEPS):
        old = jax.tree.map(np.array, state.ema)
        state, metrics = step(state, batch, train_key(cfg))
        history.append({k: float(v) for k, v in metrics.items()})
        if n in (0, 30):
            d = float(ema_decay(0.99, jnp.asarray(n)))
            expected = jax.tree.map(lambda e, p, d=d: d * e + (1 - d) * np.array(p), old, state.model)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.ema, expected)
    assert int(state.step) == STEPS
    assert history[0]["subtask_ce"] > 6.0  # chance is log 1024 = 6.93
    assert history[-1]["subtask_ce"] < 0.3
    assert history[-1]["subtask_exact_match"] == 1.0
    assert np.mean([h["flow"] for h in history[-20:]]) < 0.35 * np.mean([h["flow"] for h in history[:5]])
    assert step._cache_size() == 1


def test_average_follows_the_parameters():
    np.testing.assert_allclose(ema_decay(0.99, jnp.asarray(0)), 1 / 10)
    np.testing.assert_allclose(ema_decay(0.99, jnp.asarray(90)), 91 / 100)
    np.testing.assert_allclose(ema_decay(0.99, jnp.asarray(10_000)), 0.99)


def test_schedule_values():
    cfg = dataclasses.replace(CFG.optimizer, peak_lr=1e-3, final_lr=1e-5, warmup_steps=4)
    schedule = make_schedule(cfg, 104)
    np.testing.assert_allclose([schedule(n) for n in (0, 4)], [1e-3 / 5, 1e-3], rtol=1e-6)
    np.testing.assert_allclose(schedule(54), (1e-3 + 1e-5) / 2, rtol=1e-5)  # half of the cosine
    np.testing.assert_allclose([schedule(104), schedule(200)], [1e-5, 1e-5], rtol=1e-5)
    with pytest.raises(UserError, match=r"warmup_steps \(4\) must be less than num_steps \(4\)"):
        make_schedule(cfg, 4)


def test_optimizer_clips_the_global_norm():
    cfg = dataclasses.replace(CFG.optimizer, clip_norm=1.0, weight_decay=0.0, warmup_steps=1)
    tx = make_optimizer(cfg, 10)
    params = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    grads = {"a": jnp.full(3, 100.0), "b": jnp.full(4, -100.0)}
    _, state = tx.update(grads, tx.init(params), params)
    moment = optax_mu(state)
    norm = np.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(moment)))
    np.testing.assert_allclose(norm, 1 - cfg.b1, rtol=1e-5)


def optax_mu(state):
    return next(s.mu for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))


def test_diverged_run_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    real = train.make_train_step

    def diverging(*args):
        step = real(*args)

        def run(state, batch, key):
            new, metrics = step(state, batch, key)
            return new, metrics | ({"loss": jnp.nan} if int(new.step) == 7 else {})

        run.lower = step.lower
        return run

    monkeypatch.setattr(train, "make_train_step", diverging)
    flags = [*FLAGS, "--checkpoint-dir", str(tmp_path), "--save-every", "3"]
    with pytest.raises(SystemExit) as error:
        train.main(flags)
    assert error.value.code == 1
    directory = tmp_path / "debug" / "default"
    err = capsys.readouterr().err
    assert err.startswith("error: the loss of step 7 is nan") and err.count("\n") == 1
    assert f"last good checkpoint is {directory / '6'}" in err
    assert store.complete_steps(directory) == [3, 6]


@pytest.mark.parametrize("preset", ["pi05_tabletop", "pi0_tabletop"])
def test_action_only_presets_build_their_batches(preset):
    cfg = get_preset(preset)
    t, data = transform(cfg), sources()[0]
    rows = [data[0], data[1]]
    horizon = cfg.model.action_horizon
    for raw in rows:
        raw["actions"] = np.resize(raw["actions"], (horizon, 4))
        raw["action_valid"] = np.ones(horizon, bool)
    batch = collate([t.sample(raw) for raw in rows])
    tx = make_optimizer(cfg.optimizer, cfg.num_steps)
    state = jax.eval_shape(lambda: init_state(cfg, tx))
    _, metrics = jax.eval_shape(make_train_step(cfg, tx), state, batch, train_key(cfg))
    assert metrics["flow"].shape == ()
    assert not np.asarray(batch.target.loss).any()


# ---- bad input ------------------------------------------------------------------------------------------------------


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in directory.rglob("*")}


def refused(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as error:
        train.main(argv)
    assert error.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "--config NAME is needed"),
        ("--config debgu", "did you mean debug? Presets: debug, "),
        ("--config debug --no-such-flag 1", "--no-such-flag"),
        ("--config debug --batch-size many", "--batch-size"),
        ("--config debug --batch-size 0", "batch_size is 0"),
        ("--config debug --model.siglip.image-size 3 32", "patch_size"),
        ("--config debug --model.vlm.depth 3", "must agree"),
        ("--config debug --exp-name ../x", "plain directory name"),
        ("--config debug --model.cameras front front", "model.cameras names a camera twice: front, front"),
        ("--config debug --optimizer.ema-decay 1.5", "ema_decay"),
        ("--config debug --optimizer.warmup-steps 60 --num-steps 60", "warmup_steps"),
        ("--config debug --data.prompt-swap 2", "prompt_swap"),
        ("--config debug --exp-name fresh --data.path world://tabletop?commanded=2", "commanded must lie in [0, 1]"),
        ("--config debug --exp-name fresh --data.path world://tabletop?asked=red", "asked must be two or more of"),
        ("--config debug --exp-name fresh --data.path world://tabeltop", "datasets are written by tabletop"),
        ("--config debug --exp-name fresh --data.path world://tabletop?episode=2", "there are episodes, "),
        ("--config debug --exp-name fresh --data.path world://tabletop?episodes=x", "episodes must be a whole number"),
        ("--config debug --data.prompt-swap 0.5 --text.template openpi", "nothing would tell the actions"),
        ("--config debug --text.template poem", "unknown template 'poem'"),
        ("--config debug --exp-name fresh --text.tokenizer nowhere.model", "nowhere.model"),
        ("--config debug --exp-name fresh --model.vocab-size 100", "1024 pieces but model.vocab_size is 100"),
        (
            "--config debug --exp-name fresh --model.cameras front top",
            "has observation.images.front, observation.images.wrist",
        ),
        ("--config debug --exp-name fresh --model.action-dim 3", "model.action_dim is 3"),
        ("--config debug --exp-name fresh --text.max-prompt-tokens 5", "--text.max-prompt-tokens"),
        ("--config debug --exp-name fresh --data.path world://tabletop?episodes=1", "0 usable training frames"),
        ("--config debug --exp-name fresh --init-from nowhere", "nowhere does not exist"),
        ("--config debug --exp-name fresh --data.path=", "data.path must name"),
        ("--config debug --resume --exp-name fresh", "nothing to resume"),
        ("--config debug --resume --overwrite", "exclude each other"),
        ("--config debug", "already holds an experiment"),
        ("--config debug --num-steps 60 --resume --model.vlm.width 32", "model.vlm.width (16 saved, 32 given)"),
        (
            "--config debug --num-steps 61 --resume --data.path world://tabletop?episodes=4",
            "world://tabletop?episodes=4 holds other frames than this run was trained on",
        ),
        ("--config debug --num-steps 60 --resume --batch-size 8 --seed 1", "seed (0 saved, 1 given), batch_size (4"),
        ("--config debug --num-steps 60 --resume --optimizer.ema-decay None", "optimizer.ema_decay (0.99 saved, None"),
    ],
)
def test_bad_input_ends_in_one_line_and_changes_nothing(uninterrupted, capsys, flags, words):
    root = uninterrupted.parents[1]
    before = snapshot(root)
    assert words in refused([*flags.split(), "--checkpoint-dir", str(root)] if flags else [], capsys)
    assert snapshot(root) == before


def test_bad_data_is_found_before_overwrite_deletes(uninterrupted, capsys):
    root = uninterrupted.parents[1]
    before = snapshot(root)
    one = "world://tabletop?episodes=1"
    refused(["--config", "debug", "--overwrite", "--data.path", one, "--checkpoint-dir", str(root)], capsys)
    refused(["--config", "debug", "--overwrite", "--init-from", "no", "--checkpoint-dir", str(root)], capsys)
    assert snapshot(root) == before


def test_run_that_cannot_fit_stops_before_data_or_weights(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(memory, "available", lambda: memory.Free(24 * memory.GIB, "host memory"))
    monkeypatch.setattr(train, "make_data", lambda *a: pytest.fail("data was touched"))
    err = refused(["--config", "pi05_subtask", "--checkpoint-dir", str(tmp_path)], capsys)
    assert "pi05_subtask_tabletop" in err and "GiB" in err
    assert not list(tmp_path.iterdir())


def test_full_size_preset_with_enough_memory_asks_for_its_data(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(memory, "available", lambda: memory.Free(200 * memory.GIB, "device"))
    err = refused(["--config", "pi05_subtask", "--checkpoint-dir", str(tmp_path)], capsys)
    assert "data.path must name" in err and "--config pi05_subtask_tabletop" in err


def test_missing_extras_are_named(tmp_path, monkeypatch):
    for field, module in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=f"--{field} needs {module}.*uv sync"):
            MetricsLog(tmp_path, dataclasses.replace(CFG, **{field: True}), start_step=0)


def test_metrics_are_cut_back_to_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": n, "kind": "train", "loss": n}) for n in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "ki')  # a crash while writing
    MetricsLog(tmp_path, CFG, start_step=2).write("train", 3, {"loss": 0.5})
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(1, 1), (2, 2), (3, 0.5)]


def test_batch_that_does_not_divide_among_devices_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    flags = ["--config", "debug", "--batch-size", "3", "--checkpoint-dir", str(tmp_path)]
    assert "batch_size 3 does not divide among 2 devices" in refused(flags, capsys)


@pytest.mark.slow
def test_two_devices_compute_what_one_does(uninterrupted, tmp_path):
    env = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2",
        "NPROC": "16",
    }
    command = [sys.executable, "train.py", *FLAGS, "--checkpoint-dir", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 4/"):
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=240)
    got = losses(tmp_path / "debug" / "default")[:4]
    np.testing.assert_allclose(got, losses(uninterrupted)[:4], rtol=1e-4)
