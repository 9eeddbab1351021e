"""Broken if this fails: a released checkpoint sees or moves a robot otherwise than in openpi."""

import dataclasses
import json

import numpy as np
import pytest

from configs.debug import DEBUG
from openpi_ar.config import InferenceConfig
from openpi_ar.data import robots
from openpi_ar.data.inputs import InputTransform
from openpi_ar.data.normalize import NormStats
from openpi_ar.data.robot import Robot
from openpi_ar.errors import UserError
from openpi_ar.text.templates import TEMPLATES
from openpi_ar.text.tokenizer import load_tokenizer
from openpi_ar.worlds import robot_file

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
RNG = np.random.default_rng(0)
# openpi's _joint_flip_mask.
FLIPS = np.array([1, -1, -1, 1, 1, 1, 1, 1, -1, -1, 1, 1, 1, 1])


def config(robot: str, pi05: bool, horizon: int = 5) -> InferenceConfig:
    spec, kind = robots.get_robot(robot), "pi05" if pi05 else "pi0"
    model = dataclasses.replace(
        DEBUG.model, pi05=pi05, cameras=CAMERAS, state_dim=32, action_dim=32, action_horizon=horizon
    )
    text = dataclasses.replace(DEBUG.text, template=spec.variant(kind).template, max_prompt_tokens=200)
    return InferenceConfig(model, text, robot=spec.of_model(kind))


def statistics(dims: int, pi05: bool) -> dict[str, NormStats]:
    """Of two unlike quantities, in the mode that openpi normalises with."""
    rng = np.random.default_rng(dims)

    def one() -> NormStats:
        mean, std = rng.normal(size=dims), rng.uniform(0.5, 2, dims)
        return NormStats(mean, std, mean - 2 * std, mean + 3 * std, mode="quantile" if pi05 else "z_score")

    return {"state": one(), "actions": one()}


def transform(robot: str, pi05: bool, dims: int = 32) -> InputTransform:
    return InputTransform(config(robot, pi05), load_tokenizer("embedded"), statistics(dims, pi05))


def in_real_units(t: InputTransform, actions: np.ndarray, raws: list[dict]) -> np.ndarray:
    return t.actions_to_real(actions, [t.robot.read(raw) for raw in raws])


def normalised(x: np.ndarray, s: NormStats) -> np.ndarray:
    """openpi's Normalize, with statistics longer than x."""
    mean, std, low, high = (a[: x.shape[-1]] for a in (s.mean, s.std, s.q01, s.q99))
    return (x - mean) / (std + 1e-6) if s.mode == "z_score" else (x - low) / (high - low + 1e-6) * 2 - 1


def unnormalised(y: np.ndarray, s: NormStats) -> np.ndarray:
    """openpi's Unnormalize of all 32 dimensions."""
    return y * (s.std + 1e-6) + s.mean if s.mode == "z_score" else (y + 1) / 2 * (s.q99 - s.q01 + 1e-6) + s.q01


def picture(value: int, *, chw: bool = False, dtype: type = np.uint8) -> np.ndarray:
    image = np.full((32, 32, 3), value, np.uint8)
    image[..., 1] = 7
    image = image.astype(dtype) / 255 if dtype is not np.uint8 else image
    return image.transpose(2, 0, 1) if chw else image


def aloha_raw(**changes) -> dict:
    names = ("cam_high", "cam_left_wrist", "cam_right_wrist", "cam_low")
    images = {name: picture(10 * (i + 1), chw=True) for i, name in enumerate(names)}
    return {"images": images, "state": np.linspace(-0.9, 0.9, 14), "prompt": "fold_the towel\n", **changes}


def droid_raw(**changes) -> dict:
    return {
        "observation/exterior_image_1_left": picture(10),
        "observation/exterior_image_2_left": picture(90),
        "observation/wrist_image_left": picture(20),
        "observation/joint_position": np.linspace(-1, 1, 7),
        "observation/gripper_position": np.array([0.3]),
        "prompt": "pick up the block",
        **changes,
    }


def libero_raw(**changes) -> dict:
    return {
        "observation/image": picture(10),
        "observation/wrist_image": picture(20),
        "observation/state": np.linspace(-1, 1, 8),
        "prompt": "open the drawer",
        **changes,
    }


RAWS = {"aloha": aloha_raw, "aloha_sim": aloha_raw, "droid": droid_raw, "libero": libero_raw}


