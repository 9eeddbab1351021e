"""Broken if this fails: joints move the wrong way, or by the wrong amount, on a robot whose units are not the
model's."""

import math

import numpy as np
import pytest

from openpi_ar.data import transforms as t
from openpi_ar.robot_spec import make_mask, mask_runs

RNG = np.random.default_rng(0)


def test_masks_are_openpis_shorthand():
    assert make_mask(2, -2, 2) == (True, True, False, False, True, True)
    assert make_mask(6, -1) == (True,) * 6 + (False,)
    assert mask_runs(make_mask(2, -2, 2)) == (2, -2, 2) and mask_runs(()) == ()


def test_delta_is_relative_to_the_raw_state_where_masked():
    state, actions = np.array([1.0, 2.0, 3.0, 4.0]), np.array([[11.0, 12.0, 13.0], [21.0, 22.0, 23.0]])
    np.testing.assert_array_equal(t.to_delta(actions, state, (True, False)), [[10, 12, 13], [20, 22, 23]])
    np.testing.assert_array_equal(t.to_delta(actions, state, ()), actions)
    np.testing.assert_array_equal(actions, [[11, 12, 13], [21, 22, 23]])  # the caller's array is left alone


def test_delta_round_trip_with_a_batch():
    state, actions = RNG.normal(size=(4, 8)), RNG.normal(size=(4, 5, 7))
    mask = make_mask(6, -1)
    delta = t.to_delta(actions, state, mask)
    for b in range(4):
        np.testing.assert_allclose(delta[b, :, :6], actions[b, :, :6] - state[b, None, :6], atol=1e-6)
    np.testing.assert_array_equal(delta[..., 6], actions[..., 6])
    np.testing.assert_allclose(t.to_absolute(delta, state, mask), actions, atol=1e-12)
    assert np.abs(t.to_absolute(delta, state[::-1], mask) - actions).max() > 0.1


def test_flip_is_its_own_inverse_and_leaves_the_rest():
    x = np.arange(1.0, 7.0).reshape(2, 3)
    np.testing.assert_array_equal(t.flip(x, (1, -1)), [[1, -2, 3], [4, -5, 6]])
    np.testing.assert_array_equal(t.flip(t.flip(x, (1, -1)), (1, -1)), x)


def pi_gripper(value: float) -> float:
    """openpi's `_gripper_to_angular`, step by step."""
    linear = value * (0.05800 - 0.01844) + 0.01844
    sine = (0.022**2 + linear**2 - 0.036**2) / (2 * 0.022 * linear)
    return (math.asin(min(max(sine, -1.0), 1.0)) - 0.5476) / (1.6296 - 0.5476)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.5, 0.9, 1.0, 1.3])
def test_gripper_state_is_openpis(value):
    assert t.aloha_gripper_state_to_pi(np.array([value]))[0] == pytest.approx(pi_gripper(value), abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_gripper_action_is_openpis(value):
    assert t.aloha_gripper_action_to_pi(np.array([value]))[0] == pytest.approx(
        value * (1.4910 + 0.6213) - 0.6213 - 0.5476, abs=1e-12
    )
    assert t.aloha_gripper_action_from_pi(np.array([value]))[0] == pytest.approx(
        (value + 0.5476 + 0.6213) / (1.4910 + 0.6213), abs=1e-12
    )


def test_gripper_actions_round_trip():
    x = np.linspace(0, 1, 101)
    np.testing.assert_allclose(t.aloha_gripper_action_from_pi(t.aloha_gripper_action_to_pi(x)), x, atol=1e-12)
    # State and action grippers live in different spaces: mixing them up is far off.
    assert np.abs(t.aloha_gripper_action_from_pi(t.aloha_gripper_state_to_pi(x)) - x).max() > 0.05


def test_padding_and_its_inverse():
    x = RNG.normal(size=(3, 4))
    padded = t.pad_dims(x, 6)
    np.testing.assert_array_equal(padded[:, :4], x)
    assert padded.shape == (3, 6) and not padded[:, 4:].any()
