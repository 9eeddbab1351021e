"""If this fails, the tabletop is not reproducible, shows a wrong picture, or grasps by other means than friction."""

import numpy as np
import pytest

from openpi_ar.worlds.tabletop import scene
from openpi_ar.worlds.tabletop.cameras import RayCamera
from openpi_ar.worlds.tabletop.tasks import Layout, clear_task, pair_task
from openpi_ar.worlds.tabletop.world import Tabletop

TOOL = np.array([0.13, -0.14, 0.2])


@pytest.fixture(scope="module")
def world() -> Tabletop:
    return Tabletop()


def layout(red: tuple[float, float] = (0.0, -0.05), yaw: float = 0.0, tool: np.ndarray = TOOL) -> Layout:
    return Layout(("red", "blue"), np.array([red, (0.1, 0.03)]), np.array([yaw, 0.0]), tool, scene.MAX_OPENING)


CLEAR = clear_task("left", ("red", "blue"))


def pixel_of(point: tuple[float, float, float], size: int = 64) -> tuple[int, int]:
    """Row and column of a world point in the front image, by the pinhole equations."""
    forward = scene.FRONT_LOOKS_AT - scene.FRONT_POSITION
    forward = forward / np.linalg.norm(forward)
    up = np.cross([1.0, 0.0, 0.0], forward)
    ray = np.array(point) - scene.FRONT_POSITION
    focal = size / 2 / np.tan(np.radians(scene.FRONT_FOVY) / 2)
    column = size / 2 + focal * ray[0] / (ray @ forward)
    row = size / 2 - focal * (ray @ up) / (ray @ forward)
    return int(row), int(column)


def grasp(world: Tabletop, dx: float, dy: float, yaw: float = 0.0) -> bool:
    """Come down beside the red block's centre by (dx, dy), close, lift and carry; is the block still in the hand?"""
    x, y = dx, -0.05 + dy
    world.reset(0, task=CLEAR, layout=layout(yaw=yaw, tool=np.array([x, y, 0.12])), render=False)
    for target, steps in [((x, y, 0.022, -1), 4), ((x, y, 0.022, 1), 2), ((x, y, 0.12, 1), 4), ((x, 0.1, 0.12, 1), 4)]:
        for _ in range(steps):
            info = world.step(np.array(target), render=False)[4]
    return info["held"] == "red" and info["positions"]["red"][2] > 0.08


def test_same_seed_and_actions_same_pixels(world: Tabletop):
    actions = np.random.default_rng(0).uniform([-0.15, -0.15, 0.02, -1], [0.15, 0.15, 0.2, 1], (12, 4))

    def run(env: Tabletop, seed: int) -> list[np.ndarray]:
        observations = [env.reset(seed)[0], *(env.step(action)[0] for action in actions)]
        return [array for o in observations for array in (o["images"]["front"], o["images"]["wrist"], o["state"])]

    first = run(world, 3)
    for again in (run(world, 3), run(Tabletop(), 3)):
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, run(world, 4), strict=True))


def test_observation_has_the_promised_shapes():
    world = Tabletop(image_size=(16, 32), cameras=("wrist",))
    observation, info = world.reset(0)
    assert observation["images"].keys() == {"wrist"}
    assert observation["images"]["wrist"].shape == (16, 32, 3)
    assert observation["images"]["wrist"].dtype == np.uint8
    assert observation["state"].shape == (4,)
    assert observation["state"].dtype == np.float32
    assert observation["prompt"] == info["task"].prompt
    assert world.step(np.zeros(4), render=False)[0]["images"] == {}


@pytest.mark.parametrize("red", [(0.0, -0.05), (-0.13, 0.03), (-0.1, -0.14)])
def test_a_block_shows_where_it_is(world: Tabletop, red: tuple[float, float]):
    images = world.reset(0, task=CLEAR, layout=layout(red))[0]["images"]
    top = images["front"][pixel_of((*red, 0.04))]
    # Lambert: 0.45 + 0.62 * 0.86 = 0.983 of the block's colour on its upward face.
    np.testing.assert_allclose(top, np.array(scene.RGB["red"]) * 0.983 * 255, atol=1)
    front_face = images["front"][pixel_of((red[0], red[1] - 0.0201, 0.008))]
    np.testing.assert_allclose(front_face, np.array(scene.RGB["red"]) * (0.45 + 0.62 * 0.45) * 255, atol=1)


def test_left_is_left_and_bins_differ(world: Tabletop):
    front = world.reset(0, task=CLEAR, layout=layout())[0]["images"]["front"].astype(int)
    left, right = (pixel_of((*scene.BIN_CENTER[name], 0.0)) for name in ("left", "right"))
    assert left[1] < 32 < right[1]
    assert front[left].min() > front[right].max() + 100
    assert np.ptp(front[left]) < 15  # grey: only blocks are colourful


