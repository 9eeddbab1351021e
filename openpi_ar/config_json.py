"""Configs as JSON and back: what travels in a checkpoint's `assets/config.json`.

The file of a run holds its `TrainConfig`; that of a converted checkpoint an `InferenceConfig`, and says so: `"type":
"InferenceConfig"`.
"""

import dataclasses
import json
from pathlib import Path
import types
import typing
from typing import Any

from openpi_ar.config import InferenceConfig, LeRobotData, TrainConfig
from openpi_ar.errors import UserError
from openpi_ar.textfile import read_text

# Written for fields that may hold one of several dataclasses, so that reading knows which.
_TYPE = "type"
# Fields of earlier versions, by class and name: the fields that have taken their place, if any.
_RENAMED: dict[tuple[str, str], tuple[str, ...]] = {
    ("LossConfig", "text_weight"): ("subtask_weight", "answer_weight"),
    ("LeRobotData", "vision_steps"): (),
    ("LeRobotData", "naming_steps"): (),
}
# Parameters of the tabletop's demonstrations, which were a kind of data of their own.
_TABLETOP = ("episodes", "seed", "image_size", "noise", "commanded", "asked", "pairs")


def dumps(cfg: TrainConfig | InferenceConfig) -> str:
    """The config as indented JSON, every field written out (defaults may change; a checkpoint must not)."""
    return json.dumps(_encode(cfg, tagged=isinstance(cfg, InferenceConfig)), indent=2) + "\n"


def loads(text: str, *, source: str = "config.json") -> TrainConfig | InferenceConfig:
    """Inverse of `dumps`. Fields that are absent take their defaults. Raises UserError on unknown or unfit fields."""
    try:
        body = json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{source} is not JSON: {e}") from e
    is_inference = isinstance(body, dict) and body.get(_TYPE) == InferenceConfig.__name__
    return decode(InferenceConfig if is_inference else TrainConfig, body, source)


def read(path: Path) -> TrainConfig | InferenceConfig:
    """The config in a file, as `loads`. Raises UserError if the file cannot be read, too."""
    return loads(read_text(path), source=str(path))


def flatten(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted field name -> value, in declaration order; a field with several possible types also yields `name.type`."""
    flat: dict[str, Any] = {}
    for field, options in _fields(type(cfg)):
        value, name = getattr(cfg, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            if len(options) > 1:
                flat[f"{name}.{_TYPE}"] = type(value).__name__
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _fields(cls: type) -> list[tuple[dataclasses.Field, list[type]]]:
    """Each field with the dataclasses it may hold (empty for plain values)."""
    hints = typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        found.append((field, [m for m in members if dataclasses.is_dataclass(m)]))
    return found


def _encode(value: Any, *, tagged: bool) -> Any:
    if not dataclasses.is_dataclass(value):
        return list(value) if isinstance(value, tuple) else value
    body = {_TYPE: type(value).__name__} if tagged else {}
    return body | {f.name: _encode(getattr(value, f.name), tagged=len(o) > 1) for f, o in _fields(type(value))}


def _upgraded(cls: type, body: dict[str, Any]) -> dict[str, Any]:
    """The fields of `cls` as this version names them, from those of any earlier version."""
    body = {new: value for name, value in body.items() for new in _RENAMED.get((cls.__name__, name), (name,))}
    robot = body.get("robot")
    if cls is LeRobotData and isinstance(robot, dict) and "state" not in robot:
        # Robots said nothing of features then, and these were the defaults.
        defaults = {"state": ["observation.state"], "actions": ["action"]}
        body = {name: value for name, value in body.items() if value != defaults.get(name)}
    data = body.get("data")
    if cls is not TrainConfig or not isinstance(data, dict) or data.get(_TYPE) != "TabletopData":
        return body
    values = {name: data[name] for name in _TABLETOP if data.get(name) not in (None, [])}
    joined = {"image_size": "x", "asked": ","}
    texts = {k: joined[k].join(map(str, v)) if k in joined else str(v) for k, v in values.items()}
    path = "world://tabletop?" + "&".join(f"{name}={text}" for name, text in texts.items())
    kept = {name: data[name] for name in ("cache_dir", "prompt_swap") if name in data}
    return {**body, "data": {"path": path, **kept}, "world": "tabletop"}


def decode(cls: type, body: Any, where: str) -> Any:
    if not isinstance(body, dict):
        raise UserError(f"{where}: expected the fields of {cls.__name__}, found {body!r}")
    body = _upgraded(cls, body)
    values, fields = {}, {f.name: (f, options) for f, options in _fields(cls)}
    if unknown := sorted(set(body) - set(fields) - {_TYPE}):
        raise UserError(f"{where}: {cls.__name__} has no field {', '.join(unknown)}; written by another version?")
    for name, value in body.items():
        if name == _TYPE:
            continue
        options = fields[name][1]
        if isinstance(value, dict) and options:
            by_name = {o.__name__: o for o in options}
            tag = value.get(_TYPE, options[0].__name__)
            if tag not in by_name:
                raise UserError(f"{where}: {name} must be one of {', '.join(by_name)}, found {tag!r}")
            values[name] = decode(by_name[tag], value, f"{where}: {name}")
        else:
            # JSON has no tuples; every sequence of the schema is one.
            values[name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**values)
    except (TypeError, ValueError) as e:
        raise UserError(f"{where}: {e}") from e
