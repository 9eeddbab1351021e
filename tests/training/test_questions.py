"""Broken if this fails: rows of questions cannot be trained or evaluated beside robot rows, or change the robot's
figures."""

import dataclasses

import jax
import numpy as np
import pytest

from configs.debug import DEBUG
from openpi_ar.data import check
from openpi_ar.data.inputs import collate
from openpi_ar.data.lerobot.source import LeRobotSource
from openpi_ar.training.evaluate import Evaluator
from openpi_ar.training.metrics import averaged
from openpi_ar.training.optimizer import make_optimizer
from openpi_ar.training.state import init_state
from openpi_ar.training.step import make_train_step
from openpi_ar.types import Batch
from tests.data_fixtures import PLAIN, sources, transform
from tests.model_fixtures import random_like

CFG = dataclasses.replace(DEBUG, batch_size=4, eval_batches=1)
SOURCE = sources()[0]


def question(i: int) -> dict:
    answer = ("yes", "no")[i % 2]
    return {"images": SOURCE[i]["images"], "question": f"is {i} red?", "answer": answer, "template": "vqa"}


class Rows(LeRobotSource):
    """A training source of given rows; what is asked of it as a whole is the robot data's."""

    def __init__(self, given: list[dict]):
        super().__init__(SOURCE.table, SOURCE.rows, SOURCE.horizon, SOURCE.robot)
        object.__setattr__(self, "given", given)  # the base class is frozen

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: int) -> dict:
        return self.given[index]


ROBOT = [SOURCE[i] for i in (0, 8, 14)]  # one of each prompt
MIXED = [ROBOT[0], question(1), ROBOT[1], question(2), ROBOT[2]]


def model(cfg=CFG):
    return random_like(jax.eval_shape(lambda: init_state(cfg, make_optimizer(cfg.optimizer, 10))), 0.3).model


def evaluated(rows: list[dict]) -> tuple[dict[str, float], list[tuple[str, str]]]:
    cfg = dataclasses.replace(CFG, batch_size=len(rows))
    return Evaluator(cfg, Rows(rows), transform())(model())


def test_questions_change_no_figure_of_the_robot_rows():
    alone, _ = evaluated(ROBOT)
    mixed, texts = evaluated(MIXED)
    own = {name for name in mixed if name.startswith("answer")}
    assert own == {"answer_ce", "answer_exact_match", "answer_first_token", "answer_generated_exact"}
    assert set(mixed) - own == set(alone)
    for name in set(alone) - {"loss"}:
        assert mixed[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name
    assert {"swap_action", "swap_text", "action_error_3", "subtask_generated_exact"} < set(alone)
    assert mixed["loss"] == pytest.approx(alone["loss"] + mixed["answer_ce"], rel=1e-4)
    assert {"yes", "no"} & {truth for truth, _ in texts}
    # Negative control: another robot row does change them.
    other, _ = evaluated([*ROBOT[:2], SOURCE[15]])
    assert abs(other["action_error"] - alone["action_error"]) > 1e-3


def test_questions_alone_are_evaluated_by_what_can_be_measured():
    metrics, texts = evaluated([question(1), question(2)])
    assert set(metrics) == {"loss", "answer_ce", "answer_exact_match", "answer_first_token", "answer_generated_exact"}
    assert [truth for truth, _ in texts] == ["no", "yes"]


def test_a_batch_of_both_trains_both():
    t = transform()
    tx = make_optimizer(CFG.optimizer, 10)
    step = make_train_step(CFG, tx)
    state = init_state(CFG, tx)
    batches = [collate([t.sample(r) for r in rows]) for rows in (MIXED[:4], [*ROBOT, ROBOT[0]])]
    history = []
    for i in range(6):
        batch = batches[i % 2]
        assert isinstance(batch, Batch)
        state, metrics = step(state, batch, jax.random.key(0))
        history.append({name: float(value) for name, value in metrics.items()})
    assert all(np.isfinite(list(m.values())).all() for m in history)
    assert history[-2]["answer_ce"] < history[0]["answer_ce"] and history[-2]["subtask_ce"] < history[0]["subtask_ce"]
    tokens = sum(len(t.tokenizer.encode(answer)) + 1 for answer in ("no", "yes"))  # with EOS
    assert [m["answer_count"] for m in history[:2]] == [tokens, 0]
    means = averaged(history[:2])
    # A batch without answers says nothing about them; without any, there is nothing to report.
    assert means["answer_ce"] == history[0]["answer_ce"] > 0
    assert "answer_ce" not in averaged(history[1:2]) and not any("_count" in name for name in means)


@pytest.mark.slow
def test_reprompted_rows_train_and_are_evaluated_beside_questions():
    text = dataclasses.replace(CFG.text, conditioning="reprompt")
    cfg = dataclasses.replace(CFG, text=text, batch_size=len(MIXED))
    t = transform(dataclasses.replace(PLAIN, text=text))
    tx = make_optimizer(cfg.optimizer, 10)
    state, step = init_state(cfg, tx), make_train_step(cfg, tx)
    batch = collate([t.sample(r) for r in MIXED])
    losses = []
    for _ in range(5):
        state, metrics = step(state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    mixed, _ = Evaluator(cfg, Rows(MIXED), t)(model())
    alone, _ = Evaluator(dataclasses.replace(cfg, batch_size=len(ROBOT)), Rows(ROBOT), t)(model())
    for name in set(alone) - {"loss"}:
        assert mixed[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name
    appended, _ = evaluated(ROBOT)
    assert abs(appended["action_error"] - alone["action_error"]) > 1e-5  # control
    assert appended["subtask_generated_exact"] == alone["subtask_generated_exact"]


def test_the_dry_run_shows_each_rows_own_texts(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    odd = check.dry_run(CFG, Rows(MIXED[:3]), Rows(ROBOT), transform())
    out = capsys.readouterr().out
    assert "'answer en is 1 red?\\n'" in out and "'no<eos>'" in out and f"' {ROBOT[0]['subtask']}<eos>'" in out
    assert not any("budget" in line or "tokens" in line for line in odd)
