"""`circuits heads`, `attention` and `generate`."""

# no `from __future__ import annotations`: typer reads the annotations
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from circuits.cli.arguments import (
    JsonOption,
    ModelArgument,
    SaesOption,
    SeedOption,
    WeightsOption,
    within,
)
from circuits.cli.editing import Numbers, recipe_of
from circuits.cli.output import progress_bar, say, show_json, show_table, visible
from circuits.cli.weights import FigureOption, check_figure

app = typer.Typer()

N_TOKENS = 20
"""How many tokens are added when nobody says."""


@app.command()
def heads(
    model: ModelArgument,
    n: Annotated[
        int,
        typer.Option(
            "--texts", callback=within(2, 10**5), help="Texts of random tokens that repeat."
        ),
    ] = 32,
    length: Annotated[
        int, typer.Option(help="Tokens of each; 0: 64, or what the model takes.")
    ] = 0,
    top: Annotated[
        int, typer.Option(callback=within(1), help="Heads of each kind; JSON has all.")
    ] = 5,
    figure: FigureOption = None,
    seed: SeedOption = 0,
    weights: WeightsOption = None,
    workspace: SaesOption = None,
    json: JsonOption = False,
) -> None:
    """Find previous-token, duplicate-token and induction heads on random repeated tokens."""
    from circuits.figures import heads_figure, save_figure
    from circuits.localization import score_heads
    from circuits.localization.heads import CHANCE
    from circuits.models.zoo.loading import load_model

    check_figure(figure)
    loaded = load_model(model, weights)
    with progress_bar("heads", quiet=json) as progress:
        found = score_heads(loaded, n=n, length=length or None, seed=seed, progress=progress)
    if figure is not None:
        save_figure(heads_figure(found), figure)
    if json:
        show_json(found.to_dict())
        return
    for kind in found.kinds:
        rows = [
            (s.head, s.score, f"{s.low:.4g} to {s.high:.4g}", s.chance, s.p_value, "yes" if s.is_one else "no")
            for s in found.of(kind)[:top]
        ]  # fmt: skip
        columns = ("head", "attention there", "95 % interval", "by chance", "p", "more than chance")
        title = f"{kind.replace('_', ' ')} heads of {model}: {n} texts, seed {seed}; chance: {CHANCE[kind]}"
        show_table(columns, rows, title)


@app.command()
def attention(
    model: ModelArgument,
    heads: Annotated[str, typer.Argument(help="Heads, LAYER.HEAD, with blanks or commas between.")],
    text: Annotated[str, typer.Option("--text", help="The text, or tokens.")] = "",
    figure: FigureOption = None,
    weights: WeightsOption = None,
    workspace: SaesOption = None,
    json: JsonOption = False,
) -> None:
    """Show where heads attend in a text, raw and weighted by the length of the values."""
    from circuits.figures import attention_figure, save_figure
    from circuits.localization import attention_patterns
    from circuits.models.zoo.loading import load_model

    check_figure(figure)
    if not text:
        raise ValueError("--text is empty: expected the text in which heads attend")
    loaded = load_model(model, weights)
    found = attention_patterns(loaded, text, heads.replace(",", " ").split())
    if figure is not None:
        save_figure(attention_figure(found), figure)
    if json:
        show_json(found.to_dict())
        return
    words = [visible(token) for token in found.tokens]
    for pattern in found.patterns:
        rows = []
        for q, token in enumerate(words):
            best, fetched = int(pattern.raw[q].argmax()), int(pattern.weighted[q].argmax())
            rows.append((
                f"{q} {token}", f"{best} {words[best]}", float(pattern.raw[q, best]),
                f"{fetched} {words[fetched]}", float(pattern.weighted[q, fetched]),
            ))  # fmt: skip
        columns = ("token", "attends most to", "share", "fetches most from", "share, by values")
        show_table(columns, rows, f"{pattern.head} of {model}")
        if pattern.sink is not None:
            word, share = found.tokens[pattern.sink], f"{pattern.sink_share:.0%}"
            say(
                f"sink of {pattern.head}: {word!r} at {pattern.sink} gets {share} of the attention of later tokens"
            )


@app.command()
def generate(
    model: ModelArgument,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="A text to continue; may be repeated.")
    ] = None,
    edit: Annotated[
        list[str] | None,
        typer.Option("--edit", help="An edit in words, or a recipe file; may be repeated."),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="How many tokens to add.")] = N_TOKENS,
    temperature: Annotated[
        float, typer.Option(help="Of drawing; 0 takes the most likely token.")
    ] = 0.0,
    force: Annotated[
        bool, typer.Option("--force", help="Take a recipe that was written for other weights.")
    ] = False,
    seed: SeedOption = 0,
    weights: WeightsOption = None,
    workspace: SaesOption = None,
    json: JsonOption = False,
) -> None:
    """Continue texts with the model as it is and, with --edit, as it is edited."""
    from circuits.edits.recipes import edited
    from circuits.examples import Examples
    from circuits.models.adapter.inputs import TokenInput
    from circuits.models.zoo.loading import load_model

    if not text:
        raise ValueError("--text is missing: expected at least one text to continue")
    loaded = load_model(model, weights)
    if not isinstance(loaded.input, TokenInput):
        raise ValueError(f"model {model} takes images: it continues no texts")
    recipe = recipe_of(loaded, edit, Numbers(seed=seed), force) if edit else None
    examples = Examples.texts(loaded, text)
    prompts = [examples.tokens(i) for i in range(len(examples))]
    clean = _continued(loaded, prompts, tokens, temperature, seed)
    changed = None
    if recipe is not None:
        with edited(loaded, recipe):
            changed = _continued(loaded, prompts, tokens, temperature, seed)
    if json:
        show_json([
            {
                "text": own, "clean": clean[i],
                "edited": None if changed is None else changed[i],
            }
            for i, own in enumerate(text)
        ])  # fmt: skip
        return
    for i, own in enumerate(text):
        say(own)
        say(f"  as it is: {clean[i]}")
        if changed is not None:
            say(f"  edited:   {changed[i]}")


def _continued(
    model: Any, prompts: Sequence[Sequence[int]], tokens: int, temperature: float, seed: int
) -> list[str]:
    """What comes after each prompt."""
    inputs, mask = model.pad(prompts)
    made = model.generate(inputs, tokens, mask=mask, temperature=temperature, seed=seed)
    between = "" if model.input.encoder is not None else " "
    return [
        between.join(model.input.word(t) for t in row.tolist()[len(prompt) :])
        for row, prompt in zip(made, prompts, strict=True)
    ]
