"""`circuits ablate`, `attribute`, `saliency` and `sanity`."""

# no `from __future__ import annotations`: typer reads the annotations
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from circuits.cli.arguments import (
    AgainstOption,
    AnswerOption,
    DataOption,
    ExactOption,
    ImageOption,
    JsonOption,
    LabelsOption,
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
    WorkspaceOption,
)
from circuits.cli.choosing import examples_of, options_of, task_of, units_of
from circuits.cli.output import (
    progress_bar,
    say,
    show_classes,
    show_effects,
    show_json,
    show_table,
    warn,
)
from circuits.cli.tuning import UnitsArgument
from circuits.cli.weights import FigureOption, check_figure
from circuits.examples import LIMIT, Examples
from circuits.experiments import N_RANDOM
from circuits.files import check_writable
from circuits.workspace import Workspace

app = typer.Typer()

How = Literal["zero", "mean", "resample", "counterpart"]
ChannelMethod = Literal["activation_x_gradient", "integrated_gradients", "ablation", "relevance"]
RelevanceRule = Literal["gradient", "epsilon", "gamma", "z_plus"]
Quantity = Literal["activation", "probability", "log_probability"]

TargetOption = Annotated[
    str,
    typer.Option(
        help="What is explained: top (each prediction), class:NAME, token:WORD or SITE:INDEX, with @POSITION."
    ),
]
LessOption = Annotated[
    str, typer.Option("--against", help="A class or token to subtract from the target.")
]
OptionOption = Annotated[
    list[str] | None, typer.Option("--option", help="NAME=VALUE, of the method; may be repeated.")
]
BatchOption = Annotated[
    int, typer.Option(help="Versions of examples in one pass: bounds the memory.")
]
SHOWN = 8
"""Examples that have a table each; JSON has all."""

OutOption = Annotated[
    Path | None, typer.Option("--out", help="Save the numbers (.safetensors, and .json).")
]


@app.command()
def ablate(
    model: ModelArgument,
    units: UnitsArgument,
    task: TaskOption = "",
    data: DataOption = "",
    text: TextOption = "",
    limit: LimitOption = LIMIT,
    take: TakeOption = "spread",
    labels: LabelsOption = "",
    metric: MetricOption = "",
    positions: PositionsOption = "",
    answer: AnswerOption = "",
    against: AgainstOption = "",
    how: Annotated[How, typer.Option(help="What takes their place.")] = "zero",
    random: RandomOption = N_RANDOM,
    pool: Annotated[
        str, typer.Option(help="Units the random groups are drawn from (default: those as active).")
    ] = "",
    later: Annotated[str, typer.Option(help="A later site whose units are looked at.")] = "",
    figure: FigureOption = None,
    seed: SeedOption = 0,
    weights: WeightsOption = None,
    workspace: SaesOption = None,
    json: JsonOption = False,
) -> None:
    """Ablate units and show what changes, compared with random units that are as active."""
    from circuits.experiments.ablation import ablate as run
    from circuits.figures import ablation_figure, save_figure
    from circuits.models.zoo.loading import load_model

    check_figure(figure)
    loaded = load_model(model, weights)
    chosen = units_of(loaded, units)
    asked = task_of(
        loaded, task, data, text, limit, take, seed, labels,
        metric=metric, positions=positions, answer=answer, against=against,
    )  # fmt: skip
    with progress_bar("ablate", quiet=json) as progress:
        report = run(
            loaded, chosen, asked, how=how, n_random=random, pool=units_of(loaded, pool) if pool else None,
            later=later or None, seed=seed, progress=progress,
        )  # fmt: skip
    if figure is not None:
        save_figure(ablation_figure(report), figure)
    if json:
        show_json(report.to_dict())
        return
    title = f"{model} without {len(chosen)} units ({how}), {report.record.measured_on}; seed {seed}"
    show_effects({"": report.effects}, title)
    show_classes(report.classes)
    if report.downstream:
        rows = [(d.unit, d.intact, d.change, d.random) for d in report.downstream]
        columns = ("unit", "mean activation", "change", "random groups (rms)")
        show_table(columns, rows, title=f"units of {later}")


