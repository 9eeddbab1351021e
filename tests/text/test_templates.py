"""If this fails, models read prompts that differ from those they were trained on, or learn from the wrong tokens."""

from pathlib import Path
import random

import numpy as np
import pytest

from openpi_ar.errors import UserError
from openpi_ar.text.segments import TokenArrays, pack
from openpi_ar.text.templates import TEMPLATES, discretize_state, get_template
from openpi_ar.text.tokenizer import Tokenizer, load_tokenizer
from openpi_ar.types import Kind
from openpi_ar.worlds.tabletop.tasks import known_subtasks

STATE = np.array([-1.3, -1.0, -0.9999, 0.0, 0.5, 0.9999, 1.0, 1.7], np.float32)
STATE_TEXT = "-1 0 0 128 192 255 255 255"

# Frozen: task "Pick_up the CUP.\n " and text "Move to_the cup. ", byte for byte.
FROZEN = {
    "openpi": ("Task: Pick up the CUP., State: -1 0 0 128 192 255 255 255;\nAction: ", None),
    "openpi_pi0": ("Pick up the CUP.\n", None),
    "subtask": ("Task: Pick up the CUP., State: -1 0 0 128 192 255 255 255;\nSubtask:", " Move to_the cup."),
    "openpi_subtask_generation": ("Task: pick up the cup. Subtask: ", "move to the cup.;\nAction: "),
    "openpi_subtask": (
        "Task: pick up the cup.; State: -1 0 0 128 192 255 255 255; Subtask: ",
        "move to the cup.;\nAction: ",
    ),
    "vqa": ("answer en Pick up the CUP.\n", "Move to_the cup."),
    "paligemma": ("Pick_up the CUP.\n", "Move to_the cup."),
}
OWN = ("subtask", "vqa", "paligemma")
WRITING = [name for name, (_, target) in FROZEN.items() if target is not None]


def encode_prompt(tok: Tokenizer, name: str, task: str, state: np.ndarray | None, budget: int) -> TokenArrays:
    return pack(tok, TEMPLATES[name].prompt_segments(task, state), budget)


def encode_target(tok: Tokenizer, name: str, text: str, budget: int) -> TokenArrays:
    return pack(tok, TEMPLATES[name].target_segments(text), budget)


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return load_tokenizer("embedded")


def test_every_preset_is_frozen():
    assert set(FROZEN) == set(TEMPLATES)


@pytest.mark.parametrize("name", FROZEN)
def test_text_is_byte_exact(name):
    prompt, target = FROZEN[name]
    assert TEMPLATES[name].prompt_text("Pick_up the CUP.\n ", STATE) == prompt
    if target is None:
        with pytest.raises(UserError, match="writes no text"):
            TEMPLATES[name].target_text("Move")
    else:
        assert TEMPLATES[name].target_text("Move to_the cup. ") == target


# The same with completed subtasks, "_" and capitals as above.
REMEMBERED = {
    "subtask": "Task: Pick up the CUP., Done: Move to_the cup.; lift, State: -1 0 0 128 192 255 255 255;\nSubtask:",
    "openpi_subtask_generation": "Task: pick up the cup. Done: move to the cup; lift. Subtask: ",
    "openpi_subtask": "Task: pick up the cup.; Done: move to the cup; lift; State: -1 0 0 128 192 255 255 255; Subtask: ",
}


@pytest.mark.parametrize("name", FROZEN)
def test_completed_subtasks_stand_before_the_state(tok, name):
    template, done = TEMPLATES[name], ("Move to_the cup. ", " lift")
    assert template.remembers is (name in REMEMBERED)
    if not template.remembers:
        with pytest.raises(UserError, match="has no place for completed subtasks"):
            template.prompt_text("Pick_up the CUP.\n ", STATE, done)
        return
    told = template.prompt_text("Pick_up the CUP.\n ", STATE, done)
    assert told == REMEMBERED[name]
    # What a session tells, the parsed text, is what training tells, the label.
    ids = [i for s in template.target_segments(done[0]) for i in s.ids(tok)]
    assert template.prompt_text("Pick_up the CUP.\n ", STATE, (template.parse(tok, ids), "lift")) == told
    assert template.prompt_text("a {done}", STATE, ("{texts}",)).count("{") == 2


