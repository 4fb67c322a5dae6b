"""`circuits weights`, `expand` and `families`."""

# no `from __future__ import annotations`: typer reads the annotations
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from circuits.cli.arguments import (
    DataOption,
    JsonOption,
    LimitOption,
    ModelArgument,
    SaesOption,
    SeedOption,
    TakeOption,
    UnitArgument,
    WeightsOption,
    WorkspaceOption,
)
from circuits.cli.choosing import examples_of
from circuits.cli.output import progress_bar, say, show_json, show_table, warn
from circuits.examples import LIMIT
from circuits.files import check_writable
from circuits.workspace import Workspace

app = typer.Typer()

Mode = Literal["linear", "mean"]
Kind = Literal["rotation", "mirror", "scale", "hue"]

FigureOption = Annotated[
    Path | None, typer.Option("--figure", help="Draw it too: a path that ends in .png or .svg.")
]


@app.command()
def weights(
    model: ModelArgument,
    unit: UnitArgument,
    top: Annotated[int, typer.Option(help="How many each way.")] = 10,
    figure: FigureOption = None,
    weights: WeightsOption = None,
    workspace: SaesOption = None,
    json: JsonOption = False,
) -> None:
    """Show the strongest weights into and out of a unit."""
    from circuits.models.zoo.loading import load_model
    from circuits.weights import incoming, outgoing

    check_figure(figure)
    loaded = load_model(model, weights)
    built_from, builds = incoming(loaded, unit, top), outgoing(loaded, unit, top)
    shown = {c.layer for c in (*built_from, *builds)}
    for layer in loaded.weight_layers:
        if layer.name in shown and layer.lost:
            warn(
                f"layer {layer.name} also reads what comes through {', '.join(layer.lost)}, which is not "
                "followed here: `circuits expand` has it all"
            )
    if figure is not None:
        _draw_kernels(built_from or builds, "source" if built_from else "target", unit, figure)
    if json:
        facts = {"unit": str(loaded.unit(unit)), "model_hash": loaded.hash}
        both = {"incoming": built_from, "outgoing": builds}
        show_json(facts | {name: [c.to_dict() for c in found] for name, found in both.items()})
        return
    for title, connections, end in (
        (f"{unit} is built from", built_from, "source"),
        (f"{unit} builds", builds, "target"),
    ):
        rows = [(*_row(c, end), ", ".join(c.through)) for c in connections]
        show_table((*_COLUMNS, "through"), rows, title=title)
        if not rows:
            say("  nothing: no weights connect it to another site on this side")


_COLUMNS = ("unit", "norm", "typical norm", "sum", "kernel")


def _row(connection: Any, end: str) -> tuple[Any, ...]:
    c = connection
    return getattr(c, end), c.norm, c.typical, c.total, " x ".join(map(str, c.kernel.shape)) or "1"


def check_figure(figure: Path | None) -> None:
    """Raise if a figure was asked for that cannot be written."""
    if figure is not None:
        from circuits.figures import check_figure_path

        check_figure_path(figure)
        check_writable(figure.parent, "folder")


def _draw_kernels(connections: Any, end: str, title: str, figure: Path) -> None:
    from circuits.figures import kernels_figure, save_figure

    save_figure(kernels_figure(connections, end, title), figure)


