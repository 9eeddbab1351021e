"""If this fails, a parameter has another name in memory than on disk, or one that does not fit goes unnoticed."""

import dataclasses

import jax
import numpy as np
import pytest

from openpi_ar import params
from openpi_ar.errors import UserError
from tests.model_fixtures import random_like, tiny_config, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config())


def same(a, b) -> bool:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_model_comes_back_from_its_pure_tree(model):
    tree = {"of": (model, 3), "step": np.zeros(())}
    pure = params.pure_params(tree)
    assert set(pure["of"][0]) > {"vlm", "expert", "img"}
    assert isinstance(pure["of"][0]["vlm"]["blocks"]["layers"]["q"]["w"], jax.Array)
    abstract = jax.eval_shape(lambda: tree)
    assert same(params.fill(abstract, pure), tree)
    assert not same(params.fill(abstract, params.pure_params({**tree, "of": (random_like(model, 1.0), 3)})), tree)


def test_flat_and_nested_are_inverse(model):
    flat = params.flatten(model)
    assert list(flat) == params.leaf_paths(model)
    assert all(a is b for a, b in zip(flat.values(), jax.tree.leaves(model), strict=True))
    nested = params.unflatten(flat)
    assert params.flatten(nested).keys() == flat.keys() and all(params.flatten(nested)[k] is flat[k] for k in flat)


def test_split_and_join_are_inverse(model):
    vlm = frozenset(p for p in params.leaf_paths(model) if p.startswith("vlm/"))
    rest = params.split(model, vlm)
    assert vlm and set(params.leaf_paths(rest)) == set(params.leaf_paths(model)) - vlm
    assert same(params.join(model, rest), model)
    doubled = params.flatten(params.join(model, jax.tree.map(lambda x: 2 * x + 1, rest)))
    for path, value in params.flatten(model).items():
        np.testing.assert_array_equal(doubled[path], value if path in vlm else 2 * value + 1)
    assert params.split(model, frozenset()) is model
    with pytest.raises(KeyError, match="other/w"):
        params.join(model, {"other": {"w": 1}})


@dataclasses.dataclass
class Shaped:
    shape: tuple[int, ...]


def test_everything_that_does_not_fit_is_said_at_once():
    want = {name: Shaped(shape) for name, shape in {"a": (2,), "b": (3, 4), "c": (), "d": (5,)}.items()}
    have = {name: Shaped(shape) for name, shape in {"a": (2,), "b": (4, 3), "d": (5,), "e": (1,)}.items()}
    assert params.misfits(want, have) == ["c: missing", "e: unknown", "b: expected [3, 4], found [4, 3]"]
    with pytest.raises(UserError, match=r"^x\.npz does not fit the model: c: missing; e: unknown; b: expected"):
        params.check_fit(want, have, "x.npz")
    params.check_fit(want, want, "x.npz")
    layers = {f"norm1.layers.{i}.w": Shaped(()) for i in range(12)}
    assert params.misfits(layers, {}) == ["12 of norm1.layers.*.w: missing"]
    assert params.misfits(layers, dict(list(layers.items())[1:])) == ["norm1.layers.0.w: missing"]