def test_braces_in_the_users_text_are_just_text():
    assert TEMPLATES["vqa"].prompt_text("what is {state} {0} {task}?") == "answer en what is {state} {0} {task}?\n"
    assert TEMPLATES["subtask"].target_text("say {text}") == " say {text}"


def test_state_is_discretised_as_openpi_does():
    # openpi: np.digitize(state, bins=np.linspace(-1, 1, 256 + 1)[:-1]) - 1. Written out here without digitize.
    state = np.random.default_rng(0).uniform(-1.2, 1.2, 2000)
    expected = [max(-1, min(255, int(np.floor((s + 1) * 128)))) for s in state]
    assert discretize_state(state).tolist() == expected
    assert " ".join(map(str, discretize_state(STATE))) == STATE_TEXT


@pytest.mark.parametrize("name", FROZEN)
def test_prompt_bits(tok, name):
    a = encode_prompt(tok, name, "pick up the cup", STATE, 64)
    text = TEMPLATES[name].prompt_text("pick up the cup", STATE)
    n = int(a["valid"].sum())
    assert a["ids"].dtype == np.int32
    assert a["ids"][:n].tolist() == [tok.bos_id, *tok.encode(text)]
    assert a["valid"].tolist() == [True] * n + [False] * (64 - n)
    assert (a["ids"][n:] == tok.pad_id).all()
    assert not a["causal"].any() and not a["loss"].any() and not a["hidden"].any()


@pytest.mark.parametrize("name", WRITING)
def test_target_bits(tok, name):
    a = encode_target(tok, name, "pick up the cup", 32)
    n = int(a["valid"].sum())
    assert a["ids"][:n].tolist() == [*tok.encode(TEMPLATES[name].target_text("pick up the cup")), tok.eos_id]
    assert a["causal"].tolist() == a["loss"].tolist() == a["valid"].tolist() == [True] * n + [False] * (32 - n)
    assert np.flatnonzero(a["hidden"]).tolist() == [n - 1]  # the EOS
    assert set(a["kind"][:n].tolist()) == {Kind.ANSWER if name in ("vqa", "paligemma") else Kind.SUBTASK}


def test_a_template_says_what_it_reads_and_whether_it_needs_a_state():
    assert [(t.key, t.needs_state) for t in (TEMPLATES["vqa"], TEMPLATES["subtask"])] == [
        ("answer", False),
        ("subtask", True),
    ]
    assert all(t.needs_state for t in TEMPLATES.values() if "{state}" in t.prompt)


