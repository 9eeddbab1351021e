"""If this fails, the LIBERO world is not LIBERO: other pictures, states or starts than openpi's client sees; or its
expert fails."""

from importlib.util import find_spec
import itertools

import numpy as np
import pytest

from openpi_ar.config import LeRobotData
from openpi_ar.data.lerobot.load import load_lerobot
from openpi_ar.data.robots import ROBOTS
from openpi_ar.errors import UserError
from openpi_ar.worlds.libero import world as world_module
from openpi_ar.worlds.libero.export import write_libero
from openpi_ar.worlds.libero.record import record_episode
from openpi_ar.worlds.libero.tasks import TASKS, pick_up, put
from openpi_ar.worlds.libero.world import CAMERAS, LiberoWorld

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # software rendering
    pytest.mark.skipif(
        find_spec("libero") is None, reason="LIBERO is not installed: pip install 'openpi-ar[libero]', EGL or OSMesa"
    ),
]

TASK, STATE = 7, 3
"""The smallest scene, and a start of the arm that is not LIBERO's middle one."""


@pytest.fixture(scope="module")
def world():
    made = LiberoWorld((64, 64))
    yield made
    made.close()


def test_an_episode_starts_in_liberos_state_and_its_observation_is_what_openpis_client_sends(world, monkeypatch):
    monkeypatch.setattr(world_module, "SETTLE_STEPS", 0)
    obs, info = world.reset(TASK, STATE)
    env, states = world._env, world._states
    np.testing.assert_array_equal(env.get_sim_state(), states[STATE])
    assert obs["prompt"] == TASKS[TASK].prompt and info["subtask"] == pick_up("alphabet soup")
    raw = env.env._get_observations()
    np.testing.assert_array_equal(
        obs["state"][[0, 1, 2, 6, 7]], np.float32([*raw["robot0_eef_pos"], *raw["robot0_gripper_qpos"]])
    )
    turn = obs["state"][3:6]
    angle = np.linalg.norm(turn)
    quaternion = np.r_[np.sin(angle / 2) * turn / angle, np.cos(angle / 2)]
    assert abs(quaternion @ raw["robot0_eef_quat"]) > 1 - 1e-6
    pictures = _liberos_pictures(STATE)
    for name, camera in CAMERAS.items():
        image = obs["images"][name].astype(float)
        theirs = pictures[camera][::-1, ::-1].astype(float)  # as openpi's client turns it
        error = np.abs(image - theirs).mean()
        others = [np.abs(image - x).mean() for x in (theirs[::-1], theirs[:, ::-1], theirs[::-1, ::-1])]
        assert error < 10 and 2.5 * error < min(others), (name, error, others)


def _liberos_pictures(state: int) -> dict[str, np.ndarray]:
    """What LIBERO's own environment for evaluation shows in an initial state, its rows from the bottom up."""
    from libero.libero import benchmark
    from libero.libero.envs import OffScreenRenderEnv

    suite = benchmark.get_benchmark("libero_10")()
    env = OffScreenRenderEnv(
        bddl_file_name=suite.get_task_bddl_file_path(TASK), camera_heights=64, camera_widths=64, hard_reset=False
    )
    env.reset()
    obs = env.set_init_state(suite.get_task_init_states(TASK)[state])
    env.close()
    return {camera: obs[f"{camera}_image"] for camera in CAMERAS.values()}


def test_a_disturbed_demonstration_succeeds_and_reads_back(world, tmp_path):
    episode = record_episode(world, TASK, (0, 0), 1.0)
    first, second = TASKS[TASK].objects
    said = [subtask for subtask, _ in itertools.groupby(episode.subtasks)]
    assert [s for s in (pick_up(first), put(first), pick_up(second), put(second), "done") if s in said] == list(
        dict.fromkeys(said)
    )
    assert said[-1] == "done" and np.abs(episode.action).max() <= 1
    root = write_libero(tmp_path / "out", [episode], (64, 64))
    cameras = tuple(ROBOTS["libero"].cameras.values())
    cfg = LeRobotData(str(root), robot=ROBOTS["libero"].of_model("pi05"), held_out=0.0, frames="decode")
    source = load_lerobot(cfg, 4, cameras, (64, 64), needs_subtask=True)[0]
    assert len(source) == len(episode.state)
    for i in range(0, len(source), 40):
        assert source[i]["subtask"] == episode.subtasks[i]
        np.testing.assert_array_equal(np.float32(source[i]["state"]), episode.state[i])
        for c, camera in enumerate(cameras):
            assert np.abs(source[i]["images"][camera].astype(int) - episode.images[i, c]).mean() < 8


def test_another_task_or_state_is_refused(world):
    with pytest.raises(UserError, match="no task 3 here: choose one of 0, 1, 7"):
        world.reset(3)
    with pytest.raises(UserError, match="initial states 0 to 49, found 50"):
        world.reset(TASK, 50)
