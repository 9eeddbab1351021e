"""The dry run: prints what training would be fed, and lists what looks wrong.

Images are decoded of the few rows that are shown; statistics and labels are of all rows.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from openpi_ar import files
from openpi_ar.config import TrainConfig
from openpi_ar.data.inputs import InputTransform
from openpi_ar.data.layout import Column, Numbers, SingleSource, TrainingSource
from openpi_ar.data.mixture import parts_of
from openpi_ar.data.normalize import NEAR_CONSTANT, NormStats
from openpi_ar.data.questions import QuestionSource
from openpi_ar.errors import UserError
from openpi_ar.tables import console, new_table
from openpi_ar.text.segments import Segment, readable

_BARS = " ▁▂▃▄▅▆▇█"
_SHOWN = 3
_LISTED = 10
_FAR = 3.0
"""Times the range of the quantiles: a value this far out is more likely an error in the data than a rare move."""


def dry_run(
    cfg: TrainConfig,
    train: TrainingSource,
    held_out: TrainingSource,
    transform: InputTransform,
    remarks: Sequence[str] = (),
    plot: Path | None = None,
) -> list[str]:
    """Prints mapping, ranges after normalisation, and prompts with targets; returns remarks on what looks wrong.

    `plot`: file to draw the ranges into. Raises UserError if it cannot be written, or a sample does not fit the model.
    """
    odd = list(remarks)
    stats = {"state": transform.state_stats, "actions": transform.action_stats}
    out = console()
    out.print(f"{train.name}: {len(train)} training frames, {len(held_out)} held out", soft_wrap=True)
    out.print(_mapping(cfg, train, transform))
    parts = parts_of(train)
    for k, part in enumerate(parts):
        numbers, names = part.numbers(), {"state": part.layout.state, "actions": part.layout.actions}
        if not any(numbers.values()):  # questions
            continue
        if len(parts) > 1:
            out.print(f"{part.name}, by the statistics of all:", soft_wrap=True)
        for what, columns in numbers.items():
            shown, problems = _ranges(what, columns, names[what], stats[what], part)
            out.print(shown)
            odd += problems
        if plot is not None:
            file = plot.with_stem(f"{plot.stem}_{k}") if k else plot
            _plot(file, numbers, names, stats)
            out.print(f"drawn into {file}", soft_wrap=True)
    out.print(_texts(train, transform))
    odd += _labels(train, transform) + _budgets(cfg, train, transform)
    for line in odd:
        out.print(f"! {line}", style="yellow", soft_wrap=True)
    out.print(f"{len(odd) or 'no'} remark{'s' * (len(odd) != 1)}; nothing was trained")
    return odd


def _mapping(cfg: TrainConfig, train: TrainingSource, transform: InputTransform) -> Table:
    table = new_table("model input", "comes from", "", title="mapping")
    sample, layout = train[0], train.layout
    height, width = cfg.model.siglip.image_size
    for camera in cfg.model.cameras:
        image = sample["images"].get(camera)
        size = "masked" if image is None else f"{image.shape[0]} x {image.shape[1]} -> {height} x {width}"
        table.add_row(camera, layout.cameras.get(camera, ""), size)
    dims = (("state", layout.state, cfg.model.state_dim), ("action", layout.actions, cfg.model.action_dim))
    for what, names, model in dims:
        table.add_section()
        for i, name in enumerate(names):
            table.add_row(f"{what} {i}", name, _done(transform, what, i))
        if model > len(names):
            table.add_row(f"{what} {len(names)} to {model - 1}", "", "padding")
    return table


def _done(transform: InputTransform, what: str, i: int) -> str:
    robot = transform.robot.spec
    done = ["sign turned"] if i < len(robot.flips) and robot.flips[i] < 0 else []
    done += ["ALOHA gripper"] if i in robot.aloha_grippers else []
    done += ["1 - x"] if i in robot.inverted_grippers else []
    if what == "action":
        done.append("less the chunk's first state" if i < len(robot.delta) and robot.delta[i] else "absolute")
    return ", ".join(done)


def _ranges(
    what: str, columns: Sequence[Column], names: Sequence[str], stats: NormStats, source: SingleSource
) -> tuple[Table, list[str]]:
    title = f"{what} after normalisation ({stats.mode})"
    columns_shown = ("min", "1 %", "median", "99 %", "max", "outside [-1, 1]", "furthest at", "-1.5 to 1.5")
    table = new_table("", *columns_shown, title=title)
    offset, scale = stats.offset_scale
    odd = []
    for i, (column, name) in enumerate(zip(columns, names, strict=True)):
        x = (column.values - offset[i]) / scale[i]
        cells = [f"{v:.2f}" for v in np.quantile(x, [0, 0.01, 0.5, 0.99, 1])]
        outside = float((np.abs(x) > 1).mean())
        worst = int(np.argmax(np.abs(x)))
        where = source.where(int(column.rows[worst]))
        table.add_row(name, *cells, f"{100 * outside:.1f} %", where.rsplit(": ", 1)[-1], _histogram(x))
        if np.ptp(np.quantile(column.values, [0.01, 0.99])) < NEAR_CONSTANT:
            odd.append(f"{what} {i} ({name}) is constant, {column.values[worst]:.5g}: it is centred, not scaled")
        if abs(x[worst]) > (_FAR if stats.mode == "quantile" else 3 * _FAR):
            value = column.values[worst]
            odd.append(f"{what} {i} ({name}) reaches {x[worst]:.1f} ({value:.5g} before normalisation) at {where}")
        # By construction 2 % lie outside the quantiles; more only if the statistics are of other data.
        elif stats.mode == "quantile" and outside * len(x) > 2 + 0.05 * len(x):
            odd.append(f"{what} {i} ({name}): {100 * outside:.1f} % lie outside [-1, 1], the furthest at {where}")
    return table, odd


def _histogram(x: np.ndarray) -> str:
    counts, _ = np.histogram(np.clip(x, -1.5, 1.5), 24, (-1.5, 1.5))
    # Rounded up: what occurs at all is seen.
    return "".join(_BARS[int(np.ceil(c / counts.max() * (len(_BARS) - 1)))] for c in counts)


def _plot(path: Path, numbers: Numbers, names: dict[str, Sequence[str]], stats: dict[str, NormStats]) -> None:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(12, 1.5 + 0.4 * max(map(len, numbers.values()))), layout="tight")
    for ax, (what, columns) in zip(fig.subplots(1, 2), numbers.items(), strict=True):
        offset, scale = stats[what].offset_scale
        ax.axvspan(-1, 1, color="0.93")
        for i, column in enumerate(columns):
            x = (column.values - offset[i]) / scale[i]
            low, q01, q25, median, q75, q99, high = np.quantile(x, [0, 0.01, 0.25, 0.5, 0.75, 0.99, 1])
            ax.plot([low, high], [i, i], color="C1", lw=1)
            ax.plot([q01, q99], [i, i], color="C0", lw=3)
            ax.plot([q25, q75], [i, i], color="C0", lw=8)
            ax.plot([median], [i], "w|")
        ax.set_yticks(range(len(columns)), names[what], fontsize=8)
        ax.set_xlim(-4, 4)
        ax.invert_yaxis()
        ax.set_title(f"{what}: all (thin), 1 to 99 %, 25 to 75 % (thick)", fontsize=9)
    with files.writing(path, "name another file with --plot"):
        fig.savefig(path, dpi=120)


def _labels(train: TrainingSource, transform: InputTransform) -> list[str]:
    empty = train.unlabelled()
    if not empty or not transform.writes_text:
        return []
    more = [f"... and {len(empty) - _LISTED} more such runs of frames"] if len(empty) > _LISTED else []
    return [f"no subtask: {place}" for place in empty[:_LISTED]] + more


def _texts(train: TrainingSource, transform: InputTransform) -> Table:
    """Some rows' prompts and targets byte for byte."""
    table = new_table("frame", "", "text, byte for byte", "tokens", "of", title="texts")
    for i in np.linspace(0, len(train) - 1, min(_SHOWN, len(train))).astype(int).tolist():
        raw = train[i]
        arrays = transform.sample(raw)
        prompt = transform.prompt_segments(transform.robot.read(raw))
        table.add_row(train.where(i), "prompt", *_row(prompt, arrays["prompt"]["valid"]))
        if target := transform.target_segments(raw):
            note = "" if arrays["target"]["loss"].any() else " (not supervised)"
            table.add_row("", f"target{note}", *_row(target, arrays["target"]["valid"]))
    return table


