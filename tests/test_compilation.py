"""If this fails, compiled programs are written where they must not be, or read by a processor that cannot run them."""

from pathlib import Path
import re

import jax
from jax.experimental.compilation_cache import compilation_cache
import pytest

from openpi_ar import compilation
from openpi_ar.errors import UserError
from openpi_ar.files import cache_root

_OPTIONS = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def options():
    """JAX as it starts without any environment variable; put back afterwards."""
    before = {name: jax.config.values[name] for name in _OPTIONS}
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_directory_of_its_own_for_each_processor(options, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENPI_AR_CACHE", str(tmp_path))
    used = compilation.keep_compiled_programs()
    assert used is not None and used.parent == tmp_path / "xla"
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(Path, "read_text", lambda self: "flags : fpu sse2\n")  # another processor's
    other = compilation.keep_compiled_programs()
    assert other is not None and other.parent == used.parent and other != used


def test_what_jax_was_told_is_left_alone(options, tmp_path, monkeypatch):
    shortest = "jax_persistent_cache_min_compile_time_secs"
    monkeypatch.setenv("OPENPI_AR_CACHE", str(tmp_path))
    for environment in ({shortest.upper(): "0"}, {}):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        jax.config.update("jax_compilation_cache_dir", None)
        jax.config.update(shortest, 0.0)
        compilation.keep_compiled_programs()
        assert (jax.config.values[shortest] == 0.0) == bool(environment)
        monkeypatch.delenv(shortest.upper(), raising=False)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert compilation.keep_compiled_programs() == tmp_path / "mine"
    jax.config.update("jax_enable_compilation_cache", False)
    assert compilation.keep_compiled_programs() is None


def test_attention_is_plain_until_a_figure_chooses_another(monkeypatch):
    assert compilation.attention_on("auto", "bfloat16") == "plain" == compilation.attention_on("plain", "float32")
    with pytest.raises(
        UserError, match=r"cudnn needs an NVIDIA GPU and bfloat16, but the device is a CPU: use --model"
    ):
        compilation.attention_on("cudnn", "bfloat16")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compilation.attention_on("auto", "bfloat16") == "plain"
    assert compilation.attention_on("cudnn", "bfloat16") == "cudnn"
    with pytest.raises(UserError, match="computes in float32: .* or --model.dtype bfloat16"):
        compilation.attention_on("cudnn", "float32")
    monkeypatch.setitem(compilation.ATTENTION, "gpu", compilation.Choice("cudnn", "a figure"))
    assert compilation.attention_on("auto", "bfloat16") == "cudnn"
    assert compilation.attention_on("auto", "float32") == "plain"  # cuDNN has no kernel for it


def test_flags_that_were_chosen_do_not_replace_those_that_were_given(monkeypatch):
    assert not any(compilation.FLAGS.values())
    chosen = tuple(compilation.Choice(f"--{name}=chosen", "a figure") for name in ("a", "b"))
    monkeypatch.setitem(compilation.FLAGS, "gpu", chosen)
    monkeypatch.setenv("XLA_FLAGS", "--b=given --c")
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    for _ in range(2):
        compilation.add_flags()
        assert compilation.os.environ["XLA_FLAGS"] == "--b=given --c --a=chosen"
        assert "LIBTPU_INIT_ARGS" not in compilation.os.environ


def test_what_was_compiled_and_what_was_read_is_told_apart(options, tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "_SHORTEST_S", 0.0)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    x = jax.numpy.arange(3.0)

    def account() -> str:
        with compilation.counted() as programs:
            jax.jit(lambda x: x * 2 + 1)(x).block_until_ready()
        return str(programs)

    assert re.fullmatch(r"compiled in \d+\.\d s", account())
    assert re.fullmatch(r"read from the cache in \d+\.\d s", account())  # another function, the same program
    with compilation.counted() as programs:
        pass
    assert (programs.compiled, programs.read) == (0, 0) and str(programs).startswith("done in")
    compilation_cache.reset_cache()


def test_one_rule_for_the_cache_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENPI_AR_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    assert cache_root(tmp_path / "given") == tmp_path / "given"
    monkeypatch.setenv("OPENPI_AR_CACHE", "")
    assert cache_root() == Path.home() / ".cache" / "openpi_ar"
