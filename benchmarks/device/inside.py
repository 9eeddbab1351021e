"""What may help without any flag: more rows, another layout of the vocabulary's head, float8 products."""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp

from benchmarks.device.fast import Bench
from benchmarks.device.plan import Stage
from benchmarks.device.record import Record
from benchmarks.device.setting import Setting
from benchmarks.device.weights import random_tree
from benchmarks.roofline import Work
from benchmarks.sizes import SIZES
from benchmarks.timing import compile_program, run_in_turns

_SECONDS = 1.0


Product = tuple[Callable[..., jax.Array], jax.Array, jax.Array]
"""A function and the two arrays that it multiplies."""


def compare(record: Record, name: str, programs: dict[str, Product]) -> None:
    """Times two ways to the same product in turns; the first is what is used today."""
    found = {key: compile_program(*call) for key, call in programs.items()}
    (first, plain), (second, other) = ((key, program.call().astype(jnp.float32)) for key, program in found.items())
    run_in_turns(found, seconds=_SECONDS, most=100)
    apart = jnp.abs(plain - other).mean() / jnp.abs(plain).mean()
    figures = {f"{key}_ms": 1e3 * program.median for key, program in found.items()}
    times = found[first].median / found[second].median
    record.add(name, {**figures, "times_faster": times, "relative_difference": float(apart)})
    record.say(f"{name} {times:.2f}x")


def rows_of(array: tuple[int, ...], dtype: str) -> jax.Array:
    """A random array."""
    return random_tree(jax.ShapeDtypeStruct(array, dtype), dtype)


def head(record: Record, setting: Setting) -> None:
    """Logits of one token: the table as it is stored, [V D], and transposed, [D V]."""
    cfg = setting.cfg
    x, table = (rows_of(s, setting.dtype) for s in ((1, cfg.vlm.width), (cfg.vocab_size, cfg.vlm.width)))

    def stored(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum("BD,VD->BV", x, w, preferred_element_type=jnp.float32)

    def transposed(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum("BD,DV->BV", x, w, preferred_element_type=jnp.float32)

    compare(record, "head_transposed", {"stored": (stored, x, table), "transposed": (transposed, x, table.T)})


def float8(record: Record, setting: Setting) -> None:
    """The widest product of the prefill in the form that XLA turns into a float8 product where the device has one."""
    cfg, narrow = setting.cfg, jnp.float8_e4m3fn
    # In steps of 16, as such products need.
    tokens = -(-setting.prefix // 16) * 16
    x, w = (rows_of(s, setting.dtype) for s in ((tokens, cfg.vlm.width), (cfg.vlm.width, 2 * cfg.vlm.mlp_dim)))

    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w

    def narrowed(x: jax.Array, w8: jax.Array) -> jax.Array:
        x8 = jax.lax.optimization_barrier(x.astype(narrow)).astype(x.dtype)
        return x8 @ w8.astype(x.dtype)

    compare(record, "float8", {"plain": (plain, x, w), "narrow": (narrowed, x, w.astype(narrow))})


def run(stage: Stage, size: str, record: Record) -> None:
    """Each by itself."""
    del stage
    one = Setting(SIZES[size], {})
    bench = Bench(record, size, one.dtype)
    for name, part in (("head_transposed", head), ("float8", float8)):
        with record.attempt(name):
            part(record, one)
    for rows in (4, 16) if size == "full" else (4,):
        name = f"actions_batch_{rows}"
        with record.attempt(name):
            many = one.sharing(rows=rows)
            row = dataclasses.replace(many.actions().alone, share=lambda _, n=rows: n)
            row = dataclasses.replace(row, work=Work(row.work.flops / rows, row.work.bytes / rows))
            found = bench.measure(name, many, row)
            record.say(f"{name} {found['ours_ms']:.3g} ms a row")
