"""`circuits edit …`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

from circuits import effects
from circuits.cli import options
from circuits.cli.choosing import units_of
from circuits.cli.output import say, show_json, warn
from circuits.cli.recipes import ESTIMATED, associated, recipe_of
from circuits.cli.signatures import argument, command, option
from circuits.database import Database
from circuits.edits import recipes
from circuits.edits.auditing import LOGS, audit
from circuits.edits.auditing import head as head_of
from circuits.edits.ledger import Ledger
from circuits.edits.records import OPERATORS, Edit, edit_schema
from circuits.effects import EditReport
from circuits.experiments import N_RANDOM
from circuits.files import write_json
from circuits.history import Head
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tables import Table
from circuits.units import Unit
from circuits.workspace import Workspace

app = typer.Typer(
    help="Write recipes of edits, measure them, and keep edits in a ledger with undo and redo.",
    no_args_is_help=True,
)

What = Annotated[list[str] | None, argument(
    "Edits and recipe files, applied in order. An edit is an operator with its fields, in quotes, e.g. 'zero "
    "SITE:1,2', 'scale SITE:1 factor=2' or 'filter_weights into=SITE:1' (`circuits edit operators` lists them all)."
)]  # fmt: skip
Branch = Annotated[str, option("The branch of the ledger to work on.")]
BranchInstead = Annotated[str, option("Instead, take the edits of this branch of the ledger.")]
AnyBranch = Annotated[str, option("Show only this branch of the ledger. By default all of them.")]


@dataclass(frozen=True)
class Measuring:
    """What edits are compared with, and what they are meant to change."""

    target: Annotated[list[str] | None, option(
        "What the edits are meant to change: class:NAME, token:WORD or a unit SITE:INDEX; may be repeated."
    )] = None  # fmt: skip
    random: options.Random = N_RANDOM
    seed: options.Seed = 0

    def measure(
        self,
        model: HookedModel,
        recipe: recipes.Recipe,
        task: options.LabelledTask,
        output: options.Output,
        generalise: str = "",
        tuning: str = "",
    ) -> EditReport:
        """What a recipe does."""
        asked = task.compile(model, self.seed)
        other = options.Dataset(generalise, task.limit, task.take)
        more = other.choose(model, self.seed) if generalise else None
        units: list[Unit] = units_of(model, tuning) if tuning else []
        with output.progress("measure") as progress:
            return effects.measure(
                model, recipe, asked, targets=self.target or (), generalisation=more, tuning=units,
                n_random=self.random, seed=self.seed, progress=progress,
            )  # fmt: skip


# --- recipes ---------------------------------------------------------------------------------------


@command(app)
def operators(output: options.Output) -> None:
    """List the edit operators and the fields of each."""
    rows = [("zero", "units", "Remove units: scale by 0.")]
    for name, kind in OPERATORS.items():
        needs = [f.name if f.default is MISSING else f"[{f.name}]" for f in fields(kind)]
        rows.append((name, " ".join(needs), kind.about))
    more = [(name, *about) for name, about in ESTIMATED.items()]
    output.show(
        edit_schema(),
        (
            Table(("operator", "fields", "what it does"), rows),
            Table(("in words also", "needs", "makes"), more),
        ),
    )


@command(app)
def schema() -> None:
    """Print the JSON schema of recipe files."""
    show_json(recipes.recipe_schema())


@command(app)
def new(
    model: options.Model,
    out: Annotated[Path, argument("The recipe file to write, .json.")],
    examples: options.LabelledDataset,
    what: What = None,
    associate: Annotated[str, option(
        "A layer: add a rank-one edit of its weights (ROME) that makes the model answer --prompt with --answer."
    )] = "",
    prompt: Annotated[str, option("With --associate: the text whose answer is to change.")] = "",
    answer: Annotated[str, option("With --associate: the new answer, token:WORD or class:NAME.")] = "",
    note: options.Note = "",
    author: options.Author = "",
    force: options.Force = False,
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Write a recipe file from edits and from other recipes."""
    options.check_out(out)
    loaded = model.load()
    base = recipe_of(loaded, what or [], examples, seed, force)
    found, lines = list(base.edits), []
    if associate:
        made = associated(loaded, associate, prompt, answer, examples, seed, model.place)
        found.append(made)
        lines.append(made.origin)
    elif prompt or answer:
        raise ValueError("--prompt and --answer go with --associate LAYER")
    if not found:
        raise ValueError(
            "nothing to edit: give edits in words, e.g. 'zero mixed3b:335', or a recipe"
        )
    recipe = recipes.Recipe.of(loaded, found, note or base.note, author or base.author, seed)
    recipe.save(out)
    lines.append(f"{out}: {len(recipe.edits)} edits of {model.spec} ({recipe.model_hash[:16]})")
    say("\n".join(lines))