@app.command()
def attribute(
    model: ModelArgument,
    site: Annotated[str, typer.Argument(help="Where; for --direct not needed.")] = "",
    target: TargetOption = "top",
    against: LessOption = "",
    quantity: Annotated[Quantity, typer.Option(help="Of the target.")] = "activation",
    method: Annotated[ChannelMethod, typer.Option(help="How.")] = "activation_x_gradient",
    rule: Annotated[RelevanceRule, typer.Option(help="Of relevance.")] = "epsilon",
    baseline: Annotated[
        Literal["zero", "mean"], typer.Option(help="Of integrated gradients and ablation.")
    ] = "zero",
    steps: Annotated[int, typer.Option(help="Of integrated gradients.")] = 50,
    groups: Annotated[int, typer.Option(help="Also put the channels in so many groups.")] = 0,
    direct: Annotated[
        bool, typer.Option("--direct", help="Direct logit attribution of a transformer, instead.")
    ] = False,
    check: Annotated[
        int, typer.Option(help="Units to remove in truth, of each of four examples.")
    ] = 16,
    data: DataOption = "",
    image: ImageOption = None,
    text: TextOption = "",
    limit: LimitOption = LIMIT,
    take: TakeOption = "spread",
    exact: ExactOption = False,
    top: Annotated[int, typer.Option(help="How many units.")] = 10,
    save: Annotated[
        str, typer.Option(help="Store the means as edges of the model's graph, under this name.")
    ] = "",
    out: OutOption = None,
    figure: FigureOption = None,
    batch: BatchOption = 32,
    seed: SeedOption = 0,
    workspace: WorkspaceOption = None,
    weights: WeightsOption = None,
    json: JsonOption = False,
) -> None:
    """Show which units of a site are responsible for a decision or for another unit's activation."""
    from circuits.attribution import attribute as run
    from circuits.attribution import parse_target
    from circuits.figures import attribution_figure, save_figure
    from circuits.models.zoo.loading import load_model

    check_figure(figure)
    _check_out(out)
    if top < 1:
        raise ValueError(f"top {top} must be at least 1")
    if direct:
        for name, given in (
            ("--figure", figure),
            ("--out", out),
            ("--save", save),
            ("--groups", groups),
        ):
            if given:
                raise ValueError(f"{name} {str(given)!r} does not go with --direct")
    if groups < 0:
        raise ValueError(f"groups {groups} must be 0 or more")
    loaded = load_model(model, weights)
    goal = parse_target(loaded, target, against, quantity)
    if not direct and not site:
        raise ValueError("site '' is missing: name the site whose units are to be credited")
    if not direct:
        loaded.site(site)
    if save:
        _check_edges(Workspace.default(workspace), loaded, goal, site, save)
    chosen = examples_of(loaded, data, limit, image, text, exact, take=take, seed=seed)
    if direct:
        _direct(loaded, chosen, goal, top, json)
        return
    with progress_bar("attribute", quiet=json) as progress:
        made = run(
            loaded, chosen, goal, site, method, baseline=baseline, steps=steps, rule=rule, check=check, seed=seed,
            batch=batch, size="keep", progress=progress,
        )  # fmt: skip
    split = _groups(loaded, chosen, goal, site, groups, seed, batch) if groups else None
    if save:
        _save_edges(Workspace.default(workspace), loaded, made, save)
    if out is not None:
        made.save(out)
    if figure is not None:
        save_figure(attribution_figure(made, chosen.images()), figure)
    if json:
        show_json(
            made.to_dict() | {
                "by_example": [
                    {"name": name, "units": [{"unit": f"{made.site}:{u}", "value": v} for u, v in made.top(i, top)]}
                    for i, name in enumerate(chosen.names)
                ],
                "groups": split,
            }
        )  # fmt: skip
        return
    say(f"{made.method} at {made.site} of {model} on {chosen}")
    for i, name in enumerate(chosen.names[:SHOWN]):
        rows = [(f"{made.site}:{u}", v) for u, v in made.top(i, top)]
        title = f"{name}: {made.aims[i]} = {float(made.target_values[i]):.4g}"
        show_table(("unit", "share"), rows, title=title)
        _say_sum(made, i)
    _say_more(chosen)
    if made.check is not None:
        say(
            f"rank correlation with ablation ({made.check.n_units} units, {len(made.check.by_example)} examples): "
            f"{made.check.correlation:.2f} (by chance up to {made.check.chance:.2f}, seed {seed})"
        )
    for example in (split or [])[:SHOWN]:
        rows = [(g["group"], g["effect"], g["removed"], g["units"]) for g in example["groups"]]
        show_table(
            ("group", "activation x gradient", "lost without it", "units"),
            rows,
            title=f"{example['name']}, groups",
        )


