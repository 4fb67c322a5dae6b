"""Transformer units: readable texts with tokens coloured by activation, where heads look, what units add to logits."""

from __future__ import annotations

import html
from collections.abc import Sequence

import streamlit as st
from torch import Tensor

from apps import cached
from apps.address import line, part, plain
from apps.showing import show
from apps.subject import Look
from circuits.edits.recipes import Recipe
from circuits.examples import Examples
from circuits.figures import image_attention_figure
from circuits.localization import shown_pattern
from circuits.models.adapter.inputs import TokenInput
from circuits.stimuli.spelling import words_of
from circuits.store import Example
from circuits.units import Unit
from circuits.weights import TokenPairs

LISTED = 10
BEFORE, AFTER = 24, 12
"""Tokens that are shown before and after the one at which a unit is most active."""

MANY = 8192
"""Tokens of a vocabulary whose pairs are gone through only when a person asks for it."""

LONGEST = 48
"""Tokens of a text whose attention is drawn."""

_CSS = """<style>
.unit-texts { display: grid; grid-template-columns: max-content 1fr max-content; gap: 6px 12px; line-height: 1.6; }
.unit-texts > .value { text-align: right; font-variant-numeric: tabular-nums; opacity: .85; }
.unit-texts > .from { opacity: .8; font-size: .8em; max-width: 9em; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.unit-texts > .text { white-space: pre-wrap; overflow-wrap: anywhere; }
.unit-texts .token { border-radius: 3px; padding: 1px 0; }
.unit-texts .peak { font-weight: 600; outline: 1.5px solid currentColor; }
.unit-texts .odd { opacity: .8; font-size: .85em; }
</style>"""


def texts_panel(look: Look, examples: Examples, found: Sequence[Example], key: str) -> None:
    """Texts around where the unit is most active, each token coloured by its activation."""
    spec = look.model.input
    assert isinstance(spec, TokenInput), "chosen by the caller"
    whole = st.toggle("Whole texts", key=f"whole-texts-{key}")
    rows = []
    for example in found:
        one = examples.subset([example.index])
        rows.append((example, one.tokens(0), _activations(look, one)))
    limit = max((abs(v) for *_, values in rows for v in values), default=0.0) or 1.0
    made = [_row(e, spec, tokens, values, limit, whole) for e, tokens, values in rows]
    st.html(f"{_CSS}<div class='unit-texts'>{''.join(made)}</div>")
    around = "" if whole else f" {BEFORE} tokens before the peak and {AFTER} after it are shown."
    st.caption(
        f"Orange is above zero, blue below, full colour at ±{limit:.3g}. The peak is framed; rest the pointer on a "
        f"token to read its number.{around}"
    )


def _activations(look: Look, one: Examples) -> list[float]:
    """The unit's activation at each token of one text; none at a site without positions."""
    site = look.model.site(look.unit.site)
    if "position" not in site.axes:
        return []
    value = cached.recorded(look.model, Recipe((), look.record.hash), one, site.name)
    return site.activations(value)[0, look.unit.index].reshape(-1).tolist()


def _row(
    example: Example,
    spec: TokenInput,
    tokens: Sequence[int],
    values: Sequence[float],
    limit: float,
    whole: bool,
) -> str:
    """A text as a row: how active the unit is at most, the text around there, and where it is from."""
    at = example.position[0] if example.position else -1
    first, last = 0, len(tokens)
    if not whole and at >= 0:
        first, last = max(0, at - BEFORE), min(len(tokens), at + AFTER + 1)
    words = words_of(spec.vocabulary, tokens)
    gap = "" if spec.vocabulary else " "
    shown = []
    for i in range(first, last):
        value = values[i] if i < len(values) else 0.0
        shown.append(_token(words[i], value, limit, i == at, tokens[i] == spec.bos))
    before, after = "… " if first else "", " …" if last < len(tokens) else ""
    name = html.escape(example.name)
    return (
        f"<div class='value'>{example}</div><div class='text'>{before}{gap.join(shown)}{after}</div>"
        f"<div class='from' title='{name}'>{name}</div>"
    )


def _token(word: str, value: float, limit: float, peak: bool, start: bool) -> str:
    colour = "230,120,0" if value > 0 else "0,114,178"
    strength = 0.55 * min(1.0, abs(value) / limit)
    kind = f"token{' peak' if peak else ''}{' odd' if start else ''}"
    visible = html.escape(word).replace("\n", "↵").replace("\t", "⇥")
    return (
        f"<span class='{kind}' title='{value:.3g}' style='background:rgba({colour},{strength:.2f})'>"
        f"{visible}</span>"
    )


@part
def own_text_panel(look: Look) -> None:
    """How active the unit is at each token of a text that the person types; where a head looks there."""
    model, spec = look.model, look.model.input
    if not isinstance(spec, TokenInput):
        return
    st.subheader("On a text of your own")
    hint = "Once upon a time" if spec.vocabulary else "5 9 2 7 5 9 2"
    text = st.text_input(
        "A text", st.query_params.get("text", ""), max_chars=2000, key="unit-text", placeholder=hint
    )
    if not text.strip():
        return
    st.query_params["text"] = text
    try:
        one = Examples.texts(model, [text], ["your text"])
        values = _activations(look, one)
    except (ValueError, KeyError) as error:
        st.error(line(error))
        return
    if values:
        tokens, limit = one.tokens(0), max(map(abs, values)) or 1.0
        peak = max(range(len(values)), key=lambda i: values[i])
        own = Example(0, "your text", values[peak], (peak,))
        row = _row(own, spec, tokens, values, limit, whole=True)
        st.html(f"{_CSS}<div class='unit-texts'>{row}</div>")
    if (head := shown_pattern(model, look.unit)) is not None:
        _attention(look, one, head, "own-pattern")