@command(app)
def measure(
    model: options.Model,
    task: options.LabelledTask,
    measuring: Measuring,
    output: options.FigureOutput,
    what: What = None,
    branch: BranchInstead = "",
    generalise: Annotated[str, option(
        "Another dataset on which to measure --target too, to see whether the edit generalises. By default none."
    )] = "",
    tuning: Annotated[str, option("Units whose curve tuning is measured too, e.g. mixed3b:1,2.")] = "",
    force: options.Force = False,
    out: Annotated[Path | None, option("Save the report to this file, as JSON.")] = None,
) -> None:  # fmt: skip
    """Measure what edits do, or a branch of the ledger, which then records the report."""
    options.check_out(out)
    _either(what, branch)
    ledger, head = None, ""
    if branch:
        loaded, ledger = _ledger(model, write=True)
        head = ledger.head(branch)
        recipe = ledger.recipe(at=head)
    else:
        loaded = model.load()
        recipe = recipe_of(loaded, what or [], task.examples, measuring.seed, force)
    report = measuring.measure(loaded, recipe, task, output, generalise, tuning)
    if ledger is not None:
        ledger.measured(report.to_dict(), branch, head)
    if out is not None:
        write_json(out, report.to_dict())
    output.draw(lambda figures: figures.edit_figure(report))
    output.show(report, report.tables())


@command(app)
def diff(
    before: Annotated[str, argument("A recipe file or, with --model, a branch.")],
    after: Annotated[str, argument("The recipe file or branch to compare it with.")],
    output: options.Output,
    model: Annotated[str, option("A model: compare two branches of its ledger.")] = "",
    workspace: options.WorkspaceFolder = None,
    weights: Annotated[Path | None, option("With --model: a file of weights for it.")] = None,
) -> None:  # fmt: skip
    """Show which edits to remove from one recipe, and which to add, to get another."""
    if model:
        _, ledger = _ledger(options.Model(model, weights, workspace))
        old, new = (ledger.recipe(name) for name in (before, after))
    else:
        old, new = (recipes.Recipe.load(name) for name in (before, after))
    found = recipes.diff(old, new)

    def lines() -> Iterator[str]:
        if old.model_hash != new.model_hash:
            hashes = " and ".join(r.model_hash[:16] or "any" for r in (old, new))
            yield f"for different models: {hashes}"
        yield from (f"{line.sign} {_words(line.edit)}" for line in found)
        if all(line.sign == " " for line in found):
            yield "the same edits"

    output.show([{"sign": line.sign, "edit": line.edit.to_dict()} for line in found], lines())


@command(app)
def bake(
    model: options.Model,
    out: Annotated[Path, argument("The weights file to write, .safetensors.")],
    output: options.Output,
    what: What = None,
    branch: BranchInstead = "",
    force: options.Force = False,
) -> None:
    """Write a weights file with the edits applied: `--weights FILE` loads it for the same model."""
    options.check_out(out, ".safetensors", option="weights file")
    _either(what, branch)
    if branch:
        loaded, ledger = _ledger(model)
        recipe = ledger.recipe(branch)
    else:
        loaded = model.load()
        recipe = recipe_of(loaded, what or [], force=force)
    made = recipes.bake(loaded, recipe)
    recipes.save_baked(made, out, loaded, recipe)
    output.show(
        {"path": str(out), "model_hash": made.hash, "base_hash": loaded.hash},
        [f"{out}: {loaded.hash[:16]} with {len(recipe.edits)} edits is {made.hash[:16]}"],
    )


# --- the ledger ------------------------------------------------------------------------------------


