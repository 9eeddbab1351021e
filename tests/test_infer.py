"""If this fails, `python infer.py` prints wrong numbers, or answers bad input with a traceback instead of a remedy."""

import copy
import dataclasses
import json
from pathlib import Path
import shutil

import numpy as np
from PIL import Image
import pytest

import infer
from openpi_ar.data.robot import Robot
from openpi_ar.policy import Policy
from openpi_ar.robot_spec import RobotSpec
from openpi_ar.worlds.tabletop.world import Tabletop


def images(folder: Path) -> list[str]:
    """Camera arguments of two random images."""
    rng = np.random.default_rng(0)
    for name in ("front", "wrist"):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{name}.png")
    return ["--images", f"front={folder / 'front.png'}", f"wrist={folder / 'wrist.png'}"]


STATE = ["--state", "-0.05", "0.1", "0.12", "0.09"]
PROMPT = ["--prompt", "put the red block in the left bin"]


@pytest.fixture
def ckpt(tiny_checkpoint: Path) -> list[str]:
    return ["--ckpt", str(tiny_checkpoint), "--repeats", "1"]


@pytest.fixture
def warm(ckpt, tiny_policy, monkeypatch) -> list[str]:
    """The checkpoint's arguments, with the shared compiled policy in its place."""
    monkeypatch.setattr(Policy, "from_checkpoint", lambda path: tiny_policy)
    return ckpt


def fails(argv: list[str], capsys) -> str:
    """The one line that a call with bad input prints."""
    with pytest.raises(SystemExit) as e:
        infer.main(argv)
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


def test_a_checkpoint_is_all_it_needs(ckpt, tiny_policy, tmp_path, capsys):
    """From the files on disk: what is written is what the policy says of the tabletop's first observation."""
    infer.main([*ckpt, "--seed", "5", "--json", str(tmp_path / "o.json"), "--plot", str(tmp_path / "chunk.png")])
    written = json.loads((tmp_path / "o.json").read_text())
    obs, _ = Tabletop((32, 32)).reset(5)
    expected = tiny_policy.infer(obs, seed=5)
    np.testing.assert_allclose(written["actions"], expected["actions"], atol=1e-4)
    assert (written["subtask"], written["prompt"]) == (expected["subtask"], obs["prompt"])
    assert list(written["timing"]) == ["images", "prefill", "text", "flow", "total", "first_call"]
    assert written["timing"]["first_call"] > written["timing"]["total"] > 0
    with Image.open(tmp_path / "chunk.png") as plot:
        assert plot.size[0] > 300

    out = capsys.readouterr().out
    assert f"prompt:  {obs['prompt']}" in out and f"subtask: {expected['subtask']}" in out
    for value in np.asarray(written["actions"]).ravel():
        assert f"{value:.4f}" in out
    assert f"{written['timing']['prefill']:.1f}" in out


def test_own_images_state_and_prompt(warm, tiny_policy, tmp_path):
    infer.main([*warm, *images(tmp_path), *STATE, *PROMPT, "--json", str(tmp_path / "o.json")])
    raw = {
        "images": {n: np.asarray(Image.open(tmp_path / f"{n}.png")) for n in ("front", "wrist")},
        "state": np.float32([-0.05, 0.1, 0.12, 0.09]),
        "prompt": PROMPT[1],
    }
    expected = tiny_policy.infer(raw)
    written = json.loads((tmp_path / "o.json").read_text())
    np.testing.assert_allclose(written["actions"], expected["actions"], atol=1e-6)

    np.savez(tmp_path / "obs.npz", **raw["images"], state=raw["state"], prompt=np.array(PROMPT[1]))
    infer.main([*warm, "--observation", str(tmp_path / "obs.npz"), "--json", str(tmp_path / "npz.json")])
    assert json.loads((tmp_path / "npz.json").read_text())["actions"] == written["actions"]

    other = ["--observation", str(tmp_path / "obs.npz"), "--prompt", "clear the table"]
    infer.main([*warm, *other, "--json", str(tmp_path / "other.json")])
    assert json.loads((tmp_path / "other.json").read_text())["actions"] != written["actions"]


def test_forced_subtask_and_question(warm, tmp_path, capsys):
    infer.main([*warm, "--subtask", "done", "--json", str(tmp_path / "s.json")])
    assert json.loads((tmp_path / "s.json").read_text())["subtask"] == "done"
    infer.main([*warm, *images(tmp_path), "--question", "what is this?", "--json", str(tmp_path / "q.json")])
    answer = json.loads((tmp_path / "q.json").read_text())
    sure = {"logprobs", "logprob", "margin"}
    assert (
        set(answer) == {"prompt", "answer", "text_status", "boxes", "stray_tokens", "timing"} | sure
        and answer["prompt"] == "what is this?"
    )
    assert "answer:" in capsys.readouterr().out