def _attention(look: Look, one: Examples, head: Unit, key: str) -> None:
    drawn, n = cached.attention_drawn(look.model, one, head, LONGEST)
    show(drawn, key)
    cut = f" The first {LONGEST:d} of {n:d} tokens." if n > LONGEST else ""
    st.caption(
        "Each row adds up to 1. On the right attention is multiplied by the length of what it fetches (the value’s "
        f"norm): what goes to a sink, such as the first token, hardly counts there.{cut}"
    )


@part
def pattern_panel(look: Look, examples: Examples, example: int) -> None:
    """Where a head looks, on the example that excites it most."""
    head = shown_pattern(look.model, look.unit)
    if head is None:
        return
    st.subheader("Where it looks")
    last = len(examples) - 1
    at = int(st.number_input("Example", 0, last, example, key=f"pattern-{look.unit}"))
    one = examples.subset([at])
    where = f"{plain(examples.names[at])} of {plain(examples.data)}"
    if isinstance(look.model.input, TokenInput):
        st.caption(where)
        _attention(look, one, head, "pattern")
        return
    names = cached.queries_of(look.model, head)
    asked = [st.selectbox("Attention of", names, key=f"query-{look.unit}")] if names else []
    found = cached.looks_of(look.model, one, head, *asked)
    show(image_attention_figure(found), "pattern")
    st.caption(f"{where}. Patches are named by row and column, from the top left.")


# --- by the weights alone ------------------------------------------------------------------------


@part
def logits_panel(look: Look) -> None:
    """What a neuron, a dimension of the stream or a head adds to logits directly, by its weights alone."""
    spec, site = look.model.input, look.model.site(look.unit.site)
    if not isinstance(spec, TokenInput):
        return
    if cached.writes_logits(look.model, site):
        st.subheader("What it adds to logits")
        values = cached.logits_by(look.model, look.unit)
        mean = values.mean().item()
        most, least = st.columns(2)
        for column, title, largest in ((most, "raises", True), (least, "lowers", False)):
            column.dataframe(_words(look, values - mean, title, largest), hide_index=True)
        st.caption(
            "Per unit of activation, directly, by the weights alone (W_out W_U, without the division by the norm of "
            f"the stream), against the mean over all {len(values):,} tokens, {mean:+.3g}: what is added to all of them "
            f"changes no probability. Standard deviation over tokens: {values.std().item():.3g}."
        )
    elif site.kind in ("head", "pattern") and shown_pattern(look.model, look.unit) is not None:
        _pairs(look, spec.n_vocab)


def _pairs(look: Look, n: int) -> None:
    """The pairs of tokens that a head joins most."""
    st.subheader("What it looks for, and what it makes of it")
    head = cached.output_of_head(look.model, look.unit)
    if head is None:
        st.caption("Its output is at no site, so its weights are not known by head.")
        return
    if n > MANY and not st.toggle(
        f"Go through all {n:,} × {n:,} pairs of tokens (about half a minute)", key="all-pairs"
    ):
        return
    offset = int(
        st.number_input(
            "Distance back to the key", 0, 1000, 1, key="pairs-distance",
            help="Rotary embeddings make scores depend on it; other models have the same pairs at all distances.",
        )
    )  # fmt: skip
    looked, moved = st.columns(2)
    try:
        with looked:
            found = cached.pairs_of(look.model, head, "QK", -offset)
            _pair_table(look, found, ("query token", "key token", "score"))
        with moved:
            found = cached.pairs_of(look.model, head, "OV", 0)
            _pair_table(look, found, ("attended token", "raises", "by"))
            st.caption(
                f"{100 * found.to_itself:.3g} % of tokens raise themselves most (by chance "
                f"{100 / found.n_tokens:.1g} %)."
            )
    except (
        ValueError
    ) as error:  # its weights are not known by head, or its scores are no bilinear form
        st.caption(line(error))
        return
    st.caption(
        "By the weights alone, for tokens as they are embedded: W_E W_QK W_E^T and W_E W_OV W_U, the largest of all "
        "pairs. Late heads read what earlier layers have written, which is not in here."
    )


def _pair_table(look: Look, found: TokenPairs, columns: tuple[str, str, str]) -> None:
    (a, b, c), names = columns, _names(look)
    rows = [{a: names[p.source], b: names[p.target], c: round(p.value, 3)} for p in found.pairs]
    st.dataframe(rows, hide_index=True)
    n = found.n_tokens
    st.caption(f"All {n:,} × {n:,} pairs: {found.mean:+.3g} ± {found.std:.3g}.")


def _names(look: Look) -> list[str]:
    """How tokens are written; their numbers if that is unknown."""
    spec = look.model.input
    assert isinstance(spec, TokenInput), "checked by the callers"
    return list(cached.output_names(look.model)) or [str(i) for i in range(spec.n_vocab)]


def _words(look: Look, values: Tensor, title: str, largest: bool) -> list[dict[str, str | float]]:
    found, names = values.topk(min(LISTED, len(values)), largest=largest), _names(look)
    return [
        {title: names[i], "by": round(v, 3)}
        for i, v in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]
