"""`circuits edit …`."""

# no `from __future__ import annotations`: typer reads the annotations
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from circuits.cli.arguments import (
    AgainstOption,
    AnswerOption,
    DataOption,
    JsonOption,
    LabelsOption,
    LimitOption,
    MetricOption,
    ModelArgument,
    PositionsOption,
    RandomOption,
    SeedOption,
    Take,
    TakeOption,
    TaskOption,
    TextOption,
    WeightsOption,
    WorkspaceOption,
)
from circuits.cli.choosing import examples_of, task_of, units_of, usual_data
from circuits.cli.output import (
    progress_bar,
    say,
    show_classes,
    show_effects,
    show_json,
    show_table,
    warn,
)
from circuits.cli.weights import FigureOption, check_figure
from circuits.examples import LIMIT, Examples
from circuits.experiments import N_RANDOM
from circuits.files import check_writable
from circuits.workspace import Workspace

app = typer.Typer(
    help="Edit circuits: recipes, what they do, and a ledger in which everything can be undone.",
    no_args_is_help=True,
)

WhatArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help="Recipe files, or edits in words: 'zero SITE:1,2', 'scale SITE:1 factor=2', "
        "'filter_weights into=SITE:1', … (`circuits edit operators` lists them)."
    ),
]
BranchOption = Annotated[str, typer.Option("--branch", help="Branch of the ledger.")]
NoteOption = Annotated[str, typer.Option("--note", help="Why; kept with the edits.")]
AuthorOption = Annotated[str, typer.Option("--author", help="Who (default: the user).")]
ForceOption = Annotated[
    bool,
    typer.Option("--force", help="Take a recipe that was written for other weights, if it fits."),
]
TargetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--target", help="What it is meant to change: class:NAME, token:WORD, SITE:INDEX."
    ),
]


