"""If this fails, questions of a folder or of a dataset are trained with the wrong pictures or answers, or change the
robot's rows."""

import dataclasses
import json
from pathlib import Path
import pickle

import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.debug import DEBUG
from openpi_ar.config import LeRobotData
from openpi_ar.data import check
from openpi_ar.data.inputs import InputTransform
from openpi_ar.data.lerobot.questions import questions_of, read_questions
from openpi_ar.data.loader import Loader
from openpi_ar.data.questions import load_folder
from openpi_ar.data.sources import load_sources
from openpi_ar.errors import UserError
from openpi_ar.text.tokenizer import load_tokenizer
from tests.lerobot_fixtures import CAMERAS, GOLDEN, STARTS, broken, edit_json, pixels, source, sources


def picture(path: Path, value: int) -> Path:
    Image.fromarray(np.full((20, 30, 3), value, np.uint8)).save(path)
    return path


def folder(path: Path, count: int = 12) -> Path:
    path.mkdir(parents=True)
    lines = []
    for i in range(count):
        picture(path / f"{i // 2}.png", 10 * (i // 2))  # two questions about each picture
        lines.append({"image": f"{i // 2}.png", "question": f"what is {i}?", "answer": f" number {i} "})
    (path / "vqa.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_rows_of_a_folder_are_its_pictures_questions_and_answers(tmp_path):
    train, test = load_folder(str(folder(tmp_path / "q")), CAMERAS, 0.3)
    assert (len(train), len(test)) == (8, 4)
    seen = [train[i] for i in range(8)] + [test[i] for i in range(4)]
    for row in seen:
        number = int(row["question"].split()[-1][:-1])
        assert row["answer"] == f"number {number}" and row["template"] == "vqa" and "actions" not in row
        assert row["masked"] == CAMERAS[1:] and (row["images"][CAMERAS[0]] == 10 * (number // 2)).all()
    assert len({row["question"] for row in seen}) == 12
    pictures = [{row["images"][CAMERAS[0]][0, 0, 0] for row in rows} for rows in (seen[:8], seen[8:])]
    assert not pictures[0] & pictures[1]  # no picture is on both sides
    same, also = load_folder(str(tmp_path / "q"), CAMERAS, 0.0)
    assert len(same) == len(also) == 12
    assert pickle.loads(pickle.dumps(train))[0]["question"] == train[0]["question"]  # for worker processes


def test_pictures_go_to_the_cameras_that_are_named(tmp_path):
    picture(tmp_path / "a.png", 1), picture(tmp_path / "b.png", 2)
    entry = {"question": "what?", "answer": "that"}
    entries = [
        {**entry, "images": ["a.png", "b.png"]},
        {**entry, "images": {CAMERAS[1]: "a.png"}},
        {**entry, "image": str(tmp_path / "b.png")},
    ]
    (tmp_path / "vqa.jsonl").write_text("\n".join(map(json.dumps, entries)))
    rows, _ = load_folder(str(tmp_path), CAMERAS, 0.0)
    shown = [{camera: int(image[0, 0, 0]) for camera, image in rows[i]["images"].items()} for i in range(3)]
    assert shown == [{CAMERAS[0]: 1, CAMERAS[1]: 2}, {CAMERAS[1]: 1}, {CAMERAS[0]: 2}]
    assert rows[1]["masked"] == CAMERAS[:1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": None}, "'answer' must be a text, found None"),
        ({"answer": "  "}, "'answer' must be a text"),
        ({"question": 7}, "'question' must be a text, found 7"),
        ({"image": "gone.png"}, "picture 'gone.png' is missing"),
        ({"image": None}, "'image' must be a file"),
        ({"images": ["0.png"] * 3}, "at most 2 files"),
        ({"images": {"top": "0.png"}}, "base_0_rgb, left_wrist_0_rgb"),
        ({"images": {CAMERAS[0]: 3}}, "3 is no file name"),
    ],
)
def test_a_line_that_is_not_right_is_named(tmp_path, change, words):
    file = folder(tmp_path / "q") / "vqa.jsonl"
    lines = file.read_text().split("\n")
    lines[4] = json.dumps({**json.loads(lines[4]), **change})  # blank lines count
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match="line 5: ") as e:
        load_folder(str(file.parent), CAMERAS, 0.3)
    assert words in str(e.value)


def test_a_picture_that_cannot_be_read_is_named_when_it_is(tmp_path):
    root = folder(tmp_path / "q")
    (root / "0.png").write_text("no picture")
    rows, _ = load_folder(str(root), CAMERAS, 0.0)
    with pytest.raises(UserError, match="line 1 is not a readable image"):
        rows[0]
    (root / "vqa.jsonl").write_text("{}\nnonsense")
    with pytest.raises(UserError, match="line 2 is not JSON"):
        load_folder(str(root), CAMERAS, 0.0)
    (root / "vqa.jsonl").write_text("")
    with pytest.raises(UserError, match="0 questions for training"):
        load_folder(str(root), CAMERAS, 0.0)


def event(role: str, content: object, camera: str | None) -> dict:
    return {"role": role, "content": content, "style": "vqa", "camera": camera, "tool_calls": None}


def with_events(tmp_path: Path, events: dict[tuple[int, int], list[dict]]) -> Path:
    """A copy of LeRobot's own dataset with these rows on its frames, by (episode, frame)."""
    root = broken(tmp_path, "v30_images_lang")
    for file in (root / "data").glob("*/*.parquet"):
        table = pq.read_table(file)
        places = zip(table["episode_index"].to_pylist(), table["frame_index"].to_pylist(), strict=True)
        column = pa.array([events.get(place, []) for place in places])
        index = table.schema.get_field_index("language_events")
        pq.write_table(table.set_column(index, "language_events", column), file)
    return root


FRONT, WRIST = (f"observation.images.{camera}" for camera in CAMERAS)
PAIR = [event("user", "what is red?", FRONT), event("assistant", "the block", FRONT)]


def test_questions_on_frames_are_rows_with_the_cameras_that_they_name(tmp_path):
    both = [*PAIR, event("user", "what is red?", WRIST), event("assistant", "the block", WRIST)]
    anywhere = [event("user", "is it open?", None), event("assistant", "none", None)]
    noise = [{**event("assistant", "to the left", None), "style": "trace"}]
    two = [*PAIR, event("user", "how near?", WRIST), event("assistant", '{"label": "cup"}', WRIST)]
    root = with_events(tmp_path, {(0, 3): PAIR, (1, 0): both + noise, (2, 5): anywhere, (2, 21): two})
    found = read_questions(source(root))
    frame = {0: STARTS[0] + 3, 1: STARTS[1], 2: STARTS[2] + 5, 3: STARTS[2] + 21, 4: STARTS[2] + 21}
    texts = [(q.question, q.answer) for q in found]
    block = ("what is red?", "the block")
    assert texts == [block, block, ("is it open?", "none"), block, ("how near?", '{"label": "cup"}')]
    assert [tuple(q.images) for q in found] == [CAMERAS[:1], CAMERAS, CAMERAS, CAMERAS[:1], CAMERAS[1:]]
    for i, q in enumerate(found):
        for camera, read in q.images.items():
            np.testing.assert_array_equal(read(), pixels(camera)[frame[i]])
    assert "episode 2, frame 21" in found[-1].where
    # A model without the wrist camera is not asked about it.
    only = read_questions(source(root, cameras=(f"{CAMERAS[0]}={FRONT}", f"{CAMERAS[1]}=none")))
    assert [tuple(q.images) for q in only] == [CAMERAS[:1]] * 4

    train, held_out, _ = sources(root, held_out=0.3)
    a, b = questions_of(train, held_out, CAMERAS)
    assert len(a) + len(b) == 5 and not {q.group for q in a.rows} & {q.group for q in b.rows}
    for events, words in (
        (PAIR[:1], "a question without an answer"),
        (PAIR[1:], "an answer without a question"),
        ([event("user", 3, FRONT)], "expected a text"),
    ):
        broken_root = with_events(tmp_path / words, {(1, 2): events})
        with pytest.raises(UserError, match=f"episode 1, frame 2.*{words}"):
            read_questions(source(broken_root))


def mixed_config(root: Path, **fields) -> tuple:
    data = LeRobotData(path=str(root), frames="decode", held_out=0.3, **fields)
    model = dataclasses.replace(DEBUG.model, cameras=CAMERAS, state_dim=8, action_dim=8)
    return dataclasses.replace(DEBUG, model=model, data=data, batch_size=4)


def test_a_batch_has_its_share_of_questions_and_the_robots_statistics(tmp_path):
    root = with_events(tmp_path, {(e, f): PAIR for e in range(3) for f in range(0, 18, 3)})
    alone = load_sources(mixed_config(root))[0]
    cfg = mixed_config(root, questions=0.5, mix=(f"{folder(tmp_path / 'q')}=0.5",))
    train, held_out, remarks = load_sources(cfg)
    for name, stats in train.norm_stats().items():
        np.testing.assert_allclose(stats.mean, alone.norm_stats()[name].mean, rtol=1e-5)
    assert sum("training rows, weight 0.5" in remark for remark in remarks) == 2
    transform = InputTransform.for_training(cfg, load_tokenizer("embedded"), train.norm_stats())
    batches = Loader(train, transform, batch_size=4, seed=0, augment=None)
    acting = [np.asarray(next(batches).action_mask).any((1, 2)).sum() for _ in range(10)]
    assert acting == [2] * 10  # 1 : 0.5 : 0.5
    kinds = [held_out[i].get("answer") for i in range(len(held_out))]
    assert "the block" in kinds and any(k and k.startswith("number") for k in kinds) and None in kinds
    with pytest.raises(UserError, match="no dataset has questions"):
        load_sources(mixed_config(GOLDEN / "v30_video", questions=0.5))
    with pytest.raises(UserError, match="give it in --data.mix"):
        load_sources(mixed_config(tmp_path / "q"))
    with pytest.raises(UserError, match="weight of 0 or more"):
        load_sources(mixed_config(root, questions=-1.0))
    edit_json(root / "meta/info.json", lambda info: info["features"].pop("language_events"))
    with pytest.raises(UserError, match="no dataset has questions"):
        load_sources(mixed_config(root, questions=0.5))


def test_a_question_that_is_too_long_is_found_before_the_run_and_the_dry_run_shows_both_kinds(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    pairs = {(e, f): PAIR for e in range(3) for f in range(0, 18, 3)}
    cfg = mixed_config(with_events(tmp_path, pairs), questions=1.0)
    train, held_out, _ = load_sources(cfg)
    transform = InputTransform.for_training(cfg, load_tokenizer("embedded"), train.norm_stats())
    check.check_questions(train, transform)
    check.dry_run(cfg, train, held_out, transform)
    out = capsys.readouterr().out
    assert "'answer en what is red?\\n'" in out and "'the block<eos>'" in out and "Subtask:" in out
    assert out.count("state after normalisation") == 1
    long = {(1, 4): [event("user", "what is " + "very " * 30, FRONT), event("assistant", "that", FRONT)]}
    train, _, _ = load_sources(mixed_config(with_events(tmp_path / "long", pairs | long), questions=1.0))
    with pytest.raises(UserError, match="episode 1, frame 4: the prompt takes .* tokens but the budget is"):
        check.check_questions(train, transform)
    odd = check.dry_run(cfg, train, held_out, transform)
    assert [line for line in odd if "frame 4: the question takes" in line and "text.max_prompt_tokens is" in line]
