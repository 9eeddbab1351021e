"""Broken if this fails: closed-loop figures (success, blocks placed, subtask accuracy, ablations) are not what they
say."""

import dataclasses
import json

import av
import numpy as np
from PIL import Image
import pytest

from openpi_ar.errors import UserError
from openpi_ar.worlds import video
from openpi_ar.worlds.protocol import Play, World
from openpi_ar.worlds.rollout import RolloutConfig, run_rollouts
from openpi_ar.worlds.tabletop.__main__ import main
from openpi_ar.worlds.tabletop.episodes import TabletopEpisodes
from openpi_ar.worlds.tabletop.expert import expert_action
from openpi_ar.worlds.tabletop.tasks import next_subtask
from openpi_ar.worlds.tabletop.world import Tabletop
from tests.prompt_fixtures import parse_prompt


class OpenTabletop(Tabletop):
    """A tabletop whose observation holds the world itself, so that scripted policies can cheat."""

    def _observe(self, render: bool) -> dict:
        return {**super()._observe(render), "world": self}


def small_world(**which) -> TabletopEpisodes:
    return TabletopEpisodes(Play(**which), OpenTabletop((24, 24)))


class Scripted:
    """Follows the prompt it is given by the scripted expert; one action, held for the whole chunk."""

    def __init__(self, say=None, obey: bool = True, horizon: int = 2):
        self.say, self.obey, self.horizon = say, obey, horizon
        self.batches: list[tuple[int, int | None]] = []
        self.brightest = 0

    def infer_batch(self, raws, *, subtasks=None, sessions=None, batch_size=None):
        self.batches.append((len(raws), batch_size))
        return [self.infer(raw, None if subtasks is None else subtasks[i]) for i, raw in enumerate(raws)]

    def infer(self, raw, forced):
        self.brightest = max(self.brightest, *(int(image.max()) for image in raw["images"].values()))
        facts = raw["world"].facts()
        try:
            right = next_subtask(parse_prompt(raw["prompt"], tuple(facts.blocks)), facts)
        except ValueError:  # a shuffled prompt may name blocks that are not there
            right = "done"
        doing = forced if forced is not None and self.obey else right
        said = forced or (right if self.say is None else self.say)
        actions = np.stack([expert_action(facts, doing)] * self.horizon)
        return {"subtask": said, "text_status": "loop" if self.say else "ok", "actions": actions, "timing": {}}


def run(policy, **options):
    """`options` of the episodes and of how they are run."""
    names = {"seed", "split", "subtask", "wrong_subtask"}
    which = {k: v for k, v in options.items() if k in names}
    how = {"episodes": 3, "execute": 2, "batch": 2} | {k: v for k, v in options.items() if k not in names}
    return run_rollouts(policy, RolloutConfig(**how), lambda: small_world(**which), progress=False)


@pytest.fixture(scope="module")
def expert_result():
    return run(Scripted())


def test_an_expert_that_says_what_it_does_is_perfect(expert_result):
    m = expert_result.means
    assert (m["success"], m["blocks_placed"], m["subtask_accuracy"], m["text_trouble"]) == (1.0, 1.0, 1.0, 0.0)
    assert m["approached_named"] is None
    assert [e.as_dict()["seed"] for e in expert_result.episodes] == [0, 1, 2]
    assert isinstance(small_world(), World)
    assert all(10 < e.steps < 180 for e in expert_result.episodes)


def test_when_the_expert_drives_only_words_count(expert_result):
    """The policy's own actions would go nowhere; the expert's finish the task, and every word is still judged."""

    class Lazy(Scripted):
        def infer(self, raw, forced):
            plan = super().infer(raw, forced)
            return {**plan, "actions": np.zeros_like(plan["actions"])}

    driven = run(Lazy(), expert_drives=True)
    assert (driven.means["success"], driven.means["subtask_accuracy"]) == (1.0, 1.0)
    assert run(Lazy(say="done"), expert_drives=True, episodes=1).means["subtask_accuracy"] < 0.2
    assert run(Lazy(), episodes=1).means["success"] == 0.0  # control
    with pytest.raises(UserError, match="does not listen"):
        run(Lazy(), expert_drives=True, wrong_subtask=True)