@app.command()
def operators(json: JsonOption = False) -> None:
    """List the operators and what each needs."""
    from dataclasses import MISSING, fields

    import circuits.edits.recipes  # noqa: F401  (makes the operators known)
    from circuits.edits.records import OPERATORS, edit_schema

    if json:
        show_json(edit_schema())
        return
    rows = [("zero", "units", "Remove units: scale by 0.")]
    for name, kind in OPERATORS.items():
        needs = [f.name if f.default is MISSING else f"[{f.name}]" for f in fields(kind)]
        rows.append((name, " ".join(needs), kind.about))
    show_table(("operator", "fields", "what it does"), rows)
    more = [(name, *about) for name, about in _MADE.items()]
    show_table(("in words also", "needs", "makes"), more)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipe files."""
    from circuits.edits.recipes import recipe_schema

    show_json(recipe_schema())


@app.command()
def new(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="The recipe file to write.")],
    what: WhatArgument = None,
    associate: Annotated[
        str, typer.Option(help="A layer in which to store that --prompt is answered with --answer.")
    ] = "",
    prompt: Annotated[str, typer.Option(help="The text whose answer is to change.")] = "",
    answer: Annotated[str, typer.Option(help="token:WORD or class:NAME.")] = "",
    data: DataOption = "",
    limit: LimitOption = LIMIT,
    take: TakeOption = "spread",
    note: NoteOption = "",
    author: AuthorOption = "",
    labels: LabelsOption = "",
    force: ForceOption = False,
    seed: SeedOption = 0,
    workspace: WorkspaceOption = None,
    weights: WeightsOption = None,
) -> None:
    """Write a recipe from edits in words and other recipes."""
    from circuits.edits.recipes import Recipe
    from circuits.models.zoo.loading import load_model

    check_writable(out.parent, "folder")
    loaded = load_model(model, weights)
    base = recipe_of(loaded, what or [], Numbers(data, limit, take, seed, labels), force)
    found = list(base.edits)
    if associate:
        numbers = Numbers(data, max(limit, MOMENT), take, seed)
        found.append(_associated(loaded, associate, prompt, answer, numbers, workspace))
        say(found[-1].origin)
    elif prompt or answer:
        raise ValueError("--prompt and --answer go with --associate LAYER")
    if not found:
        raise ValueError(
            "nothing to edit: give edits in words, e.g. 'zero mixed3b:335', or a recipe"
        )
    recipe = Recipe.of(loaded, found, note or base.note, author or base.author, seed)
    recipe.save(out)
    say(f"{out}: {len(recipe.edits)} edits of {model} ({recipe.model_hash[:16]})")


@app.command()
def apply(
    model: ModelArgument,
    what: WhatArgument = None,
    branch: BranchOption = "main",
    note: NoteOption = "",
    author: AuthorOption = "",
    force: ForceOption = False,
    measured: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure what the branch then does.")
    ] = True,
    target: TargetOption = None,
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
    random: RandomOption = N_RANDOM,
    seed: SeedOption = 0,
    workspace: WorkspaceOption = None,
    weights: WeightsOption = None,
    json: JsonOption = False,
) -> None:
    """Put edits on a branch of the ledger, and measure what it does, compared with random edits."""
    loaded, ledger = _ledger(model, weights, workspace, write=True)
    recipe = recipe_of(loaded, what or [], Numbers(data, limit, take, seed, labels), force)
    if not recipe.edits:
        raise ValueError("nothing to apply: give a recipe file or edits in words")
    head, report = ledger.head(branch), None
    if measured:  # before anything is written
        whole = ledger.recipe(branch) + recipe
        asked = task_of(
            loaded, task, data, text, limit, take, seed, labels,
            metric=metric, positions=positions, answer=answer, against=against,
        )  # fmt: skip
        report = _measure(loaded, whole, asked, target, None, random, (), seed, json)
    made = ledger.apply(recipe, note, branch, author or None, seed)
    if report is not None and made[0].parent == head:
        ledger.measured(report.to_dict(), branch, made[-1].hash, author or None)
    elif report is not None:
        warn(
            f"somebody else edited branch {branch!r} meanwhile: `circuits edit measure --branch {branch}` again"
        )
    if json:
        show_json({"entries": [e.to_dict() for e in made], "report": report and report.to_dict()})
        return
    for entry in made:
        say(f"{entry.hash[:12]} {_words(entry.edit)}")
    if report is not None:
        _show_report(report)


@app.command()
def measure(
    model: ModelArgument,
    what: WhatArgument = None,
    branch: BranchOption = "",
    target: TargetOption = None,
    generalise: Annotated[
        str, typer.Option(help="Other data, on which the targets are measured too.")
    ] = "",
    tuning: Annotated[str, typer.Option(help="Units whose tuning to curves is measured.")] = "",
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
    random: RandomOption = N_RANDOM,
    force: ForceOption = False,
    out: Annotated[Path | None, typer.Option(help="Save the report as JSON.")] = None,
    figure: FigureOption = None,
    seed: SeedOption = 0,
    workspace: WorkspaceOption = None,
    weights: WeightsOption = None,
    json: JsonOption = False,
) -> None:
    """Measure what edits do: a recipe, edits in words, or a branch of the ledger (and note it there)."""
    from circuits.figures import edit_figure, save_figure
    from circuits.files import write_json
    from circuits.models.zoo.loading import load_model

    check_figure(figure)
    if out is not None:
        check_writable(out.parent, "folder")
    if bool(what) == bool(branch):
        raise ValueError("give either edits (words or recipe files) or --branch NAME")
    ledger = None
    if branch:
        loaded, ledger = _ledger(model, weights, workspace, write=True)
        head = ledger.head(branch)
        recipe = ledger.recipe(at=head)
    else:
        loaded, head = load_model(model, weights), ""
        recipe = recipe_of(loaded, what or [], Numbers(data, limit, take, seed, labels), force)
    asked = task_of(
        loaded, task, data, text, limit, take, seed, labels,
        metric=metric, positions=positions, answer=answer, against=against,
    )  # fmt: skip
    more = examples_of(loaded, generalise, limit, take=take, seed=seed) if generalise else None
    units = units_of(loaded, tuning) if tuning else ()
    report = _measure(loaded, recipe, asked, target, more, random, units, seed, json)
    if ledger is not None:
        ledger.measured(report.to_dict(), branch, head)
    if out is not None:
        write_json(out, report.to_dict())
    if figure is not None:
        save_figure(edit_figure(report), figure)
    if json:
        show_json(report.to_dict())
    else:
        _show_report(report)


@app.command()
def undo(
    model: ModelArgument,
    branch: BranchOption = "main",
    author: AuthorOption = "",
    workspace: WorkspaceOption = None,
    weights: WeightsOption = None,
) -> None:
    """Take the last edit of a branch back, and check that the weights are what they were."""
    _, ledger = _ledger(model, weights, workspace, write=True)
    entry = ledger.undo(branch, author or None)
    say(f"undone: {entry.hash[:12]} {_words(entry.edit)}; at {_place(ledger, branch)}")


@app.command()
def redo(
    model: ModelArgument,
    branch: BranchOption = "main",
    author: AuthorOption = "",
    workspace: WorkspaceOption = None,
    weights: WeightsOption = None,
) -> None:
    """Make the edit again that was undone last."""
    _, ledger = _ledger(model, weights, workspace, write=True)
    entry = ledger.redo(branch, author or None)
    say(f"made again: {entry.hash[:12]} {_words(entry.edit)}; at {_place(ledger, branch)}")


@app.command(name="branch")
def new_branch(
    model: ModelArgument,
    name: Annotated[str, typer.Argument(help="Its name.")],
    at: Annotated[
        str, typer.Option(help="Entry (or the model's hash) that it begins at; first digits do.")
    ] = "",
    origin: Annotated[str, typer.Option("--from", help="Branch whose head it begins at.")] = "main",
    author: AuthorOption = "",
    workspace: WorkspaceOption = None,
    weights: WeightsOption = None,
) -> None:
    """Begin a branch."""
    _, ledger = _ledger(model, weights, workspace, write=True)
    ledger.branch(name, at or None, origin, author or None)
    say(f"branch {name} begins at {_place(ledger, name)}")


@app.command()
def log(
    model: ModelArgument,
    branch: BranchOption = "",
    workspace: WorkspaceOption = None,
    weights: WeightsOption = None,
    json: JsonOption = False,
) -> None:
    """List what happened, oldest first, and where each branch is."""
    _, ledger = _ledger(model, weights, workspace)
    if branch:
        ledger.head(branch)
    events = ledger.events(branch or None)
    if json:
        show_json([e.__dict__ for e in events])
        return
    rows = []
    for event in events:
        which = event.start if event.kind == "undo" else event.end
        entry = None if which == ledger.model_hash else ledger.entry(which)
        what, note = (_words(entry.edit), entry.note) if entry else ("the model as it is", "")
        if event.kind == "measure":
            what, note = f"report {event.report[:12]}", ""
        rows.append((event.created, event.branch, event.kind, which[:12], what, event.author, note))
    show_table(("when (UTC)", "branch", "", "entry", "edit", "who", "why"), rows)
    for name in [branch] if branch else ledger.branches():
        n = len(ledger.entries(name))
        say(f"{name} is at {_place(ledger, name)}: {n} edits, {len(ledger.undone(name))} to redo")


@app.command()
def show(
    model: ModelArgument,
    entry: Annotated[str, typer.Argument(help="The first digits of its hash.")],
    workspace: WorkspaceOption = None,
    weights: WeightsOption = None,
) -> None:
    """Show an entry of the ledger, with what was measured of it, as JSON."""
    _, ledger = _ledger(model, weights, workspace)
    found = ledger.entry(entry)
    show_json(found.to_dict() | {"reports": ledger.reports(found.hash)})


@app.command()
def diff(
    before: Annotated[str, typer.Argument(help="A recipe file, or a branch with --model.")],
    after: Annotated[str, typer.Argument(help="Another.")],
    model: Annotated[str, typer.Option("--model", help="Compare branches of its ledger.")] = "",
    workspace: WorkspaceOption = None,
    weights: WeightsOption = None,
    json: JsonOption = False,
) -> None:
    """Show what has to be taken out of one recipe and put in to get another."""
    from circuits.edits.recipes import Recipe
    from circuits.edits.recipes import diff as compared

    if model:
        _, ledger = _ledger(model, weights, workspace)
        recipes = [ledger.recipe(name) for name in (before, after)]
    else:
        recipes = [Recipe.load(name) for name in (before, after)]
    found = compared(*recipes)
    if json:
        show_json([{"sign": d.sign, "edit": d.edit.to_dict()} for d in found])
        return
    if recipes[0].model_hash != recipes[1].model_hash:
        hashes = " and ".join(r.model_hash[:16] or "any" for r in recipes)
        say(f"for different models: {hashes}")
    for line in found:
        say(f"{line.sign} {_words(line.edit)}")
    if all(d.sign == " " for d in found):
        say("the same edits")


@app.command()
def bake(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="Weights file to write, .safetensors.")],
    what: WhatArgument = None,
    branch: BranchOption = "",
    force: ForceOption = False,
    workspace: WorkspaceOption = None,
    weights: WeightsOption = None,
    json: JsonOption = False,
) -> None:
    """Write new weights with the edits in them: `--weights FILE` loads them for the same model."""
    from circuits.edits.recipes import bake as baked
    from circuits.edits.recipes import save_baked
    from circuits.models.zoo.loading import load_model

    check_writable(out.parent, "folder")
    if out.suffix != ".safetensors":
        raise ValueError(f"weights file {str(out)!r} must end in .safetensors")
    if bool(what) == bool(branch):
        raise ValueError("give either edits (words or recipe files) or --branch NAME")
    if branch:
        loaded, ledger = _ledger(model, weights, workspace)
        recipe = ledger.recipe(branch)
    else:
        loaded = load_model(model, weights)
        recipe = recipe_of(loaded, what or [], Numbers(), force)
    made = baked(loaded, recipe)
    save_baked(made, out, loaded, recipe)
    if json:
        show_json({"path": str(out), "model_hash": made.hash, "base_hash": loaded.hash})
    else:
        say(f"{out}: {loaded.hash[:16]} with {len(recipe.edits)} edits is {made.hash[:16]}")


@app.command()
def replay(
    model: ModelArgument,
    branch: BranchOption = "main",
    workspace: WorkspaceOption = None,
    weights: WeightsOption = None,
    json: JsonOption = False,
) -> None:
    """Make a branch's edits again on the model and compare every hash; exit code 1 if one differs."""
    loaded, ledger = _ledger(model, weights, workspace)
    found = ledger.replay(branch)
    with ledger.edited(branch):
        final = loaded.hash
    same = all(r.same for r in found)
    if json:
        each = [{"entry": r.entry.hash, "same": r.same} for r in found]
        show_json({"entries": each, "same": same, "model_hash": final})
    else:
        for r in found:
            say(f"{'same  ' if r.same else 'OTHER '} {r.entry.hash[:12]} {_words(r.entry.edit)}")
        say(
            f"{len(found)} edits, all hashes {'the same' if same else 'NOT the same'}; weights {final[:16]}"
        )
    if not same:
        raise typer.Exit(1)