def test_a_list_of_subtasks_is_all_that_can_come_out_and_each_is_scored(ckpt, tiny_policy, tmp_path, capsys):
    free = tiny_policy.infer(Tabletop((32, 32)).reset(0)[0])
    (tmp_path / "list.txt").write_text("done\n\n pick up the red block \nplace it in the left bin\n")
    listed = ["--subtasks", str(tmp_path / "list.txt")]
    infer.main([*ckpt[:2], *listed, "--json", str(tmp_path / "o.json")])
    report, out = json.loads((tmp_path / "o.json").read_text()), capsys.readouterr().out
    assert list(report["scores"]) == ["done", "pick up the red block", "place it in the left bin"]
    assert report["subtask"] in report["scores"] and free["subtask"] not in report["scores"]  # control
    assert report["logprob"] == pytest.approx(sum(report["logprobs"])) and f"{np.exp(report['logprob']):.1%}" in out
    best = max(report["scores"], key=report["scores"].get)
    assert ("note:" in out) == (best != report["subtask"])
    (tmp_path / "list.txt").write_text(" \n")
    assert "holds no text" in fails([*ckpt[:2], *listed], capsys)
    (tmp_path / "list.txt").write_text("done\n" + "word " * 50)
    assert "the target takes" in fails([*ckpt[:2], *listed], capsys)
    assert "list.txt" in fails([*ckpt[:2], "--subtasks", str(tmp_path / "no" / "list.txt")], capsys)
    assert "leave out one" in fails([*ckpt, *listed, "--subtask", "done"], capsys)


def test_the_users_way_of_decoding_is_handed_on(ckpt, tiny_policy, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(Policy, "from_checkpoint", lambda path, **options: given.update(options) or tiny_policy)
    infer.main([*ckpt, "--dtype", "bfloat16", "--temperature", "0.5", "--denoise-steps", "3"])
    assert given == {"dtype": "bfloat16", "temperature": 0.5, "denoise_steps": 3}


def test_rollout_prints_and_writes_means_over_episodes(warm, tmp_path, capsys):
    options = ["--rollout", "2", "--seed", "3", "--split", "held_out", "--execute", "2", "--wrong-subtask"]
    infer.main([*warm, *options, "--json", str(tmp_path / "r.json"), "--video", str(tmp_path / "r.gif")])
    report = json.loads((tmp_path / "r.json").read_text())
    assert {"success", "blocks_placed", "subtask_accuracy", "episodes"} <= set(report)
    assert [e["seed"] for e in report["episodes"]] == [3, 4]
    for name in ("success", "blocks_placed", "approached_named", "steps"):
        assert report[name] == np.mean([e[name] for e in report["episodes"]])
    out = capsys.readouterr().out
    assert "2 held_out episodes, seeds from 3" in out and f"{report['steps']:.3f}" in out
    with Image.open(tmp_path / "r.gif") as gif:
        assert gif.n_frames > 2


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (["--state", "1", "2", "3"], ["4 numbers", "[3]"]),
        (["--state", "1", "2", "nan", "4"], ["not finite", "nan"]),
        (["--images", "front=FRONT"], ["camera 'wrist' is missing", "reads front, wrist"]),
        (["--images", "front=FRONT", "wrist=WRIST", "top=WRIST"], ["no camera 'top'", "front, wrist"]),
        (["--images", "FRONT"], ["camera=file", "front=a.png"]),
        (["--images", "front=TEXT", "wrist=WRIST"], ["text.txt", "not a readable image"]),
        (["--images", "front=nowhere.png", "wrist=WRIST"], ["'nowhere.png'", "does not exist"]),
        (["--prompt", "  "], ["--prompt is empty"]),
        (["--prompt", "put " * 100], ["tokens but the budget is", "shorten"]),
        (["--subtask", "word " * 50], ["the target takes", "budget"]),
        (["--subtask", ""], ["--subtask is empty"]),
        (["--subtask", "done", "--question", "why?"], ["leave out --subtask"]),
        (["--observation", "TEXT"], ["exclude each other"]),
        (["--video", "a.mp4"], ["--video", "--rollout N"]),
        (["--plot", "nowhere/a.png"], ["'nowhere'", "create it"]),
        (["--plot", "TEXT"], [".png", "text.txt"]),
        (["--rollout", "1"], ["leave out --images, --state, --prompt"]),
        (["--done", "pick up", "--question", "why?"], ["leave out --done"]),
        (["--done", "pick up the red block"], ["without a memory", "text.memory 0"]),
        (["--repeats", "-1"], ["--repeats must be 0 or more"]),
        (["--temperature", "-1"], ["--temperature must be 0 or more, found -1"]),
        (["--denoise-steps", "0"], ["--denoise-steps must be 1 or more, found 0"]),
    ],
)
def test_bad_input_is_one_line_with_cause_and_remedy(warm, tmp_path, capsys, change, parts):
    argv = [*warm, *images(tmp_path), *STATE, *PROMPT]
    (tmp_path / "text.txt").write_text("hello")
    files = {"FRONT": "front.png", "WRIST": "wrist.png", "TEXT": "text.txt"}
    for key, name in files.items():
        change = [c.replace(key, str(tmp_path / name)) for c in change]
    if change[0] in argv:
        start = argv.index(change[0])
        stop = next((i for i in range(start + 1, len(argv)) if argv[i].startswith("--")), len(argv))
        del argv[start:stop]
    message = fails([*argv, *change], capsys)
    assert [part for part in parts if part not in message] == []
    assert (tmp_path / "text.txt").read_text() == "hello"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["does not exist"]),
        ({}, ["prompt is missing"]),
        ({"front": np.zeros((4, 4, 3), np.uint8)}, ["prompt is missing"]),
        ({"front": np.zeros((4, 4, 3), np.uint8), "prompt": "x"}, ["state is missing", "4 numbers"]),
        ({"state": np.zeros(4), "prompt": "x"}, ["camera 'front' is missing", "found no image"]),
        ({"front": np.zeros((4, 4)), "wrist": np.zeros((4, 4)), "prompt": "x", "state": np.zeros(4)}, ["uint8 RGB"]),
        ({"state": np.array([{}])}, ["plain arrays"]),
        (b"hello", ["obs.npz", "plain arrays"]),
    ],
)
def test_bad_observation_files(warm, tmp_path, capsys, content, parts):
    path = tmp_path / "obs.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **content)
    message = fails([*warm, "--observation", str(path)], capsys)
    assert [part for part in parts if part not in message] == []


