"""All that a policy needs, from a checkpoint of openpi_ar or from openpi's or LeRobot's models.

A checkpoint of openpi_ar holds everything, and one of LeRobot nearly so. openpi's hold parameters and statistics: what
the model was fed depends on the robot that it was trained for, so the robot has to be named.
"""

from collections.abc import Mapping
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from openpi_ar.checkpoints import lerobot, remote, store
from openpi_ar.checkpoints.options import LoadOptions
from openpi_ar.compilation import keep_compiled_programs, run_once
from openpi_ar.config import DecodeConfig, InferenceConfig, TextConfig, TrainConfig
from openpi_ar.data.normalize import NormStats
from openpi_ar.data.robots import ROBOTS, get_robot
from openpi_ar.errors import UserError
from openpi_ar.model_config import ModelConfig
from openpi_ar.models.vlm import VLA
from openpi_ar.policy.policy import Policy
from openpi_ar.policy.programs import inference_dtype
from openpi_ar.policy.talker import Talker
from openpi_ar.robot_spec import RobotSpec
from openpi_ar.text.templates import get_template
from openpi_ar.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from openpi_ar.checkpoints.assets import Said

_ANSWER_TOKENS = 128
"""Enough for a caption, or for a detection of some twenty objects."""


class PolicyParts(NamedTuple):
    """Arguments of `Policy`; layers stacked. `notes` are what a user should know: what was filled in."""

    cfg: InferenceConfig
    model: VLA
    tokenizer: Tokenizer
    stats: dict[str, NormStats]
    notes: tuple[str, ...] = ()


def load(
    path: str | Path,
    *,
    robot: str | None = None,
    asset_id: str | None = None,
    horizon: int | None = None,
    **decode: Any,
) -> Policy | Talker:
    """The policy of a checkpoint of any known format: `load("tabletop")` is the one that comes with the package.

    Compiled programs are stored on disk for the next start. A checkpoint without an action tower gives a `Talker`, the
    part of a policy that answers questions.

    Args:
        path, robot, asset_id, horizon: see `load_policy_parts`, and there for its errors.
        decode: fields of `DecodeConfig` in place of the checkpoint's: `dtype="bfloat16"`, `temperature=0.7`,
            `denoise_steps=5`, `subtasks=[...]` to generate nothing but one of these.
    """
    keep_compiled_programs()
    if robot is None and _only_talks(path):
        return load_talker(path, **decode)
    parts = load_policy_parts(path, robot, asset_id=asset_id, horizon=horizon)
    cfg = dataclasses.replace(parts.cfg, decode=_decoding(parts.cfg.decode, decode))
    return Policy(*parts._replace(cfg=cfg))


def _decoding(own: DecodeConfig, changed: Mapping[str, Any]) -> DecodeConfig:
    """The checkpoint's way of decoding with the user's changes."""
    listed = {name: tuple(value) if isinstance(value, list) else value for name, value in changed.items()}
    return dataclasses.replace(own, **listed)


def load_talker(path: str | Path, **decode: Any) -> Talker:
    """Answers of any checkpoint that writes text: PaliGemma's, pi0.5's of openpi or LeRobot, one of openpi_ar.

    Args:
        path: as in `load_policy_parts`. A checkpoint that is not openpi_ar's needs PaliGemma's tokenizer: as
            `tokenizer.model` beside it, or in the cache (`load_tokenizer`).
        decode: fields of `DecodeConfig` in place of the checkpoint's: `dtype="bfloat16"`, `temperature=0.7`.

    Raises:
        UserError: it is no checkpoint, there is no tokenizer, or the model was trained for nothing but actions.
    """
    keep_compiled_programs()
    path = remote.shipped(path)
    check_talks(path)
    notes: tuple[str, ...] = ()
    if _is_ours(path):
        cfg, model, tokenizer, _ = store.load_policy_checkpoint(path)
        text, own = cfg.text, cfg.decode
    else:
        from openpi_ar.checkpoints.load import load_model  # here, because reading other formats is a heavy import

        loaded = load_model(path)
        notes = tuple(note for note in loaded.notes if not note.startswith("action_horizon"))
        model, tokenizer = loaded.model, _tokenizer_beside(loaded.source.path) or load_tokenizer("paligemma")
        text, own = TextConfig("paligemma", "vqa", max_target_tokens=_ANSWER_TOKENS), DecodeConfig()
        if not isinstance(loaded.config, ModelConfig):
            tokenizer = Tokenizer(tokenizer.model_bytes, action_tail=0)  # its last ids are no action tokens
    how = _decoding(own, decode)
    kind = inference_dtype(how.dtype)
    return Talker(run_once(lambda m: m.for_inference(kind), model), tokenizer, text, how, notes)


