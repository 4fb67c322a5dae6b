"""`circuits patch`, `paths`, `keep`, `lens` and `probe`."""

# no `from __future__ import annotations`: typer reads the annotations
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

from circuits.cli.arguments import (
    AgainstOption,
    AnswerOption,
    DataOption,
    JsonOption,
    LimitOption,
    MetricOption,
    ModelArgument,
    PositionsOption,
    RandomOption,
    SaesOption,
    SeedOption,
    TakeOption,
    TaskOption,
    TextOption,
    WeightsOption,
    within,
)
from circuits.cli.choosing import task_of
from circuits.cli.output import progress_bar, say, show_json, show_table, visible
from circuits.cli.weights import FigureOption, check_figure
from circuits.examples import LIMIT
from circuits.experiments import N_RANDOM

app = typer.Typer()

By = Literal["site", "position", "head", "head_position", "unit"]
Directions = Literal["noising", "denoising", "both"]
Outside = Literal["counterpart", "mean", "position_mean", "zero"]
Method = Literal["mean_difference", "logistic"]
Labels = Literal["pair", "answer", "template"]

SitesOption = Annotated[
    str,
    typer.Option(
        "--sites",
        help="Where: names, patterns (blocks.*.hook_mlp_out) or ends of names (resid_pre, z, attn_out), with commas.",
    ),
]
AtOption = Annotated[
    str,
    typer.Option(
        "--at",
        help="Positions that are looked at: 3,-1, spans of the task by name, or `spans`; all if empty.",
    ),
]
PairsOption = Annotated[
    int,
    typer.Option(
        "--random", help="How many other pairs each is also patched from, at random, as a control."
    ),
]
TopOption = Annotated[
    int, typer.Option("--top", callback=within(1), help="How many lines; JSON has all.")
]


@app.command()
def patch(
    model: ModelArgument,
    sites: SitesOption = "",
    by: Annotated[By, typer.Option(help="What is replaced at once.")] = "position",
    at: AtOption = "",
    direction: Annotated[
        Directions, typer.Option(help="Into the clean run, into the corrupted one, or both.")
    ] = "both",
    task: TaskOption = "",
    data: DataOption = "",
    text: TextOption = "",
    limit: LimitOption = LIMIT,
    take: TakeOption = "spread",
    metric: MetricOption = "",
    random: PairsOption = 1,
    top: TopOption = 15,
    figure: FigureOption = None,
    seed: SeedOption = 0,
    weights: WeightsOption = None,
    workspace: SaesOption = None,
    json: JsonOption = False,
) -> None:
    """Patch sites, heads or positions from the other run of each pair: which of them carry a task?"""
    from circuits.figures import patch_grid_figure, save_figure
    from circuits.localization import patch_grid
    from circuits.models.zoo.loading import load_model

    check_figure(figure)
    loaded = load_model(model, weights)
    asked = task_of(loaded, task, data, text, limit, take, seed, "", metric=metric)
    with progress_bar("patch", quiet=json) as progress:
        grid = patch_grid(
            loaded, asked, sites or None, by=by, positions=at or None, direction=direction, n_random=random, seed=seed,
            progress=progress,
        )  # fmt: skip
    if figure is not None:
        save_figure(patch_grid_figure(grid), figure)
    if json:
        show_json(grid.to_dict())
        return
    _show_grid(grid, "cell", top)


def _show_grid(grid: Any, word: str, top: int) -> None:
    """A table of the cells (or paths) with the largest effects in each direction."""
    for way, side in grid.sides.items():
        effects = sorted(grid.effects(way), key=lambda e: -abs(e.change))
        rows = [
            (e.cell, e.normalised, e.change, f"{e.low:.4g} to {e.high:.4g}", e.null, e.p_value, e.n)
            for e in effects[:top]
        ]
        columns = (
            word,
            "share",
            "change",
            "95 % interval",
            "another pair's",
            "p of the pair",
            "examples",
        )
        title = (
            f"{way}: {grid.metric.name} of {grid.record.measured_on}; {side.base.mean():.4g} in the run that is "
            f"patched, {side.other.mean():.4g} in the other; {len(rows)} of {len(effects)} {word}s, "
            f"seed {grid.record.seed}"
        )
        show_table(columns, rows, title)
    say(
        "share: of the way from the run that is patched (0) to the other (1); another pair's: the same share, "
        f"{grid.null_is}; p of the pair: tests whether its own differs from another pair's, not whether there is an "
        f"effect (paired, Holm over all {word}s)"
    )