def _row(segments: Sequence[Segment], valid: np.ndarray) -> tuple[str, str, str]:
    return repr(readable(segments)), str(int(valid.sum())), str(len(valid))


def check_questions(train: TrainingSource, transform: InputTransform) -> None:
    """Raises UserError naming the first question that does not fit the token budgets, before a run meets it."""
    for part in parts_of(train):
        for row in part.rows if isinstance(part, QuestionSource) else ():
            try:
                transform.prompt(transform.template("vqa").prompt_segments(row.question))
                transform.target({"template": "vqa", "answer": row.answer})
            except UserError as e:
                raise UserError(f"{row.where}: {e}") from e


def check_histories(cfg: TrainConfig, train: TrainingSource, transform: InputTransform) -> None:
    """Raises UserError if a prompt with completed subtasks may not fit its budget, before a run meets it."""
    need, text = _longest_history(cfg, train, transform)
    if need > cfg.text.max_prompt_tokens:
        raise UserError(
            f"with text.memory {cfg.text.memory} a prompt can take {need} tokens, text.max_prompt_tokens is "
            f"{cfg.text.max_prompt_tokens}: raise it, or remember less ({text!r})"
        )


def _longest_history(cfg: TrainConfig, train: TrainingSource, transform: InputTransform) -> tuple[int, str]:
    """(most tokens that a prompt with completed subtasks can take, that prompt); 0 without a memory."""
    template, longest_state = transform.template(), np.ones(transform.state_stats.dims)
    pairs = list(train.histories)
    if cfg.data.prompt_swap:  # any task may then stand before any history
        pairs = [(task, done) for task in train.prompts for done in dict.fromkeys(done for _, done in pairs)]
    texts = {template.prompt_text(task, longest_state, done) for task, done in pairs}
    return max(((1 + len(transform.tokenizer.encode(text)), text) for text in texts), default=(0, ""))


