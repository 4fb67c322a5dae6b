"""The page of prompts: what is typed becomes a task, and what it shows is what the library says."""

from __future__ import annotations

import pytest
import torch
from streamlit.testing.v1 import AppTest

from circuits import Workspace, load_model
from circuits.localization import logit_lens, patch_grid
from circuits.tasks import task_of_prompts
from circuits.workspace import ModelRecord
from tests.test_app import page, text

CLEAN, CORRUPTED = "5 9 2 7 5 9", "5 3 2 7 5 9"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    made = Workspace(tmp_path_factory.mktemp("prompts"))
    for name in ("induction", "cleanroom"):
        made.register(ModelRecord(name, load_model(name).hash))
    return made


def _page(place: Workspace, monkeypatch: pytest.MonkeyPatch, **query: str) -> AppTest:
    return page(place, monkeypatch, "prompts", True, model="induction", **query)


def test_prompts_become_a_task() -> None:
    model = load_model("induction")
    task = task_of_prompts(model, CLEAN, CORRUPTED)
    logits = model.logits(torch.tensor([task.examples.tokens(0), task.counterparts.tokens(0)]))[
        :, -1
    ]  # type: ignore[union-attr]
    assert task.questions[0].answers == ((int(logits[0].argmax()),),)
    wrong = task.questions[0].against[0][0]
    assert wrong in (int(logits[1].argmax()), int(logits[0].topk(2).indices[1]))
    assert wrong != task.questions[0].answers[0][0]
    own = task_of_prompts(model, CLEAN, "", (2,), (3,))
    assert own.questions[0].answers == ((2,),)
    assert own.questions[0].against == ((3,),)
    assert own.counterparts is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("",), "clean is empty"),
        (("5 9 2", "5 9"), "has 2 tokens: expected 3|has 3 tokens: expected 4"),
        (("5 9 2", "5 9 2"), "is the same text"),
        (("5 9 2", "5 9 1", (4,), (4,)), "is both a right and a wrong answer"),
    ],
)
def test_prompts_that_make_no_task(words: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        task_of_prompts(load_model("induction"), *words)


def test_images_have_no_prompts() -> None:
    with pytest.raises(ValueError, match="expected a language model"):
        task_of_prompts(load_model("cleanroom"), "5 9")


def test_a_newcomer_sees_a_task(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    test = _page(place, monkeypatch)
    assert not test.exception
    assert not test.error, text(test)
    for heading in ("Layer by layer", "Where it matters that the prompts differ", "How it goes on"):
        assert heading in text(test)


def test_an_image_model_has_no_prompts(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    test = page(place, monkeypatch, "prompts", True, model="cleanroom")
    assert "choose a language model" in text(test)


def test_prompts_patching_and_an_edit(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    query = {"task": "your own prompts", "clean": CLEAN, "corrupted": CORRUPTED, "patch": "heads"}
    test = _page(place, monkeypatch, **query)
    assert not test.exception
    assert not test.error, text(test)
    model = load_model("induction")
    task = task_of_prompts(model, CLEAN, CORRUPTED)
    whole = logit_lens(model, task, null=False).intact[0]
    (said,) = [m.value for m in test.markdown if "after the clean prompt" in m.value]
    assert f"{whole:.3g} after the clean prompt" in said
    test.button(key="patch-head").click().run()
    assert not test.exception
    found = patch_grid(model, task, by="head", direction="noising", n_random=0)
    matrix = abs(found.matrix())
    i, j = divmod(int(matrix.argmax()), matrix.shape[1])
    strongest = f"{i}.{j}"
    links = [str(e.proto) for e in test.main if e.type == "page_link"] or [
        str(e.proto) for e in test.get("page_link")
    ]
    assert any(f'label: "{strongest}: ' in one.replace("\\\\", "") for one in links)
    before = [m.value for m in test.markdown if "edited" in m.value]
    assert not before
    test.selectbox(key="choose-remove").select(strongest).run()
    test.button(key="prompts-remove").click().run()
    assert not test.exception
    (edited,) = [m.value for m in test.markdown if "as it is," in m.value]
    assert f"{whole:.3g} as it is" in edited
    test.button(key="edit-undo").click().run()
    assert not [m.value for m in test.markdown if "as it is," in m.value]


def test_trouble_is_one_line(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    test = _page(place, monkeypatch, task="your own prompts", clean="5 9", corrupted="5 9 2")
    assert not test.exception
    assert "expected" in text(test)
    assert test.text_input(key="prompt-clean").value == "5 9"
