"""All that a policy needs, from a checkpoint of openpi_ar or from openpi's or LeRobot's models.

A checkpoint of openpi_ar holds everything. Others hold parameters and statistics: what the model was fed depends on the
robot that it was trained for, so the robot has to be named.
"""

from collections.abc import Sequence
import dataclasses
from pathlib import Path
from typing import NamedTuple

from openpi_ar.checkpoints import remote, store
from openpi_ar.checkpoints.options import LoadOptions
from openpi_ar.compilation import keep_compiled_programs
from openpi_ar.config import InferenceConfig, TextConfig
from openpi_ar.data.normalize import NormStats, check_mode, find_norm_stats, load_norm_stats
from openpi_ar.data.robots import ROBOTS, get_robot
from openpi_ar.errors import UserError
from openpi_ar.models.vlm import VLA
from openpi_ar.policy.policy import Policy
from openpi_ar.robot_spec import RobotSpec
from openpi_ar.text.tokenizer import Tokenizer, load_tokenizer

# openpi's Pi0Config.max_token_len: pi0's prompt does not carry the state.
_PROMPT_TOKENS = {"pi0": 48, "pi05": 200}


class PolicyParts(NamedTuple):
    """Arguments of `Policy`; layers stacked."""

    cfg: InferenceConfig
    model: VLA
    tokenizer: Tokenizer
    stats: dict[str, NormStats]


def load(
    path: str | Path,
    *,
    robot: str | None = None,
    asset_id: str | None = None,
    horizon: int | None = None,
    subtasks: Sequence[str] = (),
) -> Policy:
    """The policy of a checkpoint of any known format: `load("tabletop")` is the one that comes with the package.

    Compiled programs are stored on disk for the next start. With `subtasks` it generates nothing but one of these.
    The other arguments and errors: see `load_policy_parts`.
    """
    keep_compiled_programs()
    parts = load_policy_parts(path, robot, asset_id=asset_id, horizon=horizon)
    if subtasks:
        decode = dataclasses.replace(parts.cfg.decode, subtasks=tuple(subtasks))
        parts = parts._replace(cfg=dataclasses.replace(parts.cfg, decode=decode))
    return Policy(*parts)


def load_policy_parts(
    path: str | Path, robot: str | None = None, *, asset_id: str | None = None, horizon: int | None = None
) -> PolicyParts:
    """Configuration with the robot, model, tokenizer and statistics of a checkpoint of any known format.

    Args:
        path: `tabletop`, which comes with the package; a step or experiment of openpi_ar; or an openpi or LeRobot
            checkpoint, local or remote (`load_model`). A directory called `tabletop` is `./tabletop`.
        robot: name in `ROBOTS` or a .yaml or .json file. Checkpoints of openpi and LeRobot need it. Those of
            openpi_ar then take its observations, unless they were trained with a named robot: that one is used, and
            another is an error.
        asset_id: directory under `assets/` with the statistics, where there are several.
        horizon: actions in a chunk. None: the checkpoint's config.json, else the robot's in openpi's configurations.

    Raises:
        UserError: something is missing, unknown or does not fit; raised before parameters are read where possible.
    """
    path = remote.shipped(path)
    spec = None if robot is None else get_robot(robot)
    if horizon is not None and horizon < 1:
        raise UserError(f"the horizon must be 1 action or more, found {horizon}")
    complete = _is_complete(path)
    if spec is not None and not complete:
        return _load_foreign(path, spec, asset_id, horizon)
    if complete and (asset_id is not None or horizon is not None):
        raise UserError(f"{path} holds its own statistics and horizon: leave out --asset-id and --horizon")
    try:
        parts = PolicyParts(*store.load_policy_checkpoint(path))
    except UserError as e:
        if complete:
            raise
        robots = " | ".join(ROBOTS)
        raise UserError(
            f"{e}. If it is a checkpoint of openpi or LeRobot, name the robot it is for: --robot {robots}"
        ) from e
    return parts if spec is None else parts._replace(cfg=_with_robot(parts.cfg, spec, path))


def _load_foreign(path: str | Path, spec: RobotSpec, asset_id: str | None, horizon: int | None) -> PolicyParts:
    from openpi_ar.checkpoints.load import inspect, load_model  # here, because reading other formats is a heavy import

    tokenizer = load_tokenizer("paligemma")
    options = LoadOptions(action_horizon=horizon)
    found = inspect(path, options)
    source, config = found.matched.source.path, found.acting()
    if found.kind == "ours" and not store.missing_parts(source.parent):
        assets = store.load_assets(step := store.resolve_step_dir(source))
        check_mode(step / "assets" / store.NORM_STATS, assets.stats["state"].mode, assets.config.model.norm_mode)
        model = load_model(path, options).acting()[0]
        return PolicyParts(_with_robot(assets.inference, spec, path), model, assets.tokenizer, assets.stats)
    folder = find_norm_stats(_root(source), asset_id=asset_id, known=spec.asset_ids)
    stats = load_norm_stats(folder, required_mode=config.norm_mode)
    variant = spec.variant(config.kind)
    if not found.tells_horizon:
        options = LoadOptions(action_horizon=variant.horizon)
    model, config = load_model(path, options).acting()
    text = TextConfig("paligemma", variant.template, max_prompt_tokens=_PROMPT_TOKENS[config.kind])
    return PolicyParts(InferenceConfig(config, text, robot=spec.of_model(config.kind)), model, tokenizer, stats)


def _is_complete(path: str | Path) -> bool:
    """It is a checkpoint of openpi_ar with all parts: a converted one may lack tokenizer and statistics."""
    try:
        return not store.missing_parts(store.resolve_step_dir(path))
    except UserError:
        return False


def _with_robot(cfg: InferenceConfig, spec: RobotSpec, path: str | Path) -> InferenceConfig:
    """The config for this robot; unchanged if the checkpoint has a robot of that name: its statistics are of that."""
    own = cfg.robot.name if cfg.robot is not None else ""
    if own and own != spec.name:
        raise UserError(f"{path} was trained for robot {own!r}, not {spec.name!r}: leave out --robot")
    return cfg if own else dataclasses.replace(cfg, robot=spec.of_model(cfg.model.kind))


def _root(path: Path) -> Path:
    """The directory that holds `assets/`: openpi's parameters are in its `params/`, or in a file in it."""
    return path.parent if path.is_file() or path.name == "params" else path
