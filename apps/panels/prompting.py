"""What a model makes of a prompt, or of two: answers, layers, patching, parts, attention, continuations."""

from __future__ import annotations

import html
from contextlib import suppress

import streamlit as st

from apps import cached, editing
from apps.address import TROUBLE, action, choose, choose_number, line, link, part, plain, python
from apps.panels.recipes import stack_panel
from apps.panels.tokens import LONGEST
from apps.showing import picked_cell, show
from circuits.edits import zero
from circuits.edits.recipes import Recipe
from circuits.figures import lens_figure, patch_cells_figure, predictions_figure
from circuits.localization import PatchGrid
from circuits.localization.cells import By
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.stimuli.spelling import marked, word_of, words_of
from circuits.tasks import Task
from circuits.units import Unit
from circuits.workspace import ModelRecord

LISTED = 8
GRAINS: dict[str, By] = {"layers and positions": "position", "heads": "head"}

_CSS = """<style>
.prompt-tokens { line-height: 2; overflow-wrap: anywhere; }
.prompt-tokens span { border-radius: 3px; padding: 2px 0; white-space: pre-wrap; }
.prompt-tokens .other { outline: 1.5px solid #d55e00; }
.prompt-tokens .new { background: rgba(0,114,178,.18); }
</style>"""


def said_panel(record: ModelRecord, model: HookedModel, task: Task) -> None:
    """Both prompts with the tokens in which they differ, and what the model says next."""
    runs = {"clean": task.examples} | (
        {} if task.counterparts is None else {"corrupted": task.counterparts}
    )
    tokens = {name: one.tokens(0) for name, one in runs.items()}
    asked = [*_tokens_of(task, "answers"), *_tokens_of(task, "against")]
    for column, (name, one) in zip(st.columns(len(runs)), runs.items(), strict=True):
        with column:
            other = tokens.get("corrupted", tokens["clean"])
            differing = {
                i for i, (a, b) in enumerate(zip(tokens["clean"], other, strict=True)) if a != b
            }
            st.html(_CSS + _marked(model, tokens[name], differing, "other"))
            found = cached.predictions_of(model, Recipe((), record.hash), one)
            more = [t for t in asked if t not in {p.index for p in found}]
            if more:
                found = found + cached.predictions_of(model, Recipe((), record.hash), one, of=more)
            show(predictions_figure({name: found}), f"prompts-{name}")
    values = cached.metric_of(model, Recipe((), record.hash), task)
    both = f"{values[0]:.3g}" + (
        f" after the clean prompt, {values[1]:.3g} after the corrupted one" if values[1:] else ""
    )
    st.markdown(f"**{plain(_measured(model, task))}**: {both}.")


def _tokens_of(task: Task, which: str) -> list[int]:
    """The first tokens of the answers to the example, or of what they are compared with."""
    return [words[0] for words in getattr(task.questions[0], which) if words]


def _measured(model: HookedModel, task: Task) -> str:
    """The task's metric in words."""
    spec = model.input
    assert isinstance(spec, TokenInput), "checked by the page"
    right, wrong = (
        ", ".join(f"“{word_of(spec.vocabulary, t)}”" for t in _tokens_of(task, which))
        for which in ("answers", "against")
    )
    name = task.metric.name.replace("_", " ")
    return f"{name} of {right} and {wrong}" if right and wrong else name


def _marked(model: HookedModel, tokens: list[int], which: set[int], kind: str) -> str:
    """Tokens of a text, some of them marked."""
    spec = model.input
    assert isinstance(spec, TokenInput), "checked by the page"
    gap = "" if spec.vocabulary else " "
    shown = [
        f"<span class='{kind if i in which else ''}' title='position {i}'>{html.escape(word)}</span>{gap}"
        for i, word in enumerate(words_of(spec.vocabulary, tokens))
    ]
    return f"<div class='prompt-tokens'>{''.join(shown)}</div>"


@part
def layers_panel(record: ModelRecord, model: HookedModel, task: Task) -> None:
    """The metric if the model stopped at each depth (logit lens)."""
    st.subheader("Layer by layer")
    show(lens_figure(cached.lens_of(model, task), "if the model stopped there"), "prompts-lens")
    st.caption(
        "The logit lens: the last normalisation and the unembedding read the residual stream at each depth. One prompt "
        "has no interval; `circuits lens` measures over a task, next to another example’s stream."
    )