@command(app)
def apply(
    model: options.Model,
    task: options.LabelledTask,
    measuring: Measuring,
    output: options.Output,
    what: What = None,
    branch: Branch = "main",
    note: options.Note = "",
    author: options.Author = "",
    force: options.Force = False,
    measured: Annotated[bool, option(
        "Measure what the branch with the new edits does, as `circuits edit measure` does.", "--measure/--no-measure"
    )] = True,
) -> None:  # fmt: skip
    """Add edits to a branch of the ledger, and measure what it does, compared with random edits."""
    loaded, ledger = _ledger(model, write=True)
    recipe = recipe_of(loaded, what or [], task.examples, measuring.seed, force)
    if not recipe.edits:
        raise ValueError("nothing to apply: give a recipe file or edits in words")
    head, report = ledger.head(branch), None
    if measured:  # before anything is written
        report = measuring.measure(loaded, ledger.recipe(branch) + recipe, task, output)
    made = ledger.apply(recipe, note, branch, author or None, measuring.seed)
    if report is not None and made[0].parent == head:
        ledger.measured(report.to_dict(), branch, made[-1].hash, author or None)
    elif report is not None:
        warn(
            f"somebody else edited branch {branch!r} meanwhile: run `circuits edit measure --branch {branch}` again"
        )
    facts = {"entries": [e.to_dict() for e in made], "report": report and report.to_dict()}
    lines = [f"{entry.hash[:12]} {_words(entry.edit)}" for entry in made]
    output.show(facts, [*lines, *(report.tables() if report is not None else ())])


@command(app)
def undo(model: options.Model, branch: Branch = "main", author: options.Author = "") -> None:
    """Undo the last edit of a branch, and check that the weights are what they were before."""
    _, ledger = _ledger(model, write=True)
    entry = ledger.undo(branch, author or None)
    say(f"undone: {entry.hash[:12]} {_words(entry.edit)}; at {_place(ledger, branch)}")


@command(app)
def redo(model: options.Model, branch: Branch = "main", author: options.Author = "") -> None:
    """Redo the edit that was undone last."""
    _, ledger = _ledger(model, write=True)
    entry = ledger.redo(branch, author or None)
    say(f"made again: {entry.hash[:12]} {_words(entry.edit)}; at {_place(ledger, branch)}")


@command(app, "branch")
def new_branch(
    model: options.Model,
    name: Annotated[str, argument("The name of the new branch.")],
    at: Annotated[str, option(
        "The hash of the entry that the branch starts from, or of the unedited model; its first digits are enough. "
        "By default the last entry of the branch --from."
    )] = "",
    origin: Annotated[str, option("The branch to start from.", "--from")] = "main",
    author: options.Author = "",
) -> None:  # fmt: skip
    """Create a branch."""
    _, ledger = _ledger(model, write=True)
    ledger.branch(name, at or None, origin, author or None)
    say(f"branch {name} begins at {_place(ledger, name)}")


@command(app)
def log(model: options.Model, output: options.Output, branch: AnyBranch = "") -> None:
    """List the events of the ledger, oldest first, and where each branch is."""
    _, ledger = _ledger(model)
    if branch:
        ledger.head(branch)
    events = ledger.events(branch or None)

    def tables() -> Iterator[Table | str]:
        rows = []
        for event in events:
            which = event.start if event.kind == "undo" else event.end
            entry = None if which == ledger.model_hash else ledger.entry(which)
            what, note = (_words(entry.edit), entry.note) if entry else ("the model as it is", "")
            if event.kind == "measure":
                what, note = f"report {event.report[:12]}", ""
            rows.append(
                (event.created, event.branch, event.kind, which[:12], what, event.author, note)
            )
        yield Table(("when (UTC)", "branch", "", "entry", "edit", "who", "why"), rows)
        for name in [branch] if branch else ledger.branches():
            n = len(ledger.entries(name))
            yield f"{name} is at {_place(ledger, name)}: {n} edits, {len(ledger.undone(name))} to redo"

    output.show([event.__dict__ for event in events], tables())