@pytest.mark.parametrize(
    ("name", "horizons", "state", "actions", "delta_pi0", "delta_pi05", "asset"),
    [
        ("aloha", (50, 50), 14, 14, [1] * 6 + [0] + [1] * 6 + [0], [1] * 6 + [0] + [1] * 6 + [0], "trossen"),
        ("aloha_sim", (50, 50), 14, 14, [], [], "lerobot/aloha_sim_transfer_cube_human"),
        ("droid", (10, 15), 8, 8, [], [], "droid"),
        ("libero", (50, 10), 8, 7, [1] * 6 + [0], [], "physical-intelligence/libero"),
    ],
)
def test_table_is_openpis(name, horizons, state, actions, delta_pi0, delta_pi05, asset):
    spec = robots.get_robot(name)
    assert (spec.pi0.horizon, spec.pi05.horizon) == horizons
    assert (spec.state_dims, spec.action_dims) == (state, actions)
    assert (list(spec.pi0.delta), list(spec.pi05.delta)) == (delta_pi0, delta_pi05)
    assert spec.asset_ids == (asset,)


@pytest.mark.parametrize("pi05", [True, False])
@pytest.mark.parametrize("name", list(RAWS))
def test_images_land_on_their_cameras(name, pi05):
    arrays = transform(name, pi05).observation(RAWS[name]())
    right = "aloha" in name
    np.testing.assert_array_equal(arrays["image_mask"], [True, True, right])
    for i, value in enumerate((10, 20, 30 if right else 0)):
        assert (arrays["images"][i, ..., 0] == value).all()
        assert (arrays["images"][i, ..., 1] == (7 if value else 0)).all()


def test_image_forms_and_names_that_mean_the_same():
    t, want = transform("droid", True), None
    for keys in (
        ("observation/exterior_image_1_left", "observation/wrist_image_left"),
        ("exterior_image_1_left", "wrist_image_left"),
        ("base_0_rgb", "left_wrist_0_rgb"),
    ):
        for chw in (True, False):
            for dtype in (np.uint8, np.float64):
                views = {k: picture(v, chw=chw, dtype=dtype) for k, v in zip(keys, (10, 20), strict=True)}
                state = {"state": np.r_[np.linspace(-1, 1, 7), 0.3], "prompt": "pick up the block"}
                for raw in ({**state, **views}, {**state, "images": views}):
                    got = t.observation(raw)
                    want = want or t.observation(droid_raw())
                    np.testing.assert_allclose(got["images"].astype(int), want["images"], atol=1 * (dtype != np.uint8))
                    np.testing.assert_array_equal(got["state"], want["state"])
    nested = {"observation": {k.split("/")[1]: v for k, v in droid_raw().items() if "/" in k}, "prompt": "x"}
    np.testing.assert_array_equal(t.observation(nested)["state"], t.observation(droid_raw())["state"])
    scalar = t.observation(droid_raw(**{"observation/gripper_position": 0.3}))
    np.testing.assert_array_equal(scalar["state"], t.observation(droid_raw())["state"])


def test_left_out_cameras_are_masked_only_where_openpi_allows_it():
    raw = aloha_raw(images={"cam_high": picture(10, chw=True)})
    np.testing.assert_array_equal(transform("aloha", True).observation(raw)["image_mask"], [True, False, False])
    masked = droid_raw(masked=["wrist_image_left"])
    np.testing.assert_array_equal(transform("droid", True).observation(masked)["image_mask"], [True, False, False])


@pytest.mark.parametrize("name", ["droid", "libero"])
@pytest.mark.parametrize("pi05", [True, False])
def test_state_and_prompt_are_openpis(name, pi05):
    raw, t = RAWS[name](), transform(name, pi05)
    if name == "droid":
        state = np.r_[raw["observation/joint_position"], raw["observation/gripper_position"]]
    else:
        state = raw["observation/state"]
    want = normalised(state, statistics(32, pi05)["state"])
    arrays = t.observation(raw)
    np.testing.assert_allclose(arrays["state"], [*want, *[0] * 24], atol=1e-5)
    bins = " ".join(str(int(np.digitize(v, np.linspace(-1, 1, 257)[:-1]) - 1)) for v in want)
    # LIBERO's pi0.5 is fed pi0's prompt: no state in it, and its action expert takes none either.
    text = (
        f"Task: {raw['prompt']}, State: {bins};\nAction: " if (name, pi05) == ("droid", True) else raw["prompt"] + "\n"
    )
    tok = load_tokenizer("embedded")
    np.testing.assert_array_equal(arrays["prompt"]["ids"][arrays["prompt"]["valid"]], [tok.bos_id, *tok.encode(text)])


def aloha_state() -> np.ndarray:
    """openpi's _decode_state of the raw one."""
    state = FLIPS * aloha_raw()["state"]
    for i in (6, 13):
        travel = state[i] * (0.05800 - 0.01844) + 0.01844
        sine = (0.022**2 + travel**2 - 0.036**2) / (2 * 0.022 * travel)
        state[i] = (np.arcsin(np.clip(sine, -1, 1)) - 0.5476) / (1.6296 - 0.5476)
    return state


