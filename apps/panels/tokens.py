"""Transformer units: tokens coloured by activation, where heads look, what they add to logits."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

import streamlit as st
import torch
from torch import Tensor

from apps import cached
from apps.address import guarded, line, part, plain
from apps.showing import show
from apps.subject import Look
from circuits.edits.recipes import Recipe
from circuits.examples import Examples
from circuits.figures import attention_figure, image_attention_figure
from circuits.localization import shown_pattern
from circuits.models.adapter.inputs import TokenInput
from circuits.store import Example
from circuits.weights import direct_logits, ov_circuit

_NEURON = re.compile(r"blocks\.[0-9]+\.mlp\.hook_post")
LISTED = 10


def texts_panel(look: Look, examples: Examples, found: Sequence[Example]) -> None:
    """Texts, each token coloured by the unit's activation; where it is most active set off."""
    spec = look.model.input
    assert isinstance(spec, TokenInput), "chosen by the caller"
    nothing, site = Recipe((), look.record.hash), look.model.site(look.unit.site)
    rows = []
    for example in found:
        one = examples.subset([example.index])
        values = _along(cached.recorded(look.model, nothing, one, site.name), look)
        rows.append((example, [spec.word(t) for t in one.tokens(0)], values))
    limit = max((abs(v) for *_, values in rows for v in values), default=0.0) or 1.0
    gap = "" if spec.vocabulary else " "
    st.html("\n".join(_marked(e, words, values, limit, gap) for e, words, values in rows))
    st.caption(f"Orange: above zero, blue: below; full colour at ±{limit:.3g}.")


def _along(value: Tensor, look: Look) -> list[float]:
    """The unit's activation at each token, of a batch of one."""
    site = look.model.site(look.unit.site)
    if "position" not in site.axes:
        return []
    return site.activations(value)[0, look.unit.index].reshape(-1).tolist()


def _marked(
    example: Example, words: Sequence[str], values: Sequence[float], limit: float, gap: str
) -> str:
    at = example.position[0] if example.position else -1
    parts = []
    for i, word in enumerate(words):
        value = values[i] if i < len(values) else 0.0
        colour = "230,120,0" if value > 0 else "0,114,178"
        strength = min(1.0, abs(value) / limit)
        edge = "outline:1px solid #888;" if i == at else ""
        parts.append(
            f"<span title='{value:.3g}' style='background:rgba({colour},{0.75 * strength:.2f});{edge}'>"
            f"{html.escape(word).replace(chr(10), '⏎')}</span>"
        )
    text = gap.join(parts)
    return f"<div style='font-family:monospace;line-height:1.7'>{example}&emsp;{text}</div>"


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
        show(attention_figure(cached.attention_of(look.model, one, head)), "pattern")
        st.caption(f"{where}; each row adds up to 1.")
        return
    names = cached.queries_of(look.model, head)
    asked = [st.selectbox("Attention of", names, key=f"query-{look.unit}")] if names else []
    found = cached.looks_of(look.model, one, head, *asked)
    show(image_attention_figure(found), "pattern")
    st.caption(f"{where}. Patches are named by row and column, from the top left.")


@guarded
def logits_panel(look: Look) -> None:
    """What a neuron or head adds to logits directly, by its weights alone."""
    spec = look.model.input
    if not isinstance(spec, TokenInput):
        return
    site = look.model.site(look.unit.site)
    if any(_NEURON.fullmatch(name) for name in (site.name, *site.aliases)):
        st.subheader("What it adds to logits")
        values = direct_logits(look.model, look.unit)
        table = {side: _words(values, spec, side == "most") for side in ("most", "least")}
        st.dataframe(table, width="content")
        st.caption(
            f"Per unit of activation, directly (W_out W_U); over all tokens ± {values.std().item():.3g}."
        )
    elif site.name.endswith(".hook_z"):
        st.subheader("What it copies and changes")
        try:
            ov = ov_circuit(look.model, look.unit, tokens=True).matrix
        except ValueError as error:  # its weights are not known by head
            st.caption(line(error))
            return
        own = (ov.argmax(1) == torch.arange(len(ov))).float().mean().item()
        flat = ov.flatten().topk(min(LISTED, ov.numel()))
        rows = [
            {
                "attended token": spec.word(int(i) // ov.shape[1]),
                "raises": spec.word(int(i) % ov.shape[1]),
                "by": v,
            }
            for v, i in zip(flat.values.tolist(), flat.indices.tolist(), strict=True)
        ]
        st.dataframe(rows, hide_index=True, width="content")
        st.caption(
            f"W_E W_OV W_U: {100 * own:.0f} % of tokens raise themselves most (by chance {100 / len(ov):.1g} %)."
        )


def _words(values: Tensor, spec: TokenInput, largest: bool) -> list[str]:
    found = values.topk(min(LISTED, len(values)), largest=largest)
    return [
        f"{spec.word(i)} {v:+.2f}"
        for i, v in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]
