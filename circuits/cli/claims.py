"""`circuits claim`: write claim files, and list the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Typer

from circuits.claims import KINDS, TESTS, claims_schema, write_claims
from circuits.claims.parts import Ablation
from circuits.claims.writing import EXAMPLES, claims_of_circuit, claims_of_recipe, task_of_circuit
from circuits.cli import options
from circuits.cli.recipes import recipe_of
from circuits.cli.signatures import Within, argument, command, option
from circuits.graph.saved import load_circuit
from circuits.tables import Table
from circuits.tasks.spec import TaskSpec

app = Typer(
    help="Write a claim file from a saved circuit or a recipe, and list the tests that could refute claims.",
    no_args_is_help=True,
)


@command(app)
def new(
    model: options.Model,
    out: Annotated[Path, option("The file to write, .yaml.", "--out")],
    output: options.Output,
    circuit: Annotated[str, argument("The name of a circuit that `circuits discover --save` kept.")] = "",
    recipe: Annotated[Path | None, option(
        "A recipe instead of a circuit: the claim is what its edits do to the task's metric, see --least and --most."
    )] = None,
    least: Annotated[float | None, option(
        "With --recipe: the least change of the metric that is predicted.", check=Within(-(10**9), 10**9)
    )] = None,
    most: Annotated[float | None, option(
        "With --recipe: the largest change that is predicted.", check=Within(-(10**9), 10**9)
    )] = None,
    task: Annotated[str, option("The task. By default the one on which the circuit was found.", "--task")] = "",
    examples: Annotated[int, option(
        "How many new examples are drawn for both halves of the task; those that were drawn when the circuit was found "
        "are left out.", check=Within(4, 10**6),
    )] = EXAMPLES,
    ablation: Annotated[Ablation, option("What everything outside the circuit carries.")] = "counterpart",
    about: Annotated[str, option("The story, in a few sentences.")] = "",
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Write a claim file about a saved circuit, with every test that applies, or about what a recipe does."""
    options.check_out(out, ".yaml", ".yml")
    if bool(circuit) == (recipe is not None):
        raise ValueError("expected the name of a saved circuit, or --recipe FILE")
    if (recipe is None) != (least is None and most is None) or (least is None) != (most is None):
        raise ValueError(
            "--least and --most belong to --recipe, which needs both: the change that is predicted"
        )
    loaded = model.load()
    more: dict[str, Any] = {
        "weights": str(model.weights.resolve()) if model.weights else "", "about": about, "seed": seed
    }  # fmt: skip
    if recipe is not None:
        assert least is not None, "checked before"
        assert most is not None, "checked before"
        edits, spec = recipe_of(loaded, [str(recipe)]), TaskSpec(task, examples, seed)
        file = claims_of_recipe(recipe.stem, edits, loaded, model.spec, spec, least, most, **more)
    else:
        found = load_circuit(model.place.database, circuit, loaded.hash)
        spec = task_of_circuit(found, loaded, task, examples)
        file = claims_of_circuit(
            circuit, found, loaded, model.spec, spec, ablation=ablation, **more
        )
    write_claims(out, file)
    rows = [(c.name, c.test, c.settings_line) for c in file.claims]
    output.show(
        {"file": str(out), "claims": [c.name for c in file.claims]},
        [
            Table(("claim", "test", "settings"), rows, f"{out}: {len(file.claims)} claims"),
            "read the file, take out what you do not claim, then run: circuits verify " + str(out),
        ],
    )


@command(app)
def tests(output: options.Output) -> None:
    """List the kinds of claim, the tests that could refute each, and their settings with defaults."""
    rows = [
        (kind, name, TESTS[name].about, "; ".join(_said(name)))
        for kind, names in KINDS.items()
        for name in names
    ]
    facts = [
        {"claim": kind, "test": name, "about": about, "settings": said}
        for kind, name, about, said in rows
    ]
    output.show(
        facts, [Table(("claim", "test", "what it measures", "settings"), rows, "tests of claims")]
    )


def _said(name: str) -> list[str]:
    return [
        f"{p.name}: {p.about} ({'needed' if p.default is None else f'default {p.default}'})"
        for p in TESTS[name].parameters
    ]


@command(app)
def schema(output: options.Output) -> None:
    """Print the JSON schema of claim files."""
    options.Output(json=True).show(claims_schema())
