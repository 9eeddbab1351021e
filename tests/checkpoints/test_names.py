"""If this fails, a tensor of the public checkpoints has no home in our model, or two, or sizes are read off wrongly."""

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from openpi_ar.checkpoints import match, sources
from openpi_ar.checkpoints.family import expected_shape
from openpi_ar.checkpoints.load import FAMILIES
from openpi_ar.checkpoints.pi0 import FAMILY
from openpi_ar.errors import UserError
from openpi_ar.model_config import GEMMA_2B, GEMMA_300M, ModelConfig, PaliGemmaConfig
from openpi_ar.models import family
from openpi_ar.params import flatten, misfits
from tests.format_fixtures import GOLDEN

KEYS = json.loads(gzip.decompress((GOLDEN / "keys" / "public_checkpoints.json.gz").read_bytes()))
FULL = {
    "pi0": ModelConfig(pi05=False, vlm=GEMMA_2B, expert=GEMMA_300M, action_horizon=50),
    "pi05": ModelConfig(pi05=True, vlm=GEMMA_2B, expert=GEMMA_300M, action_horizon=50),
}


def matched(name: str) -> match.Matched:
    column = "openpi" if "jax" in name or "paligemma" in name else "torch"
    specs = {key: sources.Spec(tuple(shape), np.dtype("float32")) for key, (shape, _) in KEYS[name].items()}
    return match.recognise(sources.Source(Path(name), (column,), specs, lambda n: np.zeros(0)), FAMILIES)


@pytest.mark.parametrize("name", [n for n in KEYS if n != "paligemma_pt224_npz"])
def test_every_public_key_is_used_once_or_ignored_with_a_reason(name):
    m = matched(name)
    assert m.left == []
    assert len(m.found) + len(m.ignored) == len(KEYS[name]) == len(m.source.specs)
    assert all(": " in line for line in m.ignored)
    sizes = match.solve(m, {"n": 16, "K": 1})
    paths = {item.row.ours for item in m.found}
    cfg = FAMILY.build(paths, sizes, {"action_horizon": 50}, None)
    want = FULL["pi05" if "pi05" in name else "pi0"]
    if "lora" in name:
        assert (cfg.vlm.lora_rank, cfg.expert.lora_rank) == (16, 32)
    else:
        assert cfg == want
        assert FAMILY.sizes(cfg).items() <= sizes.items() | {("P", 32)}
        # 812 tensors of which one, the second tower's head, is not read.
        assert {"torch": {777, 778, 812, 813}, "openpi": {50, 51}}[m.column] & {len(KEYS[name])}
    # Every parameter of ours is set, in the shape that it has there.
    ours = {k: v.shape for k, v in flatten(family.abstract(cfg)).items()}
    assert paths == set(ours)
    assert {
        row.ours: expected_shape(row.stored_layout("ours"), sizes) for row in FAMILY.rows if row.ours in ours
    } == ours
    stored = match.expected(m, sizes, paths)
    assert misfits(stored, {item.name: match.Shape(m.shape(item)) for item in m.found}) == []


def test_paligemma_is_a_model_of_its_own():
    m = matched("paligemma_pt224_npz")
    assert (len(m.found), m.left, m.writer.kind) == (32, [], "big_vision")
    paths = {item.row.ours for item in m.found}
    cfg = m.family.build(paths, match.solve(m, {}), {}, None)
    assert cfg == PaliGemmaConfig() and paths == set(flatten(family.abstract(cfg)))


def test_the_table_that_knows_most_names_is_taken():
    other = dataclasses.replace(FAMILY, title="other", rows=FAMILY.rows[:9])
    m = match.recognise(matched("openpi_torch_pi05").source, (other, FAMILY, other))
    assert m.family is FAMILY and m.writer.kind == "torch"
    assert matched("lerobot_pi05_saved_by_lerobot_main").writer.kind == "lerobot"
    with pytest.raises(UserError, match="holds another model: .* unknown to other"):
        match.recognise(m.source, (other,))


def test_one_parameter_under_two_names_is_refused():
    source = matched("openpi_torch_pi0").source
    twice = source.specs | {"model.action_in_proj.bias": source.specs["action_in_proj.bias"]}
    with pytest.raises(UserError, match=r"the same parameter twice: action_in_proj.bias and model.action_in_proj.bias"):
        match.recognise(dataclasses.replace(source, specs=twice), (FAMILY,))


def test_every_row_is_a_parameter_of_some_model():
    lora = dataclasses.replace(GEMMA_2B, lora_rank=2)
    models = [dataclasses.replace(cfg, vlm=lora, expert=lora) for cfg in FULL.values()]
    paths = {path for cfg in models for path in flatten(family.abstract(cfg))}
    assert paths == FAMILY.by_path.keys()


def test_table_names_are_unique():
    for column in ("ours", "openpi", "torch"):
        names = [name for row in FAMILY.rows for name in row.names(column)]
        assert len(names) == len(set(names)) > 40
