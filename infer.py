"""Talk and act with a checkpoint: `python infer.py --ckpt tabletop`. See `python infer.py --help`.

Without an observation of yours it takes one from the simulated world that the checkpoint names; with `--rollout N` it
plays closed-loop episodes there.
"""

# Help and wrong flags are answered before what takes seconds is imported: JAX, the policy and the world in the
# functions.
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from openpi_ar import files, flags
from openpi_ar.errors import UserError, command_line
from openpi_ar.textfile import read_texts
from openpi_ar.worlds import NAMES, open_world, robot_file

if TYPE_CHECKING:
    from openpi_ar.compilation import Programs
    from openpi_ar.policy import Policy, Talker
    from openpi_ar.worlds.protocol import World


_OF_ROBOT = ("robot", "asset_id", "horizon")
_DECODE = ("dtype", "temperature", "denoise_steps")


@dataclasses.dataclass(frozen=True)
class Args:
    """Says what to do next and does it: one observation, a question, or closed-loop episodes."""

    ckpt: str
    """Directory of a checkpoint's step or of an experiment; `tabletop` is the one that comes with the package (a
    directory of that name is `./tabletop`). A checkpoint of LeRobot's too, and with --robot one of openpi's."""
    robot: str | None = None
    """Whose observations it takes and whose actions it gives: aloha, aloha_sim, droid, libero, tabletop, or a .yaml or
    .json file. A checkpoint of yours trained on LeRobot data needs none."""
    asset_id: str | None = None
    """Which statistics under the checkpoint's `assets/`, if there are several."""
    horizon: int | None = None
    """Actions in a chunk of a checkpoint that does not hold it; default: openpi's for the robot."""
    world: str | None = None
    """Simulated world to take observations from and to play in: tabletop or libero; default: the checkpoint's own."""
    seed: int = 0
    """Of the world's scene, of the first episode, and of the action noise."""
    images: tuple[str, ...] = ()
    """Your observation: camera=file for each camera, e.g. `front=a.png wrist=b.png`, by the robot's or the model's
    names. For a question also files alone, in the model's order."""
    state: tuple[float, ...] | None = None
    """The robot's state in real units."""
    prompt: str | None = None
    """What to do."""
    done: tuple[str, ...] = ()
    """The subtasks that are completed, the last one last, for a model with a memory (`text.memory`)."""
    observation: Path | None = None
    """Your observation as .npz: an image per camera by its name, `state`, `prompt`; with --robot what it sends, by its
    keys."""
    subtask: str | None = None
    """Have the model act as if it had generated this."""
    subtasks: Path | None = None
    """Generate nothing but one of these: a file with one subtask a line. Of one observation, each is scored too."""
    question: str | None = None
    """Ask about the images instead of acting; any checkpoint that talks, PaliGemma's too, without --robot. In plain
    words, or as PaliGemma's prompts are typed: `answer en ...`, `caption en`, `detect cup ; plate`, `segment cup`."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of weights and computation; default: the checkpoint's, which is float32 on a CPU and bfloat16 elsewhere."""
    temperature: float | None = None
    """Draw text instead of taking the most likely: 1 as the model has it, below 1 less freely, 0 not at all."""
    denoise_steps: int | None = None
    """Steps from noise to actions; default: the checkpoint's."""
    repeats: int = 0
    """Time each stage too, as medians of this many calls: compiles a program for each."""
    rollout: int = 0
    """Play this many closed-loop episodes in the world."""
    split: Literal["train", "held_out", "back"] = "train"
    """Tasks of the episodes: those of training (new layouts), combinations never trained on, or the tabletop's `back`,
    which cannot be done without a memory."""
    execute: int = 2
    """Actions of a chunk that an episode executes before it asks again."""
    batch: int = 8
    """Episodes played at once."""
    shuffle_prompts: bool = False
    """Ablation: each episode gets another one's prompt."""
    blank_images: bool = False
    """Ablation: black images."""
    expert_drives: bool = False
    """The scripted expert acts and the model only generates text: how often is it right?"""
    wrong_subtask: bool = False
    """Ablation: force "pick up" with a block that is not next, and see which one the hand goes to."""
    video: Path | None = None
    """Film the episodes: .mp4 or .gif."""
    plot: Path | None = None
    """Draw the action chunk, or the answer's boxes in the image, into this file."""
    json: Path | None = None
    """Write what was printed to this file."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Bad input ends with one line on stderr and exit code 2."""
    with command_line():
        run(flags.parse(Args, argv, "python infer.py"))