@command(app)
def show(
    model: options.Model,
    entry: Annotated[str, argument("The first digits of the entry's hash, as `circuits edit log` shows it.")],
) -> None:  # fmt: skip
    """Show an entry of the ledger, with what was measured of it, as JSON."""
    _, ledger = _ledger(model)
    found = ledger.entry(entry)
    show_json(found.to_dict() | {"reports": ledger.reports(found.hash)})


@command(app)
def replay(model: options.Model, output: options.Output, branch: Branch = "main") -> None:
    """Apply a branch's edits to the model again and compare every hash; exit code 1 if one differs."""
    loaded, ledger = _ledger(model)
    found = ledger.replay(branch)
    with ledger.edited(branch):
        final = loaded.hash
    same = all(r.same for r in found)
    lines = [
        f"{'same  ' if r.same else 'OTHER '} {r.entry.hash[:12]} {_words(r.entry.edit)}"
        for r in found
    ]
    lines.append(
        f"{len(found)} edits, all hashes {'the same' if same else 'NOT the same'}; weights {final[:16]}"
    )
    each = [{"entry": r.entry.hash, "same": r.same} for r in found]
    output.show({"entries": each, "same": same, "model_hash": final}, lines)
    if not same:
        raise typer.Exit(1)


@command(app)
def head(output: options.Output, workspace: options.WorkspaceFolder = None) -> None:
    """Print how far the ledger and what people saved have come, with a hash over it, to keep outside the workspace."""
    now = head_of(_kept(workspace))
    facts = {"head": str(now), **dict(zip(("events", "versions"), now.counts, strict=True))}
    about = f"covers {_counted(now.counts)}; `circuits edit verify --head HEAD` checks that they stay as they are"
    output.show(facts, [str(now), about])


@command(app)
def verify(
    output: options.Output,
    head: Annotated[str | None, option(
        "What `circuits edit head` printed before: everything up to it must be as it was then."
    )] = None,
    workspace: options.WorkspaceFolder = None,
) -> None:  # fmt: skip
    """Check the ledger, and what people saved: hashes, references, versions, tables. Exit code 1 if there is a fault.

    Without --head this shows that they are consistent, but not that they are the original ones: somebody who rewrites
    all of a ledger can make it consistent.
    """
    kept = None if head is None else Head.parse(head, len(LOGS))
    database = _kept(workspace) if kept is None else Workspace.default(workspace).database
    found, now = audit(database, kept)
    word = "faulty" if found else "consistent" if kept is None else "unchanged"
    if found or now is None:
        last = f"{len(found)} {'fault' if len(found) == 1 else 'faults'}"
    elif kept is None:
        last = f"consistent: {_counted(now.counts)}"
    else:
        since = [a - b for a, b in zip(now.counts, kept.counts, strict=True)]
        last = f"unchanged up to that head: {_counted(kept.counts)}; consistent since: {_counted(since)}"
    output.show(
        {"state": word, "faults": found, "head": None if now is None else str(now)}, [*found, last]
    )
    if found:
        raise typer.Exit(1)


def _kept(workspace: Path | None) -> Database:
    """The database of a workspace in which something was kept.

    Raises:
        FileNotFoundError: if nothing was: to call that consistent would hide a mistyped name.
    """
    place = Workspace.default(workspace)
    if not place.database.there():
        raise FileNotFoundError(
            f"workspace {str(place.root)!r} has no workspace.db: nothing has been edited or saved in it"
        )
    return place.database


def _counted(counts: Sequence[int]) -> str:
    events, versions = counts
    return f"{events} events of the ledger, {versions} saved versions (circuits, families, names)"


# --- what they share -------------------------------------------------------------------------------


def _ledger(model: options.Model, write: bool = False) -> tuple[HookedModel, Ledger]:
    place = model.place.writable() if write else model.place
    loaded = model.load()
    return loaded, Ledger(place.database, loaded)


def _either(what: list[str] | None, branch: str) -> None:
    if bool(what) == bool(branch):
        raise ValueError("give either edits (words or recipe files) or --branch NAME")


def _words(edit: Edit) -> str:
    text = str(edit)
    return text if len(text) <= 120 else f"{text[:117]}…"


def _place(ledger: Ledger, branch: str) -> str:
    head = ledger.head(branch)
    return "the model as it is" if head == ledger.model_hash else head[:12]
