"""`circuits heads`, `attention` and `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from typer import Typer

from circuits import localization
from circuits.cli import options
from circuits.cli.recipes import recipe_of
from circuits.cli.signatures import Within, argument, command, option
from circuits.edits.recipes import edited
from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.stimuli.images import read_image

app = Typer()

N_TOKENS = 20
"""How many tokens are added when nobody says."""


@command(app)
def heads(
    model: options.Model,
    output: options.FigureOutput,
    texts: Annotated[int, option(
        "How many texts of random tokens that repeat to score heads on.", check=Within(2, 10**5)
    )] = 32,
    length: Annotated[int, option(
        "How many tokens each text has; 0 stands for 64, or for what the model takes if that is less.",
        check=Within(0, 10**6),
    )] = 0,
    top: options.Top = options.TOP,
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Find previous-token, duplicate-token and induction heads on random repeated tokens."""
    loaded = model.load()
    with output.progress("heads") as progress:
        found = localization.score_heads(
            loaded, n=texts, length=length or None, seed=seed, progress=progress
        )
    output.draw(lambda figures: figures.heads_figure(found))
    output.show(found, found.tables(top))


@command(app)
def attention(
    model: options.Model,
    heads: Annotated[str, argument("Heads, written LAYER.HEAD, with blanks or commas between.")],
    output: options.FigureOutput,
    text: Annotated[str, option(
        "The text in which the heads attend: words, or numbers of tokens if the model has no words."
    )] = "",
    image: Annotated[Path | None, option("For a vision transformer: the image file in which the heads attend.")] = None,
    query: Annotated[list[str] | None, option(
        "With --image: whose attention to show: `class token`, `register 1`, the row and column of a patch (3,4) or a "
        "token's number; may be repeated. By default the class token or, if there is none, the patch in the middle."
    )] = None,
) -> None:  # fmt: skip
    """Show attention patterns of heads on a text, raw and weighted by value norms, or over an image."""
    named = heads.replace(",", " ").split()
    if image is not None:
        if text:
            raise ValueError(f"--text {text!r} does not go with --image")
        picture = read_image(image)
        looks = localization.image_attention(model.load(), picture, named, query or ())
        output.draw(lambda figures: figures.image_attention_figure(looks))
        output.show(looks, looks.tables())
        return
    if query:
        raise ValueError(f"--query {query[0]!r} goes with --image")
    if not text:
        raise ValueError(
            "--text is empty: expected the text in which heads attend (--image for a vision transformer)"
        )
    loaded = model.load()
    options.say_if_cut(loaded, text)
    found = localization.attention_patterns(loaded, text, named)
    output.draw(lambda figures: figures.attention_figure(found))
    output.show(found, found.tables())


@command(app)
def generate(
    model: options.Model,
    output: options.Output,
    text: Annotated[list[str] | None, option("A text to continue; may be repeated.")] = None,
    edit: Annotated[list[str] | None, option(
        "An edit in words, or a recipe file; may be repeated. By default the model is not edited."
    )] = None,
    tokens: Annotated[int, option(
        "How many tokens to add to each text.", check=Within(1)
    )] = N_TOKENS,
    temperature: Annotated[float, option(
        "The temperature at which tokens are drawn; 0 takes the most probable token each time.", check=Within(0, 1e6)
    )] = 0.0,
    force: options.Force = False,
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Continue texts with the unedited model and, with --edit, with the edited model too."""
    if not text:
        raise ValueError("--text is missing: expected at least one text to continue")
    loaded = model.load()
    if not isinstance(loaded.input, TokenInput):
        raise ValueError(f"model {model.spec} takes images: it continues no texts")
    recipe = recipe_of(loaded, edit, seed=seed, force=force) if edit else None
    for one in text:
        options.say_if_cut(loaded, one)
    examples = Examples.texts(loaded, text)
    prompts = [examples.tokens(i) for i in range(len(examples))]
    clean = _continued(loaded, prompts, tokens, temperature, seed)
    changed: list[str | None] = [None] * len(text)
    if recipe is not None:
        with edited(loaded, recipe):
            changed = [*_continued(loaded, prompts, tokens, temperature, seed)]

    def lines() -> Iterator[str]:
        for prompt, as_is, as_edited in zip(text, clean, changed, strict=True):
            yield f"{prompt}\n  as it is: {as_is}"
            if as_edited is not None:
                yield f"  edited:   {as_edited}"

    each = zip(text, clean, changed, strict=True)
    output.show([{"text": t, "clean": c, "edited": e} for t, c, e in each], lines())


def _continued(
    model: HookedModel, prompts: Sequence[Sequence[int]], tokens: int, temperature: float, seed: int
) -> list[str]:
    """What comes after each prompt."""
    spec = model.input
    assert isinstance(spec, TokenInput), "checked by the caller"
    inputs, mask = model.pad(prompts)
    made = model.generate(inputs, tokens, mask=mask, temperature=temperature, seed=seed)
    between = "" if spec.encoder is not None else " "
    return [
        between.join(spec.word(t) for t in row.tolist()[len(prompt) :])
        for row, prompt in zip(made, prompts, strict=True)
    ]
