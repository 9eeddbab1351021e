"""If this fails, the benchmarks compare programs that do not return the same numbers, or do not say which is faster."""

import json

import pytest

from benchmarks import baseline, inference, run
from benchmarks.sizes import SIZES


@pytest.mark.slow
def test_the_command_gives_ratios_of_equal_programs(tmp_path):
    out = tmp_path / "out.json"
    run.compare(run.Args(what="inference", size="tiny", seconds=0.0, json=out), "float32")
    found = json.loads(out.read_text())
    assert found["ratios"].keys() == {"decode_token", "denoise", "text_and_actions", "text_and_actions_draft"}
    assert all(ratio > 0 for ratio in found["ratios"].values())
    stages = {"vision", "prefill", "denoise", "text_and_actions", "text_and_actions_draft"}
    assert found["largest_differences"].keys() == stages
    assert max(found["largest_differences"].values()) < 1e-4


def test_a_baseline_with_other_numbers_is_refused(monkeypatch):
    right = baseline.embed_images
    monkeypatch.setattr(baseline, "embed_images", lambda model, obs: right(model, obs) + 0.01)
    with pytest.raises(AssertionError, match=r"the two paths differ by 0\.0"):
        inference.programs(SIZES["tiny"], "float32")