def patching_panel(record: ModelRecord, model: HookedModel, task: Task) -> None:
    """Which activations of the corrupted prompt change the answer when they are put into the clean one."""
    st.subheader("Where it matters that the prompts differ")
    what = choose("Patch", list(GRAINS), "patch", sidebar=False)
    grain = GRAINS[what]
    found = cached.patched(model, task, grain)
    if found is None:

        def patch() -> None:
            bar = st.progress(0.0, "Patching…")
            cached.patched(
                model, task, grain, lambda done, of: bar.progress(done / of, "Patching…")
            )
            bar.empty()

        action(plain(f"Patch all {what}"), patch, f"patch-{grain}")
        st.caption(
            "Each cell takes a pass of the model: about a second for a small model, a quarter of a minute for one of a "
            "hundred million weights."
        )
        return
    cell = picked_cell(patch_cells_figure(found), f"prompts-grid-{grain}")
    label = cached.label_of(record)
    if cell is not None:
        row, column = found.rows[cell[0]], found.columns[cell[1]]
        site, unit = (row, int(column)) if grain == "head" else (row, None)
        st.markdown(plain(f"{row} · {column}: {found.matrix()[cell]:.3g} of the way"))
        _open(label, site, unit, f"Open {_short(site, unit)}")
    with st.container(horizontal=True):
        for row, column, value in _strongest(found):
            unit = int(column) if grain == "head" else None
            name = f"{_short(row, unit)}{'' if grain == 'head' else f' at {column}'}: {value:+.2f}"
            _open(label, row, unit, name)
    st.caption(
        "The activation of the corrupted prompt is put into the run on the clean one, one cell at a time: 0 changes "
        "nothing, 1 gives the corrupted prompt’s answer. Click a cell, or one of the strongest. A single pair has "
        "neither an interval nor a control: `circuits patch --task` has both."
    )


def _open(label: str, site: str, unit: int | None, name: str) -> None:
    """A link to a head or to a site."""
    if unit is None:
        link("site", name, model=label, site=site)
    else:
        link("unit", name, model=label, site=site, unit=unit)


def _short(site: str, unit: int | None) -> str:
    """A head as `LAYER.HEAD`, a site by its name."""
    parts = site.split(".")
    return f"{parts[1]}.{unit}" if unit is not None and parts[0] == "blocks" else site


def _strongest(found: PatchGrid) -> list[tuple[str, str, float]]:
    """The cells that change the answer most."""
    matrix = found.matrix()
    cells = [
        (row, column, float(matrix[i, j]))
        for i, row in enumerate(found.rows)
        for j, column in enumerate(found.columns)
        if matrix[i, j] == matrix[i, j]
    ]
    return sorted(cells, key=lambda c: -abs(c[2]))[:LISTED]


@part
def parts_panel(record: ModelRecord, model: HookedModel, task: Task) -> None:
    """What each head and MLP adds to the answer's logit directly."""
    st.subheader("What speaks for the answer directly")
    try:
        found = cached.logit_parts_of(model, task)
    except TROUBLE as error:  # answers of several tokens, or none
        st.caption(line(error))
        return
    values = found.values[0]
    order = values.abs().argsort(descending=True)[:LISTED].tolist()
    rows = [{"part": found.names[k], "logits": round(float(values[k]), 3)} for k in order]
    st.dataframe(rows, hide_index=True)
    label = cached.label_of(record)
    with st.container(horizontal=True):
        for k in order:
            if ".hook_z:" in found.names[k]:
                unit = Unit.parse(found.names[k])
                _open(label, unit.site, unit.index, _short(unit.site, unit.index))
    st.caption(
        f"{len(found.names)} parts add up to {float(found.logits[0]):.3g}, the difference of the two logits (residual "
        f"{float(found.residual[0]):.1g}). What a part does by way of later layers is not in here."
    )


