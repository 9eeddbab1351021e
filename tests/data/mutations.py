"""Changes of JSON bodies for tests that damage files of users."""

from typing import Any

import numpy as np

JUNK: tuple[Any, ...] = (
    None, "", "x", "null", "\ud800", "../..", "{", "{video_key.x}", "{episode_index:>9999}", True, 0, -1, 1, 7, 1.5, 1e300,
    10**25, float("nan"), float("inf"), [], [None], [[1]], {}, {"a": 1}, "v2.1", "video", "string", "float32", "a\u2028b\0c",
)  # fmt: skip


def spots(body: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a JSON body."""
    inside = list(body.items()) if isinstance(body, dict) else list(enumerate(body)) if isinstance(body, list) else []
    return [(body, key) for key, _ in inside] + [spot for _, value in inside for spot in spots(value)]


def change_json(rng: np.random.Generator, body: Any) -> None:
    places = spots(body)
    if not places:
        return
    container, key = places[rng.integers(len(places))]
    what = rng.integers(4)
    if what == 0:
        del container[key]
    elif what == 1 and isinstance(container, dict):
        container[f"{key}_"] = container.pop(key)
    elif what == 2 and isinstance(container, list):
        container.append(container[key])
    else:
        container[key] = JUNK[rng.integers(len(JUNK))]
