"""Arguments and options that several commands take."""

# no `from __future__ import annotations`: typer reads the annotations
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from circuits.workspace import ModelRecord, Workspace


def within(least: int, most: int | None = None) -> Callable[[Any], Any]:
    """A check of an option's value, or of each of several."""

    def check(value: Any) -> Any:
        for one in value if isinstance(value, list) else [value]:
            if one is not None and not least <= one <= (one if most is None else most):
                wanted = f"{least} or more" if most is None else f"{least} to {most}"
                raise typer.BadParameter(f"{one} must be {wanted}")
        return value

    return check


ModelArgument = Annotated[
    str, typer.Argument(help="A model that `circuits models` lists, e.g. shapes or tl:gpt2.")
]
UnitArgument = Annotated[str, typer.Argument(help="A unit, SITE:INDEX, e.g. mixed3b:335.")]
WeightsOption = Annotated[
    Path | None, typer.Option("--weights", help="The model's weights file (.safetensors or .pt).")
]
WorkspaceOption = Annotated[
    Path | None,
    typer.Option("--workspace", help="Folder for results (default: $CIRCUITS_WORKSPACE or cache)."),
]
SaesOption = Annotated[  # `circuits.cli.main.run` reads it, for every command
    Path | None,
    typer.Option(
        "--workspace",
        help="Folder of the autoencoders of MODEL+NAME (default: $CIRCUITS_WORKSPACE or cache).",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        help="photos, curves, shapes, repeats, folder:PATH (images), tokens:PATH (text), npz:PATH[:KEY], "
        "hf:PATH[:COLUMN] or python:MODULE:FACTORY.",
    ),
]

Take = Literal["spread", "first", "random"]
TakeOption = Annotated[
    Take,
    typer.Option(
        "--take", help="Which of --data: spread over it, the first, or drawn at random (--seed)."
    ),
]
LimitOption = Annotated[
    int, typer.Option("--limit", callback=within(1, 10**6), help="How many examples of --data.")
]
LabelsOption = Annotated[
    str,
    typer.Option(
        "--labels",
        help="Classes of the images of --data: FILE.json, FILE.npz:KEY, or `names` to take them from names.",
    ),
]
ImageOption = Annotated[
    list[Path] | None, typer.Option("--image", help="An image file instead; may be repeated.")
]
TextOption = Annotated[str, typer.Option("--text", help="A text instead, for models of tokens.")]
ExactOption = Annotated[
    bool, typer.Option("--exact", help="Refuse images of another size than the model's.")
]
TaskOption = Annotated[
    str,
    typer.Option(
        "--task",
        help="What is measured: a task by name, or its file (default: the model's own, or what --data states).",
    ),
]
MetricOption = Annotated[
    str, typer.Option("--metric", help="What is measured first, e.g. logit_difference.")
]
PositionsOption = Annotated[
    str,
    typer.Option(
        "--positions", help="Where answers are read: last, all, a span's name, or 3,5 (from 0)."
    ),
]
AnswerOption = Annotated[str, typer.Option("--answer", help="The answer to each example.")]
AgainstOption = Annotated[str, typer.Option("--against", help="What answers are compared with.")]
RandomOption = Annotated[
    int, typer.Option("--random", help="Random variants that stand next to each number.")
]


SeedOption = Annotated[
    int,
    typer.Option("--seed", callback=within(0, 2**32 - 1), help="Seed of everything random."),
]


def record_of(spec: str, weights: Path | None, model_hash: str) -> ModelRecord:
    """How to load the model again, from any folder."""
    spec, *attached = spec.split("+")
    if attached:
        from circuits.models.zoo.loading import find_autoencoder

        base = record_of(spec, weights, model_hash)
        names = [_in_workspace(find_autoencoder(a).resolve()) for a in attached]
        return ModelRecord("+".join([base.spec, *names]), model_hash, base.weights)
    scheme, _, rest = spec.partition(":")
    path = Path(rest.partition(":")[0])
    if scheme in ("python", "tl", "hf") and path.exists():  # a file of their own, a local folder
        spec = ":".join([scheme, str(path.resolve()), *rest.split(":")[1:]])
    return ModelRecord(spec, model_hash, str(weights.resolve()) if weights else None)


def _in_workspace(path: Path) -> str:
    """An autoencoder by its name where it is the workspace's own, so that the workspace can be moved."""
    place = Workspace.default().root.resolve() / "saes"
    if not path.is_relative_to(place):
        return str(path)
    return f"sae/{path.relative_to(place).with_suffix('')}"