def _begin_with_strongest(model: HookedModel, task: Task, parameter: str) -> None:
    """Where the URL names no head, the one that adds most to the answer directly, if that is known."""
    if parameter in st.query_params or not model.has_stream:
        return
    with suppress(*TROUBLE):
        found = cached.logit_parts_of(model, task)
        names = [found.names[k] for k in found.values[0].argsort(descending=True).tolist()]
        first = next((Unit.parse(name) for name in names if ".hook_z:" in name), None)
        if first is not None:
            st.query_params[parameter] = _short(first.site, first.index)


@part
def attention_panel(record: ModelRecord, model: HookedModel, task: Task) -> None:
    """Where one head looks in the clean prompt."""
    heads = cached.heads_of(model)
    if not heads:
        return
    st.subheader("Where a head looks")
    _begin_with_strongest(model, task, "head")
    at = choose("Head", list(heads), "head", sidebar=False)
    drawn, _ = cached.attention_drawn(model, task.examples, heads[at], LONGEST)
    show(drawn, "prompts-attention")


@part
def continuation_panel(record: ModelRecord, model: HookedModel, task: Task) -> None:
    """How the model goes on, as it is and as edited, token by token."""
    st.subheader("How it goes on")
    spec = model.input
    assert isinstance(spec, TokenInput), "checked by the page"
    before = len(task.examples.tokens(0))
    room = spec.n_ctx - before
    if room < 1:
        st.caption(f"The prompt fills the model’s context of {spec.n_ctx:d} tokens.")
        return
    left, right = st.columns([1, 3])
    with left:
        heads = cached.heads_of(model)
        n = choose_number("Tokens", 1, min(100, room), min(12, room), "tokens")
        if heads:
            _begin_with_strongest(model, task, "remove")
            at = choose("Remove head", list(heads), "remove", sidebar=False)

            def remove() -> None:
                unit = cached.output_of_head(model, heads[at])
                if unit is None:
                    raise ValueError(f"head {at}: its output is at no site")
                editing.add(record.hash, zero(str(unit)))

            action("Remove this head", remove, "prompts-remove")
        stack_panel(record)
    recipe = editing.recipe(record.hash)
    runs = {"as it is": Recipe((), record.hash)} | ({"edited": recipe} if recipe.edits else {})
    with right:
        try:
            made = {
                name: cached.continued(model, own, task.examples, n) for name, own in runs.items()
            }
        except TROUBLE as error:
            st.error(line(error))
            return
        first = made["as it is"]
        for name, tokens in made.items():
            new = (
                {i for i in range(before, len(tokens)) if i >= len(first) or tokens[i] != first[i]}
                if name == "edited"
                else set(range(before, len(tokens)))
            )
            st.caption(plain(name))
            st.html(_CSS + _marked(model, tokens, new, "other" if name == "edited" else "new"))
        if "edited" in made:
            values = [cached.metric_of(model, own, task)[0] for own in runs.values()]
            st.markdown(
                f"**{plain(_measured(model, task))}**: {values[0]:.3g} as it is, {values[1]:.3g} edited."
            )
            link("edits", "Compare with random edits", model=cached.label_of(record))
        st.caption(
            "The most likely token each time. In the edited text, tokens that differ are framed."
        )


def task_code(record: ModelRecord, model: HookedModel, task: Task) -> None:
    """The same in Python."""
    spec = model.input
    assert isinstance(spec, TokenInput), "checked by the page"
    other = () if task.counterparts is None else tuple(task.counterparts.tokens(0))
    words = [tuple(task.examples.tokens(0)), other]
    words += [tuple(_tokens_of(task, which)) for which in ("answers", "against")]
    said = ", ".join(map(repr, words))
    about = (
        marked("".join(words_of(spec.vocabulary, task.examples.tokens(0))))
        if spec.vocabulary
        else ""
    )
    python(f"""
import circuits
from circuits.localization import logit_lens, patch_grid
from circuits.tasks import task_of_prompts

model = {record.code}
task = task_of_prompts(model, {said})  # tokens of {about!r}
print(logit_lens(model, task, null=False).depths)
{'print(patch_grid(model, task, direction="noising", n_random=0).matrix())' if other else ""}
print(model.generate(task.examples.inputs, 12))
""")
