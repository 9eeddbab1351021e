"""Broken if this fails: states and actions are scaled wrongly, or a checkpoint's statistics are misread."""

import json

import numpy as np
import pytest

from openpi_ar.data import normalize
from openpi_ar.errors import UserError
from openpi_ar.model_config import ModelConfig

ROWS = np.random.default_rng(0).normal([1.0, -20.0, 0.3], [2.0, 5.0, 0.01], (5_000, 3))


def test_statistics_are_numpys():
    s = normalize.compute_stats(ROWS.T)
    np.testing.assert_allclose(s.mean, ROWS.mean(0), rtol=1e-6)
    np.testing.assert_allclose(s.std, ROWS.std(0), rtol=1e-6)
    np.testing.assert_allclose(s.q01, np.quantile(ROWS, 0.01, axis=0), rtol=1e-6)
    np.testing.assert_allclose(s.q99, np.quantile(ROWS, 0.99, axis=0), rtol=1e-6)


def test_quantile_is_openpis_formula():
    s = normalize.compute_stats(ROWS.T)
    expected = (ROWS - s.q01) / (s.q99 - s.q01 + 1e-6) * 2.0 - 1.0
    np.testing.assert_allclose(s.normalize(ROWS), expected, atol=1e-5)
    assert 0.975 < (np.abs(s.normalize(ROWS)) <= 1).mean() < 0.985


def test_z_score_is_openpis_formula():
    s = normalize.compute_stats(ROWS.T, "z_score")
    np.testing.assert_allclose(s.normalize(ROWS), (ROWS - s.mean) / (s.std + 1e-6), atol=1e-5)


@pytest.mark.parametrize("mode", ["quantile", "z_score"])
def test_inverse_returns_the_input_even_where_nothing_moves(mode):
    x = np.concatenate([ROWS, np.full((len(ROWS), 1), 0.5)], axis=1)
    s = normalize.compute_stats(x.T, mode)
    np.testing.assert_allclose(s.unnormalize(s.normalize(x)), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["quantile", "z_score"])
def test_near_constant_dimension_is_centred_not_blown_up(mode):
    noise = 0.5 + 1e-6 * np.random.default_rng(0).normal(size=(1000, 1))
    s = normalize.compute_stats(noise.T, mode)
    assert np.abs(s.normalize(noise)).max() < 1e-4
    # A real excursion keeps its own unit.
    np.testing.assert_allclose(s.normalize(np.array([0.8])), 0.3, atol=1e-4)


@pytest.mark.parametrize("mode", ["quantile", "z_score"])
def test_floor_is_in_the_statistics_so_openpis_formula_alone_gives_our_numbers(mode):
    x = np.concatenate([ROWS, 0.5 + 1e-6 * np.random.default_rng(0).normal(size=(len(ROWS), 1))], axis=1)
    s = normalize.compute_stats(x.T, mode)
    quantile, z_score = (x - s.q01) / (s.q99 - s.q01 + 1e-6) * 2.0 - 1.0, (x - s.mean) / (s.std + 1e-6)
    openpi = quantile if mode == "quantile" else z_score
    np.testing.assert_allclose(s.normalize(x), openpi, atol=1e-5)
    assert np.abs(openpi[:, 3]).max() < 1e-4
    np.testing.assert_array_equal(s.floored().q01, s.q01)


@pytest.mark.parametrize("mode", ["quantile", "z_score"])
def test_a_released_checkpoints_near_constant_dimension_keeps_openpis_numbers(tmp_path, mode):
    """Its model has learnt the stretched ones: floored, an output of 1 would move the joint by a radian."""
    entry = {"mean": [0.5], "std": [2e-5], "q01": [0.49997], "q99": [0.50003]}
    (tmp_path / "norm_stats.json").write_text(json.dumps({"norm_stats": {"state": entry, "actions": entry}}))
    s = normalize.load_norm_stats(tmp_path, required_mode=mode)["actions"]
    y = np.array([-1.0, 0.0, 1.0])[:, None]
    want = y * (2e-5 + 1e-6) + 0.5 if mode == "z_score" else (y + 1.0) / 2.0 * (6e-5 + 1e-6) + 0.49997
    np.testing.assert_allclose(s.unnormalize(y), want, atol=1e-7)
    assert np.abs(s.floored().unnormalize(y) - want).max() > 0.9


@pytest.mark.parametrize("bad", [np.zeros((0, 3)), np.array([[0.0, np.nan]])])
def test_unusable_rows_are_refused(bad):
    with pytest.raises(UserError):
        normalize.compute_stats(bad.T)


def test_file_round_trip_and_openpis_keys(tmp_path):
    stats = {
        "state": normalize.compute_stats(ROWS.T, "z_score"),
        "actions": normalize.compute_stats(2 * ROWS.T, "z_score"),
    }
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


