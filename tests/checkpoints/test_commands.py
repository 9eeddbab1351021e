"""If this fails, a command says something untrue about a checkpoint, or takes a damaged one for a whole one."""

import os
from pathlib import Path
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from openpi_ar.checkpoints import __main__ as cli
from openpi_ar.checkpoints.load import load_model
from openpi_ar.checkpoints.remote import SHIPPED
from tests.format_fixtures import GOLDEN, LEROBOT, damaged, params, refused


def test_bfloat16_export_and_inspect(tmp_path, capsys):
    cli.main(["convert", str(GOLDEN / "pi05"), str(tmp_path / "half"), "--to", "openpi", "--dtype", "bfloat16"])
    assert all(v.dtype == ml_dtypes.bfloat16 for v in params(load_model(tmp_path / "half")).values())
    cli.main(["inspect", str(tmp_path / "half")])
    said = capsys.readouterr().out
    for words in ("openpi, JAX (orbax)", "pi0.5", "bfloat16 571,912", "horizon 6", "64 x 64"):
        assert words in said, words


def test_files_that_are_no_checkpoints(tmp_path, capsys):
    whole = (LEROBOT / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "truncated" in refused(capsys, "inspect", str(tmp_path / "cut.safetensors"))
    (tmp_path / "text.safetensors").write_text("I am no tensor\n")
    assert "cannot be read as safetensors" in refused(capsys, "inspect", str(tmp_path / "text.safetensors"))
    (tmp_path / "x.npz").write_bytes(b"nothing")
    assert "cannot be read as an .npz" in refused(capsys, "inspect", str(tmp_path / "x.npz"))
    assert "does not exist" in refused(capsys, "inspect", str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    assert "no checkpoint that is known" in refused(capsys, "inspect", str(tmp_path / "empty"))
    assert "expected a .safetensors" in refused(capsys, "inspect", str(Path(__file__)))


def test_all_offenders_at_once(tmp_path, capsys):
    def spoil(t):
        del t["model.action_out_proj.bias"]
        layers = "model.paligemma_with_expert.gemma_expert.model.layers"
        t[f"{layers}.2.mlp.down_proj.weight"] = np.zeros((32, 95), np.float32)
        t["model.action_extra"] = np.zeros(3, np.float32)

    err = refused(
        capsys, "convert", str(damaged(tmp_path, spoil)), str(tmp_path / "out"), "--to", "openpi", "--siglip-heads", "4"
    )
    for words in (
        "action_out_proj.bias: missing",
        "layers.2.mlp.down_proj.weight: expected [32, 96], found [32, 95]",
        "action_extra: unknown",
    ):
        assert words in err
    assert not (tmp_path / "out").exists()


def test_another_model_family(tmp_path, capsys):
    save_file(
        {f"transformer.h.{i}.attn.weight": np.zeros((4, 4), np.float32) for i in range(6)},
        tmp_path / "model.safetensors",
    )
    assert "holds another model" in refused(capsys, "inspect", str(tmp_path))


def test_an_orbax_directory_with_a_missing_array(tmp_path, capsys):
    shutil.copytree(GOLDEN / "pi05" / "params", tmp_path / "params")
    for file in (tmp_path / "params").rglob("d/*"):
        file.unlink()
    err = refused(capsys, "convert", str(tmp_path), str(tmp_path / "out"), "--to", "torch")
    assert "cannot be read" in err
    assert not list(tmp_path.glob(".out*"))
    (tmp_path / "params" / "_METADATA").unlink()
    assert "half-written" in refused(capsys, "inspect", str(tmp_path))


def test_a_damaged_array_is_one_line_also_after_the_last_of_orbaxs_threads(tmp_path):
    """In a process of its own: they report, as stack traces, when the interpreter ends."""
    shutil.copytree(SHIPPED["tabletop"], tmp_path / "c")
    for file in (tmp_path / "c" / "params").rglob("d/*"):
        file.unlink()
    convert = ["-m", "openpi_ar.checkpoints", "convert", str(tmp_path / "c"), str(tmp_path / "o"), "--to", "torch"]
    for argv in (convert, ["infer.py", "--ckpt", str(tmp_path / "c")]):
        done = subprocess.run(
            [sys.executable, *argv], capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
        )
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