def test_without_a_policy_the_expert_plays(expert_result):
    played, scripted = run(None).means, expert_result.means
    assert played | {"steps": 0} == scripted | {"steps": 0}
    assert 10 < (played["steps"] or 0) < (scripted["steps"] or 0)  # it acts anew at every step
    # Nothing is drawn for nobody to look at.
    seen = []
    world = small_world()
    world.world._observe = lambda render, real=world.world._observe: seen.append(render) or real(render)
    run_rollouts(None, RolloutConfig(1), lambda: world, progress=False)
    assert set(seen) == {False}


def test_words_and_deeds_are_scored_apart(expert_result):
    liar = run(Scripted(say="dance"))
    assert (liar.means["success"], liar.means["subtask_accuracy"], liar.means["text_trouble"]) == (1.0, 0.0, 1.0)
    assert [e.steps for e in liar.episodes] == [e.steps for e in expert_result.episodes]

    silent = run(Scripted(say=""), episodes=1)
    assert silent.means["subtask_accuracy"] is None

    class Idle(Scripted):
        def infer(self, raw, forced):
            return {**super().infer(raw, forced), "actions": np.tile([0, 0, 0.2, -1.0], (2, 1))}

    idle = run(Idle(), episodes=1).episodes[0]
    assert (idle.success, idle.figures["blocks_placed"], idle.subtask_accuracy) == (False, 0.0, 1.0)
    assert idle.steps == 40 + 35 * len(parse_prompt(idle.prompt, tuple(_colors(0))).targets)


def _colors(seed: int):
    _, info = OpenTabletop((2, 2)).reset(seed)
    return info["positions"]


def test_results_do_not_depend_on_how_many_run_at_once(expert_result):
    alone, together = Scripted(), Scripted()
    assert run(alone, batch=1) == expert_result
    assert run(together, batch=8) == expert_result
    assert set(alone.batches) == {(1, 1)}
    assert together.batches[0] == (3, 3)  # no more worlds than episodes
    assert {size for _, size in together.batches} == {3}  # always padded to the same size
    assert min(rows for rows, _ in together.batches) < 3


def test_seeds_go_on_from_the_first_and_splits_differ(expert_result):
    later = run(Scripted(), episodes=1, seed=2)
    assert later.episodes[0] == expert_result.episodes[2]
    held_out = run(Scripted(), episodes=2, split="held_out")
    assert held_out.means["success"] == 1.0
    assert {e.prompt for e in held_out.episodes}.isdisjoint(e.prompt for e in expert_result.episodes)


def test_shuffled_prompts_are_anothers_and_scored_by_the_own_task(expert_result):
    own = [e.prompt for e in expert_result.episodes]
    shuffled = run(Scripted(), shuffle_prompts=True)
    given = [e.prompt for e in shuffled.episodes]
    assert all(a != b for a, b in zip(own, given, strict=True))
    assert set(given) <= set(own)
    assert shuffled.means["success"] < 1.0 and shuffled.means["subtask_accuracy"] < 1.0
    with pytest.raises(UserError, match="different tasks"):
        run(Scripted(), episodes=1, shuffle_prompts=True)


def test_blank_images_are_black():
    blind, seeing = Scripted(), Scripted()
    run(blind, episodes=1, blank_images=True)
    run(seeing, episodes=1)
    assert blind.brightest == 0 and seeing.brightest > 100


def test_a_wrong_subtask_shows_whether_words_lead_to_deeds():
    obeying = run(Scripted(obey=True), wrong_subtask=True).means
    ignoring = run(Scripted(obey=False), wrong_subtask=True).means
    assert (obeying["approached_named"], obeying["approached_true"]) == (1.0, 0.0)
    assert (ignoring["approached_named"], ignoring["approached_true"]) == (0.0, 1.0)
    assert obeying["subtask_accuracy"] is None  # it was not the policy's own word