@app.command()
def expand(
    model: ModelArgument,
    source: Annotated[str, typer.Argument(help="The earlier site, or input.")],
    target: UnitArgument,
    mode: Annotated[
        Mode, typer.Option(help="linear, or the mean gradient of --data's examples.")
    ] = "linear",
    data: DataOption = "",
    limit: LimitOption = LIMIT,
    take: TakeOption = "spread",
    at: Annotated[
        str, typer.Option(help="The target's position, Y,X (default: the middle of its map).")
    ] = "",
    apart: Annotated[
        bool, typer.Option("--apart", help="Show positive and negative paths apart too.")
    ] = False,
    factors: Annotated[int, typer.Option(help="Split it into that many groups of units.")] = 0,
    top: Annotated[int, typer.Option(help="How many sources.")] = 10,
    out: Annotated[
        Path | None, typer.Option("--out", help="Save all of it (.safetensors).")
    ] = None,
    figure: FigureOption = None,
    seed: SeedOption = 0,
    weights: WeightsOption = None,
    workspace: SaesOption = None,
    json: JsonOption = False,
) -> None:
    """Show a site's weights on a unit through everything between them, next to shuffled weights."""
    from circuits.models.paths.randomizing import randomized
    from circuits.models.zoo.loading import load_model
    from circuits.weights import expand_weights
    from circuits.weights.factors import factorize

    check_figure(figure)
    for name, value, least in (("top", top, 1), ("limit", limit, 1), ("factors", factors, 0)):
        if value < least:
            raise ValueError(f"{name} {value} must be at least {least}")
    if out is not None:
        if out.suffix != ".safetensors":
            raise ValueError(f"--out {str(out)!r} must end in .safetensors")
        check_writable(out.parent, "folder")
    place = _position(at)
    loaded = load_model(model, weights)
    unit = loaded.unit(target)
    n_sources = loaded.n_units(source if source == "input" else loaded.site(source).name)
    if factors > n_sources:
        raise ValueError(f"factors {factors} must be 0 to {n_sources}, the units of {source}")
    examples = None
    if mode == "mean":
        examples = examples_of(loaded, data, limit, take=take, seed=seed)
    elif data:
        raise ValueError(f"--data {data!r} goes with --mode mean")

    def of(model: Any, apart: bool, progress: Any = None) -> Any:
        return expand_weights(
            model, source, unit.site, mode=mode, units=[unit.index], at=place, examples=examples,
            apart=apart, progress=progress,
        )  # fmt: skip

    with progress_bar("expand", quiet=json) as progress:
        found = of(loaded, apart, progress)
    parts = factorize(found, factors, seed) if factors else None
    beside = of(randomized(loaded, seed), apart=False)
    strongest = sorted(beside.norms[0].tolist(), reverse=True)
    connections = found.connections(unit.index, top)
    if out is not None:
        found.save(out)
    if figure is not None:
        title = f"{unit} from {found.source}, {mode}"
        _draw_kernels(connections, "source", title, figure)
    rows = []
    for rank, c in enumerate(connections):
        row = [*_row(c, "source"), strongest[rank]]
        if found.positive is not None and found.negative is not None:
            i = found.sources.index(c.source.index)
            row += [found.positive[0, i].sum().item(), found.negative[0, i].sum().item()]
        rows.append(row)
    if json:
        show_json(
            {
                "source": found.source, "target": str(unit), "mode": mode, "at": list(found.at),
                "start": list(found.start), "model_hash": found.model_hash,
                "examples": dict(found.examples), "cut": found.cut, "seed": seed,
                "connections": [
                    c.to_dict() | {"norm_in_shuffled_weights": strongest[rank]}
                    for rank, c in enumerate(connections)
                ],
                "factors": None if parts is None else _factors(parts, found.sources, top),
            }
        )  # fmt: skip
        return
    what = f" on {examples}" if examples is not None else ""
    columns = [*_COLUMNS, f"in shuffled weights (seed {seed})"]
    columns += ["positive paths", "negative paths"] if apart else []
    show_table(columns, rows, title=f"{unit} from {found.source} at {found.at}, mode {mode}{what}")
    if not connections:
        warn(
            f"all weights are zero: {unit} was not active at {found.at} in any example "
            "(the site before its ReLU has a gradient there)"
            if mode == "mean"
            else "all weights are zero"
        )
    if found.cut:
        warn("the border of the map cuts these kernels off")
    if parts is not None:
        factor_rows = [
            (k, item["share"], ", ".join(f"{u} {g:.2f}" for u, g in item["units"].items()))
            for k, item in enumerate(_factors(parts, found.sources, top)["factors"], 1)
        ]
        show_table(("factor", "share up to here", "units"), factor_rows)
        say(f"not shown by the factors: {parts.hidden:.1%} of the weights' mass")


def _factors(parts: Any, sources: tuple[int, ...], top: int) -> dict[str, Any]:
    found = []
    for group, share in zip(parts.groups, parts.shares, strict=True):
        order = (-group).argsort(kind="stable")[:top]
        members = {str(sources[i]): float(group[i]) for i in order if group[i] > 0}
        found.append({"share": share, "units": members})
    return {"factors": found, "hidden": parts.hidden, "seed": parts.seed}


def _position(text: str) -> tuple[int, ...] | None:
    if not text:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--at {text!r} is not of the form Y,X, e.g. 14,14") from None


