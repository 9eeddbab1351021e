"""If this fails, a golden of another size is refused, or one that cannot be verified ends in a stack trace."""

import json
from pathlib import Path
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest

from openpi_ar.checkpoints import export
from openpi_ar.doctor import __main__ as cli
from openpi_ar.doctor.verify import verify
from openpi_ar.errors import UserError
from openpi_ar.model_config import VitConfig
from openpi_ar.params import flatten, unflatten
from tests.model_fixtures import tiny_config, tiny_model

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def copy(tmp_path) -> Path:
    """The inputs and outputs of a golden, without its parameters."""
    return Path(shutil.copytree(GOLDEN / "pi05", tmp_path / "golden", ignore=shutil.ignore_patterns("params")))


def rewrite(folder: Path, file: str, change) -> None:
    arrays = dict(np.load(folder / file))
    change(arrays)
    np.savez(folder / file, **arrays)


def refused(capsys, golden: Path, checkpoint: Path = GOLDEN / "pi05") -> str:
    with pytest.raises(SystemExit) as e:
        cli.main(["verify", str(checkpoint), str(golden)])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1
    return err


@pytest.mark.parametrize("told", ["config.json", "images"])
def test_images_that_are_not_square(tmp_path, told):
    """42 x 56 pixels: 3 x 4 patches, which 12 position embeddings do not tell from 2 x 6."""
    siglip = VitConfig(width=24, depth=2, mlp_dim=40, num_heads=2, patch_size=14, image_size=(42, 56))
    cfg = tiny_config(siglip=siglip)
    model, rng = tiny_model(cfg), np.random.default_rng(0)
    tree = unflatten(export.to_openpi(flatten(model), cfg))
    ocp.PyTreeCheckpointer().save(tmp_path / "params", {"params": tree})
    inputs = {f"image/{c}": rng.uniform(-1, 1, (2, 42, 56, 3)).astype(np.float32) for c in cfg.cameras}
    inputs |= {f"image_mask/{c}": np.ones(2, bool) for c in cfg.cameras}
    inputs |= {"tokenized_prompt": rng.integers(2, 60, (2, 5)), "tokenized_prompt_mask": np.ones((2, 5), bool)}
    shape = (2, cfg.action_horizon, cfg.action_dim)
    inputs |= {"actions": rng.normal(size=shape), "noise": rng.normal(size=shape), "time": np.full(2, 0.5)}
    inputs = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in inputs.items()}
    np.savez(tmp_path / "inputs.npz", **inputs, state=np.zeros((2, cfg.state_dim), np.float32))
    tokens = {c: np.asarray(model.img(inputs[f"image/{c}"], np.dtype("float32"))) for c in cfg.cameras}
    np.savez(tmp_path / "outputs.npz", **{f"img_tokens/{c}": t for c, t in tokens.items()})
    if told == "config.json":
        (tmp_path / "config.json").write_text(json.dumps({"image_hw": [42, 56], "image_keys": list(cfg.cameras)}))
    differences, _ = verify(tmp_path, tmp_path)
    assert {d.name: d.ok for d in differences} == {"img_tokens/front": True, "img_tokens/wrist": True}


def test_images_of_another_size_than_the_checkpoints(copy, capsys):
    def smaller(arrays):
        for name in [name for name in arrays if name.startswith("image/")]:
            arrays[name] = arrays[name][:, :32, :48]

    rewrite(copy, "inputs.npz", smaller)
    err = refused(capsys, copy)
    assert "images of 32 x 48 are (2, 3) patches" in err and "for (4, 4)" in err


def test_pi0_fast_cannot_be_verified(copy, capsys):
    for name in ("inputs_train.npz", "inputs_sample.npz"):
        shutil.copy(copy / "inputs.npz", copy / name)
        rewrite(copy, name, lambda a: [a.pop(k) for k in ("actions", "noise", "time")])
    (copy / "inputs.npz").unlink()
    (copy / "config.json").write_text(json.dumps({"kind": "pi0_fast"}))
    err = refused(capsys, copy)
    assert "holds no actions (pi0_fast)" in err and "pi0-FAST and others cannot" in err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("noise"), "lacks the array 'noise'"),
        (lambda a: a.pop("image_mask/base_0_rgb"), "lacks the array 'image_mask/base_0_rgb'"),
        (lambda a: [a.pop(k) for k in list(a) if k.startswith("image/")], "holds no images"),
        (lambda a: a.update({"image/base_0_rgb": np.zeros((2, 8, 8, 3))}), "of one size"),
        (lambda a: a.update({"image/base_0_rgb": np.zeros(3)}), "of one size"),
    ],
)
def test_arrays_that_are_missing_or_misshapen(copy, capsys, change, words):
    rewrite(copy, "inputs.npz", change)
    assert words in refused(capsys, copy)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"image_keys": ["moon"]}, "image_keys of config.json are ['moon']"),
        ({"image_keys": 3}, "image_keys of config.json are 3"),
        ({"siglip": {"num_heads": "two"}}, "num_heads is 'two'"),
        ({"pali": {"num_kv_heads": -1}}, "num_kv_heads is -1"),
    ],
)
def test_a_config_that_says_nonsense(copy, capsys, config, words):
    (copy / "config.json").write_text(json.dumps(config))
    assert words in refused(capsys, copy)


def test_a_damaged_file(copy, capsys):
    content = (copy / "outputs.npz").read_bytes()
    (copy / "outputs.npz").write_bytes(content[: len(content) // 2])
    assert "cannot be read as an .npz" in refused(capsys, copy)


def test_a_directory_that_is_no_golden(tmp_path):
    with pytest.raises(UserError, match="is no golden"):
        verify(GOLDEN / "pi05", tmp_path)
