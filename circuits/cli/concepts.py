"""`circuits sae …`: autoencoders of a model's activations."""

# no `from __future__ import annotations`: typer reads the annotations
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from circuits.cli.arguments import (
    JsonOption,
    LabelsOption,
    LimitOption,
    ModelArgument,
    SeedOption,
    TakeOption,
    WeightsOption,
    WorkspaceOption,
    record_of,
    within,
)
from circuits.cli.autoencoders import (
    CodeArgument,
    DataOfOption,
    ModelOption,
    attached_to,
    code_of,
    data_of,
    model_of,
)
from circuits.cli.choosing import labels_of, stored
from circuits.cli.latents import bottleneck, name_latents
from circuits.cli.output import errors, progress_bar, say, show_json, show_table, warn
from circuits.examples import LIMIT, Examples
from circuits.workspace import Workspace

app = typer.Typer(
    help="Train sparse autoencoders, measure them, and name their latents.", no_args_is_help=True
)

Architecture = Literal["topk", "batchtopk", "matryoshka", "relu", "jumprelu", "gated"]
Layout = Literal["saelens", "dictionary_learning", "sparsify"]


@app.command()
def train(
    model: ModelArgument,
    site: Annotated[str, typer.Argument(help="Of whose activations.")],
    name: Annotated[str, typer.Option(help="What it is called: letters, digits, _ and -.")],
    data: Annotated[str, typer.Option("--data", help="Examples; a harvest of them is used if there is one.")],
    architecture: Annotated[Architecture, typer.Option(help="What kind.")] = "topk",
    latents: Annotated[
        list[int] | None, typer.Option(callback=within(1), help="How many latents; several train side by side.")
    ] = None,
    expansion: Annotated[
        int, typer.Option(callback=within(1), help="Latents for each number of a row, without --latents.")
    ] = 8,
    k: Annotated[
        list[int] | None, typer.Option("--k", help="Latents active in a row (topk and kin); several.")
    ] = None,
    sparsity: Annotated[
        list[float] | None, typer.Option(help="Factor of the sparsity (relu, gated, jumprelu); several.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas; several train side by side.")] = "0",
    target: Annotated[
        str, typer.Option(help="A transcoder: the site that it writes.")
    ] = "",
    skip: Annotated[bool, typer.Option("--skip", help="A transcoder with a linear way beside.")] = False,
    steps: Annotated[int, typer.Option(help="How many batches.")] = 2000,
    batch: Annotated[int, typer.Option(help="Rows in a batch.")] = 4096,
    lr: Annotated[float | None, typer.Option(help="Learning rate (default: 2e-4 / sqrt(latents / 2^14)).")] = None,
    hold_out: Annotated[float, typer.Option(help="Share of examples to measure on.")] = 0.1,
    first: Annotated[
        int | None, typer.Option("--leave-first", help="Leave out so many first tokens (default: 1).")
    ] = None,
    norms: Annotated[
        float, typer.Option(help="Leave out rows of more than so many median norms; 0: none.")
    ] = 10.0,
    precision: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of the encoder's product.")
    ] = "float32",
    bias: Annotated[
        Literal["mean", "median"], typer.Option(help="Where the decoder's bias begins.")
    ] = "mean",
    live: Annotated[bool, typer.Option("--live", help="Run the model, even where a harvest is there.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 60.0,
    anew: Annotated[bool, typer.Option("--anew", help="Begin anew, and overwrite.")] = False,
    seed: SeedOption = 0,
    weights: WeightsOption = None,
    workspace: WorkspaceOption = None,
    json: JsonOption = False,
) -> None:  # fmt: skip
    """Train autoencoders of a site. Run it again to go on where it stopped.

    Several sizes, sparsities and seeds learn from the same pass over the rows.
    """
    from circuits.models.adapter.attaching import check_name
    from circuits.models.zoo.loading import load_model
    from circuits.sae import Hyperparameters, RowFilter, Schedule
    from circuits.sae import train as run

    place = Workspace.default(workspace).writable()
    check_name(name)
    loaded = load_model(model, weights)
    goal = loaded.site(target).name if target else None
    rows = _rows(place, loaded, loaded.site(site).name, goal, data, live)
    width = int(rows.about["width"])
    by_count = architecture in ("topk", "batchtopk", "matryoshka")
    variants = [
        Hyperparameters(
            architecture, n, k=count, sparsity=factor, lr=lr, bias=bias, skip=skip, seed=s
        )
        for n in latents or [expansion * width]
        for count in (k or [32] if by_count else [32])
        for factor in ([1.0] if by_count else sparsity or [1.0])
        for s in _seeds(seeds)
    ]
    for option, given in (("--latents", latents), ("--k", k), ("--sparsity", sparsity)):
        if given and len(set(given)) < len(given):
            raise ValueError(f"{option} {' '.join(map(str, given))}: expected different ones")
    if first is not None and not rows.tokens:
        raise ValueError(f"--leave-first {first}: rows of site {site!r} are no positions of texts")
    if k and not by_count:
        raise ValueError(f"--k {k[0]} goes with topk, batchtopk and matryoshka, not {architecture}")
    if sparsity and by_count:
        raise ValueError(
            f"--sparsity {sparsity[0]:g} goes with relu, gated and jumprelu, not {architecture}"
        )
    settings: Any = variants[0] if len(variants) == 1 else {s.label(): s for s in variants}
    rule = RowFilter((1 if rows.tokens else 0) if first is None else first, norms, hold_out)
    schedule = Schedule(steps, batch, seed=seed, precision=precision)
    with _training_bar(f"train {name}", quiet=json) as report:
        made = run(
            rows, settings, schedule, place.autoencoder_path(name), rule=rule, every=every, anew=anew, report=report
        )  # fmt: skip
    place.register(record_of(model, weights, loaded.hash), replace=False)
    if json:
        show_json({code.about.name: _summary(code) for code in made.values()})
        return
    _show_list([("/".join(filter(None, (name, variant))), code) for variant, code in made.items()])
    one = next(iter(made))
    path = f"{name}/{one}" if one else name
    say(
        f"latents are units: circuits harvest {model}+sae/{path} --data {data} --sites sae/{made[one].about.name}"
    )


def _seeds(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or len(set(found)) < len(found) or not 0 <= min(found) <= max(found) < 2**32:
        raise ValueError(f"--seeds {text!r} is not a list of different whole numbers, e.g. 0,1,2")
    return found


def _rows(
    place: Workspace, model: Any, site: str, target: str | None, data: str, live: bool = False
) -> Any:
    """Rows of a harvest, if there is one at full depth; else of the model as it runs."""
    from circuits.sae import ModelRows, StoreRows
    from circuits.stimuli.sources import open_source

    wanted = {site, target or site}
    store = None if live else stored(place, model.hash, site, data)
    if store is not None and wanted <= set(store.provenance.depth.full):
        source = open_source(data)
        if source.hash == store.provenance.data_hash:
            return StoreRows(store, site, target)
    return ModelRows(model, open_source(data), site, target)


class _training_bar:  # noqa: N801 - used like a function
    """A progress bar that shows what the autoencoders are like."""

    def __init__(self, what: str, quiet: bool) -> None:
        self._bar = progress_bar(what, quiet)
        self._every = quiet

    def __enter__(self) -> Any:
        move = self._bar.__enter__()
        last = [-1]

        def report(progress: Any) -> None:
            move(progress.step, progress.steps)
            tenth = progress.step * 10 // progress.steps
            if not self._every and tenth > last[0]:
                last[0] = tenth
                said = [
                    f"{name + ': ' if name else ''}fvu {progress.fvu[name]:.3f}, l0 {progress.l0[name]:.1f}, dead "
                    f"{100 * progress.dead[name]:.1f} %"
                    for name in progress.fvu
                ]
                errors.print(
                    f"step {progress.step} of {progress.steps}: {'; '.join(said)}",
                    highlight=False,
                    markup=False,
                )

        return report

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)


def _summary(code: Any) -> dict[str, Any]:
    a = code.about
    metrics = {k: v for k, v in a.metrics.items() if k != "curve"}
    return {
        "name": a.name, "site": a.site, "target": a.target, "model": a.model, "model_hash": a.model_hash,
        "data": a.data, "architecture": a.architecture, "n_latents": code.n_latents, "width": code.d_in, "k": code.k,
        "metrics": metrics,
    }  # fmt: skip


def _show_list(codes: list[tuple[str, Any]]) -> None:
    rows = []
    for path, code in codes:
        m = code.about.metrics
        numbers = (m.get("fvu", "-"), m.get("l0", "-"), m.get("dead", "-"))
        rows.append(
            (
                path,
                code.about.model,
                code.about.site,
                code.about.architecture,
                code.n_latents,
                *numbers,
            )
        )
    columns = (
        "autoencoder",
        "model",
        "site",
        "architecture",
        "latents",
        "fvu in training",
        "l0",
        "dead",
    )
    show_table(columns, rows)


@app.command(name="ls")
def list_autoencoders(workspace: WorkspaceOption = None, json: JsonOption = False) -> None:
    """List the autoencoders of a workspace."""
    from circuits.autoencoders import load_autoencoder
    from circuits.models.zoo.loading import list_autoencoders as listed

    found = []
    for name, path in listed(Workspace.default(workspace)).items():
        try:
            found.append((name, load_autoencoder(path)))
        except ValueError as error:
            warn(str(error))
    if json:
        show_json({name: _summary(code) for name, code in found})
    else:
        _show_list(found)


@app.command(name="eval")
def evaluate(
    sae: CodeArgument,
    data: DataOfOption = "",
    labels: LabelsOption = "",
    limit: LimitOption = LIMIT,
    take: TakeOption = "spread",
    examples: Annotated[
        Literal["unseen", "all"],
        typer.Option(
            help="Which the model's behaviour is measured on: those held out of training, or all."
        ),
    ] = "unseen",
    rows: Annotated[
        int, typer.Option(callback=within(2), help="Rows that reconstruction is measured on.")
    ] = 65536,
    seed: SeedOption = 0,
    model: ModelOption = "",
    weights: WeightsOption = None,
    workspace: WorkspaceOption = None,
    json: JsonOption = False,
) -> None:
    """How well codes describe rows, and what the model does with them, beside nulls.

    What is found of an autoencoder of the workspace is kept beside it: the app shows it.
    """
    from circuits.autoencoders import FILE
    from circuits.models.zoo.loading import find_autoencoder, list_autoencoders
    from circuits.sae import as_evaluation, behaviour, reconstruction, save_evaluation, unseen
    from circuits.stimuli.sources import open_source

    place = Workspace.default(workspace)
    code = code_of(sae, workspace)
    data = data_of(code, data)
    loaded = model_of(code, model, weights, place)
    source = open_source(data)
    target = code.about.target if code.about.target != code.about.site else None
    own = _rows(place, loaded, code.about.site, target, data)
    known = labels_of(loaded, source, labels) if labels else None
    among = unseen(code, source) if examples == "unseen" else None
    which = (
        "held out of training"
        if among
        else ""
        if examples == "unseen"
        else "those of the training too"
    )
    taken = Examples(loaded, source, limit, how=take, seed=seed, labels=known, among=among)
    measured = reconstruction(code, own, rows=rows, seed=seed)
    behaved = behaviour(loaded, code, taken, seed=seed)
    found = as_evaluation(measured, behaved, which)
    file = find_autoencoder(sae, place)
    file = file / FILE if file.is_dir() else file
    if file.resolve() in [path.resolve() for path in list_autoencoders(place).values()]:
        save_evaluation(file, found)
    if json:
        show_json({"name": code.about.name, **found})
        return
    _show_metrics(code, measured)
    _show_behaviour(behaved, which)


def _show_metrics(code: Any, found: Any) -> None:
    described = [("the autoencoder, held out" if found.trained else "the autoencoder", found.own)]
    described += [("the autoencoder, in training", found.trained)] if found.trained else []
    described += list(found.nulls.items())
    columns = ("on rows", "fvu", "fvu with rows left out", "cosine", "norm ratio", "l0", "dead")
    rows = [(n, r.fvu, r.fvu_all, r.cosine, r.l2_ratio, r.l0, r.dead) for n, r in described]
    title = f"{code.about.name}: {code.n_latents} latents of {code.about.site}, {found.n_rows} rows of {found.data}"
    show_table(columns, rows, title=title)


def _show_behaviour(found: Any, which: str) -> None:
    rows = []
    for name, m in found.measures.items():
        shares = [
            f"{s:.3f} ({i[0]:.3f} to {i[1]:.3f})"
            for s, i in ((m.of_zero, m.of_zero_interval), (m.of_mean, m.of_mean_interval))
        ]
        rows.append((name, m.intact, m.reconstruction, m.zero, m.mean, m.random, *shares))
        if m.warning:
            warn(f"{name}: {m.warning}")
    columns = (
        "the model's",
        "intact",
        "with codes",
        "zero",
        "mean",
        "random dictionary",
        "recovered of zero",
        "of the mean",
    )
    examples = found.record.task["examples"]
    title = f"{examples['data']}: {examples['chosen']}{', ' if which else ''}{which}"
    show_table(columns, rows, title=title)
    if (change := found.change) is not None:
        say(f"accuracy with codes: {change.change:+.4f} ({change.low:+.4f} to {change.high:+.4f})")


@app.command()
def compare(
    saes: Annotated[
        list[str],
        typer.Argument(help="Autoencoders; a run of several stands for all of its variants."),
    ],
    seed: SeedOption = 0,
    workspace: WorkspaceOption = None,
    json: JsonOption = False,
) -> None:
    """Match the directions of autoencoders one to one: what another seed finds too."""
    from circuits.sae import stability

    place = Workspace.default(workspace)
    names: list[str] = []
    for name in saes:
        folder = place.autoencoder_path(name)
        several = sorted(p.stem for p in folder.glob("*.safetensors")) if folder.is_dir() else []
        several = [s for s in several if s not in ("sae", "checkpoint")]
        names += [f"{name}/{s}" for s in several] or [name]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"autoencoder {twice[0]!r} is named twice: expected different ones")
    codes = {name: code_of(name, workspace) for name in names}
    for name, code in codes.items():
        ours, theirs = (
            (c.about.model_hash, c.about.target) for c in (code, next(iter(codes.values())))
        )
        if ours != theirs:
            raise ValueError(
                f"autoencoder {name!r} writes {ours[1]} of weights {ours[0][:16]}, {names[0]!r} {theirs[1]} of "
                f"{theirs[0][:16]}: expected autoencoders of one site"
            )
    found = stability(codes, seed)
    if json:
        show_json(found.to_dict())
        return
    rows = [(pair, m.mcc, m.random, m.shared, m.close) for pair, m in found.matchings.items()]
    show_table(("pair", "mean cosine", "of random ones", "shared (0.7)", "close (0.9)"), rows)
    say(
        f"in all: {100 * found.in_all:.1f} % of the first one's directions have a partner in every other"
    )