@app.command()
def verify(workspace: WorkspaceOption = None, json: JsonOption = False) -> None:
    """Check every hash of the ledger; exit code 1 if something was changed."""
    from circuits.edits.auditing import verify as faults

    found = faults(Workspace.default(workspace).database)
    if json:
        show_json(found)
    else:
        for line in found:
            say(line)
        say("the ledger is as it was written" if not found else f"{len(found)} faults")
    if found:
        raise typer.Exit(1)


# --- what they share -------------------------------------------------------------------------------


def _ledger(
    model: str, weights: Path | None, workspace: Path | None, write: bool = False
) -> tuple[Any, Any]:
    from circuits.edits.ledger import Ledger
    from circuits.models.zoo.loading import load_model

    place = Workspace.default(workspace)
    if write:
        place = place.writable()
    loaded = load_model(model, weights)
    return loaded, Ledger(place.database, loaded)


_MADE = {
    "mean": ("units", "set, to the mean over --data"),
    "resample": ("units", "resample, from examples of --data"),
    "patch": ("units example=N", "patch, from one example of --data"),
    "project": ("direction", "erase, of one direction"),
    "leace": ("site", "erase, of what tells classes apart (examples of --data, --labels)"),
}
"""Edits in words whose numbers come from data: what each needs, and what it makes."""