def _named(model: Any, aim: str) -> str:
    """A target with the name of its class or token."""
    from circuits.models.adapter.inputs import TokenInput
    from circuits.tasks.targets import output_site

    site, _, rest = aim.partition(":")
    if site != output_site(model).name:
        return aim
    index = int(rest.partition("@")[0])
    if isinstance(model.input, TokenInput):
        return f"{aim} ({model.input.word(index)!r})"
    return f"{aim} ({model.classes[index]})" if model.classes else aim


def _say_sum(made: Any, example: int) -> None:
    if made.residual is None:
        return
    parts = "".join(f", {name} {float(value[example]):.4g}" for name, value in made.parts.items())
    total = float(made.units()[example].sum())
    say(f"  all units {total:.4g}{parts}; residual {float(made.residual[example]):.2g}")


def _check_out(out: Path | None) -> None:
    if out is not None:
        if out.suffix != ".safetensors":
            raise ValueError(f"--out {str(out)!r} must end in .safetensors")
        _check_file(out)


def _check_file(out: Path) -> None:
    if out.is_dir():
        raise ValueError(f"--out {str(out)!r} is a folder: expected a file")
    check_writable(out.parent, "folder")


def _direct(model: Any, chosen: Examples, goal: Any, top: int, json: bool) -> None:
    from circuits.attribution import direct_logit_attribution

    found = direct_logit_attribution(model, chosen, goal)
    if json:
        show_json(
            {
                "target": found.target, "model_hash": found.model_hash, "examples": dict(found.examples),
                "parts": list(found.names), "by_example": [
                    {"name": n, "logit": float(found.logits[i]), "values": found.values[i].tolist(),
                     "residual": float(found.residual[i])}
                    for i, n in enumerate(chosen.names)
                ],
            }
        )  # fmt: skip
        return
    say(f"direct logit attribution on {chosen}")
    for i, name in enumerate(chosen.names[:SHOWN]):
        order = found.values[i].abs().argsort(descending=True)[:top].tolist()
        rows = [(found.names[k], float(found.values[i, k])) for k in order]
        show_table(
            ("part", "adds to the logit"), rows, title=f"{name}: logit {float(found.logits[i]):.4g}"
        )
        say(
            f"  {len(found.names)} parts {float(found.values[i].sum()):.4g}; residual {float(found.residual[i]):.2g}"
        )
    _say_more(chosen)


def _say_more(chosen: Examples) -> None:
    if len(chosen) > SHOWN:
        say(f"and {len(chosen) - SHOWN} more examples: --json has all")