def check_talks(path: str | Path) -> None:
    """Raises UserError for a checkpoint that was trained for nothing but actions: a pi0 of others, or of openpi_ar a
    run from nothing whose template writes no text and whose data has no questions."""
    path = remote.shipped(path)
    if not _is_ours(path):
        from openpi_ar.checkpoints.load import inspect

        if inspect(path).config.kind == "pi0":
            raise UserError(f"{path} is a pi0, which was not trained to write text: it acts and cannot answer")
        return
    cfg = store.load_assets(store.resolve_step_dir(path)).config
    if get_template(cfg.text.template).target is not None:
        return
    if isinstance(cfg, TrainConfig):
        only_acts = not (cfg.init_from or cfg.data.questions or cfg.data.mix)
    else:
        only_acts = cfg.model.kind == "pi0"
    if only_acts:
        raise UserError(
            f"{path} only acts: it was trained with template {cfg.text.template!r}, which writes no text; ask a "
            "checkpoint trained with --text.template subtask or on questions (docs/data.md), or PaliGemma"
        )


def _tokenizer_beside(path: Path) -> Tokenizer | None:
    """The SentencePiece model in the directory of a checkpoint or its `assets/`."""
    from openpi_ar.checkpoints.sources import root_of

    root = root_of(path)
    found = [root / name for name in (store.TOKENIZER, f"assets/{store.TOKENIZER}", "paligemma_tokenizer.model")]
    return next((Tokenizer(file.read_bytes()) for file in found if file.is_file()), None)


def _only_talks(path: str | Path) -> bool:
    """Whether it is a checkpoint without an action tower; False too if it is none at all."""
    if _is_ours(remote.shipped(path)):
        return False
    from openpi_ar.checkpoints.load import inspect

    try:
        return not isinstance(inspect(path).config, ModelConfig)
    except UserError:
        return False


def load_policy_parts(
    path: str | Path, robot: str | None = None, *, asset_id: str | None = None, horizon: int | None = None
) -> PolicyParts:
    """Configuration with the robot, model, tokenizer and statistics of a checkpoint of any known format.

    Args:
        path: `tabletop`, which comes with the package; a step or experiment of openpi_ar; or an openpi or LeRobot
            checkpoint, local or remote (`load_model`). A directory called `tabletop` is `./tabletop`.
        robot: name in `ROBOTS` or a .yaml or .json file. Checkpoints of openpi need it; those of LeRobot take LeRobot's
            features without it. Checkpoints of openpi_ar then take its observations, unless they were trained with a
            named robot: that one is used, and another is an error.
        asset_id: directory under `assets/` with the statistics, where there are several.
        horizon: actions in a chunk. None: the checkpoint's config.json, else the robot's in openpi's configurations.

    Raises:
        UserError: something is missing, unknown or does not fit; raised before parameters are read where possible.
    """
    path = remote.shipped(path)
    spec = None if robot is None else get_robot(robot)
    if horizon is not None and horizon < 1:
        raise UserError(f"the horizon must be 1 action or more, found {horizon}")
    if _is_ours(path):
        if asset_id is not None or horizon is not None:
            raise UserError(f"{path} holds its own statistics and horizon: leave out --asset-id and --horizon")
        if spec is None:
            return PolicyParts(*store.load_policy_checkpoint(path))
    from openpi_ar.checkpoints import assets, load  # here, because reading other formats is a heavy import

    looked = load.inspect(path, LoadOptions(action_horizon=horizon))
    model = looked.acting()
    known = () if spec is None else spec.asset_ids
    said = assets.read(looked.matched.source, model, asset_id=asset_id, known=known)
    if looked.kind == "ours" and (isinstance(said.config, TrainConfig) or not said.own):
        store.load_assets(said.root)  # raises: a part of it is lost
    if spec is None and not said.knows_robot and said.lerobot is None:
        raise UserError(
            f"{path} does not say which robot it is for: name it with --robot {' | '.join(ROBOTS)} | FILE; a question "
            "about --images needs none"
        )
    if said.stats is None:
        raise said.problem or UserError(f"{path} holds no normalisation statistics")
    notes = [note for note in looked.notes if not note.startswith("action_horizon")]
    by_files = said.inference if said.knows_robot or said.lerobot is None else said.lerobot
    cfg = by_files if spec is None else _with_robot(said, spec, path, notes)
    if not looked.tells_horizon:
        horizon = model.action_horizon if spec is None else spec.variant(cfg.model.kind).horizon
        notes.append(f"action_horizon {horizon}: no file tells it, the robot's in openpi's configurations is taken")
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, action_horizon=horizon))
    if said.tokenizer is None:
        notes.append(f"tokenizer {cfg.text.tokenizer}: none lies beside the parameters")
        tokenizer = load_tokenizer(cfg.text.tokenizer)
    else:
        tokenizer = load_tokenizer(str(said.tokenizer))
    vla, _ = load.read(dataclasses.replace(looked, config=cfg.model)).acting()
    return PolicyParts(cfg, vla, tokenizer, said.stats, (*notes, *said.notes))


