"""Parameters by their paths: a module or nested dict as a flat mapping and back, parts of it, and one report of what
does not fit.

A path is "/"-joined and the same in memory and in a checkpoint: `vlm/blocks/layers/q/w`.
"""

from collections.abc import Collection, Mapping
import re
from typing import Any, TypeVar

from flax import nnx
import jax

from openpi_ar.errors import UserError

Tree = TypeVar("Tree")


def leaf_paths(tree: Any) -> list[str]:
    """Path of each leaf, in the order of `jax.tree.leaves`; without the `value` that nnx puts at the end."""
    paths = []
    for keys, _ in jax.tree_util.tree_leaves_with_path(tree):
        names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys]
        paths.append("/".join(names[:-1] if names[-1] == "value" else names))
    return paths


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves of a module or nested dict by path, in the order of `jax.tree.leaves`."""
    return dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict of a flat mapping: the inverse of `flatten` for nested dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def with_leaves(tree: Tree, flat: Mapping[str, Any]) -> Tree:
    """The tree (a module, concrete or abstract, or nested dict) with the leaves that `flat` names; it keeps the others.

    Raises KeyError listing the paths of `flat` that the tree does not have.
    """
    paths = leaf_paths(tree)
    if unknown := flat.keys() - set(paths):
        raise KeyError(f"no parameters of the model: {', '.join(sorted(unknown))}")
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [flat.get(path, leaf) for path, leaf in zip(paths, leaves, strict=True)])


def _is_module(x: Any) -> bool:
    return isinstance(x, nnx.Module)


def pure_params(tree: Any) -> Any:
    """The tree with each module in it replaced by its nested dict of parameters: what a checkpoint holds."""
    return jax.tree.map(lambda x: unflatten(flatten(x)) if _is_module(x) else x, tree, is_leaf=_is_module)


def fill(template: Tree, pure: Any) -> Tree:
    """Inverse of `pure_params`: the arrays of `pure` in the modules of `template` (which may be abstract)."""
    return jax.tree.map(
        lambda t, p: with_leaves(t, flatten(p)) if _is_module(t) else p, template, pure, is_leaf=_is_module
    )


# ---- parts of a model -----------------------------------------------------------------------------------------------


def split(model: Any, without: Collection[str]) -> Any:
    """A nested dict of a model's parameters whose paths are not in `without`; the model itself if that is empty."""
    if not without:
        return model
    return unflatten({path: leaf for path, leaf in flatten(model).items() if path not in without})


def join(model: Tree, part: Any) -> Tree:
    """The model with what `split` took from it in these values."""
    return with_leaves(model, flatten(part)) if isinstance(part, dict) else part


# ---- what does not fit ----------------------------------------------------------------------------------------------


def misfits(want: Mapping[str, Any], have: Mapping[str, Any]) -> list[str]:
    """All differences between two mappings from names to arrays (or anything with a shape): what is missing in `have`,
    what is unknown to `want`, and what has another shape. Missing names that differ in a layer's number (`.3.`) are one
    entry."""
    missing: dict[str, list[str]] = {}
    for name in want:
        if name not in have:
            missing.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    problems = [
        f"{names[0] if len(names) == 1 else f'{len(names)} of {some}'}: missing" for some, names in missing.items()
    ]
    problems += [f"{name}: unknown" for name in have if name not in want]
    shapes = ((name, list(want[name].shape), list(have[name].shape)) for name in want if name in have)
    return problems + [f"{name}: expected {a}, found {b}" for name, a, b in shapes if a != b]


def check_fit(want: Mapping[str, Any], have: Mapping[str, Any], what: str) -> None:
    """Raises UserError that says `what` does not fit and lists all of `misfits`."""
    if problems := misfits(want, have):
        raise UserError(f"{what} does not fit the model: {'; '.join(problems)}")