def test_a_given_subtask_is_forced_in_every_episode():
    colors = list(_colors(0))
    result = run(Scripted(), episodes=1, subtask=f"pick up the {colors[-1]} block")
    assert result.episodes[0].figures["approached_named"] is True
    absent = next(c for c in ("red", "yellow", "green", "blue", "purple") if c not in colors)
    policy = Scripted(obey=False)
    ignored = run(policy, episodes=1, subtask=f"pick up the {absent} block").episodes[0]
    assert ignored.figures["approached_named"] is None and ignored.steps <= 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 0}, "episodes is 0"),
        ({"execute": 0, "batch": 0}, "execute is 0, batch is 0"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"subtask": "fly"}, "no subtask 'fly'"),
        ({"subtask": "done", "wrong_subtask": True}, "exclude each other"),
        ({"execute": 3}, "execute is 3 but the policy plans 2"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        run(Scripted(), **options)


def test_mp4_shows_every_step(tmp_path):
    path = tmp_path / "episodes.mp4"
    cfg = RolloutConfig(episodes=1, execute=2)
    result = run_rollouts(Scripted(), cfg, small_world, video=path, progress=False)
    with av.open(str(path)) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(frames) == result.episodes[0].steps + 5
    assert frames[0].shape[1] == 2 * 256 and frames[0].shape[0] > 256
    assert np.abs(frames[0][:256].astype(int) - frames[-1][:256]).mean() > 3  # something happens


def test_gif_shows_every_step(tmp_path):
    path = tmp_path / "episodes.gif"
    shots = [video.Shot({"a": np.full((8, 8, 3), i, np.uint8)}, "I do", None) for i in (0, 90, 180)]
    with video.VideoWriter(path, 10) as writer:
        writer.add_episode("do it", shots)
    with Image.open(path) as gif:
        size = video.draw_frame(shots[0].images, "do it", "I do").shape[1::-1]
        assert (gif.n_frames, gif.info["duration"], gif.size) == (3, 100, size)


def test_frames_hold_cameras_prompt_and_words():
    red, blue = (np.broadcast_to(np.uint8(color), (8, 12, 3)) for color in ((200, 0, 0), (0, 0, 200)))
    draw = video.draw_frame
    frame = draw({"front": red, "wrist": blue}, "do this", "I do that")
    assert frame.shape[0] % 2 == frame.shape[1] % 2 == 0 and frame.shape[1] == 2 * 384
    assert (frame[:256, :384] == (200, 0, 0)).all() and (frame[:256, 384:768] == (0, 0, 200)).all()
    same = {"front": red, "wrist": blue}
    assert not np.array_equal(frame, draw(same, "do it", "I do that"))
    assert not np.array_equal(frame, draw(same, "do this", "I do this"))
    right, wrong = (draw(same, "do this", "I do that", right=flag) for flag in (True, False))
    assert right[256:, :, 1].sum() > wrong[256:, :, 1].sum()
    assert draw(same, "word " * 200, "word " * 200).shape == frame.shape  # long text is cut, not drawn over


def test_a_video_that_cannot_be_written_is_refused_first(tmp_path):
    for path, message in ((tmp_path / "a.avi", r"\.mp4 or \.gif"), (tmp_path / "no" / "a.mp4", "does not exist")):
        policy = Scripted()
        with pytest.raises(UserError, match=message):
            run_rollouts(policy, RolloutConfig(1), small_world, video=path, progress=False)
        assert policy.batches == []


def test_means_leave_out_episodes_without_the_figure(expert_result):
    one = dataclasses.replace(expert_result.episodes[0], subtask_accuracy=None)
    mixed = dataclasses.replace(expert_result, episodes=(one, *expert_result.episodes[1:]))
    assert mixed.means["subtask_accuracy"] == 1.0
    assert dataclasses.replace(expert_result, episodes=(one,)).means["subtask_accuracy"] is None


def test_the_command_plays_the_expert_and_writes_what_it_prints(tmp_path, capsys):
    flags = ["--episodes", "2", "--seed", "3", "--split", "held_out", "--json", str(tmp_path / "r.json")]
    main(["rollout", *flags])
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["success"] == 1.0 and [e["seed"] for e in report["episodes"]] == [3, 4]
    assert set(report["episodes"][0]) == {
        "seed", "prompt", "success", "blocks_placed", "subtask_accuracy", "text_trouble", "steps", "approached_named",
        "approached_true", "confidence", "passes_per_new_text",
    }  # fmt: skip
    assert f"{report['steps']:.3f}" in capsys.readouterr().out
    for argv, words in ((["--subtask", "fly"], "no subtask 'fly'"), (["--json", "nowhere/a.json"], "'nowhere'")):
        with pytest.raises(SystemExit):
            main(["rollout", *argv])
        assert words in capsys.readouterr().err
