"""Two prompts side by side: what the model says, where they begin to differ inside it, and what edits change."""

from __future__ import annotations

import streamlit as st

from apps import cached
from apps.address import TROUBLE, choose, choose_model, line
from apps.panels.prompting import (
    attention_panel,
    continuation_panel,
    layers_panel,
    parts_panel,
    patching_panel,
    said_panel,
    task_code,
)
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.tasks import Task, task_of_prompts
from circuits.tasks.builtin import STATED

OWN = "your own prompts"
FIELDS = ("clean", "corrupted", "answer", "against")
MOST = 64
"""Examples of a task to choose from."""


def page() -> None:
    """The page of prompts."""
    st.title("Prompts")
    chosen = choose_model()
    if chosen is None:
        return
    record, model = chosen
    if not isinstance(model.input, TokenInput):
        st.info("This model takes images: choose a language model, or go to “Your own input”.")
        return
    try:
        task = _task(model)
    except TROUBLE as error:
        st.error(line(error))
        return
    if task is None:
        st.info(
            "Type a prompt. With a second one of as many tokens, you see where the two begin to differ."
        )
        return
    said_panel(record, model, task)
    if model.has_stream:
        layers_panel(record, model, task)
    if task.counterparts is not None:
        patching_panel(record, model, task)
    if model.has_stream:
        parts_panel(record, model, task)
    attention_panel(record, model, task)
    continuation_panel(record, model, task)
    task_code(record, model, task)


def _task(model: HookedModel) -> Task | None:
    """One example: of a task, or of the prompts in the URL and in the fields; None if nothing is typed."""
    names = [name for name in cached.tasks_of(model) if name not in STATED]
    typed = any(st.query_params.get(field) for field in FIELDS)
    options = [OWN, *names] if typed or not names else [*names, OWN]
    where = choose("Prompts from", options, "task", sidebar=False)
    if where != OWN:
        task = cached.task_of(model, where, MOST)
        names = task.examples.names
        at = choose(
            "Example", [str(i) for i in range(len(task))], "example",
            show=lambda i: f"{i} · {names[int(i)]}", sidebar=False,
        )  # fmt: skip
        return task.subset([int(at)])
    left, right = st.columns(2)
    words = {}
    for column, field, label in (
        (left, "clean", "Clean prompt"), (right, "corrupted", "Corrupted prompt (optional, of as many tokens)"),
        (left, "answer", "Answer (by default the model’s first choice)"),
        (right, "against", "Compared with (by default its choice after the other prompt)"),
    ):  # fmt: skip
        with column:
            words[field] = _field(label, field)
    if not words["clean"].strip():
        return None
    for field in ("answer", "against"):
        words[field] = _as_it_follows(model, words["clean"], words[field])
    return task_of_prompts(model, **words)


def _field(label: str, name: str) -> str:
    """A field for text whose value is the URL's parameter."""

    def changed() -> None:
        st.query_params[name] = st.session_state[f"prompt-{name}"]

    st.session_state[f"prompt-{name}"] = st.query_params.get(name, "")
    return st.text_input(label, key=f"prompt-{name}", max_chars=2000, on_change=changed)


def _as_it_follows(model: HookedModel, prompt: str, word: str) -> str:
    """An answer as it is typed, or with a space in front where only that makes it a token after the prompt."""
    spec = model.input
    assert isinstance(spec, TokenInput), "checked by the caller"
    if not word or not spec.vocabulary or word.startswith(" "):
        return word
    before = spec.encode(prompt)
    return word if spec.encode(prompt + word)[: len(before)] == before else f" {word}"