MOMENT = 512
"""Examples that say at least what a layer reads, for `--associate`, where no harvest keeps it."""


@dataclass(frozen=True)
class Numbers:
    """Where the numbers of edits in words come from."""

    data: str = ""
    limit: int = LIMIT
    take: Take = "spread"
    seed: int = 0
    labels: str = ""

    def of(self, model: Any) -> Examples:
        return examples_of(
            model, self.data, self.limit, take=self.take, seed=self.seed, labels=self.labels
        )


def recipe_of(model: Any, what: Sequence[str], numbers: Numbers, force: bool) -> Any:
    """A recipe of the edits of recipe files and of words, in order, with the files' notes."""
    from circuits.edits.recipes import Recipe
    from circuits.edits.records import read_edit

    found: list[Any] = []
    notes, authors = [], []
    for text in what:
        if " " not in text.strip() and (text.endswith(".json") or Path(text).is_file()):
            recipe = Recipe.load(text)
            if force and recipe.model_hash not in ("", model.hash):
                warn(
                    f"recipe {text!r} was written for model {recipe.model_hash[:16]}: units of one number "
                    "need not do the same here, and what was measured of it does not hold"
                )
                recipe = recipe.forced(model)
            try:
                recipe.check(model)
            except ValueError as error:
                raise ValueError(f"{error} (--force takes it all the same, if it fits)") from None
            found += recipe.edits
            notes.append(recipe.note)
            authors.append(recipe.author)
            continue
        words = text.split()
        if words and words[0] in _MADE:
            found.append(_made(model, words, numbers))
        else:
            found.append(read_edit(model, text))
    note, author = ("; ".join(dict.fromkeys(filter(None, words))) for words in (notes, authors))
    return Recipe.of(model, found, note, author)


