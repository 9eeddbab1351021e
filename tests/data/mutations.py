"""Changes of JSON bodies for tests that damage files of users."""

import json
from pathlib import Path
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


def mutate_text(rng: np.random.Generator, file: Path) -> None:
    whole = file.suffix == ".json"
    lines = file.read_text().strip().split("\n")
    bodies = [json.loads("\n".join(lines))] if whole else [json.loads(line) for line in lines]
    for _ in range(rng.integers(1, 3)):
        if rng.random() < 0.8 or whole:
            change_json(rng, bodies[rng.integers(len(bodies))])
        else:  # lines doubled, lost or shuffled
            bodies = [bodies[i] for i in rng.integers(0, len(bodies), rng.integers(1, len(bodies) + 2))]
    end = ("\n", "\r\n", "\n\n")[rng.integers(3)]
    text = end.join(json.dumps(body, ensure_ascii=bool(rng.integers(2))) for body in bodies)
    encoding = ("utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1")[rng.integers(5)]
    file.write_bytes(text.encode(encoding, "replace"))


def mutate_bytes(rng: np.random.Generator, file: Path) -> None:
    content, what = file.read_bytes(), rng.integers(4)
    if what == 0:
        content = content[: rng.integers(len(content) + 1)]
    elif what == 1:
        at = int(rng.integers(len(content)))
        content = content[:at] + bytes(rng.integers(0, 256, 4, np.uint8)) + content[at + 4 :]
    elif what == 2:
        file.unlink()
        return
    else:
        file.unlink()
        file.mkdir()
        return
    file.write_bytes(content)
