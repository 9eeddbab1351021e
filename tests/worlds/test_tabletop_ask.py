"""If this fails, the figures of how many questions a checkpoint answers are wrong."""

import itertools

import pytest

from openpi_ar.errors import UserError
from openpi_ar.worlds.protocol import Play
from openpi_ar.worlds.tabletop.ask import AskConfig, Asked, Kind, ask
from openpi_ar.worlds.tabletop.episodes import TabletopEpisodes, open_episodes
from openpi_ar.worlds.tabletop.questions import KINDS, all_questions, kind_of


class Knows:
    """Answers from the simulator, wrongly for some kinds."""

    def __init__(self, *wrong: str) -> None:
        self.world: TabletopEpisodes = open_episodes(Play(seed=1000, image_size=(8, 8)))()
        self.wrong, self.asked, self.seen = wrong, [], []

    def answer(self, images, question):
        self.asked.append(question)
        self.seen.append(max(int(image.max()) for image in images.values()))
        certain = dict(itertools.chain(*all_questions(self.world.world.facts()).values()))
        return {"answer": "" if kind_of(question) in self.wrong else certain[question]}


def asked_of(model: Knows, **how) -> Asked:
    return ask(model, AskConfig(episodes=2, every=7, **how), lambda: model.world)


def test_what_the_simulator_knows_is_right_and_a_wrong_kind_is_found():
    right = asked_of(Knows())
    assert set(right.kinds) == set(KINDS)
    assert {kind.right for kind in [*right.kinds.values(), right.overall]} == {1.0}
    assert right.overall.asked == sum(kind.asked for kind in right.kinds.values()) > 2 * len(KINDS)
    one_wrong = asked_of(Knows("side"))
    assert {name: kind.right for name, kind in one_wrong.kinds.items()} == {k: float(k != "side") for k in KINDS}
    assert one_wrong.overall.right == 1 - right.kinds["side"].asked / right.overall.asked


def test_it_asks_at_the_same_moments_whatever_the_answers_and_black_images_are_black():
    model, blind = Knows(), Knows()
    asked_of(model)
    asked_of(blind, blank_images=True)
    assert model.asked == blind.asked
    assert min(model.seen) > 100 and max(blind.seen) == 0


def test_the_commonest_answer_is_counted_by_wording():
    rows = [("a", "yes", "yes"), ("a", "yes", "no"), ("a", "no", "no"), ("b", "no", "yes")]
    assert Kind.of(rows) == Kind(asked=4, right=0.5, majority=0.75)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(UserError, match="every must be 1 or more, found 0"):
        AskConfig(every=0)
