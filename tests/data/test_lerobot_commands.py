"""Broken if this fails: a dataset cannot be looked at, measured or trained on from the command line."""

import dataclasses
import re

import numpy as np
import pytest

from benchmarks import loader
from configs import HELP, get_preset
from openpi_ar.checkpoints import store
from openpi_ar.config import LeRobotData
from openpi_ar.data.__main__ import main
from openpi_ar.data.normalize import load_norm_stats
from openpi_ar.errors import UserError
from openpi_ar.policy import Policy
from openpi_ar.training import cli
from openpi_ar.training.metrics import read_metrics
from tests.lerobot_fixtures import DATASETS, GOLDEN, broken, edit_column, rows, source
import train

CAMERAS = ["--model.cameras", "base_0_rgb", "left_wrist_0_rgb", "--model.state-dim", "7", "--model.action-dim", "7"]


def printed(capsys, *argv: object) -> str:
    main([str(a) for a in argv])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", DATASETS)
def test_inspect_says_what_there_is(capsys, name):
    out = printed(capsys, "inspect", GOLDEN / name)
    convention = "language_persistent" if "lang" in name else "subtask_index"
    stored = "av1" if "video" in name else "images in parquet"
    for words in (
        name[:3].replace("v2", "v2.").replace("v3", "v3."),
        "3 of 18 to 22",
        "60 (",
        "toy7dof",
        convention,
        stored,
    ):
        assert words in out, words
    assert "observation.images.left_wrist_0_rgb" in out and "open the drawer" in out and "j0, j1" in out


def test_stats_are_exact_and_written_with_their_mode(capsys, tmp_path):
    for path in (GOLDEN / "v30_video").rglob("*.mp4"):
        assert path.is_file()
    copy = broken(tmp_path, "v30_video")
    for path in copy.rglob("*.mp4"):
        path.unlink()  # no video is needed
    out = printed(capsys, "stats", copy, "--mode", "z_score", "--out", tmp_path / "stats")
    assert "60 rows" in out and "rows/s" in out and "action.j6" in out
    stats = load_norm_stats(tmp_path / "stats")
    x = np.array([row["action"] for row in rows("v30_video")])
    np.testing.assert_allclose(stats["actions"].q01, np.quantile(x, 0.01, axis=0), rtol=1e-5)
    assert stats["state"].mode == "z_score"


@pytest.mark.parametrize("name", ["v21_images", "v30_video", "v30_images_lang"])
def test_subtasks_are_counted(capsys, name):
    out = printed(capsys, "subtasks", GOLDEN / name)
    line = next(line for line in out.splitlines() if "pull the drawer open" in line)
    assert [cell.strip() for cell in line.split("│")[1:-1]] == [
        "pull the drawer open",
        "9",
        "1",
        "1",
        "episode 1, frame 9",
    ]
    assert "every one of 60 frames" in out


def test_missing_labels_are_flagged(capsys, tmp_path):
    path = broken(tmp_path, "v30_video")
    edit_column(
        path / "data/chunk-000/file-000.parquet", "subtask_index", lambda c: c.__setitem__(slice(18, 38), [-1] * 20)
    )
    out = printed(capsys, "subtasks", path)
    assert "20 of 60 frames have no subtask, in 2 episodes; the first is episode 0, frame 18" in out
    assert "1 episodes have none at all: 1" in out


def test_errors_are_one_line_and_exit_2(capsys, tmp_path):
    with pytest.raises(SystemExit) as e:
        main(["inspect", str(tmp_path / "no")])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_another_dataset_keeps_how_the_preset_trains():
    cfg = cli.parse(["--config", "pi05_subtask_tabletop", "--data.path", "x"], HELP, get_preset).config
    assert cfg.data == dataclasses.replace(get_preset("pi05_subtask_tabletop").data, path="x")
    assert cfg.data.prompt_swap > 0
    flags = ["--data.path=y", "--data.cameras", "front=top", "wrist=none", "--data.episodes", "0", "2"]
    data = cli.parse(["--config", "debug", *flags], HELP, get_preset).config.data
    assert isinstance(data, LeRobotData)
    assert (data.path, data.cameras, data.episodes) == ("y", ("front=top", "wrist=none"), (0, 2))


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENPI_AR_CACHE", str(tmp_path / "cache"))

    def call(*argv: object) -> None:
        train.run([str(a) for a in ("--config", "debug", "--checkpoint-dir", tmp_path / "ck", *argv)])

    return call


SHORT = (*CAMERAS, "--eval-every", 0, "--num-steps", 3, "--save-every", 3, "--log-every", 1)