def test_the_wrist_camera_follows_the_hand(world: Tabletop):
    above = layout(tool=np.array([0.0, -0.05, 0.12]))
    wrist = world.reset(0, task=CLEAR, layout=above)[0]["images"]["wrist"]
    assert wrist[32, 32, 0] > 200
    assert wrist[32, 32, 1] < 50
    moved = layout(tool=np.array([0.0, -0.10, 0.12]))  # hand nearer to the viewer: block further up in the image
    rows = np.nonzero(world.reset(0, task=CLEAR, layout=moved)[0]["images"]["wrist"][..., 0] > 200)[0]
    assert rows.mean() < 26


def test_the_block_under_the_hand_stays_visible_in_both_cameras(world: Tabletop):
    for height in (0.022, 0.07, 0.12):
        images = world.reset(0, task=CLEAR, layout=layout(tool=np.array([0.0, -0.05, height])))[0]["images"]
        for image in images.values():
            red = (image[..., 0] > 120) & (image[..., 1] < 50) & (image[..., 2] < 50)
            assert red.sum() >= 20


@pytest.mark.parametrize("dx", [-0.015, 0.0, 0.015])
@pytest.mark.parametrize("dy", [-0.015, 0.0, 0.015])
def test_a_grasp_forgives_a_centimetre_and_a_half(world: Tabletop, dx: float, dy: float):
    assert grasp(world, dx, dy, yaw=0.2)


def test_a_grasp_needs_the_block_and_friction(world: Tabletop):
    assert not grasp(world, 0.0, 0.06)
    slippery = Tabletop()
    slippery.reset(0, task=CLEAR, layout=layout(), render=False)
    slippery._model.geom_friction[:] = 1e-3
    assert not grasp(slippery, 0.0, 0.0)


def test_the_tool_reaches_its_target_at_limited_speed(world: Tabletop):
    world.reset(0, task=CLEAR, layout=layout(), render=False)
    goal = np.array([-0.1, 0.1, 0.1, -1.0])
    previous = TOOL
    for _ in range(10):
        state = world.step(goal, render=False)[0]["state"]
        assert np.hypot(*(state[:2] - previous[:2])) < 0.055
        previous = state[:3]
    np.testing.assert_allclose(state[:3], goal[:3], atol=1e-3)


def test_success_needs_every_block_landed_and_the_order(world: Tabletop):
    def play(task_bins: tuple[str, str], moved: list[tuple[str, str]]) -> tuple[bool, dict]:
        world.reset(0, task=pair_task("red", task_bins[0], "blue", task_bins[1]), layout=layout(), render=False)
        for color, name in moved:
            body = world._bodies[world._colors.index(color)]
            joint = world._model.body_jntadr[body]
            address = world._model.jnt_qposadr[joint]
            world._data.qpos[address : address + 3] = [*scene.BIN_CENTER[name], 0.03]
            _, reward, terminated, _, info = world.step(np.array([0.1, -0.1, 0.15, -1.0]), render=False)
            assert reward == float(terminated) == float(info["success"])
        return terminated, info

    assert play(("left", "right"), [("red", "left"), ("blue", "right")])[0]
    terminated, info = play(("left", "right"), [("red", "left")])
    assert not terminated
    assert info["blocks_placed"] == 0.5
    terminated, info = play(("left", "right"), [("blue", "right"), ("red", "left")])
    assert not terminated
    assert info["out_of_order"]
    assert info["blocks_placed"] == 1.0


def test_an_episode_ends_at_its_step_limit(world: Tabletop):
    world.reset(0, task=CLEAR, layout=layout(), render=False)
    ends = [world.step(np.array([*TOOL, -1.0]), render=False)[2:4] for _ in range(world.max_steps)]
    assert ends[-1] == (False, True)
    assert not any(truncated for _, truncated in ends[:-1])


def test_bad_input_is_named(world: Tabletop):
    world.reset(0, render=False)
    with pytest.raises(ValueError, match=r"4 finite numbers.*got"):
        world.step(np.zeros(5))
    with pytest.raises(ValueError, match="finite"):
        world.step(np.array([0.0, np.nan, 0.0, 1.0]))
    with pytest.raises(ValueError, match="lacks \\['green'\\]"):
        world.reset(0, task=clear_task("left", ("green",)), layout=layout())
    with pytest.raises(RuntimeError, match="reset"):
        Tabletop().step(np.zeros(4))
    with pytest.raises(ValueError, match=r"unknown camera 'side'.*front.*wrist"):
        Tabletop(cameras=("side",))
    with pytest.raises(ValueError, match="positive"):
        RayCamera(world._model, "front", (0, 64))
