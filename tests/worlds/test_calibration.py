"""If this fails, a policy looks surer or less sure than it is: calibration figures are not what they say."""

import numpy as np
import pytest

from openpi_ar.worlds.calibration import Calibration


def test_figures_of_a_case_done_by_hand():
    # Surest first: right, wrong, right, wrong.
    got = Calibration.of([0.95, 0.92, 0.55, 0.15], [True, False, True, False])
    assert (got.count, got.right) == (4, 0.5)
    assert got.area_risk_coverage == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)
    assert got.area_at_best == pytest.approx((0 + 0 + 1 / 3 + 2 / 4) / 4)
    assert got.brier == pytest.approx((0.05**2 + 0.92**2 + 0.45**2 + 0.15**2) / 4)
    assert got.expected_error == pytest.approx((2 * abs(0.935 - 0.5) + abs(0.55 - 1) + abs(0.15 - 0)) / 4)
    assert [(b.above, b.count, b.right) for b in got.bins] == [(0.1, 1, 0.0), (0.5, 1, 1.0), (0.9, 2, 0.5)]
    assert Calibration.of([1.0], [True]).bins[0].above == 0.9


def test_the_area_is_that_of_random_order_where_all_are_equally_sure():
    right = np.random.default_rng(0).random(400) < 0.7
    got = Calibration.of(np.full(400, 0.5), right)
    assert got.area_risk_coverage == pytest.approx(1 - got.right)
    assert got.area_at_best < 0.1
    # Ties count as their mean, in whatever order they come.
    sure, order = np.repeat([0.9, 0.4], 200), np.random.default_rng(1).permutation(200)
    mixed = np.concatenate([right[:200][order], right[200:]])
    a, b = Calibration.of(sure, right), Calibration.of(sure, mixed)
    assert a.area_risk_coverage == pytest.approx(b.area_risk_coverage)


def test_a_calibrated_source_has_a_small_error_and_an_overconfident_one_has_not():
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    right = rng.random(20_000) < p
    assert Calibration.of(p, right).expected_error < 0.02  # deviation of a bin of 2,000: 0.01
    assert Calibration.of(np.sqrt(p), right).expected_error > 0.1  # control
    assert Calibration.of(p, right).area_risk_coverage < Calibration.of(1 - p, right).area_risk_coverage
