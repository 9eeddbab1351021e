"""If this fails, the benchmarks compare programs that do not return the same numbers, or do not say which is faster."""

import json

import pytest

from benchmarks import baseline, inference, passes, run
from benchmarks.sizes import SIZES


@pytest.mark.slow
def test_the_command_gives_ratios_of_equal_programs(tmp_path):
    out = tmp_path / "out.json"
    run.compare(run.Args(what="inference", size="tiny", seconds=0.0, json=out), "float32")
    found = json.loads(out.read_text())
    whole = {"text_and_actions", "text_and_actions_draft", "text_and_actions_known"}
    assert found["ratios"].keys() == {"decode_token", "denoise", "block", *whole}
    assert all(ratio > 0 for ratio in found["ratios"].values())
    known = {f"text_and_actions, {name}" for name in ("right draft", "known text")}
    stages = {"vision", "prefill", "denoise", "text_and_actions", *known}
    assert found["largest_differences"].keys() == stages
    assert max(found["largest_differences"].values()) < 1e-4


def test_a_baseline_with_other_numbers_is_refused(monkeypatch):
    right = baseline.embed_images
    monkeypatch.setattr(baseline, "embed_images", lambda model, obs: right(model, obs) + 0.01)
    with pytest.raises(AssertionError, match=r"the two paths differ by 0\.0"):
        inference.programs(SIZES["tiny"], "float32")


def test_passes_are_counted_of_texts_that_come_out_as_they_should():
    count, text = passes.make_counter(12, 1, 4), (5, 6, 7, 8, 9)
    # One token comes from the prefill, one from each pass, and what is agreed on.
    assert count(text, None, []) == 5
    assert count(text, None, [text]) == 2  # 5 and 6 7 8, then 9
    assert count(text, (5, 6, 7, 2), [text]) == 1  # 8 comes from the check of the draft
    assert count(text, text, []) == 0
    assert count(text, None, [(5, 6, 2), text]) == 2  # 5 and 6, which the first text knows; then 7 8 9
    assert count(text, None, [(2, 6), (5, 2)]) == 5