@app.command()
def paths(
    model: ModelArgument,
    path: Annotated[
        list[str] | None,
        typer.Argument(
            help="Direct paths, SENDER,RECEIVER: 0.3,1.0.k or mlp:0,logits; every path if there is none."
        ),
    ] = None,
    heads: Annotated[
        str,
        typer.Option(
            "--heads",
            help="Instead: the total, direct and indirect effect of heads, LAYER.HEAD with commas, or `all`.",
        ),
    ] = "",
    through_mlps: Annotated[
        bool, typer.Option("--through-mlps", help="MLPs between both ends recompute.")
    ] = False,
    direction: Annotated[
        Directions, typer.Option(help="Into the clean run, into the corrupted one, or both.")
    ] = "noising",
    task: TaskOption = "",
    data: DataOption = "",
    text: TextOption = "",
    limit: LimitOption = LIMIT,
    take: TakeOption = "spread",
    metric: MetricOption = "",
    random: PairsOption = 1,
    top: TopOption = 15,
    figure: FigureOption = None,
    seed: SeedOption = 0,
    weights: WeightsOption = None,
    workspace: SaesOption = None,
    json: JsonOption = False,
) -> None:
    """Patch direct paths of a transformer from the other run of each pair: what reads what for a task?"""
    from circuits.figures import head_effects_figure, patch_grid_figure, save_figure
    from circuits.localization import head_effects, path_grid
    from circuits.models.zoo.loading import load_model

    check_figure(figure)
    if heads and (path or through_mlps or direction == "both"):
        raise ValueError("--heads goes with one --direction, and not with paths or --through-mlps")
    loaded = load_model(model, weights)
    asked = task_of(loaded, task, data, text, limit, take, seed, "", metric=metric)
    if heads:
        named = None if heads == "all" else heads.split(",")
        with progress_bar("heads", quiet=json) as progress:
            found = head_effects(
                loaded, asked, named, direction=direction, n_random=random, seed=seed, progress=progress  # type: ignore[arg-type]
            )  # fmt: skip
        if figure is not None:
            save_figure(head_effects_figure(found), figure)
        if json:
            show_json(found.to_dict())
            return
        _show_heads(found, top)
        return
    pairs = [_path(text) for text in path] if path else None
    with progress_bar("paths", quiet=json) as progress:
        grid = path_grid(
            loaded, asked, pairs, direction=direction, through_mlps=through_mlps, n_random=random, seed=seed,
            progress=progress,
        )  # fmt: skip
    if figure is not None:
        save_figure(patch_grid_figure(grid), figure)
    if json:
        show_json(grid.to_dict())
        return
    _show_grid(grid, "path", top)


def _path(text: str) -> tuple[str, str]:
    """A path in words."""
    sender, comma, receiver = text.partition(",")
    if not (sender and comma and receiver):
        raise ValueError(f"path {text!r} is not of the form SENDER,RECEIVER, such as 0.3,1.0.k")
    return sender.strip(), receiver.strip()


def _show_heads(found: Any, top: int) -> None:
    """A table of the heads with the largest effects."""
    grid = found.grid
    (way, side), *_ = grid.sides.items()
    effects = sorted(found.effects(), key=lambda e: -abs(e.total.value))
    rows = []
    for e in effects[:top]:
        parts = (e.total, e.direct, e.indirect, e.self_repair)
        rows.append(
            (e.head, *(f"{p.value:.4g} ({p.low:.4g} to {p.high:.4g})" for p in parts), e.null)
        )
    columns = ("head", "total", "direct", "indirect", "self-repair", "another pair's total")
    title = (
        f"{way}: change of {grid.metric.name} of {grid.record.measured_on}; {side.base.mean():.4g} in the run that is "
        f"patched, {side.other.mean():.4g} in the other; {len(rows)} of {len(effects)} heads, seed {grid.record.seed}"
    )
    show_table(columns, rows, title)
    say(
        "total: all that reads the head recomputes; direct: only the logits read the change; indirect: total less "
        "direct; self-repair: total less the direct effect with the last normalisation held, which repairs where its "
        "sign is opposite to the direct effect's; in brackets 95 % intervals"
    )