@pytest.mark.parametrize("pi05", [True, False])
def test_aloha_state_is_the_runtimes(pi05):
    arrays = transform("aloha", pi05).observation(aloha_raw())
    want = normalised(aloha_state(), statistics(32, pi05)["state"])
    np.testing.assert_allclose(arrays["state"], [*want, *[0] * 18], atol=1e-5)
    text = TEMPLATES["openpi" if pi05 else "openpi_pi0"].prompt_text("fold the towel", want.astype(np.float32))
    tok = load_tokenizer("embedded")
    np.testing.assert_array_equal(arrays["prompt"]["ids"][: arrays["prompt"]["valid"].sum()][1:], tok.encode(text))


@pytest.mark.parametrize("pi05", [True, False])
def test_aloha_actions_are_openpis(pi05):
    """Unnormalize, AbsoluteActions, first 14, _encode_actions."""
    model = RNG.normal(size=(1, 5, 32))
    want = unnormalised(model[0], statistics(32, pi05)["actions"])[:, :14]
    relative = [i for i in range(14) if i not in (6, 13)]
    want[:, relative] += aloha_state()[relative]
    want *= FLIPS
    want[:, [6, 13]] = (want[:, [6, 13]] + 0.5476 + 0.6213) / (1.4910 + 0.6213)
    got = in_real_units(transform("aloha", pi05), model, [aloha_raw()])
    assert got.shape == (1, 5, 14) and got.dtype == np.float32
    np.testing.assert_allclose(got[0], want, atol=1e-5)
    absolute = in_real_units(transform("aloha_sim", pi05), model, [aloha_raw()])
    np.testing.assert_allclose(absolute[0, :, [6, 13]], want[:, [6, 13]].T, atol=1e-5)
    assert np.abs(absolute[0] - want).max() > 0.1


@pytest.mark.parametrize(
    ("name", "pi05", "relative"), [("droid", True, 0), ("droid", False, 0), ("libero", True, 0), ("libero", False, 6)]
)
def test_single_arm_actions_are_openpis(name, pi05, relative):
    model = RNG.normal(size=(2, 5, 32))
    dims = robots.get_robot(name).action_dims
    want = unnormalised(model, statistics(32, pi05)["actions"])[..., :dims]
    want[..., :relative] += np.linspace(-1, 1, 8)[:relative]
    got = in_real_units(transform(name, pi05), model, [RAWS[name]()] * 2)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("pi05", [True, False])
@pytest.mark.parametrize("name", list(RAWS))
def test_training_sees_the_inverse_of_what_inference_gives(name, pi05):
    t, raw = transform(name, pi05), RAWS[name]()
    actions = RNG.uniform(0.1, 0.9, (5, robots.get_robot(name).action_dims))
    sample = {**raw, "actions": actions, "action_valid": np.ones(5, bool), "subtask": "x"}
    np.testing.assert_allclose(in_real_units(t, t.sample(sample)["actions"][None], [raw])[0], actions, atol=1e-5)


def test_each_row_is_relative_to_its_own_state():
    t = transform("aloha", True)
    raws = [aloha_raw(), aloha_raw(state=np.zeros(14))]
    model = np.repeat(RNG.normal(size=(1, 5, 32)), 2, axis=0)
    both = in_real_units(t, model, raws)
    for i, raw in enumerate(raws):
        np.testing.assert_allclose(both[i], in_real_units(t, model[i : i + 1], [raw])[0], atol=1e-6)
    assert np.abs(both[0] - both[1]).max() > 0.1


def test_prompt_may_be_bytes_or_left_to_the_robot():
    t = transform("aloha_sim", True)
    default = t.observation(aloha_raw(prompt=None))["prompt"]["ids"]
    for said in ("Transfer cube", b"Transfer cube", np.array("Transfer cube"), np.bytes_(b"Transfer cube")):
        np.testing.assert_array_equal(t.observation(aloha_raw(prompt=said))["prompt"]["ids"], default)
    with pytest.raises(UserError, match="says what to do"):
        transform("droid", True).observation(droid_raw(prompt=None))


def test_a_question_needs_no_state():
    raw = {k: v for k, v in droid_raw().items() if "position" not in k}
    t = transform("droid", True)
    np.testing.assert_allclose(t.observation({**raw, "template": "vqa"})["image_mask"], [True, True, False])
    with pytest.raises(UserError, match="joint_position"):
        t.observation(raw)


@pytest.mark.parametrize("name", list(robots.ROBOTS))
def test_json_says_everything(name, tmp_path):
    spec = robots.ROBOTS[name]
    path = tmp_path / "mine.json"
    path.write_text(robots.dumps(spec))
    assert robots.get_robot(str(path)) == spec


