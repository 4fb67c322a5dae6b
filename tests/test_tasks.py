"""Tasks: answers and positions worked out by hand, halves that never meet, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from circuits.experiments.ablation import _other_example, ablate
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.models.zoo.loading import load_model
from circuits.stimuli.sources import open_source
from circuits.tasks import METRICS, Custom, Item, Task, UnitActivation, compile_task
from circuits.tasks.builtin import load_task, paired_with
from circuits.tasks.halves import halves
from circuits.tasks.reading import Places, Reading


def reading_of(model: HookedModel, task: Task) -> Reading:
    """One reading of a whole task, gathered in plain torch."""
    (part,) = task.batches(size=len(task))
    logits = model.logits(part.inputs, mask=part.mask)
    places = part.places(logits.shape[1])
    return Reading(places, logits[places.row, places.position].double(), mask=part.mask)


def loop(model: HookedModel, prompt: list[int], answer: list[int]) -> Tensor:
    """The log-probability of an answer, one token at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for token in answer:
        logits = model.logits(torch.tensor([prompt]))[0, -1].double()
        total += logits.log_softmax(-1)[token]
        prompt = [*prompt, token]
    return total


def test_answers_of_several_tokens_are_fed_in(bridge: HookedModel) -> None:
    items = [
        Item((1, 2, 3), answers=((4, 5), (6, 7)), against=((8, 9, 10),)),
        Item((3, 2, 1, 5, 7), answers=((4, 5, 6),), against=((8,), (2, 2))),
    ]
    task = compile_task(bridge, items, metric="log_probability_difference")
    assert task.feeding == "fed"
    reading = reading_of(bridge, task)
    for i, item in enumerate(items):
        for which, words in (("wanted", item.answers), ("against", item.against)):
            each = torch.stack([loop(bridge, list(item.clean), list(w)) for w in words])
            torch.testing.assert_close(
                reading.log_p_of(which)[i], each.logsumexp(0), rtol=1e-5, atol=1e-5
            )
    with pytest.raises(ValueError, match="logit_difference needs answers of one token"):
        task.with_metric(METRICS["logit_difference"])


def test_the_first_token_that_differs_is_read_after_what_answers_share(bridge: HookedModel) -> None:
    item = Item((1, 2, 3), answers=((4, 5, 6),), against=((4, 5, 7),))
    task = compile_task(bridge, [item], feeding="first")
    assert task.examples.tokens(0) == [1, 2, 3, 4, 5]
    logits = bridge.logits(torch.tensor([[1, 2, 3, 4, 5]]))[0, -1].double()
    reading = reading_of(bridge, task)
    found = task.metric.of(reading, reading)
    torch.testing.assert_close(found[0], logits[6] - logits[7], rtol=1e-5, atol=1e-5)


def test_metrics_are_what_their_definitions_say(bridge: HookedModel) -> None:
    items = [
        Item((1, 2, 3, 4), answers=((4,), (5,)), against=((6,),), positions=(1, 3)),
        Item((7, 8), answers=((9,),), against=((1,), (2,), (3,)), positions=(1,)),
    ]
    task = compile_task(bridge, items)
    reading = reading_of(bridge, task)
    for i, item in enumerate(items):
        logits = bridge.logits(torch.tensor([item.clean]))[0].double()
        p = logits.softmax(-1)
        right = [a[0] for a in item.answers]
        wrong = [a[0] for a in item.against]
        at = list(item.positions)
        expected = {
            "logit_difference": sum(logits[k, right].mean() - logits[k, wrong].mean() for k in at),
            "probability_difference": None,
            "cross_entropy": sum(-p[k, right].sum().log() for k in at),
            "accuracy": sum(float(int(logits[k].argmax()) in right) for k in at),
        }
        for name, value in expected.items():
            if value is not None:
                found = METRICS[name].of(reading, reading)[i]
                torch.testing.assert_close(
                    found, torch.as_tensor(value / len(at)).double(), rtol=1e-5, atol=1e-5
                )
    one = compile_task(bridge, items[1:])
    own = reading_of(bridge, one)
    p = bridge.logits(torch.tensor([[7, 8]]))[0, -1].double().softmax(-1)
    torch.testing.assert_close(
        METRICS["probability_difference"].of(own, own)[0], p[9] - p[[1, 2, 3]].sum(), rtol=1e-5, atol=1e-6
    )  # fmt: skip


