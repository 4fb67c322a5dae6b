"""What the commands about autoencoders share: their options, and what these name."""

# no `from __future__ import annotations`: typer reads the annotations
from pathlib import Path
from typing import Annotated, Any

import typer

from circuits.workspace import Workspace

CodeArgument = Annotated[
    str,
    typer.Argument(
        help="An autoencoder: its name in the workspace (NAME or NAME/VARIANT), or its path."
    ),
]
DataOfOption = Annotated[
    str,
    typer.Option(
        "--data", help="Examples (see `circuits harvest`); those of the training by default."
    ),
]
AllOption = Annotated[
    int | None, typer.Option("--limit", help="At most so many examples (default: all).")
]
ModelOption = Annotated[
    str, typer.Option("--model", help="The model, if the workspace does not know it.")
]


def code_of(name: str, workspace: Path | None) -> Any:
    """An autoencoder by path, or by name in a workspace."""
    from circuits.autoencoders import load_autoencoder
    from circuits.models.zoo.loading import find_autoencoder

    return load_autoencoder(find_autoencoder(name, Workspace.default(workspace)))


def model_of(code: Any, model: str, weights: Path | None, place: Workspace) -> Any:
    """The model that an autoencoder belongs to."""
    from circuits.models.zoo.loading import load_model

    if not model:
        known = [r for r in place.models() if r.hash == code.about.model_hash]
        if not known:
            raise ValueError(
                f"autoencoder {code.about.name!r} is of model {code.about.model or 'unknown'!r}, which this workspace "
                "does not know: name it with --model"
            )
        model, weights = known[0].spec, Path(known[0].weights) if known[0].weights else None
    loaded = load_model(model, weights)
    if code.about.model_hash and loaded.hash != code.about.model_hash:
        raise ValueError(
            f"--model {model}: its weights are {loaded.hash[:16]}, autoencoder {code.about.name!r} is of "
            f"{code.about.model_hash[:16]}"
        )
    return loaded


def opened(
    sae: str, model: str, weights: Path | None, workspace: Path | None
) -> tuple[Any, Any, Any]:
    """An autoencoder, its model, and the model with the autoencoder in it."""
    code = code_of(sae, workspace)
    loaded = model_of(code, model, weights, Workspace.default(workspace))
    return code, loaded, attached_to(loaded, code)


def attached_to(model: Any, code: Any) -> Any:
    """The model with the autoencoder in it."""
    about = code.about
    return model.attach(
        code, about.name, about.site, about.target if about.target != about.site else None
    )


def data_of(code: Any, data: str) -> str:
    """The examples that are named, or those of the training."""
    if not data and not code.about.data:
        raise ValueError(
            f"autoencoder {code.about.name!r} does not say on what it was trained: name examples with --data"
        )
    return data or code.about.data
