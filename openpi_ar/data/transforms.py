"""Robot units to the units a model is trained in, each map beside its inverse. Plain numpy, before normalisation.

    actions   absolute                         <-> relative to the state the chunk starts from
    ALOHA     its own joint signs and grippers <-> those of the runtime that pi's base models were trained with
    vectors   the robot's dimensions           <-> the model's

`state_to_model`, `actions_to_model` and `actions_from_model` apply what a robot's schema asks for.

The formulas are openpi's (`src/openpi/transforms.py`, `src/openpi/policies/aloha_policy.py`).
"""

from collections.abc import Callable, Sequence

import numpy as np

from openpi_ar.robot_spec import RobotSpec

# Interbotix: the gripper's linear travel in metres (closed, open), and the arm and horn of its crank in metres.
_TRAVEL = (0.01844, 0.05800)
_ARM, _HORN = 0.036, 0.022
# pi's runtime calls encoder counts 2405 and 3110 of 4096 zero and one; as radians about ALOHA's zero of 2048.
_PI_ANGLES = (0.5476, 1.6296)
# ALOHA's commands: joint angles of the closed and the open gripper in radians.
_COMMAND_ANGLES = (-0.6213, 1.4910)


def state_to_model(spec: RobotSpec, state: np.ndarray) -> np.ndarray:
    """The robot's states [... P_real] as models know them; float64."""
    return _converted(spec, flip(np.asarray(state, np.float64), spec.flips), aloha_gripper_state_to_pi)


def absolute_to_model(spec: RobotSpec, actions: np.ndarray) -> np.ndarray:
    """`actions_to_model` [... X_real] without its last part, which makes them relative to the state."""
    return _converted(spec, flip(np.asarray(actions, np.float64), spec.flips), aloha_gripper_action_to_pi)


def actions_to_model(spec: RobotSpec, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
    """The robot's actions [... A X_real] as a model predicts them; float64.

    `state` [... P_real] is that of `state_to_model`.
    """
    return to_delta(absolute_to_model(spec, actions), state, spec.delta)


def actions_from_model(spec: RobotSpec, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
    """Inverse of `actions_to_model`."""
    x = np.array(to_absolute(np.asarray(actions, np.float64), state, spec.delta))
    return flip(_converted(spec, x, aloha_gripper_action_from_pi), spec.flips)


def to_delta(actions: np.ndarray, state: np.ndarray, mask: Sequence[bool]) -> np.ndarray:
    """Actions [... A X] relative to state [... P], both in real units, where the mask is True.

    The mask may be shorter than X: dimensions past its end stay absolute, as do those where it is False (grippers).
    """
    return np.asarray(actions) - _reference(actions, state, mask) if len(mask) else np.asarray(actions)


def to_absolute(actions: np.ndarray, state: np.ndarray, mask: Sequence[bool]) -> np.ndarray:
    """Inverse of `to_delta`; `state` is the one that the chunk was asked for with."""
    return np.asarray(actions) + _reference(actions, state, mask) if len(mask) else np.asarray(actions)


def flip(x: np.ndarray, signs: Sequence[int]) -> np.ndarray:
    """The first dimensions of x [... X] times +-1. Its own inverse."""
    x = np.array(x, copy=True)
    x[..., : len(signs)] *= np.asarray(signs, x.dtype)
    return x


def aloha_gripper_state_to_pi(x: np.ndarray) -> np.ndarray:
    """ALOHA's gripper positions (0 closed, 1 open, linear in the fingers' travel) to pi's (crank angle)."""
    travel = _unscale(x, *_TRAVEL)
    sine = (_HORN**2 + travel**2 - _ARM**2) / (2 * _HORN * travel)
    return _scale(np.arcsin(np.clip(sine, -1.0, 1.0)), *_PI_ANGLES)


def aloha_gripper_action_to_pi(x: np.ndarray) -> np.ndarray:
    """Gripper commands as ALOHA takes them (0 closed, 1 open, linear in the joint's angle) to pi's."""
    return _unscale(x, *_COMMAND_ANGLES) - _PI_ANGLES[0]


def aloha_gripper_action_from_pi(x: np.ndarray) -> np.ndarray:
    """Inverse of `aloha_gripper_action_to_pi`."""
    return _scale(x + _PI_ANGLES[0], *_COMMAND_ANGLES)


def pad_dims(x: np.ndarray, dims: int) -> np.ndarray:
    """Zeros appended to the last axis up to `dims`. Inverse: `x[..., :real]`."""
    out = np.zeros((*x.shape[:-1], dims), x.dtype)
    out[..., : x.shape[-1]] = x
    return out


def _converted(spec: RobotSpec, x: np.ndarray, aloha: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The array itself with its grippers converted: ALOHA's by `aloha`, inverted ones inverted."""
    for dims, convert in ((spec.aloha_grippers, aloha), (spec.inverted_grippers, lambda x: 1.0 - x)):
        if dims:
            x[..., list(dims)] = convert(x[..., list(dims)])
    return x


def _reference(actions: np.ndarray, state: np.ndarray, mask: Sequence[bool]) -> np.ndarray:
    """What is subtracted: the state where the mask is True, else 0; [... 1 X]."""
    reference = np.zeros((*np.shape(state)[:-1], np.shape(actions)[-1]), np.float32)
    dims = len(mask)
    reference[..., :dims] = np.where(mask, np.asarray(state)[..., :dims], 0)
    return reference[..., None, :]


def _scale(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """[low, high] to [0, 1]."""
    return (x - low) / (high - low)


def _unscale(x: np.ndarray, low: float, high: float) -> np.ndarray:
    return x * (high - low) + low
