"""Broken if this fails: some damaged checkpoint ends in a stack trace, or is read as something that its files do not hold."""

import contextlib
import io
import json
import os
from pathlib import Path
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from openpi_ar.checkpoints import __main__ as cli
from openpi_ar.checkpoints import assets, load, store
from openpi_ar.data.inputs import InputTransform
from openpi_ar.data.normalize import NormStats, save_norm_stats
from openpi_ar.errors import UserError
from openpi_ar.text.tokenizer import load_tokenizer
from tests.data.mutations import change_json, mutate_bytes, mutate_text
from tests.format_fixtures import GOLDEN, LEROBOT, STATISTICS, processors


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, tiny_checkpoint) -> dict[str, Path]:
    """One of each layout, with everything that lies beside the tensors."""
    root = tmp_path_factory.mktemp("whole")
    stats = dict.fromkeys(("state", "actions"), NormStats(*(STATISTICS[k] for k in ("mean", "std", "q01", "q99"))))
    shutil.copytree(tiny_checkpoint / "0", root / "ours", ignore=shutil.ignore_patterns("train_state"))
    shutil.copytree(GOLDEN / "pi05", root / "openpi", ignore=shutil.ignore_patterns("*.npz"))
    save_norm_stats(root / "openpi" / "assets" / "arm", stats)
    with contextlib.redirect_stdout(io.StringIO()):
        for to in ("lerobot", "torch"):
            cli.main(["convert", str(root / "openpi"), str(root / to), "--to", to])
    shutil.rmtree(root / "lerobot" / "assets")
    processors(
        root / "lerobot", "MEAN_STD", "QUANTILES", renames={"observation.images.top": "observation.images.base_0_rgb"}
    )
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main(["convert", str(root / "lerobot"), str(root / "policy"), "--to", "ours"])
    shutil.rmtree(root / "policy" / "assets" / "lerobot")
    shutil.copy(tiny_checkpoint / "0" / "assets" / "tokenizer.model", root / "policy" / "assets")
    shutil.copytree(LEROBOT, root / "old")
    buffers = {f"normalize_inputs.buffer_observation_state.{k}": np.float32(STATISTICS[k]) for k in ("mean", "std")}
    save_file(load_file(LEROBOT / "model.safetensors") | buffers, root / "old" / "model.safetensors")
    shards(root / "torch")
    shutil.copytree(GOLDEN / "paligemma" / "hf_bf16", root / "paligemma")
    return {path.name: path for path in sorted(root.iterdir())}


def shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def mutate_header(rng: np.random.Generator, file: Path) -> None:
    """Another header of a safetensors file, before the same bytes."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    for _ in range(rng.integers(1, 4)):
        change_json(rng, header)
    text = json.dumps(header).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def mutate(rng: np.random.Generator, path: Path) -> list[str]:
    """Damages one or two files of a checkpoint; returns their names."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    told = [file for file in files if file.suffix == ".json"]
    changed = []
    for _ in range(rng.integers(1, 3)):
        chosen = told if rng.random() < 0.7 else files
        file = chosen[rng.integers(len(chosen))]
        if not file.is_file() or file.name in changed:
            continue
        changed.append(file.name)
        content = file.read_bytes()
        file.unlink()  # it is a link to the whole one's
        file.write_bytes(content)
        if rng.random() < 0.15 or file.suffix not in (".json", ".safetensors"):
            mutate_bytes(rng, file)
        elif file.suffix == ".safetensors":
            mutate_header(rng, file)
        else:
            mutate_text(rng, file)
    return changed


def check_said(said: assets.Said) -> None:
    """What was read can be used: a policy's inputs are made of it."""
    assert said.config.model.cameras and all(isinstance(camera, str) for camera in said.config.model.cameras)
    if said.stats:
        for stats in said.stats.values():
            assert all(np.isfinite(getattr(stats, name)).all() for name in ("mean", "std", "q01", "q99"))
            assert np.isfinite(stats.normalize(np.zeros(stats.dims))).all()
        cfg = said.inference if said.knows_robot or said.lerobot is None else said.lerobot
        InputTransform(cfg, load_tokenizer("embedded"), said.stats)


def outcome(path: Path, *, parameters: bool) -> str:
    """ "read", or the line that reading ends with. Anything else but a UserError of one line is raised."""
    try:
        looked = load.inspect(path)
        if looked.config.kind != "paligemma":
            check_said(assets.read(looked.matched.source, looked.acting()))
        if parameters and looked.kind == "ours":
            cfg, _, tokenizer, stats = store.load_policy_checkpoint(path)
            InputTransform(cfg, tokenizer, stats)
        elif parameters:
            load.read(looked, progress=False)
    except UserError as e:
        assert "\n" not in " ".join(str(e).split()) and len(str(e)) < 20_000
        return str(e).replace(str(path), "")
    return "read"


def run(argv: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            cli.main(argv)
        except SystemExit as e:
            assert e.code == 2 and err.getvalue().count("\n") == 1


@pytest.mark.filterwarnings("ignore")
def try_damaged(tmp_path: Path, whole: dict[str, Path], seeds: range) -> list[str]:
    outcomes, names = [], sorted(whole)
    for seed in seeds:
        rng = np.random.default_rng(seed)
        name = names[seed % len(names)]
        path = Path(shutil.copytree(whole[name], tmp_path / f"{seed}", copy_function=os.link))
        changed = mutate(rng, path)
        try:
            outcomes.append(outcome(path, parameters=seed % 5 == 0 or name in ("ours", "policy")))
            if seed % 7 == 0:
                run(["inspect", str(path)])
            if seed % 23 == 0:
                run(["convert", str(path), str(path / "out"), "--to", ("torch", "lerobot")[seed % 2]])
        except Exception as e:
            raise AssertionError(f"seed {seed}, {name}: {', '.join(changed)}: {type(e).__name__} {e}") from e
        shutil.rmtree(path)
    return outcomes


@pytest.mark.filterwarnings("ignore")
def test_damaged_checkpoints_are_read_right_or_refused_in_one_line(tmp_path, checkpoints):
    outcomes = try_damaged(tmp_path, checkpoints, range(80))
    read = outcomes.count("read")
    assert 10 < read < 70  # the damage is such that both happen
    assert len(set(outcomes)) > 20  # and of many kinds


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(16))
def test_many_damaged_checkpoints_are_read_right_or_refused_in_one_line(tmp_path, checkpoints, part):
    try_damaged(tmp_path, checkpoints, range(80 + 150 * part, 230 + 150 * part))
