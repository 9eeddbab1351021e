"""If this fails, the minutes with a GPU are wasted: the command does not run where only JAX and its like are installed,
ends with the first stage that crashes, loses what it has measured, overruns, or compares with a wrong bound."""

from collections.abc import Iterator
import dataclasses
import importlib.metadata
import json
import os
from pathlib import Path
import subprocess
import sys
import time

import jax
from packaging.requirements import Requirement
import pytest

from benchmarks.device import __main__ as command
from benchmarks.device import helps, right, train
from benchmarks.device.plan import STAGES
from benchmarks.device.record import OutOfTime, Record, read
from benchmarks.device.setting import ROWS
from benchmarks.roofline import Roofline, Work, data_sheet, time_weights, tower_weights, vision_weights
from benchmarks.sizes import SIZES
from benchmarks.timing import Device
from openpi_ar.algorithms.flow import denoise
from openpi_ar.algorithms.prefill import prefill
from openpi_ar.model_config import GEMMA_2B, GEMMA_300M, ModelConfig
from openpi_ar.models import family
from openpi_ar.params import flatten
from openpi_ar.training import memory

ROOT = Path(__file__).parents[1]
ON_THE_MACHINE = ["jax", "flax", "optax", "orbax-checkpoint", "numpy", "sentencepiece", "einops", "jaxtyping", "pytest"]
CARRIED = ["pillow", "safetensors"]
"""What `device_prepare.sh` fetches."""


# ---- the command ----------------------------------------------------------------------------------------------------


def launched(code: str, seconds: float = 30) -> tuple[command.Outcome, float]:
    start = time.monotonic()
    outcome = command.launch([sys.executable, "-c", code], dict(os.environ), seconds)
    return outcome, time.monotonic() - start


def test_a_stage_that_fails_is_a_line():
    assert launched("print('fine')")[0].status == "ok"
    crashed = launched("raise ValueError('broken')")[0]
    assert crashed.status == "FAILED (exit code 1)" and "broken" in crashed.stderr
    assert launched("import os; os.abort()")[0].status == "FAILED (SIGABRT)"
    # What the kernel does where memory is short.
    assert launched("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")[0].status == "FAILED (SIGKILL)"
    # It hangs, has a child that does too, and does not listen to anybody.
    hanging = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print(subprocess.Popen(['sleep', '60']).pid, file=sys.stderr, flush=True); time.sleep(60)"
    )
    outcome, took = launched(hanging, 2.0)
    assert outcome.status == "killed: its time was over" and took < 10
    assert (
        not Path(f"/proc/{outcome.stderr.strip()}/cmdline").is_file()
        or "sleep" not in Path(f"/proc/{outcome.stderr.strip()}/cmdline").read_text()
    )