def test_texts_of_other_lengths_in_one_batch_are_read_where_they_would_be_alone(
    bridge: HookedModel,
) -> None:
    items = [Item((1, 2, 3, 4, 5, 6), answers=((4,),)), Item((7, 8), answers=((9,),))]
    together = compile_task(bridge, items, metric="log_probability")
    (part,) = together.batches()
    assert part.mask is not None
    both = reading_of(bridge, together)
    for i, item in enumerate(items):
        alone = reading_of(bridge, compile_task(bridge, [item]))
        torch.testing.assert_close(
            both.log_p_of("wanted")[i], alone.log_p_of("wanted")[0], rtol=1e-5, atol=1e-5
        )


# --- halves --------------------------------------------------------------------------------------


def test_halves_share_no_group_and_no_filler() -> None:
    # two pools of names, which never meet in one example
    keys = [
        (f"group {i // 3}", f"{i // 3 % 2} {i % 5}", f"{i // 3 % 2} {(i + 2) % 5}")
        for i in range(60)
    ]
    for seed in range(5):
        made = halves(keys, seed)
        names = [{k for i in part for k in keys[i][1:]} for part in made.values()]
        groups = [{keys[i][0] for i in part} for part in made.values()]
        assert not names[0] & names[1]
        assert not groups[0] & groups[1]
        assert min(map(len, made.values())) >= 10