def _groups(
    model: Any, chosen: Examples, goal: Any, site: str, k: int, seed: int, batch: int
) -> list[dict[str, Any]]:
    from circuits.attribution import Passes, channel_groups

    found = channel_groups(Passes(model, chosen, goal, site, batch, "keep"), k, seed)
    units = []
    for direction in found.directions:
        order = direction.argsort(descending=True)[:5].tolist()
        units.append(", ".join(str(u) for u in order if direction[u] > 0))
    return [
        {
            "name": name,
            "hidden": found.hidden,
            "groups": [
                {
                    "group": g + 1,
                    "effect": float(found.effects[i, g]),
                    "removed": float(found.removed[i, g]),
                    "units": units[g],
                }
                for g in range(k)
            ],
        }
        for i, name in enumerate(chosen.names)
    ]


def _check_edges(place: Workspace, model: Any, goal: Any, site: str, name: str) -> None:
    """Raise before anything is computed if edges could not be stored."""
    from circuits.graph.store import GraphStore
    from circuits.units import Unit

    if goal.against is not None or goal.quantity != "activation" or goal.index is None:
        raise ValueError(
            f"--save {name!r}: edges lead to one unit's activation or logit, not to {goal}"
        )
    with GraphStore(place.writable().model_folder(model.hash)) as store:
        for end in (Unit(model.site(site).name, 0), Unit(goal.site, 0)):
            store.check(end)


def _save_edges(place: Workspace, model: Any, made: Any, name: str) -> None:
    from circuits.attribution.edges import attribution_block
    from circuits.graph.store import add_edges

    add_edges(place.model_folder(model.hash), name, [attribution_block(made)])


@app.command()
def saliency(
    model: ModelArgument,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="One of the methods; may be repeated.")
    ] = None,
    target: TargetOption = "top",
    against: LessOption = "",
    quantity: Annotated[Quantity, typer.Option(help="Of the target.")] = "activation",
    site: Annotated[str, typer.Option(help="Where class activation maps are taken.")] = "",
    area: Annotated[float, typer.Option(help="Of extremal masks, as a share of the image.")] = 0.1,
    variant: Annotated[
        Literal["preserve", "delete"], typer.Option(help="Of extremal and meaningful masks.")
    ] = "preserve",
    option: OptionOption = None,
    data: DataOption = "",
    image: ImageOption = None,
    limit: LimitOption = LIMIT,
    take: TakeOption = "spread",
    exact: ExactOption = False,
    out: OutOption = None,
    figure: FigureOption = None,
    batch: BatchOption = 32,
    seed: SeedOption = 0,
    weights: WeightsOption = None,
    workspace: SaesOption = None,
    json: JsonOption = False,
) -> None:
    """Show which pixels are responsible for a decision or for a unit's activation.

    Methods are gradient, gradient_x_input, smoothgrad, vargrad, smoothgrad_squared, guided_backprop,
    integrated_gradients, relevance, occlusion, rise, grad_cam, grad_cam_plus_plus, smooth_grad_cam_plus_plus,
    guided_grad_cam, lime, kernel_shap; and the masks extremal and meaningful.
    """
    from circuits.attribution import parse_target
    from circuits.figures import saliency_figure, save_figure
    from circuits.models.zoo.loading import load_model
    from circuits.saliency import METHODS, agreement
    from circuits.saliency.maps import check_options

    check_figure(figure)
    _check_out(out)
    wanted = list(dict.fromkeys(method or ["integrated_gradients"]))
    for name in wanted:
        if name not in (*METHODS, *_MASKS):
            raise ValueError(f"method {name!r} is not one of {', '.join((*METHODS, *_MASKS))}")
    if out is not None and (len(wanted) > 1 or wanted[0] in _MASKS):
        raise ValueError("--out saves one method that is no mask")
    if site and not any("cam" in name for name in wanted):
        raise ValueError(f"--site {site!r}: only class activation maps are taken at a site")
    options = options_of(option)
    for name in wanted:
        if name in _MASKS:
            _check_mask_options(name, options)
        elif options:
            check_options(name, options)  # type: ignore[arg-type]
    loaded = load_model(model, weights)
    if "through" in options:
        options["through"] = units_of(loaded, str(options["through"]))
    goal = parse_target(loaded, target, against, quantity)
    chosen = examples_of(loaded, data, limit, image, "", exact, take=take, seed=seed)
    heats, facts = {}, []
    for name in wanted:
        with progress_bar(name, quiet=json) as progress:
            heat, fact, made = _saliency(
                loaded, chosen, goal, name, site, area, variant, options, batch, seed, progress
            )
        heats[name] = heat
        facts.append(fact)
        if out is not None and made is not None:
            made.save(out)
    names, table = agreement(heats)
    if figure is not None:
        images = chosen.images()
        if images is None:
            raise ValueError(f"--figure: model {model} takes images of neither 1 nor 3 channels")
        title = f"{model}, {goal}; {chosen}"
        save_figure(saliency_figure(images, heats, chosen.names, title), figure)
    if json:
        show_json(
            {
                "model_hash": loaded.hash, "examples": chosen.describe(), "seed": seed, "target": str(goal),
                "names": list(chosen.names), "methods": facts,
                "agreement": {"methods": names, "rank_correlation": table.tolist()},
            }
        )  # fmt: skip
        return
    for name, fact in zip(wanted, facts, strict=True):
        rows = [
            (e["name"], e["target"], e["value"], *e["found"].values()) for e in fact["examples"]
        ]
        show_table(
            ("image", "target", "value", *fact["examples"][0]["found"]),
            rows,
            title=f"{name} {fact['settings']}, {chosen}",
        )
    if len(wanted) > 1:
        rows = [(n, *row) for n, row in zip(names, table.tolist(), strict=True)]
        show_table(("rank correlation", *names), rows)
    if figure is None and out is None:
        say("--figure PATH draws the maps, --out PATH saves them")