def run(args: Args) -> None:
    """Plays, acts or answers. What can be wrong with the arguments is reported before the checkpoint is loaded."""
    console = Console(markup=False)
    _check(args)
    from openpi_ar.policy import observations

    how = {"flat": _sends_its_own(args), "named": args.question is None}
    given = observations.given(args.images, args.state, args.prompt, args.observation, **how)
    given |= {"done": args.done} if args.done else {}
    options = {key: getattr(args, key) for key in (*_OF_ROBOT, *_DECODE) if getattr(args, key) is not None}
    if args.robot is not None:
        options["robot"] = robot_file(args.robot)
    report = (_act if args.question is None else _ask)(args, given, options, console)
    files.write_json(args.json, report)


def _act(args: Args, given: dict[str, Any], options: dict[str, Any], console: Console) -> dict[str, Any]:
    """Plays episodes, or acts once."""
    from openpi_ar.policy import Policy, show

    if args.subtasks is not None:
        options["subtasks"] = read_texts(args.subtasks)
    with _stage(console, f"loading {args.ckpt}"):
        policy = Policy.from_checkpoint(args.ckpt, **options)
    _print_notes(policy, console)
    if args.rollout:
        return _rollout(args, policy, console)
    raw = _observation(args, given, policy)
    with _stage(console, "talking and acting") as programs:
        report = policy.measure(raw, seed=args.seed, subtask=args.subtask, repeats=args.repeats)
    report = {"prompt": policy.robot.prompt(raw), **report}
    if subtasks := options.get("subtasks"):
        written = map(policy.transform.template().canonical, subtasks)
        report["scores"] = dict(zip(written, policy.score(raw, subtasks).tolist(), strict=True))
    show.print_result(report, console, programs, _action_names(policy))
    if args.plot is not None:
        show.plot_chunk(args.plot, report, _action_names(policy))
    return report


def _ask(args: Args, given: dict[str, Any], options: dict[str, Any], console: Console) -> dict[str, Any]:
    """Answers the question about images of the user's, of any checkpoint; or about an observation of its robot or
    world."""
    from openpi_ar.policy import Policy, load_talker, show
    from openpi_ar.policy.checkpoint import check_talks

    with _stage(console, f"loading {args.ckpt}"):
        check_talks(args.ckpt)
        if "images" in given and not any(key in options for key in _OF_ROBOT):
            policy, images = load_talker(args.ckpt, **options), given["images"]
        else:
            policy = Policy.from_checkpoint(args.ckpt, **options)
            images = _observation(args, given, policy)
    _print_notes(policy, console)
    question = args.question or ""
    with _stage(console, "answering") as programs:
        report = policy.measure_answer(images, question, seed=args.seed, repeats=args.repeats)
    report = {"prompt": question, **report}
    show.print_result(report, console, programs)
    show.print_boxes(report, console)
    if args.plot is not None:
        show.draw_boxes(args.plot, policy.pictures(images)[0], report)
    return report


# ----------------------------------------------------------------------------------------------------------------------
# observations
# ----------------------------------------------------------------------------------------------------------------------


def _check(args: Args) -> None:
    if args.images and args.observation:
        raise UserError("--images and --observation exclude each other: give one of them")
    if args.denoise_steps is not None and args.denoise_steps < 1:
        raise UserError(f"--denoise-steps must be 1 or more, found {args.denoise_steps}")
    if args.temperature is not None and not 0 <= args.temperature < float("inf"):
        raise UserError(f"--temperature must be 0 or more, found {args.temperature}")
    if args.seed < 0 or args.rollout < 0 or args.repeats < 0:
        raise UserError("--seed, --rollout and --repeats must be 0 or more")
    single = ("images", "state", "prompt", "done", "observation", "question", "plot")
    own = [flag for flag in single if getattr(args, flag)]
    if args.rollout and own:
        raise UserError(f"--rollout plays the world's own episodes: leave out {', '.join('--' + f for f in own)}")
    only = [
        f for f in ("video", "shuffle_prompts", "blank_images", "expert_drives", "wrong_subtask") if getattr(args, f)
    ]
    if only and not args.rollout:
        raise UserError(f"--{only[0].replace('_', '-')} is about episodes: add --rollout N")
    for text, flag in ((args.subtask, "--subtask"), (args.question, "--question"), (args.prompt, "--prompt")):
        if text is not None and not text.strip():
            raise UserError(f"{flag} is empty: give it a text or leave it out")
    for flag in ("subtask", "subtasks", "done"):
        if getattr(args, flag) not in (None, ()) and args.question is not None:
            raise UserError(f"--question is answered without acting: leave out --{flag}")
    if args.subtask is not None and args.subtasks is not None:
        raise UserError("--subtask is given, --subtasks is a list to choose from: leave out one of them")
    files.check_file(args.video, "--video", ".mp4", ".gif")
    files.check_file(args.plot, "--plot", *files.FIGURES)
    files.check_file(args.json, "--json")


