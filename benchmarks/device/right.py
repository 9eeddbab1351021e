"""Are the numbers right on this device? Goldens, decoding by drafts and blocks, batches, pixels, a training run.

What they are compared with was computed elsewhere: by openpi, PaliGemma and Pillow (`tests/golden`), and by this
package on a CPU (`debug_losses.json`; `python -m benchmarks.device.right` writes it anew).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device.plan import Stage
from benchmarks.device.record import Record
from benchmarks.sizes import Size, make_batch
from configs import PRESETS
from openpi_ar.algorithms.act import act
from openpi_ar.algorithms.continuations import Continuations
from openpi_ar.algorithms.sampling import Sampling
from openpi_ar.checkpoints import store
from openpi_ar.checkpoints.options import Dtype
from openpi_ar.checkpoints.remote import SHIPPED
from openpi_ar.doctor.verify import verify
from openpi_ar.images import resize_with_pad_on_device
from openpi_ar.models.vlm import VLA
from openpi_ar.text.tokenizer import Tokenizer
from openpi_ar.training import memory
from openpi_ar.training.optimizer import make_optimizer
from openpi_ar.training.state import TrainState, train_key
from openpi_ar.training.step import make_train_step
from openpi_ar.types import Array, Observation, Tokens

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
LOSSES = Path(__file__).with_name("debug_losses.json")
# (checkpoint, golden, compute dtype), the most telling first.
_GOLDENS: tuple[tuple[str, str, Dtype], ...] = (
    ("pi05", "pi05", "float32"),
    ("pi05_subtask", "pi05_subtask", "float32"),
    ("pi05", "pi05", "bfloat16"),
    ("pi0", "pi0", "float32"),
    ("torch_pi0/lerobot_layout", "torch_pi0", "float32"),
    ("paligemma/hf_bf16", "paligemma", "bfloat16"),
)
_QUICK = 1
"""Goldens of a rehearsal."""
_ACTIONS = 3e-4
"""Between two programs, float32: other orders of summation over four layers and ten steps, values of order 1. On a CPU
it is 4e-5."""
LOSS_BOUND = 5e-5
"""Relative, over ten steps that each amplify the rounding of the last: between two programs on a CPU it is 3e-7. The
run that must not pass is 4e-4 off."""
_STEPS = 10


class Checks:
    """What was compared, each with its verdict, written as it comes."""

    def __init__(self, record: Record):
        self._record, self.found = record, {}

    def add(self, name: str, ok: bool, **figures: Any) -> None:
        self.found[name] = {"ok": bool(ok), **figures}
        self._record.add("checks", self.found)

    @property
    def verdict(self) -> str:
        wrong = [name for name, check in self.found.items() if not check["ok"]]
        return f"{len(self.found)} checks agree" if not wrong else f"WRONG: {', '.join(wrong)}"


def goldens(checks: Checks, record: Record, size: str) -> None:
    """Every quantity of every golden."""
    for checkpoint, folder, dtype in _GOLDENS[: _QUICK if size == "tiny" else None]:
        name = f"{folder} {dtype}"
        with record.attempt(name):
            differences, _ = verify(GOLDEN / checkpoint, GOLDEN / folder, compute_dtype=dtype)
            used = {d.name: getattr(d, d.judged) / d.bound for d in differences if d.bound}
            worst = max(used, key=lambda name: used[name])
            quantities = {d.name: {"largest": d.largest, "mean": d.mean, "bound": d.bound} for d in differences}
            part = {"worst": worst, "of_its_bound": used[worst], "quantities": quantities}
            checks.add(name, all(d.ok for d in differences), **part)


def observations(tokenizer: Tokenizer, model: VLA, rows: int) -> Observation:
    """Random images, and tasks of the tabletop."""
    rng, cfg = np.random.default_rng(3), model.cfg
    tasks = ("clear the table into the left bin", "put the red block in the right bin")
    states = [" ".join(map(str, rng.integers(0, 256, 4))) for _ in range(rows)]
    texts = [f"Task: {tasks[i % len(tasks)]}, State: {state};\nSubtask:" for i, state in enumerate(states)]
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    longest = max(map(len, prompts))
    ids = np.array([p + [0] * (longest - len(p)) for p in prompts], np.int32)
    valid = np.arange(longest) < np.array([len(p) for p in prompts])[:, None]
    return Observation(
        images=rng.integers(0, 256, (rows, len(cfg.cameras), *cfg.siglip.image_size, 3), np.uint8),
        image_mask=np.ones((rows, len(cfg.cameras)), bool),
        prompt=Tokens.of(ids, valid),
        state=np.zeros((rows, cfg.state_dim), np.float32),
    )


def decoding(checks: Checks) -> None:
    """The shipped checkpoint: drafts and blocks write the greedy text; a batch is its rows."""
    _, stacked, tokenizer, _ = store.load_policy_checkpoint(SHIPPED["tabletop"])
    model, rows, budget = jax.jit(lambda m: m.for_inference("float32"))(stacked), 3, 10
    obs = observations(tokenizer, stacked, rows)
    noise = jax.random.normal(jax.random.key(1), (rows, model.cfg.action_horizon, model.cfg.action_dim))
    sampling = Sampling(eos_id=tokenizer.eos_id, max_new_tokens=budget)
    run = jax.jit(lambda m, o, x, d, c: act(m, o, x, sampling, num_steps=10, draft=d, continuations=c, block=8))
    plain = run(model, obs, noise, None, None)
    ids, valid = np.asarray(plain.text.ids), np.asarray(plain.text.valid)

    def compare(name: str, other: Any, most_steps: int) -> None:
        same, steps = np.array_equal(np.where(valid, ids, 0), np.asarray(other.text.ids)), int(other.text.steps)
        apart = float(jnp.abs(other.actions - plain.actions).max())
        ok = same and steps <= most_steps and apart <= _ACTIONS
        checks.add(name, ok, same_text=same, steps=steps, plain_steps=int(plain.text.steps), actions=apart)

    checks.add("text is written", bool(valid.any(-1).all()) and len({*map(tuple, ids.tolist())}) > 1)
    compare("right draft", run(model, obs, noise, (ids, valid), None), 0)
    wrong = np.where(np.arange(budget) == 3, (ids + 1) % model.cfg.vocab_size, ids).astype(np.int32)
    compare("draft wrong at its fourth token", run(model, obs, noise, (wrong, valid), None), budget - 3)
    texts = [row[good].tolist() for row, good in zip(ids, valid, strict=True)]
    likely = Continuations.of([wrong[0].tolist(), *texts], budget, tokenizer.eos_id)
    compare("blocks", run(model, obs, noise, None, likely), int(plain.text.steps) - 1)

    single = [jax.tree.map(lambda x, i=i: x[i : i + 1], (obs, noise)) for i in range(rows)]
    alone = [run(model, *one, None, None) for one in single]
    apart = max(float(jnp.abs(one.actions[0] - plain.actions[i]).max()) for i, one in enumerate(alone))
    same = all(np.array_equal(one.text.ids[0], ids[i]) for i, one in enumerate(alone))
    checks.add("a batch of 3 is 3 batches of 1", same and apart <= _ACTIONS, same_text=same, actions=apart)


def pixels(checks: Checks) -> None:
    """The resize on the device gives the bytes of Pillow, as openpi's client sends them."""
    golden = np.load(GOLDEN / "resize.npz")
    for name in (name for name in golden.files if name.startswith("client_")):
        height, width = golden[name].shape[:2]
        ours = jax.jit(resize_with_pad_on_device, static_argnums=(1, 2))(golden["photo"], height, width)
        checks.add(f"resize {name}", np.array_equal(ours, golden[name]))