def without(raw: dict, *keys: str) -> dict:
    return {k: v for k, v in raw.items() if k not in keys}


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("droid", without(droid_raw(), "observation/wrist_image_left"), "wrist_image_left' of camera 'left_wrist_0_rgb' is missing.* found .*exterior"),
        ("aloha", aloha_raw(images={"cam_left_wrist": picture(1)}), "images/cam_high' of .* is missing"),
        ("aloha", aloha_raw(images={"cam_high": picture(1), "cam_top": picture(1)}), "no image 'images/cam_top'.*cam_high"),
        ("droid", droid_raw(**{"observation/wrist_image_left": picture(9) * 1.0}), "wrist_image_left'.*divide by 255"),
        ("droid", droid_raw(**{"observation/wrist_image_left": np.zeros((32, 32))}), "left_wrist_0_rgb.*uint8 RGB"),
        ("droid", without(droid_raw(), "observation/gripper_position"), "gripper_position.* 1 numbers, found nothing"),
        ("droid", droid_raw(**{"observation/joint_position": np.zeros(6)}), r"joint_position.* 7 numbers.*\[6\]"),
        ("droid", droid_raw(**{"observation/joint_position": np.full(7, np.nan)}), "not finite"),
        ("libero", libero_raw(**{"observation/state": ["a"] * 8}), "state.* 8 numbers"),
        ("libero", without(libero_raw(), "observation/state"), r"observation\['observation/state'\] must be 8 numbers"),
        ("aloha", aloha_raw(state=np.zeros(8)), r"14 numbers.*\[8\]"),
    ],
)  # fmt: skip
def test_bad_observations_are_refused_by_the_robots_names(name, raw, words):
    with pytest.raises(UserError, match=words):
        transform(name, True).observation(raw)


def test_robot_that_does_not_fit_the_model_is_refused():
    with pytest.raises(UserError, match=r"robot tabletop feeds camera front, wrist, but the model reads base_0_rgb"):
        transform(robot_file("tabletop"), True)
    with pytest.raises(UserError, match=r"statistics of the state have 8 dimensions but the robot has 14"):
        transform("aloha", True, dims=8)


def test_unknown_robots_get_the_names_nearest_first(tmp_path):
    with pytest.raises(UserError, match="unknown robot 'driod': choose one of droid, "):
        robots.get_robot("driod")
    with pytest.raises(UserError, match=r"nowhere.json is missing"):
        robots.get_robot("nowhere.json")
    body = dataclasses.asdict(robots.ROBOTS["droid"])
    for change, words in (
        ({"camera": {}}, "no field camera"),
        ({"cameras": {}}, "at least one image"),
        ({"state": {"s": -1}}, "dimensions must be positive"),
        ({"flips": [1, 2]}, r"signs \+-1"),
        ({"pi05": {"horizon": 0, "template": "openpi"}}, "horizon must be positive"),
        ({"pi05": {"horizon": 5, "template": "openpie"}}, "unknown template 'openpie'"),
        (
            {"pi05": {"horizon": 5, "template": "openpi", "delta": [True] * 9}},
            "pi05.delta must be of 8 dimensions at most, found 9",
        ),
        ({"optional": ["cam"]}, "optional names cam"),
    ):
        with pytest.raises(UserError, match=words):
            robots.loads(json.dumps({**body, **change}), source="mine.json")
    for text in ("{", "[]", '{"name": "x"}'):
        with pytest.raises(UserError, match=r"mine\.json"):
            robots.loads(text, source="mine.json")


def test_a_short_name_means_one_image_of_one_camera():
    cameras = {"left/top": "base_0_rgb", "right/top": "left_wrist_0_rgb", "right/arm": "right_wrist_0_rgb"}
    robot = Robot(robots.loads(json.dumps({"cameras": cameras, "state": ["state"]}), source="x.json"), CAMERAS, 1, 1)
    both = {"left/top": picture(1), "right/top": picture(2)}
    read = robot.read({**both, "arm": picture(3)}).images
    assert [int(read[camera][0, 0, 0]) for camera in CAMERAS] == [1, 2, 3]
    assert int(robot.read({**both, "right/arm": picture(3), "arm": picture(4)}).images[CAMERAS[2]][0, 0, 0]) == 3
    with pytest.raises(UserError, match="may be arm or images/arm: send one"):
        robot.read({**both, "arm": picture(3), "images": {"arm": picture(4)}})
    with pytest.raises(UserError, match="image 'left/top' of camera 'base_0_rgb' is missing"):
        robot.read({"top": picture(1), "arm": picture(3)})
    with pytest.raises(UserError, match="gives 'left/top' twice"):
        robot.read({**both, "left": {"top": picture(5)}, "arm": picture(3)})