@app.command()
def keep(
    model: ModelArgument,
    units: Annotated[
        str,
        typer.Argument(
            help="What is kept: SITE:1,2,5-9, whole sites (hook_embed) or ends of names (mlp_out), with blanks between."
        ),
    ],
    sites: SitesOption = "",
    how: Annotated[Outside, typer.Option(help="What takes the place of all else.")] = "counterpart",
    task: TaskOption = "",
    data: DataOption = "",
    text: TextOption = "",
    limit: LimitOption = LIMIT,
    take: TakeOption = "spread",
    metric: MetricOption = "",
    positions: PositionsOption = "",
    answer: AnswerOption = "",
    against: AgainstOption = "",
    random: RandomOption = N_RANDOM,
    figure: FigureOption = None,
    seed: SeedOption = 0,
    weights: WeightsOption = None,
    workspace: SaesOption = None,
    json: JsonOption = False,
) -> None:
    """Keep only some units, replace everything else, and show how much of a task is left."""
    from circuits.figures import save_figure, sufficiency_figure
    from circuits.localization import sufficiency
    from circuits.models.zoo.loading import load_model

    check_figure(figure)
    loaded = load_model(model, weights)
    asked = task_of(
        loaded, task, data, text, limit, take, seed, "",
        metric=metric, positions=positions, answer=answer, against=against,
    )  # fmt: skip
    with progress_bar("keep", quiet=json) as progress:
        found = sufficiency(
            loaded, units.split(), asked, sites or None, how=how, n_random=random, seed=seed, progress=progress
        )  # fmt: skip
    if figure is not None:
        save_figure(sufficiency_figure(found), figure)
    if json:
        show_json(found.to_dict())
        return
    null = f"{min(found.null):.4g} to {max(found.null):.4g}" if found.null else "none"
    row = (
        found.metric, found.intact, found.nothing, found.only, found.faithfulness,
        f"{found.low:.4g} to {found.high:.4g}", null, found.p_value,
    )  # fmt: skip
    columns = (
        "metric", "whole model", "nothing kept", "kept", "faithfulness", "95 % interval", "random sets", "p",
    )  # fmt: skip
    kept = ", ".join(found.kept) or "nothing"
    show_table(
        columns, [row], f"{kept} of {model} ({how}), {found.record.measured_on}; seed {seed}"
    )
    least = f"; smallest possible p: {found.least_p:.2g}" if found.null else ""
    say(
        f"faithfulness: from nothing kept (0) to the whole model (1); random sets: {found.null_is}{least}"
    )


@app.command()
def lens(
    model: ModelArgument,
    tokens: Annotated[
        bool,
        typer.Option("--tokens", help="Show the first choice at each depth of --text instead."),
    ] = False,
    held: Annotated[
        bool,
        typer.Option(
            "--held", help="Hold the final normalisation: layers then add what they write."
        ),
    ] = False,
    middle: Annotated[
        bool, typer.Option("--middle", help="Also between attention and MLP.")
    ] = False,
    task: TaskOption = "",
    data: DataOption = "",
    text: TextOption = "",
    limit: LimitOption = LIMIT,
    take: TakeOption = "spread",
    metric: MetricOption = "",
    positions: PositionsOption = "",
    answer: AnswerOption = "",
    against: AgainstOption = "",
    figure: FigureOption = None,
    seed: SeedOption = 0,
    weights: WeightsOption = None,
    workspace: SaesOption = None,
    json: JsonOption = False,
) -> None:
    """Show what a transformer would answer if it stopped at each depth (logit lens)."""
    from circuits.figures import lens_figure, lens_tokens_figure, save_figure
    from circuits.localization import lens_tokens, logit_lens
    from circuits.models.zoo.loading import load_model

    check_figure(figure)
    loaded = load_model(model, weights)
    norm: Any = "held" if held else "own"
    if tokens:
        if not text:
            raise ValueError("--tokens needs a text (--text)")
        words = lens_tokens(loaded, text, norm=norm, middle=middle)
        if figure is not None:
            save_figure(lens_tokens_figure(words), figure)
        if json:
            show_json(words.to_dict())
            return
        rows = [
            (site, *map(visible, row)) for site, row in zip(words.sites, words.words, strict=True)
        ]
        show_table(
            ("after", *map(visible, words.tokens)), rows, "most probable next token at each depth"
        )
        return
    asked = task_of(
        loaded, task, data, text, limit, take, seed, "",
        metric=metric, positions=positions, answer=answer, against=against,
    )  # fmt: skip
    with progress_bar("lens", quiet=json) as progress:
        found = logit_lens(loaded, asked, norm=norm, middle=middle, seed=seed, progress=progress)
    if figure is not None:
        save_figure(lens_figure(found), figure)
    if json:
        show_json(found.to_dict())
        return
    rows = [(d.site, d.value, f"{d.low:.4g} to {d.high:.4g}", d.null) for d in found.depths]
    show_table(
        ("stopped at", found.metric.name, "95 % interval", "another example's stream"), rows,
        f"{found.metric.name} of {found.record.measured_on}; {found.intact.mean():.4g} of the whole model, seed {seed}",
    )  # fmt: skip


