"""`circuits models` and `sites`: what can be loaded, and what can be looked at in it."""

from dataclasses import asdict

import typer

from circuits.cli.arguments import JsonOption, ModelArgument, SaesOption, WeightsOption
from circuits.cli.output import show_json, show_table
from circuits.models.zoo.loading import MODELS, load_model

app = typer.Typer()


@app.command()
def models(json: JsonOption = False) -> None:
    """List the models that can be loaded."""
    if json:
        show_json(
            [{"name": e.name, "builtin": e.builtin, "summary": e.summary} for e in MODELS.values()]
        )
        return
    show_table(
        ("model", "comes with", "what it is"),
        [(e.name, "the package" if e.builtin else "", e.summary) for e in MODELS.values()],
    )


@app.command()
def sites(
    model: ModelArgument,
    weights: WeightsOption = None,
    workspace: SaesOption = None,
    json: JsonOption = False,
) -> None:
    """List a model's sites: the places where its tensors can be read and changed."""
    loaded = load_model(model, weights)
    if json:
        show_json([{**asdict(s), "n_units": s.n_units} for s in loaded.sites])
        return
    show_table(
        ("site", "kind", "units", "shape of one example", "unit axis", "also called"),
        [
            (s.name, s.kind, s.n_units, " x ".join(map(str, s.shape)), s.axes[s.unit_axis], ", ".join(s.aliases))
            for s in loaded.sites
        ],
    )  # fmt: skip
