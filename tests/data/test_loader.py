"""Broken if this fails: training reads wrong chunks, trains on held-out episodes, or a resumed run sees other
batches."""

import dataclasses
import pickle

import jax
import numpy as np
import pytest

from openpi_ar.data.layout import Layout
from openpi_ar.data.lerobot.frame_cache import CachedReader
from openpi_ar.data.lerobot.source import LeRobotSource
from openpi_ar.data.loader import Loader, evaluation_batches
from openpi_ar.data.mixture import Mixture
from openpi_ar.data.prompt_swap import PromptSwap
from openpi_ar.errors import UserError
from tests.data_fixtures import HORIZON, LENGTHS, PROMPTS, sources, table, transform


def loader(seed: int = 0, batch_size: int = 4, fraction: float = 0.0) -> Loader:
    swap = PromptSwap(PROMPTS, fraction)
    return Loader(sources()[0], transform(), batch_size=batch_size, seed=seed, augment=swap)


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def frames(batch) -> np.ndarray:
    """Frame numbers of a batch: the front camera's pixels spell them."""
    return np.asarray(batch.observation.images)[:, 0, 0, 0, 0]


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
    d, rows = table(), sum(LENGTHS[:-1])
    stats = train.norm_stats("z_score")
    np.testing.assert_allclose(stats["actions"].mean, d.actions[:rows].mean(0), atol=1e-6)
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
    raws = [swap({"prompt": PROMPTS[0], "actions": ()}, np.random.default_rng(i)) for i in range(2_000)]
    changed = [r["prompt"] for r in raws if "supervise_text" in r]
    assert 0.26 < len(changed) / len(raws) < 0.34
    assert set(changed) == set(PROMPTS[1:])
    assert {r["prompt"] for r in raws if "supervise_text" not in r} == {PROMPTS[0]}
    question = {"question": "is it red?", "answer": "yes"}
    assert all(PromptSwap(PROMPTS, 1.0)(question, np.random.default_rng(i)) is question for i in range(5))


def test_evaluation_batches_are_fixed_and_fill_up():
    _, held_out = sources()
    pairs = evaluation_batches(held_out, transform(), batch_size=4, batches=2)
    again = evaluation_batches(held_out, transform(), batch_size=4, batches=2)
    assert all(same(x[1], y[1]) for x, y in zip(pairs, again, strict=True))
    assert [frames(b).tolist() for _, b in pairs] == [[21, 22, 24, 25], [21, 23, 24, 26]]
    (raw, batch), *_ = pairs
    np.testing.assert_array_equal([r["images"]["front"][0, 0, 0] for r in raw], frames(batch))


def test_a_swap_without_another_task_is_refused():
    with pytest.raises(UserError, match="two tasks"):
        PromptSwap(PROMPTS[:1], 0.5)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """The training source with its images in memory-mapped files, as caches are."""
    train, _ = sources()
    folder, images = tmp_path_factory.mktemp("cache"), {}
    for name, reader in train.table.images.items():
        np.save(file := folder / f"{name}.npy", np.stack([reader(i) for i in range(len(train.table.last))]))
        images[name] = CachedReader(file)
    return dataclasses.replace(train, table=dataclasses.replace(train.table, images=images))


def test_what_goes_to_a_worker_names_its_files(on_disk):
    sent = pickle.dumps(on_disk)
    assert len(sent) < 12_000 < on_disk.table.images["front"].file.stat().st_size  # the images stay in theirs
    np.testing.assert_array_equal(pickle.loads(sent)[5]["images"]["wrist"], on_disk[5]["images"]["wrist"])


@pytest.mark.slow
def test_worker_processes_make_the_same_batches_and_start_anywhere(on_disk):
    def make(workers: int) -> Loader:
        swap = PromptSwap(PROMPTS, 0.5)
        return Loader(on_disk, transform(), batch_size=4, seed=3, augment=swap, workers=workers)

    alone, two = make(0), make(2)
    batches = [next(alone) for _ in range(9)]
    try:
        two.position = 4
        assert all(same(b, next(two)) for b in batches[4:])
        assert two.position == 9
    finally:
        two.close()


@pytest.mark.slow
def test_an_error_in_a_worker_is_the_same_error(on_disk):
    narrow = transform()
    narrow.cfg = dataclasses.replace(narrow.cfg, text=dataclasses.replace(narrow.cfg.text, max_prompt_tokens=3))
    broken = Loader(on_disk, narrow, batch_size=4, seed=0, workers=1)
    with pytest.raises(UserError, match="budget is 3"):
        next(broken)
    broken.close()


def mixture(weights: tuple[float, ...] = (1.0, 0.5)) -> Mixture:
    """Two unequal parts: the fixture's three episodes and one more, 100 frames further on."""
    return Mixture((sources()[0], sources(table(100))[1]), weights)


def test_a_mixture_keeps_its_proportions_and_goes_on_where_it_was():
    def make() -> Loader:
        return Loader(mixture(), transform(), batch_size=3, seed=1, augment=PromptSwap(PROMPTS, 0.5))

    a, b = make(), make()
    batches = [next(a) for _ in range(42)]
    assert [int((frames(x) >= 100).sum()) for x in batches] == [1] * 42  # one row in three, in every batch
    counts = np.bincount(np.concatenate([frames(x) for x in batches]), minlength=127)
    assert (counts[:21] == 4).all() and (counts[121:] == 7).all()  # all rows of a part equally often
    b.position = 17
    assert all(same(x, next(b)) for x in batches[17:])


def test_statistics_of_a_mixture_are_of_what_is_drawn():
    mixed, copies = mixture((1.0, 3.5)), np.repeat
    a, b = (part.table.actions[part.rows].astype(np.float64) for part in mixed.parts)
    # 21 rows at weight 1 and 6 at 3.5: each of the 6 is drawn 12.25 times as often.
    drawn = np.concatenate([copies(a, 4, axis=0), copies(b, 49, axis=0)])
    stats = mixed.norm_stats()["actions"]
    np.testing.assert_allclose(stats.mean, drawn.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats.std, drawn.std(0), rtol=1e-6)
    np.testing.assert_allclose(stats.q99, np.quantile(drawn, 0.99, axis=0, method="inverted_cdf"), rtol=1e-6)
    # Negative control: size is not weight.
    assert np.abs(stats.mean[0] - np.concatenate([a, b]).mean(0)[0]) > 100


def test_evaluation_of_a_mixture_shows_every_part():
    mixed = mixture((1.0, 1.0))
    seen = [f for _, batch in evaluation_batches(mixed, transform(), batch_size=4, batches=2) for f in frames(batch)]
    assert sum(int(f) >= 100 for f in seen) == 4
    assert mixed.where(len(mixed) - 1) == "file: episode 3, frame 5" and set(mixed.prompts) == set(PROMPTS)


def test_parts_that_do_not_fit_name_both():
    a, _ = sources()

    class Other(LeRobotSource):
        name = "/data/other"
        layout = Layout({}, "xyz", "xyz")

    other = Other(a.table, a.rows, a.horizon, a.robot)
    with pytest.raises(UserError, match="/data/demos and /data/other cannot be mixed: their state have 4 and 3"):
        Mixture((a, other), (1.0, 1.0))