def test_no_stage_outlives_the_command(monkeypatch):
    started = []

    class Interrupted(subprocess.Popen):
        def communicate(self, *args, **options):
            started.append(self)
            raise KeyboardInterrupt

    monkeypatch.setattr(command.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        launched("import time; time.sleep(60)")
    assert started[0].wait(10) == -9


class Clock:
    """Time that passes only while a stage runs."""

    def __init__(self, monkeypatch, takes: float):
        self.now, self.given = 1000.0, []
        monkeypatch.setattr(command.time, "monotonic", lambda: self.now)

        def launch(args, env, seconds):
            self.given.append(seconds)
            self.now += min(takes, seconds)
            return command.Outcome("ok" if takes < seconds else "killed: its time was over", "")

        monkeypatch.setattr(command, "launch", launch)


@pytest.mark.parametrize("minutes", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("takes", [5.0, 1e6])
def test_the_minutes_are_obeyed_and_what_they_do_not_reach_is_said(monkeypatch, tmp_path, capsys, minutes, takes):
    clock = Clock(monkeypatch, takes)
    with pytest.raises(SystemExit) as e:
        command.main(["--out", str(tmp_path), "--minutes", str(minutes)])
    assert clock.now - 1000 <= 60 * minutes
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [stage.name for stage in STAGES]  # one line each, in their order
    skipped = [line for line in lines if "not run: the time is over" in line]
    assert len(lines) == len(clock.given) + len(skipped)
    for seconds, stage in zip(clock.given, STAGES, strict=False):
        assert seconds <= stage.seconds + 4
    assert (e.value.code == 1) == (takes > 1e3 and bool(clock.given))
    assert (tmp_path / "log.txt").read_text().count("\n") >= len(lines)


def test_missing_packages_are_one_line(monkeypatch, tmp_path, capsys):
    find = command.importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "PIL" else find(name))
    with pytest.raises(SystemExit) as e:
        command.main(["--out", str(tmp_path / "out")])
    assert e.value.code == 2 and not (tmp_path / "out").exists()
    assert "no package PIL here: run benchmarks/device_prepare.sh" in capsys.readouterr().err


def test_figures_are_on_disk_as_soon_as_they_exist(tmp_path):
    first, second = Record(tmp_path, "both", "a", 100.0), Record(tmp_path, "both", "b", 100.0)
    first.add("x", {"ms": 1.5})
    second.add("y", 2)
    first.say("x 1.5 ms")
    with first.attempt("broken"):
        raise ValueError("a long\nstory")
    found = read(tmp_path / "both.json")
    assert found["a"]["x"] == {"ms": 1.5} and found["b"]["y"] == 2 and not found["a"]["complete"]
    assert found["a"]["line"] == "x 1.5 ms, broken FAILED (ValueError)"
    assert found["a"]["errors"] == {"broken": "ValueError: a long story"}
    with pytest.raises(OutOfTime), Record(tmp_path, "both", "late", 0.0).attempt("nothing"):
        raise AssertionError("it was begun")
    assert list(tmp_path.iterdir()) == [tmp_path / "both.json"]


def test_every_stage_names_what_exists():
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    assert sum(stage.seconds for stage in STAGES[:4]) < 8 * 60  # what matters most is within one call
    assert len({stage.file for stage in STAGES}) <= 6
    for stage in STAGES:
        assert (ROOT / "benchmarks/device" / f"{stage.module}.py").is_file()
        assert set(stage.options.get("rows", ())) <= ROWS.keys()
        if stage.module == "train":
            for size in ("tiny", "full"):
                cfg = train.config(size, stage.options)
                assert bool(cfg.frozen) == bool(stage.options.get("lora"))
                for name, value in stage.options.get("model", {}).items():
                    assert getattr(cfg.model, name) == value


def test_a_batch_that_fits_is_chosen_from_the_plan():
    cfg = train.config("full", {})
    rows = train.batches_that_may_fit(cfg, int(75e9), 96)
    assert rows and rows == sorted(rows, reverse=True)
    assert memory.estimate(dataclasses.replace(cfg, batch_size=rows[0])).total < 75e9
    assert train.batches_that_may_fit(cfg, int(20e9), 96) == []  # full fine-tuning does not fit a small card
    assert train.batches_that_may_fit(train.config("full", {"lora": True}), int(20e9), 96)


def test_what_helps_is_what_is_clearly_faster():
    before = {"ours_ms": 10.0}
    assert helps.verdict({"ours_ms": 8.0}, before) == {"against_ms": 10.0, "times_faster": 1.25, "helps": True}
    assert (
        not helps.verdict({"ours_ms": 9.9}, before)["helps"] and not helps.verdict({"ours_ms": 11.0}, before)["helps"]
    )
    assert "helps" not in helps.verdict({"ours_ms": 8.0}, None)


# ---- bounds ---------------------------------------------------------------------------------------------------------


def test_weights_that_are_counted_are_those_of_the_model():
    """All of them but norms, biases, position embeddings and adapters."""
    cfg = ModelConfig(vlm=GEMMA_2B, expert=GEMMA_300M, action_horizon=50)
    flat = {k: v for k, v in flatten(family.abstract(cfg)).items() if k.rsplit("/", 1)[-1] not in ("scale", "bias")}
    left = [k for k in flat if k.endswith(("_bias", "pos_embedding"))]
    real = sum(x.size for k, x in flat.items() if k not in left)
    counted = vision_weights(cfg) + tower_weights(cfg.vlm) + tower_weights(cfg.expert) + time_weights(cfg)
    counted += cfg.vocab_size * cfg.vlm.width + 2 * cfg.action_dim * cfg.expert.width
    assert counted == real
    token = Roofline(cfg).token(980)
    assert abs(token.bytes / 5.03e9 - 1) < 0.01  # a 2B decoder with its head in bfloat16, and 980 cached tokens


def test_flops_are_those_that_xla_counts():
    """Of the unoptimised program, which also has norms, RoPE and softmax: a few per cent at this size."""
    size = SIZES["mid"]
    cfg = size.model
    model = jax.eval_shape(lambda m: m.for_inference(), family.abstract(cfg))
    batch = memory.abstract_batch(dataclasses.replace(train.config("full", {}), model=cfg, batch_size=1))
    obs, n = batch.observation, len(cfg.cameras) * cfg.siglip.num_tokens + batch.observation.prompt.ids.shape[1]
    roofline = Roofline(cfg, size=4)

    def flops(function, *args) -> float:
        return jax.jit(function).lower(*args).cost_analysis()["flops"]

    images = jax.eval_shape(lambda m, o: m.embed_images(o), model, obs)
    cache = jax.eval_shape(lambda m, o: prefill(m, o, last_only=True)[1], model, obs)
    noise = jax.ShapeDtypeStruct((1, cfg.action_horizon, cfg.action_dim), "float32")
    for name, ours, xla in (
        ("vision", roofline.vision(len(cfg.cameras)), flops(lambda m, o: m.embed_images(o), model, obs)),
        (
            "prefill",
            roofline.prefill(n),
            flops(lambda m, o, i: prefill(m, o, image_tokens=i, last_only=True), model, obs, images),
        ),
        (
            "denoise",
            roofline.denoise(n, 1),
            flops(lambda m, o, c, x: denoise(m, o, c, x, num_steps=1), model, obs, cache, noise),
        ),
    ):
        assert 0.9 < ours.flops / xla <= 1.01, (name, ours.flops, xla)


def test_the_bound_is_the_slower_of_both():
    device = Device(flops=100.0, bandwidth=10.0)
    assert Work(200.0, 10.0).bound(device) == 2.0 and Work(200.0, 50.0).bound(device) == 5.0
    assert (Work(1.0, 2.0) + Work(3.0, 4.0)).times(2) == Work(8.0, 12.0)
    kinds = [data_sheet(name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "cpu")]
    assert kinds[3] is None and len({kind.bandwidth for kind in kinds[:3]}) == 3


# ---- rehearsal ------------------------------------------------------------------------------------------------------

ONLY = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {names!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
"""Of the interpreter's start: these packages are not found."""


def with_what_they_need(names: list[str]) -> set[str]:
    """Distributions that are installed with these."""
    found: set[str] = set()

    def add(name: str) -> None:
        name = name.lower().replace("_", "-")
        if name in found:
            return
        found.add(name)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            found.remove(name)
            return
        for need in map(Requirement, needs):
            if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in ("", *extras.get(name, ()))):
                extras.setdefault(need.name.lower().replace("_", "-"), set()).update(need.extras)
                add(need.name)

    extras: dict[str, set[str]] = {}
    for name in names:
        add(name)
    return found


def others() -> Iterator[str]:
    """Packages of this environment that such a machine lacks."""
    there = with_what_they_need([*ON_THE_MACHINE, *CARRIED])
    for module, distributions in importlib.metadata.packages_distributions().items():
        if module.isidentifier() and not any(d.lower().replace("_", "-") in there for d in distributions):
            yield module


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rehearsal_with_no_other_package_than_such_a_machine_has(tmp_path):
    absent = {*others()} - {"openpi_ar", "benchmarks", "configs", "tests"}
    assert {"tyro", "grain", "mujoco", "pyarrow", "av", "matplotlib"} <= absent
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(ONLY.format(names=absent))
    env = os.environ | {
        "PYTHONPATH": str(tmp_path / "site"),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        # Half the time to compile; the programs are the same.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }
    control = subprocess.run([sys.executable, "-c", "import tyro"], env=env, capture_output=True, text=True)
    assert "No module named 'tyro'" in control.stderr
    stages = ["right", "fast", "train", "while_loops", "real"]
    call = [sys.executable, "-m", "benchmarks.device", "--out", str(tmp_path / "out"), "--size", "tiny"]
    done = subprocess.run(
        [*call, "--minutes", "14", "--stages", *stages], cwd=ROOT, env=env, capture_output=True, text=True, timeout=880
    )
    out = tmp_path / "out"
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()
    assert [line.split()[0] for line in done.stdout.splitlines()] == stages
    found = {name: part for path in out.glob("*.json") for name, part in json.loads(path.read_text()).items()}
    assert all(found[name]["complete"] and "errors" not in found[name] for name in stages), done.stdout
    assert all(check["ok"] for check in found["right"]["checks"].values())
    for name in [*ROWS][:-2]:  # the last two are the first one with fewer cameras
        assert found["fast"][name]["ours_ms"] > 0
    for name in ("actions", "text_and_actions", "denoise", "vision"):
        assert found["fast"][name]["largest_difference"] < 1e-3  # float32, the bound of `benchmarks.inference`
    assert found["fast"]["text_and_actions"]["same_tokens"] == 1 and found["fast"]["right_draft"]["steps"] == 0
    assert found["while_loops"]["token"]["times_faster"] > 0 and "WHILE" in found["while_loops"]["flags"]
    assert found["train"]["step"]["samples_per_s"] > 0 and 0 < found["train"]["step"]["mfu_measured"] < 1
    assert found["real"]["steps"] == 30 and found["real"]["data"].startswith("random batches")


def test_another_run_does_not_pass_for_the_recorded_one():
    """Recorded with it: losses of the same run but for Adam's b1, 0.8 in place of 0.9. That they are this package's is
    checked by the rehearsal."""
    found = json.loads(right.LOSSES.read_text())
    pairs = zip(found["other_losses"], found["losses"], strict=True)
    assert max(abs(a / b - 1) for a, b in pairs) > 5 * right.LOSS_BOUND