def _is_ours(path: str | Path) -> bool:
    """Whether it is a complete checkpoint of openpi_ar.

    One converted from another format may lack tokenizer and statistics.
    """
    try:
        return not store.missing_parts(store.resolve_step_dir(path))
    except UserError:
        return False


def _with_robot(said: "Said", spec: RobotSpec, path: str | Path, notes: list[str]) -> InferenceConfig:
    """The config for this robot; unchanged if the checkpoint has a robot of that name, which its statistics belong
    to. Adds to `notes` what was made to fit. Raises UserError for another robot, or one that the model cannot serve."""
    cfg, kind = said.inference, said.config.model.kind
    own = cfg.robot.name if cfg.robot is not None else ""
    if own and own != spec.name:
        raise UserError(f"{path} was trained for robot {own!r}, not {spec.name!r}: leave out --robot")
    if own:
        return cfg
    of_lerobot = said.lerobot is not None or (cfg.robot is not None and not isinstance(said.config, TrainConfig))
    if of_lerobot and not set(spec.cameras.values()) & set(cfg.model.cameras):
        seen = [camera for camera in cfg.model.cameras if not lerobot.is_empty(camera)]
        if len(seen) < len(spec.cameras):
            raise UserError(
                f"robot {spec.name} sends {len(spec.cameras)} images ({', '.join(spec.cameras)}), but the model reads "
                f"{len(seen)} ({', '.join(seen)}): write a robot file whose cameras are those"
            )
        spec = dataclasses.replace(spec, cameras=dict(zip(spec.cameras, seen, strict=False)))
        notes.append("cameras, in order: " + ", ".join(f"{key} is {camera}" for key, camera in spec.cameras.items()))
    if not said.knows_robot:
        template = spec.variant(kind).template
        return dataclasses.replace(
            cfg, text=dataclasses.replace(cfg.text, template=template), robot=spec.of_model(kind)
        )
    if isinstance(said.config, TrainConfig):
        return dataclasses.replace(cfg, robot=spec.of_model(kind))
    # LeRobot trains on a robot's own numbers: what openpi does to them for its released models was not done.
    delta = cfg.robot.delta_mask if cfg.robot is not None else ()
    spec = dataclasses.replace(spec, pi0=None, pi05=None, delta_mask=spec.delta_mask or delta)
    if spec.name in ROBOTS and (spec.flips or spec.aloha_grippers or spec.inverted_grippers):
        spec = dataclasses.replace(spec, flips=(), aloha_grippers=(), inverted_grippers=())
        notes.append(f"robot {spec.name}: joints and grippers as LeRobot has them, without openpi's conversions")
    return dataclasses.replace(cfg, robot=spec)