def _budgets(cfg: TrainConfig, train: TrainingSource, transform: InputTransform) -> list[str]:
    """Remarks on texts that can take more tokens than their budget."""
    text, template = cfg.text, transform.template()
    # No state takes more tokens than this one: three digits a dimension.
    longest_state = np.ones(transform.state_stats.dims)
    texts = [
        (f"the prompt of {task!r} can take", template.prompt_text(task, longest_state), "max_prompt_tokens")
        for task in train.prompts
    ]
    subtasks = train.subtasks if transform.writes_text else ()
    texts += [(f"{subtask!r} takes", template.target_text(subtask), "max_target_tokens") for subtask in subtasks]
    vqa = transform.template("vqa")
    for row in (row for part in parts_of(train) if isinstance(part, QuestionSource) for row in part.rows):
        texts.append((f"{row.where}: the question takes", vqa.prompt_text(row.question), "max_prompt_tokens"))
        texts.append((f"{row.where}: the answer takes", vqa.target_text(row.answer), "max_target_tokens"))
    used = ((what, 1 + len(transform.tokenizer.encode(written)), budget) for what, written, budget in texts)
    odd = [
        f"{what} {tokens} tokens, text.{budget} is {limit}: raise it, or shorten the text"
        for what, tokens, budget in used
        if tokens > (limit := getattr(text, budget))
    ]
    need, prompt = _longest_history(cfg, train, transform)
    if need > text.max_prompt_tokens:
        odd.append(
            f"{prompt!r} takes {need} tokens, text.max_prompt_tokens is {text.max_prompt_tokens}: raise it, or lower "
            "text.memory"
        )
    return odd[:_LISTED] + [f"... and {len(odd) - _LISTED} more such texts"] * (len(odd) > _LISTED)