def debug_losses(**optimizer: float) -> list[float]:
    """Losses of the debug model on one random batch. Nothing in it depends on the device but rounding."""
    cfg = dataclasses.replace(PRESETS["debug"], batch_size=8)
    cfg = dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, peak_lr=1e-3, **optimizer))
    abstract, rng = memory.abstract_state(cfg), np.random.default_rng(0)
    model = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), abstract.model)
    rest = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract.opt_state)
    state = TrainState(jnp.zeros((), jnp.int32), model, rest, jax.tree.map(jnp.copy, model))
    step = make_train_step(cfg, make_optimizer(cfg.optimizer, cfg.num_steps))
    # Lengths of its own: the losses are recorded, and the presets' budgets change.
    batch = make_batch(Size(cfg.model, prompt=32, tokens=10, train_batch=8))
    losses: list[Array] = []
    with jax.default_matmul_precision("highest"):
        for _ in range(_STEPS):
            state, metrics = step(state, batch, train_key(cfg))
            losses.append(metrics["loss"])
    return [float(loss) for loss in losses]


def training(checks: Checks) -> None:
    """The losses of a short run against those of a CPU."""
    ours, known = debug_losses(), json.loads(LOSSES.read_text())["losses"]
    apart = max(abs(a / b - 1) for a, b in zip(ours, known, strict=True))
    checks.add("debug run", apart <= LOSS_BOUND, largest_relative=apart, losses=ours, cpu=known)


def run(stage: Stage, size: str, record: Record) -> None:
    """Everything, the goldens first."""
    del stage
    checks = Checks(record)
    record.add("device", jax.devices()[0].device_kind)
    for name, part in (
        ("goldens", lambda: goldens(checks, record, size)),
        ("decoding", lambda: decoding(checks)),
        ("debug run", lambda: training(checks)),
        ("resize", lambda: pixels(checks)),
    ):
        with record.attempt(name), jax.default_matmul_precision("highest"):
            part()
    record.say(checks.verdict)
    failed = record.figures.get("errors", {})
    assert not failed and all(check["ok"] for check in checks.found.values()), f"{checks.verdict}; {failed}"


def main() -> None:
    """Writes the losses of this device, and those of a run that must not pass for the same."""
    found = {"losses": debug_losses(), "other_losses": debug_losses(b1=0.8)}
    LOSSES.write_text(json.dumps({"device": jax.devices()[0].device_kind, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