def test_a_half_cannot_be_had_from_the_other(bridge: HookedModel) -> None:
    items = [Item((i, i + 1), answers=((i + 2,),), group=str(i)) for i in range(10)]
    task = compile_task(bridge, items)
    find, test = task.find, task.test
    assert not {*find.examples.names} & {*test.examples.names}
    assert len(find) + len(test) == 10
    assert find.find is find
    with pytest.raises(ValueError, match="task task is already the find half: take the test half"):
        _ = find.test
    with pytest.raises(ValueError, match="cannot be split into two halves"):
        _ = compile_task(bridge, items[:3]).test


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "has no item"),
        ([Item((1, 2), corrupted=(1, 2, 3))], "has 3 tokens: expected 2, as many as '1 2' has"),
        ([Item((1, 2), corrupted=(3, 4)), Item((1, 3))], "'1 3' of task task has no counterpart"),
        ([Item((1, 2), positions=(2,))], r"position 2 is outside '1 2': expected -2 to 1"),
        ([Item((1, 2), positions=(0, -2))], "are not distinct"),
        ([Item((1, 20))], "token 20 is not in the vocabulary"),
        ([Item((1, 2), answers=((25,),))], "token 25 is not in the vocabulary"),
        ([Item(tuple(range(13)))], "has 13 tokens: the model takes at most 12"),
        ([Item("  ")], "text is empty"),
        ([Item((1, 2), spans={"x": (1, 4)})], "span 'x' of '1 2' is 1 to 4: expected a range within 0 to 2"),
    ],
)  # fmt: skip
def test_bad_items_are_refused(bridge: HookedModel, items: list[Item], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_task(bridge, items)


def test_bad_metrics_are_refused(bridge: HookedModel) -> None:
    items = [Item((1, 2), answers=((3,),))]
    with pytest.raises(ValueError, match="logit_difference needs wrong answers to compare"):
        compile_task(bridge, items, metric="logit_difference")
    with pytest.raises(
        KeyError, match="unknown metric 'logit_diff': did you mean logit_difference"
    ):
        compile_task(bridge, items, metric="logit_diff")
    with pytest.raises(ValueError, match="clean is empty"):
        Item("")
    with pytest.raises(ValueError, match="positions 'end': expected last, all, or whole numbers"):
        Item("a", positions="end")
    task = compile_task(bridge, items, metric=lambda output: output.sum())
    reading = reading_of(bridge, task)
    whole = Reading(reading.places, reading.logits, output=bridge.logits(torch.tensor([[1, 2]])))
    assert isinstance(task.metric, Custom)
    with pytest.raises(ValueError, match="expected one number for each of the 1 examples"):
        task.metric.of(whole, whole)


def test_a_units_activation_is_read_where_the_intact_model_is_most_active(
    bridge: HookedModel,
) -> None:
    metric = UnitActivation.named(bridge, "blocks.0.mlp.hook_post:5")
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    site = bridge.site("blocks.0.mlp.hook_post")
    value = bridge.run(tokens, read=[site])[site]
    task = compile_task(bridge, [Item(tuple(row)) for row in tokens.tolist()], metric=metric)
    base = reading_of(bridge, task)
    intact = Reading(base.places, base.logits, {site.name: value})
    changed = Reading(base.places, base.logits, {site.name: value * 2 - value.roll(1, 1)})
    at = value[:, :, 5].argmax(1)
    expected = (value * 2 - value.roll(1, 1))[torch.arange(2), at, 5].double()
    torch.testing.assert_close(metric.of(changed, intact), expected)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (Item((1, 2), answers=((3,), (3,))), "answer (3,) to '1 2' is given twice"),
        (Item((1, 2), answers=((3,),), against=((3,),)), "is both a right and a wrong answer"),
        (Item((1, 2), labels=(99999,)), "label 99999 of '1 2' is not a token: expected 0 to"),
        (Item((1, 2), labels=(-1,)), "label -1 of '1 2' is not a token"),
        (Item((1, 2), answers=((3,),), corrupted=(1, 2)), "counterpart of '1 2' is the same text"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_meant(bridge: HookedModel, item: Item, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        compile_task(bridge, [item])


def test_no_text_and_no_answer_is_cut(bridge: HookedModel) -> None:
    full = bridge.input.n_ctx
    with pytest.raises(ValueError, match=f"has {full + 1} tokens: the model takes at most {full}"):
        compile_task(bridge, [Item((1,) * (full + 1), answers=((2,),))])
    with pytest.raises(
        ValueError, match=f"needs {full + 1} tokens: the model takes at most {full}"
    ):
        compile_task(bridge, [Item((1,) * full, answers=((2, 3),))])
    assert compile_task(bridge, [Item((1,) * full, answers=((2,),))]).feeding == "one"


def test_answers_of_several_tokens_that_are_compared_have_a_metric(bridge: HookedModel) -> None:
    task = compile_task(bridge, [Item((1, 2), answers=((3, 4),), against=((5,),))])
    assert (task.feeding, task.metric.name) == ("fed", "log_probability_difference")


def test_resampling_takes_answers_of_another_example(bridge: HookedModel) -> None:
    items = [Item((i, i + 1), answers=((3, 4), (5, 6)), against=((8,),)) for i in range(3)]
    task = compile_task(bridge, items)
    (part,) = task.batches()
    other = _other_example(part, 0)
    assert all(part.rows[other] != part.rows)
    with pytest.raises(ValueError, match="at least two examples"):
        ablate(bridge, ["blocks.0.attn.hook_z:0"], task.subset([0]), how="resample", n_random=0)


def test_equal_outputs_are_no_right_answers() -> None:
    """A model that puts out the same everywhere guesses: of n outputs an answer is the first choice in 1 of n cases."""
    places = Places(
        torch.arange(2), torch.zeros(2, dtype=torch.int64), torch.arange(2), torch.tensor([[1, -1], [1, 2]]),
        torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 2,
    )  # fmt: skip
    flat = Reading(places, torch.zeros(2, 10, dtype=torch.float64))
    assert METRICS["accuracy"].of(flat, flat).tolist() == pytest.approx([0.1, 0.2])
    assert METRICS["top5"].of(flat, flat).tolist() == pytest.approx([0.5, 1.0])
    nan = Reading(places, torch.full((2, 10), torch.nan, dtype=torch.float64))
    assert METRICS["accuracy"].of(nan, flat).tolist() == [0, 0]


def test_probabilities_are_averaged_and_not_their_logarithms(bridge: HookedModel) -> None:
    task = compile_task(bridge, [Item((1, 2, 3), labels=(2, 3), positions=(0, 1))])
    own = reading_of(bridge, task)
    p = bridge.logits(torch.tensor([[1, 2, 3]]))[0].double().softmax(-1)
    expected = (p[0, 2] + p[1, 3]) / 2
    assert float(METRICS["probability"].of(own, own)) == pytest.approx(float(expected), abs=1e-6)


def test_parts_of_a_task_keep_its_halves(bridge: HookedModel) -> None:
    task = compile_task(bridge, [Item((i % 9, i // 9), answers=((i % 7,),)) for i in range(60)])
    find = {task.find.examples.identity(i) for i in range(len(task.find))}
    part = task.subset(range(10, 40)).test
    judged = {part.examples.identity(i) for i in range(len(part))}
    assert judged
    assert not judged & find


# --- in words, and counterparts from a folder ------------------------------------------------------


def test_a_task_prints_as_two_lines() -> None:
    task = load_task(load_model("stories260k"), n=8)
    first, second = repr(task.find).splitlines()
    assert first == (
        "Task 'pronouns' of stories260k: 4 examples in 2 groups, find half, with counterparts, by logit_difference "
        "(logits)"
    )
    clean, _, other = second.partition(" / ")
    assert "Susan" in clean
    assert "James" in other
    assert second.endswith("answer ' she'; against ' he'")
    assert str(task).count("\n") == 1


def test_a_task_of_images_prints_as_two_lines() -> None:
    task = load_task(load_model("shapes"), n=3)
    name, answer = task.examples.names[0], task.model.classes[task.questions[0].answers[0][0]]
    assert repr(task) == (
        "Task 'classes' of shapes: 3 examples, no counterparts, by cross_entropy (nats)\n"
        f"  e.g. {name}; answer {answer}"
    )


def test_counterparts_of_images_are_those_of_the_same_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for folder, order in (("with", "abc"), ("without", "cxba")):
        (tmp_path / folder).mkdir()
        for name in order:
            pixels = rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{name}.png")
    model = load_model("shapes")
    task = load_task(model, data=f"folder:{tmp_path / 'with'}")
    made = paired_with(task, f"folder:{tmp_path / 'without'}")
    assert made.counterparts is not None
    assert made.counterparts.names == task.examples.names == ("a.png", "b.png", "c.png")
    own = Image.open(tmp_path / "without" / "b.png")
    spec = model.input
    assert isinstance(spec, ImageInput)
    torch.testing.assert_close(made.counterparts.load(1), spec.load(own))
    (tmp_path / "without" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"have no 'a.png' \(one of 1 that are missing\)"):
        paired_with(task, f"folder:{tmp_path / 'without'}")
    with pytest.raises(ValueError, match="has counterparts of its own"):
        paired_with(made, f"folder:{tmp_path / 'without'}")
    words = load_task(load_model("induction"), n=4)
    with pytest.raises(ValueError, match="model induction takes tokens"):
        paired_with(words, f"folder:{tmp_path / 'with'}")


@pytest.mark.parametrize("data", ["photos", "crops"])
def test_crops_of_one_photograph_stay_in_one_half(data: str) -> None:
    model = load_model("shapes")
    task = load_task(model, n=80, data=open_source(data), metric="mixed3b:200")
    of = [
        {name.partition("@")[0] for name in half.examples.names} for half in (task.find, task.test)
    ]
    assert all(of)
    assert not of[0] & of[1]
    # Intervals are of photographs, too.
    assert len(set(task.clusters)) == len({name.partition("@")[0] for name in task.examples.names})