_MASKS = ("extremal", "meaningful")


def _check_mask_options(name: str, options: dict[str, Any]) -> None:
    import inspect

    from circuits.saliency import extremal, meaningful
    from circuits.saliency.maps import fitting_options

    function = extremal if name == "extremal" else meaningful
    own = ("model", "examples", "target", "area", "variant", "batch", "size", "progress")
    known = [k for k in inspect.signature(function).parameters if k not in own]
    fitting_options(f"method {name}", function, options, known)


def _saliency(
    model: Any, chosen: Examples, goal: Any, name: str, site: str, area: float, variant: Any,
    options: dict[str, Any], batch: int, seed: int, progress: Any,
) -> tuple[Any, dict[str, Any], Any]:  # fmt: skip
    """Heats, what to report, and the attribution, if it is one."""
    from circuits.saliency import extremal, meaningful
    from circuits.saliency import saliency_map as run

    shared = {"seed": seed, "batch": batch, "size": "keep", "progress": progress}
    if name in _MASKS:
        extra = {"area": area} if name == "extremal" else {}
        function = extremal if name == "extremal" else meaningful
        made = function(model, chosen, goal, variant=variant, **extra, **options, **shared)
        found = [
            {"name": n, "target": made.target, "value": float(made.intact[i]), "found": {
                "with the mask": float(made.values[i]), "random mask": float(made.random[i]),
                "all hidden": float(made.blank[i]), "area": float(made.masks[i].mean())}}
            for i, n in enumerate(chosen.names)
        ]  # fmt: skip
        settings = {"variant": variant, **extra, **options}
        return made.masks[:, 0], {"method": name, "settings": settings, "examples": found}, None
    at = {"site": site} if site and "cam" in name else {}
    made = run(model, chosen, goal, name, **at, **options, **shared)  # type: ignore[arg-type]
    heat = made.heat("signed")
    found = []
    for i, n in enumerate(chosen.names):
        place = divmod(int(heat[i].flatten().argmax()), heat.shape[-1])
        numbers = {
            "sum": float(made.values[i].sum()),
            "largest at (y, x)": f"{place[0]}, {place[1]}",
        }
        if made.residual is not None:
            numbers["residual"] = float(made.residual[i])
        numbers |= {part: float(value[i]) for part, value in made.parts.items()}
        found.append(
            {
                "name": n,
                "target": _named(model, made.aims[i]),
                "value": float(made.target_values[i]),
                "found": numbers,
            }
        )
    return heat, {"method": name, "settings": dict(made.settings), "examples": found}, made