def test_openpis_file_is_written_back_digit_for_digit(tmp_path):
    entry = {"mean": [0.1, 1 / 3], "std": [0.7, 0.123456789012345], "q01": [-0.1, 0.2], "q99": [1e-9, 2.5]}
    body = {"norm_stats": {"state": entry, "actions": entry}}
    (tmp_path / "norm_stats.json").write_text(json.dumps(body))
    folder = tmp_path / "physical-intelligence" / "libero"  # made as needed
    normalize.save_norm_stats(folder, normalize.load_norm_stats(tmp_path))
    assert json.loads((folder / "norm_stats.json").read_text()) == {"mode": "quantile", **body}
    assert [p.name for p in folder.iterdir()] == ["norm_stats.json"]


@pytest.mark.parametrize(("stored", "needed", "model"), [("z_score", "pi05", "pi0.5"), ("quantile", "pi0", "pi0 ")])
def test_a_stored_mode_that_the_model_was_not_trained_with_is_refused(tmp_path, stored, needed, model):
    required = ModelConfig(pi05=needed == "pi05").norm_mode
    stats = {name: normalize.compute_stats(ROWS.T, stored) for name in ("state", "actions")}
    normalize.save_norm_stats(tmp_path, stats)
    with pytest.raises(UserError, match=rf'norm_stats.json.* mode {stored}, but {model}.*{required}.*write "mode"'):
        normalize.load_norm_stats(tmp_path, required_mode=required)
    # As the message says: the same file with the other mode, or with none, is taken.
    path = tmp_path / "norm_stats.json"
    body = json.loads(path.read_text())
    for mode in ({"mode": required}, {}):
        path.write_text(json.dumps({**mode, "norm_stats": body["norm_stats"]}))
        assert normalize.load_norm_stats(tmp_path, required_mode=required)["state"].mode == required


def put_stats(checkpoint, *asset_ids: str) -> None:
    stats = {name: normalize.compute_stats(ROWS.T) for name in ("state", "actions")}
    for asset_id in asset_ids:
        normalize.save_norm_stats(checkpoint / "assets" / asset_id, stats)


@pytest.mark.parametrize("asset_id", ["", "droid", "physical-intelligence/libero", "me/mine"])
def test_the_only_statistics_are_found_wherever_they_are(tmp_path, asset_id):
    put_stats(tmp_path, asset_id)
    assert normalize.find_norm_stats(tmp_path, known=["droid"]) == tmp_path / "assets" / asset_id


def test_several_statistics_need_a_choice(tmp_path):
    put_stats(tmp_path, "droid", "trossen", "physical-intelligence/libero")
    with pytest.raises(UserError, match="droid, physical-intelligence/libero, trossen; pick one with --asset-id"):
        normalize.find_norm_stats(tmp_path)
    assert normalize.find_norm_stats(tmp_path, known=["trossen"]).name == "trossen"
    assert normalize.find_norm_stats(tmp_path, asset_id="droid", known=["trossen"]).name == "droid"
    with pytest.raises(UserError, match="of --asset-id trosen: it has trossen, "):
        normalize.find_norm_stats(tmp_path, asset_id="trosen")
    with pytest.raises(UserError, match="no statistics of --asset-id ../../elsewhere"):
        normalize.find_norm_stats(tmp_path, asset_id="../../elsewhere")


def test_no_statistics_at_all_says_where_they_belong(tmp_path):
    with pytest.raises(UserError, match=r"holds no normalisation statistics: expected .*assets/droid/norm_stats.json"):
        normalize.find_norm_stats(tmp_path, known=["droid"])


def test_longer_statistics_are_cut_and_shorter_ones_refused():
    s = normalize.compute_stats(ROWS.T)
    np.testing.assert_array_equal(s.first(2, "state").q99, s.q99[:2])
    with pytest.raises(UserError, match=r"statistics of the state have 3 dimensions but the robot has 8.*--asset-id"):
        s.first(8, "state")


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ("{", "norm_stats.json"),
        ("[]", "norm_stats"),
        ('{"norm_stats": {}}', "state"),
        ('{"mode": "minmax", "norm_stats": {"state": {}, "actions": {}}}', "minmax"),
        ('{"norm_stats": {"state": {"q01": [0], "q99": [1, 2]}, "actions": {}}}', "different lengths"),
        ('{"norm_stats": {"state": {"q01": [0], "q99": ["x"]}, "actions": {}}}', "lists of numbers"),
        ('{"norm_stats": {"state": {"q01": [0], "q99": [NaN]}, "actions": {}}}', "not finite in q99"),
    ],
)
def test_broken_file_is_named(tmp_path, body, names):
    (tmp_path / "norm_stats.json").write_text(body)
    with pytest.raises(UserError, match=names):
        normalize.load_norm_stats(tmp_path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"norm_stats\.json is missing"):
        normalize.load_norm_stats(tmp_path)