def test_bad_checkpoint_directories(tiny_checkpoint, tmp_path, capsys):
    def message(path: Path) -> str:
        return fails(["--ckpt", str(path)], capsys)

    assert "does not exist" in message(tmp_path / "none")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.safetensors").write_bytes(b"x")
    assert "cannot be read as safetensors" in message(tmp_path / "foreign")

    step = tiny_checkpoint / "0"
    for missing in ("assets/config.json", "assets/tokenizer.model", "assets/norm_stats.json", "params/_METADATA"):
        half = tmp_path / missing.replace("/", "_") / "0"
        shutil.copytree(step, half)
        (half / missing).unlink()
        assert missing in message(half) and missing in message(half.parent)

    broken = tmp_path / "broken"
    shutil.copytree(step, broken)
    (broken / "assets" / "tokenizer.model").write_bytes(b"half")
    assert "SentencePiece" in message(broken)
    shutil.copyfile(step / "assets" / "tokenizer.model", broken / "assets" / "tokenizer.model")
    data = [p for p in (broken / "params").rglob("*") if p.is_file() and p.name not in ("_METADATA", "manifest.ocdbt")]
    for path in data:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "params" in message(broken)


def test_a_checkpoint_without_a_world_says_how_to_name_one(warm, tiny_policy, capsys, monkeypatch):
    monkeypatch.setattr(tiny_policy, "cfg", dataclasses.replace(tiny_policy.cfg, world=""))
    for argv in ([], ["--rollout", "1"]):
        message = fails([*warm, *argv], capsys)
        assert "--world (tabletop, libero)" in message and "--images" in message
    assert "no world 'moon': there are" in fails([*warm, "--world", "moon"], capsys)
    infer.main([*warm, "--world", "tabletop", "--rollout", "1", "--wrong-subtask"])
    assert "approached named" in capsys.readouterr().out


def test_another_robots_checkpoint_cannot_play_on_the_tabletop(warm, tiny_policy, capsys, monkeypatch):
    monkeypatch.setattr(Policy, "cameras", ("base_0_rgb",))
    for argv in ([], ["--rollout", "1"]):
        message = fails([*warm, *argv], capsys)
        assert "another robot" in message and "base_0_rgb" in message and "--images" in message


def test_actions_go_by_the_datasets_names(tiny_policy, capsys):
    def names(policy: Policy) -> tuple[str, ...]:
        return infer._action_names(policy)

    def with_names(*found: str, world: str = "") -> Policy:
        robot = dataclasses.replace(tiny_policy.cfg.robot or RobotSpec(), action_names=found)
        policy = copy.copy(tiny_policy)
        policy.robot = Robot(robot, policy.cameras, 4, 4)
        policy.cfg = dataclasses.replace(policy.cfg, robot=robot, world=world)
        return policy

    assert names(tiny_policy)[0] == "x (m)"  # its world's
    own = ("action.pan.pos", "action.lift.pos", "gripper.width", "action.3")
    assert names(with_names(*own)) == ("pan.pos", "lift.pos", "gripper.width", "action 3")
    assert names(with_names()) == ("action 0", "action 1", "action 2", "action 3")