@app.command()
def sanity(
    model: ModelArgument,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="May be repeated (default: gradient, grad_cam, guided_backprop, guided_grad_cam).",
        ),
    ] = None,
    target: TargetOption = "top",
    option: OptionOption = None,
    data: DataOption = "",
    limit: LimitOption = LIMIT,
    take: TakeOption = "spread",
    stages: Annotated[int, typer.Option(help="Steps in which layers are shuffled; even.")] = 6,
    faithful: Annotated[int, typer.Option(help="Images on which faithfulness is measured.")] = 8,
    out: Annotated[Path | None, typer.Option("--out", help="Save the cards (.json).")] = None,
    figure: FigureOption = None,
    batch: BatchOption = 32,
    seed: SeedOption = 0,
    weights: WeightsOption = None,
    workspace: SaesOption = None,
    json: JsonOption = False,
) -> None:
    """Test whether attribution methods depend on what this model has learned: a card for each."""
    from circuits.figures import sanity_figure, save_figure
    from circuits.files import write_json
    from circuits.models.zoo.loading import load_model
    from circuits.saliency import METHODS, card
    from circuits.saliency.maps import check_options

    check_figure(figure)
    if out is not None:
        if out.suffix != ".json":
            raise ValueError(f"--out {str(out)!r} must end in .json")
        _check_file(out)
    wanted = list(
        dict.fromkeys(method or ["gradient", "grad_cam", "guided_backprop", "guided_grad_cam"])
    )
    options = options_of(option)
    for name in wanted:
        if name not in METHODS:
            raise ValueError(f"method {name!r} is not one of {', '.join(METHODS)}")
        check_options(name, options)  # type: ignore[arg-type]
    if faithful < 1:
        raise ValueError(f"faithful {faithful} must be at least 1")
    loaded = load_model(model, weights)
    chosen = examples_of(loaded, data, limit, take=take, seed=seed)
    cards = []
    for name in wanted:
        with progress_bar(name, quiet=json) as progress:
            cards.append(
                card(
                    loaded, chosen, name, target, stages=stages, faithful=faithful,  # type: ignore[arg-type]
                    seed=seed, batch=batch, progress=progress, **options,
                )
            )  # fmt: skip
    if out is not None:
        write_json(out, [c.to_dict() for c in cards])
    if figure is not None:
        save_figure(
            sanity_figure(cards, f"{model} {loaded.hash[:16]}, {chosen}"),
            figure,
        )
    if json:
        show_json([c.to_dict() for c in cards])
        return
    rows = []
    for c in cards:
        areas = [
            f"{_mean(c, kind, 'area'):.3g} ({_mean(c, kind, 'area_random'):.3g})"
            for kind in ("insertion", "deletion")
        ]
        rows.append(
            (c.method, c.verdicts["randomisation"], c.randomization.kept, *areas, c.road.score,
             f"{c.sensitivity.correlations[1]:.2f} ({c.sensitivity.random[1]:.2f})",
             f"{c.infidelity[0]:.2f} ({c.infidelity[1]:.2f})")
        )  # fmt: skip
    columns = (
        "method", "randomisation", "keeps", "insertion (random)", "deletion (random)", "ROAD",
        "sensitivity-n (random)", "infidelity (random)",
    )  # fmt: skip
    show_table(
        columns,
        rows,
        title=f"{model} on {chosen}; target {target}, seed {seed}",
    )
    if len(chosen) < 30:
        warn(f"{len(chosen)} images: verdicts are steadier on thirty or more")


def _mean(card: Any, kind: str, what: str) -> float:
    values = [getattr(c, what) for c in card.curves if c.kind == kind]
    return sum(values) / len(values)