@dataclass(frozen=True)
class _Steered:
    """What moving a place along its direction does, for a line of a table."""

    share: float
    null: float
    p_value: float


@app.command()
def probe(
    model: ModelArgument,
    method: Annotated[
        Method,
        typer.Option(help="Mean differences (contrastive directions) or logistic regression."),
    ] = "logistic",
    sites: SitesOption = "",
    at: AtOption = "",
    labels: Annotated[
        Labels,
        typer.Option(help="What is read off: example or counterpart, the answer, the template."),
    ] = "pair",
    steer: Annotated[
        float,
        typer.Option(
            help="Also steer the corrupted run with this multiple of the direction (0: do not)."
        ),
    ] = 0.0,
    task: TaskOption = "",
    data: DataOption = "",
    text: TextOption = "",
    limit: LimitOption = LIMIT,
    take: TakeOption = "spread",
    metric: MetricOption = "",
    random: RandomOption = N_RANDOM,
    top: TopOption = 15,
    figure: FigureOption = None,
    seed: SeedOption = 0,
    weights: WeightsOption = None,
    workspace: SaesOption = None,
    json: JsonOption = False,
) -> None:
    """Show where a label can be read off linearly, on held-out examples."""
    from circuits.figures import readout_figure, save_figure
    from circuits.localization import contrastive_directions, linear_probes, steering_grid
    from circuits.models.zoo.loading import load_model

    check_figure(figure)
    loaded = load_model(model, weights)
    asked = task_of(loaded, task, data, text, limit, take, seed, "", metric=metric)
    read = contrastive_directions if method == "mean_difference" else linear_probes
    with progress_bar("probe", quiet=json) as progress:
        found = read(
            loaded, asked, sites or None, labels=labels, positions=at or None, n_random=random, seed=seed,
            progress=progress,
        )  # fmt: skip
    steered: list[_Steered] = []
    if steer:
        with progress_bar("steer", quiet=json) as progress:
            grid = steering_grid(
                loaded,
                asked,
                found,
                amount=steer,
                direction="denoising",
                seed=seed,
                progress=progress,
            )
        steered = [_Steered(e.normalised, e.null, e.p_value) for e in grid.effects("denoising")]
    if figure is not None:
        save_figure(readout_figure(found), figure)
    if json:
        moved = {"steered": [vars(s) for s in steered]} if steered else {}
        show_json(found.to_dict() | moved)
        return
    p = found.corrected_p()
    order = sorted(range(len(p)), key=lambda i: -found.readouts[i].accuracy)[:top]
    rows = []
    for i in order:
        r = found.readouts[i]
        row = (
            f"{r.site}@{r.position}", r.accuracy, f"{r.low:.4g} to {r.high:.4g}", r.value("random"), r.value("control"),
            r.selectivity, p[i],
        )  # fmt: skip
        rows.append((*row, *((steered[i].share, steered[i].null) if steered else ())))
    columns = (
        "where", "accuracy", "95 % interval", "random directions", "control", "selectivity", "p",
        *(("steered", "at random") if steered else ()),
    )  # fmt: skip
    show_table(
        columns, rows,
        f"{found.labels}, fitted on {found.n_fitted} examples and judged on {found.record.measured_on}; "
        f"{len(order)} of {len(p)} places, seed {seed}",
    )  # fmt: skip
    say(
        "control: labels drawn at random for each template instance; p: by random directions, Holm over all places"
    )
