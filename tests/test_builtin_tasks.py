"""Tasks by name: each built-in model's own, files, and what a person types."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from circuits.experiments import run
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.tasks import Item
from circuits.tasks.builtin import load_task, names_of, tokenizer_of, with_counterparts
from circuits.tasks.files import Header, write_items


@pytest.mark.parametrize(
    ("name", "task", "metric", "least"),
    [
        # two tokens of a pattern may be alike by chance, and then what followed the first is copied
        ("induction-by-hand", "repeats", "accuracy", 0.75),
        ("addition-by-hand", "addition", "accuracy", 1.0),
        ("shapes", "classes", "accuracy", 0.9),
    ],
)
def test_a_built_in_model_does_its_own_task(
    name: str, task: str, metric: str, least: float
) -> None:
    model = load_model(name)
    own = load_task(model, n=24, metric=metric)
    assert (own.name, names_of(model)[0]) == (task, task)
    assert run(model, [], own, measures=[own.metric]).mean(metric) >= least
    find, test = own.find, own.test
    assert {find.examples.identity(i) for i in range(len(find))}.isdisjoint(
        test.examples.identity(i) for i in range(len(test))
    )


def test_a_behaviour_has_the_name_that_the_literature_uses(assets: Path) -> None:
    model = load_model("stories260k")
    assert "ioi" in names_of(model)
    for spec in ("ioi", "ioi:templates=ABBA,corruption=swap"):
        # of 512 tokens hardly any is a name, which the task says by its own name
        with pytest.raises(ValueError, match="task indirect-object: the tokenizer leaves 2 names"):
            load_task(model, spec, n=8)
    with pytest.raises(KeyError, match="unknown option of the task 'order'"):
        load_task(model, "ioi:order=ABBA", n=8)


def test_a_pair_of_drawings_is_a_task_with_counterparts() -> None:
    model = load_model("shapes")
    task = load_task(model, "shapes:kind=turned", n=4)
    (part,) = task.batches()
    assert part.counterparts is not None
    torch.testing.assert_close(part.counterparts, part.inputs.rot90(2, (2, 3)), atol=1e-5, rtol=0)
    with pytest.raises(KeyError, match="unknown option of the task 'colour'"):
        load_task(load_model("induction-by-hand"), "repeats:colour=red", n=4)


def test_what_a_person_types(bridge: HookedModel) -> None:
    task = load_task(bridge, texts=["1 2 3", "4 5 6 7"], answer="8|9", against="1")
    assert task.metric.name == "logit_difference"
    assert [q.positions for q in task.questions] == [(2,), (3,)]
    assert task.questions[0].answers == ((8,), (9,))
    following = load_task(bridge, texts=["1 2 3", "4 5 6 7"], positions="1")
    assert [q.labels for q in following.questions] == [(3,), (6,)]
    for options, message in (
        ({"spec": "repeats", "answer": "3"}, "has its own answers and positions"),
        ({"texts": ["1 2"], "positions": "5"}, r"position 5 of '1 2': expected -2 to 0"),
        ({"texts": ["1 2"], "positions": "end"}, "positions 'end': expected last, all, or whole numbers"),
        ({"texts": ["1 2"], "answer": "cat"}, "'cat' is no token"),
        ({}, "model tiny-bridge has no default task"),
        ({"answer": "3"}, "an answer needs a text"),
        ({"spec": "classes"}, "task 'classes' does not fit model tiny-bridge, which takes tokens"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_task(bridge, **options)
    with pytest.raises(KeyError, match="unknown task 'adition': did you mean addition"):
        load_task(bridge, "adition")


def test_a_task_file_belongs_to_a_tokenizer(bridge: HookedModel, tmp_path: Path) -> None:
    items = [Item((i, i + 1), answers=((i + 2,),)) for i in range(6)]
    path = tmp_path / "mine.jsonl"
    write_items(path, Header("mine", tokenizer=tokenizer_of(bridge.input)), items)  # type: ignore[arg-type]
    assert len(load_task(bridge, str(path), n=4)) == 4
    write_items(path, Header("mine", tokenizer="50257 tokens, 0123456789ab"), items)
    with pytest.raises(ValueError, match="holds tokens of another tokenizer"):
        load_task(bridge, str(path))


def test_image_pairs_compare_the_class_with_the_other_one() -> None:
    model = load_model("shapes")
    task = load_task(model, "shapes", n=4)
    (batch,) = task.batches(4)
    logits = model.logits(batch.inputs).double()
    rows = torch.arange(4)
    right, wrong = (
        torch.tensor([getattr(q, n)[0][0] for q in task.questions]) for n in ("answers", "against")
    )
    made = run(model, (), task, measures=[task.metric])
    wanted = logits[rows, right] - logits[rows, wrong]
    np.testing.assert_allclose(made.of("logit_difference"), wanted.numpy(), rtol=1e-5)


def test_images_get_counterparts_and_a_unit_can_be_the_metric() -> None:
    model = load_model("shapes")
    task = load_task(model, data="shapes", n=6, metric="mixed3b:200")
    turned = with_counterparts(task, "turned")
    assert turned.metric.name == "mixed3b:200"
    (batch,) = turned.batches(6)
    assert batch.counterparts is not None
    torch.testing.assert_close(batch.counterparts, batch.inputs.rot90(2, (2, 3)), atol=0.05, rtol=0)
    other = with_counterparts(load_task(model, "classes", data="shapes", n=6), "another")
    assert all(q.answers != q.against for q in other.questions)
    assert other.metric.name == "logit_difference"
    for n in (16, 17):  # the counterpart of an image is in the half of the image
        paired = with_counterparts(load_task(model, "classes", data="shapes", n=n), "another")
        seen = []
        for half in (paired.find, paired.test):
            assert half.counterparts is not None
            both = half.examples, half.counterparts
            seen.append({one.identity(i) for one in both for i in range(len(one))})
        assert not seen[0] & seen[1]
    with pytest.raises(ValueError, match="has counterparts of its own"):
        with_counterparts(turned, "grey")
    with pytest.raises(ValueError, match="is of images: model induction takes tokens"):
        with_counterparts(load_task(load_model("induction"), n=2), "grey")
