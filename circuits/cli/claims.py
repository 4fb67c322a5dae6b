"""`circuits claim`: write claim files, and list the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Typer

from circuits.claims import KINDS, TESTS, claims_schema, write_claims
from circuits.claims.parts import Ablation
from circuits.claims.writing import claims_of_circuit, task_of_circuit
from circuits.cli import options
from circuits.cli.signatures import Within, argument, command, option
from circuits.examples import LIMIT
from circuits.graph.saved import load_circuit
from circuits.tables import Table

app = Typer(
    help="Write a claim file from a saved circuit, and list the tests that could refute claims.",
    no_args_is_help=True,
)


@command(app)
def new(
    model: options.Model,
    circuit: Annotated[str, argument("The name of a circuit that `circuits discover --save` kept.")],
    out: Annotated[Path, option("The file to write, .yaml.", "--out")],
    output: options.Output,
    task: Annotated[str, option("The task. By default the one on which the circuit was found.", "--task")] = "",
    examples: Annotated[int, option(
        "How many examples are drawn for both halves of the task: as many as when the circuit was found.", "--limit",
        check=Within(4, 10**6),
    )] = LIMIT,
    ablation: Annotated[Ablation, option("What everything outside the circuit carries.")] = "counterpart",
    about: Annotated[str, option("The story, in a few sentences.")] = "",
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Write a claim file about a saved circuit, with every test that applies and its strict default thresholds."""
    options.check_out(out, ".yaml", ".yml")
    loaded = model.load()
    found = load_circuit(model.place.database, circuit, loaded.hash)
    weights = str(model.weights.resolve()) if model.weights else ""
    spec = task_of_circuit(found, loaded, task, examples, seed)
    file = claims_of_circuit(
        circuit,
        found,
        loaded,
        model.spec,
        spec,
        weights=weights,
        ablation=ablation,
        about=about,
        seed=seed,
    )
    write_claims(out, file)
    rows = [
        (c.name, c.test, ", ".join(f"{k} {v}" for k, v in c.settings.items())) for c in file.claims
    ]
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