def random_texts(count: int) -> list[str]:
    rng = random.Random(1)
    words = ["pick", "the", "red", "12", "255", "a", "Stop!", "🤖", "(left)", "naïve", "Subtask:", "-1", "x"]
    return [" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(count)]


@pytest.mark.parametrize("name", OWN)
def test_prompt_and_target_encoded_apart_are_the_two_encoded_together(tok, name):
    for task, text in zip(random_texts(200), [*known_subtasks(), *random_texts(300)[100:]], strict=False):
        prompt, target = TEMPLATES[name].prompt_text(task, STATE), TEMPLATES[name].target_text(text)
        assert tok.encode(prompt) + tok.encode(target) == tok.encode(prompt + target), (task, text)


def test_a_prompt_that_ends_with_a_space_would_break_it(tok):
    prompt, target = "Task: x, State: 1;\nSubtask: ", "pick up the cup"
    apart, together = tok.encode(prompt) + tok.encode(target), tok.encode(prompt + target)
    assert apart != together
    # What the model would have to say first differs: "p" "ick" after a space of its own, instead of " pick".
    assert [tok.piece(i) for i in together][-4] == "▁pick"
    assert "▁pick" not in [tok.piece(i) for i in apart]


@pytest.mark.parametrize("name", WRITING)
def test_what_was_said_is_parsed(tok, name):
    for text in (*known_subtasks(), *random_texts(50)):
        a = encode_target(tok, name, text, 64)
        said = a["ids"][a["valid"]].tolist()
        assert TEMPLATES[name].parse(tok, said) == TEMPLATES[name].canonical(text)
        # Whatever follows EOS is not text.
        assert TEMPLATES[name].parse(tok, [*said, *tok.encode(" junk"), 0, 0]) == TEMPLATES[name].canonical(text)


def test_text_cut_short_loses_no_more_than_what_was_cut(tok):
    ids = tok.encode("move to the cup.;\nAction: ")
    whole = [TEMPLATES["openpi_subtask"].parse(tok, ids[:n]) for n in range(len(ids) + 1)]
    assert whole[-1] == "move to the cup"
    assert whole[0] == ""
    assert all("move to the cup".startswith(said) for said in whole)
    assert TEMPLATES["subtask"].parse(tok, tok.encode(" pick up the")) == "pick up the"


def test_canonical_names_what_a_perfect_model_says():
    assert TEMPLATES["subtask"].canonical(" Pick_up: ") == "Pick_up:"
    assert TEMPLATES["openpi_subtask"].canonical(" Pick_up: ") == "pick up"


@pytest.mark.parametrize("empty", ["", "  ", "\n", " _ "])
def test_empty_prompts_are_refused(tok, empty):
    with pytest.raises(UserError, match="prompt is empty"):
        encode_prompt(tok, "subtask", empty, STATE, 64)


def test_empty_targets_are_refused(tok):
    with pytest.raises(UserError, match="subtask is empty"):
        encode_target(tok, "subtask", " \n", 64)


def test_budgets_name_both_numbers_and_hold_to_the_last_token(tok):
    need = int(encode_prompt(tok, "subtask", "pick up the cup", STATE, 64)["valid"].sum())
    assert encode_prompt(tok, "subtask", "pick up the cup", STATE, need)["valid"].all()
    with pytest.raises(UserError, match=f"takes {need} tokens but the budget is {need - 1}.*max-prompt-tokens"):
        encode_prompt(tok, "subtask", "pick up the cup", STATE, need - 1)
    with pytest.raises(UserError, match=r"takes 6 tokens but the budget is 5.*max-target-tokens"):
        encode_target(tok, "subtask", "pick up the red block", 5)


def test_missing_or_broken_state_and_unknown_templates_are_refused(tok):
    with pytest.raises(UserError, match="no state was given"):
        encode_prompt(tok, "subtask", "pick", None, 64)
    assert encode_prompt(tok, "openpi_pi0", "pick", None, 64)["valid"].any()
    with pytest.raises(UserError, match="finite"):
        encode_prompt(tok, "subtask", "pick", np.array([0.0, np.nan]), 64)
    with pytest.raises(UserError, match=r"'vga': choose one of vqa, .*openpi_pi0.*"):
        get_template("vga")
    with pytest.raises(UserError, match="subtask_"):
        get_template("subtask_")


def test_the_documented_table_is_the_code():
    lines = (Path(__file__).parents[2] / "docs" / "configs.md").read_text().splitlines()
    rows = dict(line.removeprefix("| ").split(" | ", 1) for line in lines if line.startswith("| "))
    for name, t in TEMPLATES.items():
        task, text = ("{question}", "{answer}") if t.key == "answer" else ("{task}", "{subtask}")
        prompt = f"`{t.prompt}`".replace("\n", "\\n").replace("{task}", task) + ", lower-cased" * t.cleans
        target = "none" if t.target is None else f"`{t.target}`".replace("\n", "\\n").replace("{text}", text)
        assert rows[f"`{name}`"] == f"{prompt} | {target} | {'needed' if t.needs_state else 'not needed'} |"