def _observation(args: Args, given: dict[str, Any], policy: Policy) -> dict[str, Any]:
    """The observation that the arguments give, else the world's of this seed with what they do give in its place."""
    if (_sends_its_own(args) and args.world is None) or any(key.startswith("observation") for key in given):
        return given  # the transform reports what is missing, by the robot's names
    for name in given.get("images", {}):
        if name not in policy.cameras:
            raise UserError(f"the model has no camera {name!r}: it reads {', '.join(policy.cameras)}")
    if "images" not in given:
        make = _open_world(args, policy)
        obs, _ = make().begin(0)
        return {**obs, **given}
    if "prompt" not in given and args.question is None:
        raise UserError("the prompt is missing: give the task with --prompt")
    if "state" not in given and args.question is None:
        raise UserError(f"the state is missing: give its {policy.transform.state_stats.dims} numbers with --state")
    return {"prompt": "", **given}


def _sends_its_own(args: Args) -> bool:
    """The observation goes by a robot's keys; the tabletop's are the model's own."""
    return args.robot not in (None, "tabletop")


def _open_world(args: Args, policy: Policy) -> Callable[[], World]:
    from openpi_ar.worlds.protocol import Play

    name = args.world or policy.cfg.world or (args.robot if args.robot in NAMES else None)
    if not name:
        raise UserError(
            f"this checkpoint names no simulated world: name one with --world ({', '.join(NAMES)}), or give an "
            f"observation with --images, --state and --prompt"
        )
    forced = {"subtask": args.subtask, "wrong_subtask": args.wrong_subtask} if args.rollout else {}
    play = Play.of(policy, episodes=max(args.rollout, 1), seed=args.seed, split=args.split, **forced)
    return open_world(name).open_episodes(play)


def _rollout(args: Args, policy: Policy, console: Console) -> dict[str, Any]:
    from openpi_ar.worlds.rollout import RolloutConfig, run_rollouts

    same = {f.name: getattr(args, f.name) for f in dataclasses.fields(RolloutConfig) if f.name != "episodes"}
    cfg = RolloutConfig(args.rollout, **same)
    result = run_rollouts(policy, cfg, _open_world(args, policy), video=args.video)
    console.print(f"{args.rollout} {args.split} episodes, seeds from {args.seed}", highlight=False)
    console.print(result.table())
    return result.as_dict()


# ----------------------------------------------------------------------------------------------------------------------
# output
# ----------------------------------------------------------------------------------------------------------------------


def _action_names(policy: Policy) -> tuple[str, ...]:
    if policy.cfg.world in NAMES:
        return open_world(policy.cfg.world).ACTION_NAMES
    names = policy.robot.spec.action_names or [f"action.{i}" for i in range(policy.transform.action_stats.dims)]
    # The feature's name says nothing where its dimensions have their own.
    short = [name.removeprefix("action.") for name in names]
    return tuple(f"action {name}" if name.isdigit() else name for name in short)


def _print_notes(policy: Talker, console: Console) -> None:
    for note in policy.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _stage(console: Console, what: str) -> Iterator[Programs]:
    """Says what takes its time, and what it took."""
    from openpi_ar.compilation import counted

    waiting = console.status(what) if console.is_terminal else contextlib.nullcontext(print(what, flush=True))
    with counted() as programs, waiting:
        yield programs
    console.print(f"{what}: {programs}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
