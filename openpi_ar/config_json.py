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
from openpi_ar.lookup import nearest
from openpi_ar.textfile import is_number, parse_json, read_text

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
    body = parse_json(text, source)
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
    """The dataclass whose fields a JSON or YAML file gives. Raises UserError for fields that it does not have, that are
    missing or of another type."""
    if not isinstance(body, dict):
        raise UserError(f"{where}: expected the fields of {cls.__name__}, found {body!r}")
    body = _upgraded(cls, body)
    hints = {field.name: typing.get_type_hints(cls)[field.name] for field in dataclasses.fields(cls)}
    if unknown := [name for name in body if name not in hints and name != _TYPE]:
        near = nearest(str(unknown[0]), hints)
        raise UserError(
            f"{where}: {cls.__name__} has no field {', '.join(map(str, unknown))}: did you mean {near[0]}? It has "
            f"{', '.join(near)}; or was the file written by another version?"
        )
    values = {name: _value(value, hints[name], f"{where}: {name}") for name, value in body.items() if name in hints}
    try:
        return cls(**values)
    except (TypeError, ValueError) as e:
        raise UserError(f"{where}: {e}") from e


def _value(value: Any, hint: Any, where: str) -> Any:
    """A value of JSON as a field of that type holds it: sequences are tuples. Raises UserError."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and types.NoneType in members:
        return None
    if options := {m.__name__: m for m in members if isinstance(m, type) and dataclasses.is_dataclass(m)}:
        tag = value.get(_TYPE, next(iter(options))) if isinstance(value, dict) else repr(value)
        if tag not in options:
            raise UserError(f"{where} must be one of {', '.join(options)}, found {tag!r}")
        return decode(options[tag], value, where)
    hint = members[0]
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind is tuple and isinstance(value, list | tuple) and (inner[-1] is ... or len(value) == len(inner)):
        return tuple(_value(x, inner[0], f"{where}, entry {i}") for i, x in enumerate(value, 1))
    if kind is dict and isinstance(value, dict):
        return {_value(k, inner[0], f"{where}: key"): _value(x, inner[1], f"{where}: {k}") for k, x in value.items()}
    if kind is typing.Literal and value in inner:
        return value
    if (hint is float and is_number(value)) or type(value) is hint:
        return value
    raise UserError(f"{where} must be {_in_words(hint)}, found {'nothing' if value is None else repr(value)}")


_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def _in_words(hint: Any) -> str:
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if kind is dict:
        return f"pairs `key: value`, each value {_in_words(inner[1])}"
    if kind is tuple:
        return f"a list{f' of {len(inner)}' * (inner[-1] is not ...)}, each entry {_in_words(inner[0])}"
    return _WORDS.get(hint, str(hint))
