"""What the commands about autoencoders share: their options, and what these name (layer 7)."""

# no `from __future__ import annotations`: typer reads the annotations
from collections.abc import Mapping, Sequence
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
LimitOption = Annotated[int, typer.Option(help="At most so many examples, spread over the data.")]
LabelsOption = Annotated[
    str, typer.Option("--labels", help="JSON or FILE.npz:KEY with the class of each example.")
]
ModelOption = Annotated[
    str, typer.Option("--model", help="The model, if the workspace does not know it.")
]


def code_of(name: str, workspace: Path | None) -> Any:
    """An autoencoder by path, or by name in a workspace."""
    from circuits.autoencoders import load_autoencoder
    from circuits.models.loading import find_autoencoder

    return load_autoencoder(find_autoencoder(name, Workspace.default(workspace)))


def model_of(code: Any, model: str, weights: Path | None, place: Workspace) -> Any:
    """The model that an autoencoder belongs to."""
    from circuits.models.loading import load_model

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


class Batches(Sequence[Any]):
    """Examples spread over a source, as the model takes them; each batch is read when it is asked for.

    Attributes:
        which: their numbers.
    """

    def __init__(
        self, model: Any, source: Any, limit: int, among: Sequence[int] | None = None
    ) -> None:
        from circuits.harvesting import Inputs
        from circuits.models.inputs import ImageInput

        if limit < 1:
            raise ValueError(f"limit {limit} must be at least 1")
        among = range(len(source)) if among is None else among
        n = min(limit, len(among))
        self.which = [among[i * len(among) // n] for i in range(n)]
        self._inputs = Inputs(model, source)
        self._groups: list[list[int]] = []
        last = -1
        for i in self.which:
            # images have one size; texts of one length go together
            size = 0 if isinstance(model.input, ImageInput) else len(self._inputs.load(i))
            if self._groups and len(self._groups[-1]) < 32 and last == size:
                self._groups[-1].append(i)
            else:
                self._groups.append([i])
            last = size

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, i: Any) -> Any:
        return self._inputs.batch(self._groups[i])


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


def unseen(code: Any, source: Any) -> list[int] | None:
    """The examples that training held out; None, for all, if it was on other data."""
    import numpy as np

    from circuits.sae.metrics import rule_of

    plan, rule = code.about.settings.get("plan"), rule_of(code)
    trained = plan.get("rows") if isinstance(plan, Mapping) else None
    known = trained.get("data_hash") if isinstance(trained, Mapping) else None
    if known != source.hash or not rule.hold_out:
        return None
    return np.flatnonzero(rule.held_out(np.arange(len(source)))).tolist() or None