@app.command()
def families(
    model: ModelArgument,
    site: Annotated[str, typer.Argument(help="Where to look; not needed to list.")] = "",
    kind: Annotated[Kind, typer.Option(help="How members differ.")] = "rotation",
    units: Annotated[
        str, typer.Option(help="Measure these units (indices, with commas) as one family.")
    ] = "",
    name: Annotated[str, typer.Option(help="Save what is measured under this name.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Save all that are found.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="List those that are saved.")] = False,
    rename: Annotated[str, typer.Option(help="OLD=NEW: give a saved one another name.")] = "",
    remove: Annotated[str, typer.Option(help="Remove a saved one (its history stays).")] = "",
    weights_from: Annotated[
        str,
        typer.Option(
            help="SAVED=OTHER: whether the weights of a saved family from another turn with them."
        ),
    ] = "",
    note: Annotated[str, typer.Option(help="Why, kept in the history.")] = "",
    threshold: Annotated[float, typer.Option(help="Least mean agreement.")] = 0.7,
    least: Annotated[int, typer.Option(help="Least members.")] = 4,
    permutations: Annotated[int, typer.Option(help="How often chance is tried.")] = 199,
    size: Annotated[
        int | None, typer.Option(help="Pixels of the stimuli (default: the model's).")
    ] = None,
    figure: FigureOption = None,
    seed: SeedOption = 0,
    workspace: WorkspaceOption = None,
    weights: WeightsOption = None,
    json: JsonOption = False,
) -> None:
    """Find groups of units that are one unit turned, mirrored, scaled or hue-shifted, and save them."""
    from circuits import families as library
    from circuits.models.zoo.loading import load_model

    check_figure(figure)
    if (save or name) and (listing or rename or remove or weights_from):
        raise ValueError("--save and --name go with finding or measuring families")
    loaded = load_model(model, weights)
    place = Workspace.default(workspace)
    if save or name or rename or remove:
        place.writable()
    database, key = place.database, loaded.hash
    if rename:
        old, _, new = rename.partition("=")
        if not new:
            raise ValueError(f"--rename {rename!r} is not of the form OLD=NEW")
        family = library.load_family(database, old, key)
        library.save_family(database, family.renamed(new), note or f"was {old}", replaces=0)
        database.save(library.KIND, key, old, None, note or f"now {new}")
    if remove:
        database.load(library.KIND, key, remove)
        database.save(library.KIND, key, remove, None, note)
    if weights_from:
        _weights_between(loaded, database, weights_from, figure, permutations, seed, json)
        return
    if listing or rename or remove:
        saved = library.saved_families(database, key)
        _draw_families(saved, figure, f"saved families of {model}")
        _show_families(saved, json)
        return
    if not site:
        raise ValueError("SITE is missing: where to look (or --list)")
    with progress_bar("families", quiet=json) as progress:
        if units:
            wanted = [loaded.site(site).unit(int(i)) for i in _whole_numbers(units)]
            found = [
                library.measure_family(
                    loaded, wanted, kind, name=name, permutations=permutations, seed=seed, size=size
                )
            ]
        else:
            found = library.find_families(
                loaded, site, kind, threshold=threshold, least=least, permutations=permutations,
                seed=seed, size=size, progress=progress,
            )  # fmt: skip
            if name:
                found = [
                    family.renamed(name if i == 0 else f"{name} {i + 1}")
                    for i, family in enumerate(found)
                ]
    if save or name:
        for family in found:
            library.save_family(database, family, note)
    _draw_families(found, figure, f"{kind} families of {model} {site}")
    _show_families(found, json)


def _whole_numbers(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise ValueError(f"--units {text!r} is not a list of indices, e.g. 3,14,15")
    return parts


def _draw_families(found: Any, figure: Path | None, title: str) -> None:
    if figure is None:
        return
    from circuits.figures import families_figure, save_figure

    if not found:
        warn("no family was found: nothing to draw")
        return
    save_figure(families_figure(found, title), figure)


def _show_families(found: Any, json: bool) -> None:
    if json:
        show_json([family.to_dict() for family in found])
        return
    rows = [
        (
            f.name, f.site, f.transformation, len(f.members), f.score, f.p_value,
            ", ".join(f"{m.unit.index} ({m.phase:.3g})" for m in f.members),
        )
        for f in found
    ]  # fmt: skip
    show_table(("family", "site", "kind", "units", "agreement", "p", "unit (phase)"), rows)
    if found:
        say(
            f"p: {found[0].null}, {found[0].n_null} times, seed {found[0].seed}; {found[0].stimuli}"
        )
    else:
        say("none")


def _weights_between(
    loaded: Any,
    database: Any,
    text: str,
    figure: Path | None,
    permutations: int,
    seed: int,
    json: bool,
) -> None:
    from circuits.equivariance import measure_equivariance
    from circuits.families import load_family
    from circuits.weights import expand_weights

    target, _, source = text.partition("=")
    if not source:
        raise ValueError(f"--weights-from {text!r} is not of the form SAVED=OTHER")
    targets = load_family(database, target, loaded.hash)
    sources = load_family(database, source, loaded.hash)
    expanded = expand_weights(
        loaded, sources.site, targets.site,
        units=[u.index for u in targets.units], sources=[u.index for u in sources.units],
    )  # fmt: skip
    found = measure_equivariance(expanded, targets, sources, permutations, seed)
    if figure is not None:
        from circuits.figures import family_figure, save_figure

        save_figure(family_figure(found, f"{target} from {source}"), figure)
    if json:
        show_json(vars(found) | {"sums": found.sums.tolist(), "model_hash": loaded.hash})
        return
    between = "the angle between" if found.multiple == 1 else "twice the angle between"
    rows = [
        (f"sum of kernels with cos({between})", found.correlation, f"0 ± {found.correlation_null:.2g}",
         found.correlation_p),
        ("turned kernels explained by the angle", found.explained, f"{found.explained_null:.2g}",
         found.explained_p),
    ]  # fmt: skip
    show_table(
        ("weights in linear mode", "measured", "by chance", "p"),
        rows,
        title=f"{target} from {source}",
    )
    say(f"chance: angles given to units at random, {found.n_null} times, seed {found.seed}")