app.command(name="name")(name_latents)
app.command()(bottleneck)


@app.command(name="export")
def export_code(
    sae: CodeArgument,
    folder: Annotated[Path, typer.Argument(help="Where to: new, or empty.")],
    layout: Annotated[Layout, typer.Option(help="Whose files.")] = "saelens",
    workspace: WorkspaceOption = None,
) -> None:
    """Write an autoencoder as another tool reads it."""
    from circuits.autoencoders.layouts import export_autoencoder

    say(f"written to {export_autoencoder(code_of(sae, workspace), folder, layout)}")


@app.command(name="import")
def import_code(
    folder: Annotated[
        Path, typer.Argument(help="A folder of SAELens, dictionary_learning or sparsify.")
    ],
    name: Annotated[str, typer.Option(help="What it is called here.")],
    model: Annotated[str, typer.Option(help="The model that it belongs to.")],
    site: Annotated[
        str, typer.Option(help="Whose activations it encodes, if its files do not say.")
    ] = "",
    target: Annotated[str, typer.Option(help="A transcoder: the site that it writes.")] = "",
    weights: WeightsOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Read another tool's autoencoder into the workspace."""
    from dataclasses import replace

    from circuits.autoencoders import FILE, About, save_autoencoder
    from circuits.autoencoders.layouts import import_autoencoder
    from circuits.models.adapter.attaching import check_name
    from circuits.models.zoo.loading import load_model

    place = Workspace.default(workspace).writable()
    path = place.autoencoder_path(check_name(name)) / FILE
    if path.parent.exists() and any(path.parent.iterdir()):
        raise FileExistsError(f"--name {name}: the workspace has an autoencoder of that name")
    loaded = load_model(model, weights)
    code = import_autoencoder(folder, About(name))
    source = site or code.about.site
    if not source:
        raise ValueError(
            f"folder {str(folder)!r} does not say whose activations it encodes: name the site with --site"
        )
    goal = target or (
        code.about.target if code.about.target not in ("", code.about.site) else source
    )
    where = loaded.site(source)
    code.about = replace(
        code.about,
        name=name,
        site=where.name,
        target=loaded.site(goal).name,
        model=loaded.name,
        model_hash=loaded.hash,
    )
    attached_to(loaded, code)  # whether it fits
    save_autoencoder(code, path)
    place.register(record_of(model, weights, loaded.hash), replace=False)
    say(f"{code.n_latents} latents of {where.name} as sae/{name}: written to {path}")
