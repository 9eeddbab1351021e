"""Broken if this fails: states and actions are scaled wrongly, or a checkpoint's statistics are misread."""

import json

import numpy as np
import pytest

from openpi_ar.data import normalize
from openpi_ar.errors import UserError

ROWS = np.random.default_rng(0).normal([1.0, -20.0, 0.3], [2.0, 5.0, 0.01], (5_000, 3))


def test_statistics_are_numpys():
    s = normalize.compute_stats(ROWS)
    np.testing.assert_allclose(s.mean, ROWS.mean(0), rtol=1e-6)
    np.testing.assert_allclose(s.std, ROWS.std(0), rtol=1e-6)
    np.testing.assert_allclose(s.q01, np.quantile(ROWS, 0.01, axis=0), rtol=1e-6)
    np.testing.assert_allclose(s.q99, np.quantile(ROWS, 0.99, axis=0), rtol=1e-6)


def test_quantile_is_openpis_formula():
    s = normalize.compute_stats(ROWS)
    expected = (ROWS - s.q01) / (s.q99 - s.q01 + 1e-6) * 2.0 - 1.0
    np.testing.assert_allclose(s.normalize(ROWS), expected, atol=1e-5)
    assert 0.975 < (np.abs(s.normalize(ROWS)) <= 1).mean() < 0.985


def test_z_score_is_openpis_formula():
    s = normalize.compute_stats(ROWS, "z_score")
    np.testing.assert_allclose(s.normalize(ROWS), (ROWS - s.mean) / (s.std + 1e-6), atol=1e-5)


@pytest.mark.parametrize("mode", ["quantile", "z_score"])
def test_inverse_returns_the_input_even_where_nothing_moves(mode):
    x = np.concatenate([ROWS, np.full((len(ROWS), 1), 0.5)], axis=1)
    s = normalize.compute_stats(x, mode)
    np.testing.assert_allclose(s.unnormalize(s.normalize(x)), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["quantile", "z_score"])
def test_near_constant_dimension_is_centred_not_blown_up(mode):
    noise = 0.5 + 1e-6 * np.random.default_rng(0).normal(size=(1000, 1))
    s = normalize.compute_stats(noise, mode)
    assert np.abs(s.normalize(noise)).max() < 1e-4
    # A real excursion keeps its own unit.
    np.testing.assert_allclose(s.normalize(np.array([0.8])), 0.3, atol=1e-4)


@pytest.mark.parametrize("bad", [np.zeros((0, 3)), np.zeros(3), np.array([[0.0, np.nan]])])
def test_unusable_rows_are_refused(bad):
    with pytest.raises(UserError):
        normalize.compute_stats(bad)


def test_file_round_trip_and_openpis_keys(tmp_path):
    stats = {"state": normalize.compute_stats(ROWS, "z_score"), "actions": normalize.compute_stats(2 * ROWS, "z_score")}
    normalize.save_norm_stats(tmp_path, stats)
    body = json.loads((tmp_path / "norm_stats.json").read_text())
    assert set(body["norm_stats"]["state"]) == {"mean", "std", "q01", "q99"}
    loaded = normalize.load_norm_stats(tmp_path)
    for name, s in stats.items():
        assert loaded[name].mode == "z_score"
        for key in ("mean", "std", "q01", "q99"):
            np.testing.assert_array_equal(getattr(loaded[name], key), getattr(s, key))


def test_openpis_file_without_mode_or_quantiles(tmp_path):
    entry = {"mean": [0.0, 1.0], "std": [1.0, 2.0], "q01": None, "q99": None}
    (tmp_path / "norm_stats.json").write_text(json.dumps({"norm_stats": {"state": entry, "actions": entry}}))
    s = normalize.load_norm_stats(tmp_path, default_mode="z_score")["state"]
    np.testing.assert_allclose(s.normalize(np.array([1.0, 5.0])), [1.0, 2.0], atol=1e-5)
    with pytest.raises(UserError, match="state lacks q01, q99"):
        normalize.load_norm_stats(tmp_path)


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ("{", "norm_stats.json"),
        ("[]", "norm_stats"),
        ('{"norm_stats": {}}', "state"),
        ('{"mode": "minmax", "norm_stats": {"state": {}, "actions": {}}}', "minmax"),
        ('{"norm_stats": {"state": {"q01": [0], "q99": [1, 2]}, "actions": {}}}', "different lengths"),
    ],
)
def test_broken_file_is_named(tmp_path, body, names):
    (tmp_path / "norm_stats.json").write_text(body)
    with pytest.raises(UserError, match=names):
        normalize.load_norm_stats(tmp_path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"norm_stats\.json is missing"):
        normalize.load_norm_stats(tmp_path)