@pytest.mark.slow
def test_datasets_of_every_version_train_together_and_the_policy_moves_the_robot(run, tmp_path, capsys):
    """One run on all of them; the checkpoint alone then knows how the robot is spoken to."""
    others = [f"{GOLDEN / name}={weight}" for name, weight in zip(DATASETS[:3], (1, 2, 0.5), strict=True)]
    flags = ("--data.path", GOLDEN / "v30_video", "--data.mix", *others, "--data.robot.delta-mask", 6, -1, *SHORT)
    run(*flags)
    out = capsys.readouterr().out
    assert out.count("training rows, weight") == 4 and "v30_images_lang: 38 training rows, weight 0.5" in out
    directory = tmp_path / "ck/debug/default"
    assets = store.load_assets(directory / "3")
    assert isinstance(assets.config.data, LeRobotData) and assets.config.data.robot.delta_mask == (6, -1)
    losses = [r["loss"] for r in read_metrics(directory / "metrics.jsonl") if r["kind"] == "train"]
    assert len(losses) == 3 and np.isfinite(losses).all()
    run(*flags, "--resume", "--data.frames", "decode", "--workers", 1)
    assert "nothing left to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"trained with another config: data.robot.delta_mask"):
        run(*flags, "--resume", "--data.robot.delta-mask", 7)

    policy = Policy.from_checkpoint(directory)
    frame = source(GOLDEN / "v30_video")[7]
    sent = {f"observation.images.{name}": image for name, image in frame["images"].items()}
    sent |= {"observation.state": frame["state"], "prompt": frame["prompt"]}
    actions = policy.infer(sent)["actions"]
    # The same through the training form of the observation, and by hand from what the model gave.
    np.testing.assert_array_equal(policy.infer(frame)["actions"], actions)
    plain_config = dataclasses.replace(assets.config, data=LeRobotData()).inference
    plain = Policy(plain_config, *store.load_policy_checkpoint(directory)[1:])
    learnt = plain.infer(frame)["actions"]
    np.testing.assert_allclose(actions[:, :6], learnt[:, :6] + frame["state"][:6], atol=1e-5)
    np.testing.assert_allclose(actions[:, 6], learnt[:, 6], atol=1e-6)
    with pytest.raises(UserError, match="data.mix takes PATH=WEIGHT"):
        run("--data.path", GOLDEN / "v30_video", "--data.mix", "there", *SHORT, "--exp-name", "new")


@pytest.mark.slow
@pytest.mark.parametrize("name", DATASETS)
def test_every_version_trains_alone_out_of_a_worker_process(run, tmp_path, name):
    run("--data.path", GOLDEN / name, "--data.frames", "decode", "--workers", 1, *SHORT)
    records = read_metrics(tmp_path / "ck/debug/default/metrics.jsonl")
    assert np.isfinite([r["loss"] for r in records]).all()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data.path", GOLDEN / "v30_video"), "--data.cameras front=observation.images.base_0_rgb wrist="),
        (("--data.path", GOLDEN / "v30_video", *CAMERAS, "--data.subtasks", "none"), "no subtask labels"),
        (("--data.path", GOLDEN / "v30_video", *CAMERAS[:3]), "--model.state-dim to 7"),
        (("--data.path", ""), "--data.path DIR"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(run, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        run(*flags)
    assert not (tmp_path / "ck").exists()


@pytest.mark.parametrize("mode", ["quantile", "z_score"])
def test_a_constant_dimension_is_flagged(capsys, tmp_path, mode):
    path = broken(tmp_path, "v30_video")
    edit_column(
        path / "data/chunk-000/file-000.parquet",
        "action",
        lambda c: c.__setitem__(slice(None), [[0.5, *a[1:]] for a in c]),
    )
    lines = [line for line in printed(capsys, "stats", path, "--mode", mode).splitlines() if "action.j" in line]
    assert ["constant" in line for line in lines] == [True] + [False] * 6


@pytest.mark.parametrize("name", ["v30_images_lang", "v30_video"])
def test_bench_measures_every_stage_of_a_dataset(capsys, monkeypatch, name):
    monkeypatch.setattr(loader, "_SECONDS", 0.02)
    cfg = loader.for_dataset(str(GOLDEN / name), get_preset("debug"))
    assert cfg.model.cameras == ("base_0_rgb", "left_wrist_0_rgb")  # the dataset's, not the preset's
    rates = loader.bench(dataclasses.replace(cfg, batch_size=4), step=False, workers=(0,))
    out = capsys.readouterr().out
    for stage in ("decode", "resize", "into the cache", "statistics", "read", "tokenize, normalise", "batch"):
        assert any(key.startswith(stage) and rates[key] > 0 for key in rates) and stage in out, stage
    assert rates["loader, threads (samples)"] > 0
    assert not [*GOLDEN.rglob("frames.npy")]  # its cache was a temporary one


@pytest.mark.parametrize(
    ("step", "rates", "workers", "words"),
    [
        (100, {0: 250, 1: 200}, 0, "compute is the bottleneck: .*2.5 times as many"),
        (100, {0: 50, 1: 60, 2: 120}, 0, "data is the bottleneck: .* --workers 2 makes 120"),
        (100, {0: 50, 1: 40, 2: 52}, 0, "data is the bottleneck: .* more workers do not help"),
        (100, {0: 150, 1: 90}, 1, "data is the bottleneck: .* --workers 0 makes 150"),
        (100, {0: 50, 1: 110}, 1, "compute is the bottleneck"),
    ],
)
def test_bench_says_what_limits_training(step, rates, workers, words):
    rates = {count: float(rate) for count, rate in rates.items()}
    assert re.search(words, loader.verdict(float(step), rates, workers))
