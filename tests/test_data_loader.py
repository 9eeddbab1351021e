"""Broken if this fails: training reads wrong chunks, trains on held-out episodes, or a resumed run sees other batches."""

import dataclasses

import jax
import numpy as np
import pytest

from openpi_ar.config import TabletopData
from openpi_ar.data.loader import Loader, evaluation_batches
from openpi_ar.data.tabletop import PromptSwap, load_tabletop, split_sources
from openpi_ar.errors import UserError
from tests.data_fixtures import HORIZON, LENGTHS, PROMPTS, demos, sources, transform


def loader(seed: int = 0, batch_size: int = 4, fraction: float = 0.0) -> Loader:
    swap = PromptSwap(PROMPTS, fraction)
    return Loader(sources()[0], transform(), batch_size=batch_size, seed=seed, augment=swap)


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def frames(batch) -> np.ndarray:
    """Frame numbers of a batch: the front camera's pixels spell them."""
    return np.asarray(batch.observation.images)[:, 0, 0, 0, 0]


def test_the_last_episodes_are_held_out():
    train, held_out = sources()
    np.testing.assert_array_equal(train.frames, np.arange(sum(LENGTHS[:-1])))
    np.testing.assert_array_equal(held_out.frames, np.arange(sum(LENGTHS[:-1]), sum(LENGTHS)))
    # 5 % of 100 episodes.
    many, few = split_sources(demos((2,) * 100), HORIZON, ("front",))
    assert (len(many), len(few)) == (190, 10)


def test_commanded_episodes_train_no_text_and_are_not_for_evaluation():
    d = demos()
    marked = np.isin(d.episode_index, [0, 3])  # one to train on and the last one
    with pytest.raises(UserError, match="all held-out episodes are commanded"):
        split_sources(dataclasses.replace(d, commanded=marked), HORIZON, ())
    train, held_out = split_sources(dataclasses.replace(d, commanded=d.episode_index == 0), HORIZON, ())
    assert [train[i]["supervise_text"] for i in range(len(train))] == [False] * 7 + [True] * (len(train) - 7)
    assert len(held_out) == LENGTHS[-1]


def test_chunks_stop_at_the_end_of_their_episode():
    train, _ = sources()
    ends = np.cumsum(LENGTHS) - 1
    episode = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    for i in range(len(train)):
        raw, end = train[i], ends[episode[i]]
        expected = np.minimum(np.arange(i, i + HORIZON), end)
        np.testing.assert_array_equal(raw["actions"][:, 0], expected)
        np.testing.assert_array_equal(raw["action_valid"], np.arange(i, i + HORIZON) <= end)
        assert raw["images"]["wrist"][0, 0, 0] == 100 + i
    assert not train[LENGTHS[0] - 1]["action_valid"][1:].any()


def test_statistics_are_those_of_the_training_frames_only():
    train, _ = sources()
    d, rows = demos(), sum(LENGTHS[:-1])
    stats = train.norm_stats("z_score")
    np.testing.assert_allclose(stats["actions"].mean, d.action[:rows].mean(0), atol=1e-6)
    np.testing.assert_allclose(stats["state"].std, d.state[:rows].std(0), rtol=1e-5)
    assert stats["actions"].mode == "z_score"


def test_batches_depend_on_seed_and_number_only():
    a, b, other = loader(), loader(), loader(seed=1)
    batches = [next(a) for _ in range(12)]
    assert all(same(x, next(b)) for x in batches)
    assert not all(same(x, next(other)) for x in batches)
    assert a.position == 12


def test_restored_position_gives_the_very_next_batch():
    a, b = loader(fraction=0.5), loader(fraction=0.5)
    batches = [next(a) for _ in range(20)]
    b.position = 13
    assert all(same(x, next(b)) for x in batches[13:])
    assert b.position == 20
    # Negative control: one batch off is noticed.
    b.position = 14
    assert not same(batches[13], next(b))


def test_every_epoch_is_a_new_permutation():
    data = loader(batch_size=3)
    n = sum(LENGTHS[:-1])
    assert n % 3 == 0
    epochs = [np.concatenate([frames(next(data)) for _ in range(n // 3)]) for _ in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(n))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], np.arange(n))


def test_images_reach_the_device_as_uint8():
    batch = next(loader())
    assert isinstance(batch.observation.images, jax.Array)
    assert batch.observation.images.dtype == np.uint8
    assert batch.observation.images.shape == (4, 2, 32, 32, 3)


def test_prompt_swap_changes_the_task_and_unsupervises_the_text_but_not_the_actions():
    plain, swapped = loader(), loader(fraction=1.0)
    for _ in range(8):
        a, b = next(plain), next(swapped)
        assert same((a.actions, a.action_mask, a.observation.images), (b.actions, b.action_mask, b.observation.images))
        np.testing.assert_array_equal(a.target.ids, b.target.ids)
        assert np.asarray(a.target.loss).any(-1).all()
        assert not np.asarray(b.target.loss).any()
        assert (np.asarray(a.observation.prompt.ids) != np.asarray(b.observation.prompt.ids)).any(-1).all()


def test_prompt_swap_hits_its_fraction_and_every_other_prompt():
    swap = PromptSwap(PROMPTS, 0.3)
    raws = [swap({"prompt": PROMPTS[0]}, np.random.default_rng(i)) for i in range(2_000)]
    changed = [r["prompt"] for r in raws if "supervise_text" in r]
    assert 0.26 < len(changed) / len(raws) < 0.34
    assert set(changed) == set(PROMPTS[1:])
    assert {r["prompt"] for r in raws if "supervise_text" not in r} == {PROMPTS[0]}


def test_evaluation_batches_are_fixed_and_fill_up():
    _, held_out = sources()
    pairs = evaluation_batches(held_out, transform(), batch_size=4, batches=2)
    again = evaluation_batches(held_out, transform(), batch_size=4, batches=2)
    assert all(same(x[1], y[1]) for x, y in zip(pairs, again, strict=True))
    assert [frames(b).tolist() for _, b in pairs] == [[21, 22, 24, 25], [21, 23, 24, 26]]
    (raw, batch), *_ = pairs
    np.testing.assert_array_equal([r["images"]["front"][0, 0, 0] for r in raw], frames(batch))


def test_impossible_data_is_refused():
    with pytest.raises(UserError, match="at least 2"):
        load_tabletop(TabletopData(episodes=1), HORIZON, ("front",))
    with pytest.raises(UserError, match=r"names base_0_rgb, but the tabletop has front, wrist"):
        load_tabletop(TabletopData(), HORIZON, ("front", "base_0_rgb"))
    with pytest.raises(UserError, match="two tasks"):
        PromptSwap(PROMPTS[:1], 0.5)
    shuffled = dataclasses.replace(demos(), episode_index=np.tile(np.arange(3), 9).astype(np.int32))
    with pytest.raises(UserError, match="not grouped"):
        split_sources(shuffled, HORIZON, ("front",))