def _made(model: Any, words: list[str], numbers: Numbers) -> Any:
    """An edit whose numbers come from data."""
    from circuits.edits.estimation import leace, means, project_out, resample
    from circuits.units import Direction

    kind, rest = words[0], words[1:]
    if len(rest) != len(_MADE[kind][0].split()):
        raise ValueError(f"edit {' '.join(words)!r}: expected {kind} {_MADE[kind][0]}")
    what = rest[0].partition("=")[2] or rest[0]
    if kind == "project":
        site = what.partition(":")[0].rpartition("*")[2].lstrip("+-")
        return project_out(Direction.parse(what, model.site(site).n_units)).checked(model)
    if kind == "patch":
        return _patch(model, what, rest[1], numbers.data)
    if kind == "leace" and not numbers.labels:
        raise ValueError("leace needs --labels FILE, or --labels names")
    examples = numbers.of(model)
    if kind == "leace":
        return leace(model, what, examples, origin=f"classes of {examples.data}")
    return means(model, what, examples) if kind == "mean" else resample(model, what, examples)


def _patch(model: Any, units: str, example: str, data: str) -> Any:
    from circuits.edits.estimation import patch
    from circuits.stimuli.sources import open_source

    name, _, number = example.partition("=")
    if name != "example" or not number.isdecimal():
        raise ValueError(
            f"edit 'patch {units} {example}': {example!r} is not of the form example=N"
        )
    source = open_source(data or usual_data(model))
    if int(number) >= len(source):
        raise ValueError(
            f"example {number} does not exist: {source.spec} has 0 to {len(source) - 1}"
        )
    one = Examples(model, source, among=[int(number)])
    return patch(model, units, one, origin=f"example {number} of {source.spec}")


def _associated(
    model: Any, layer: str, prompt: str, answer: str, numbers: Numbers, workspace: Path | None
) -> Any:
    """The rank-one edit; C from a store of the workspace that keeps it, or else from examples."""
    from circuits.cli.choosing import stored
    from circuits.edits.associative import associate, read_site, second_moment
    from circuits.tasks.targets import output_site, parse_target

    if not answer or not prompt:
        raise ValueError("--associate needs --prompt TEXT and --answer token:WORD or class:NAME")
    target = parse_target(model, answer)
    if target.site != output_site(model).name or not isinstance(target.index, int):
        raise ValueError(f"--answer {answer!r} is not token:WORD or class:NAME")
    site = read_site(model, layer).name
    store = stored(Workspace.default(workspace), model.hash, site, numbers.data)
    if store is not None and site in store.provenance.depth.covariance:
        moment, name = second_moment(model, layer, store), store.provenance.data
    else:
        examples = numbers.of(model)
        moment, name = (
            second_moment(model, layer, examples),
            str(examples),
        )
    words = f"{prompt!r} is answered with {answer} (C over {name})"
    asked = Examples.texts(model, [prompt])
    return associate(model, layer, asked, target.index, moment, origin=words)


def _measure(
    model: Any,
    recipe: Any,
    task: Any,
    targets: Sequence[str] | None,
    generalise: Any,
    random: int,
    tuning: Sequence[Any],
    seed: int,
    quiet: bool,
) -> Any:
    from circuits.effects import measure as run

    with progress_bar("measure", quiet=quiet) as progress:
        return run(
            model, recipe, task, targets=targets or (), generalisation=generalise, tuning=tuning, n_random=random,
            seed=seed, progress=progress,
        )  # fmt: skip


def _show_report(report: Any) -> None:
    groups = {
        "on target": report.targets, "on other examples": report.generalisation, "": report.effects,
        "other units of": report.others,
    }  # fmt: skip
    record = report.record
    show_effects(groups, f"{record.model}, {record.measured_on}; seed {record.seed}")
    if report.tuning:
        rows = [
            (
                t.unit, t.measures.echo.value, t.changed.echo.value, t.measures.peak.value,
                t.changed.peak.value, f"{min(t.null):.4g} to {max(t.null):.4g}" if t.null else "none",
            )
            for t in report.tuning
        ]  # fmt: skip
        show_table(("unit", "echo", "edited", "peak", "edited", "echo's change: null"), rows)
    show_classes(report.classes)
    for norm in report.norms:
        say(f"size of the change in {norm.of}: {norm.size:.4g}, {norm.relative:.2%} of its norm")
    say(f"predictions that stay: {report.locality:.1%}")
    say(f"undone: model {'identical to the bit' if report.restored else 'NOT restored'}")


def _words(edit: Any) -> str:
    text = str(edit)
    return text if len(text) <= 120 else f"{text[:117]}…"


def _place(ledger: Any, branch: str) -> str:
    head = ledger.head(branch)
    return "the model as it is" if head == ledger.model_hash else head[:12]
