"""Directions and probes: planted ones are found on held-out pairs, and nothing else is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from circuits.edits.recipes import edited
from circuits.examples import Examples
from circuits.experiments import statistics
from circuits.localization import contrastive_directions, linear_probes, steering_grid
from circuits.localization.cells import column_of
from circuits.localization.classifiers import along, fit
from circuits.localization.features import features_of
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tasks import Item, Task, compile_task, of_examples

SITE = "blocks.1.hook_resid_pre"


def marked(model: HookedModel, n: int = 24) -> Task:
    """Texts with the token 1 third, and counterparts with the token 2 there; nothing else differs."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(3, 20, (n, 6), generator=generator).tolist()
    items = []
    for i, row in enumerate(rows):
        clean, other = [*row[:2], 1, *row[3:]], [*row[:2], 2, *row[3:]]
        items.append(Item(tuple(clean), ((3,),), ((4,),), tuple(other), group=f"text {i}"))
    return compile_task(model, items)


def rows_of(model: HookedModel, half: Task, position: int) -> tuple[Tensor, Tensor]:
    assert half.counterparts is not None
    return tuple(
        model.run(side.inputs, read=[SITE])[SITE][:, position].double()
        for side in (half.examples, half.counterparts)
    )  # type: ignore[return-value]


def test_a_direction_is_the_mean_difference_of_the_find_half(bridge: HookedModel) -> None:
    task = marked(bridge)
    found = contrastive_directions(
        bridge, task, SITE, positions=[1, 2, -1], n_random=19, n_control=4
    )
    assert found.columns == ("1", "2 1", "-1"), "with the token where all texts have the same"
    for position, name in ((2, "2 1"), (5, "-1")):
        clean, other = rows_of(bridge, task.find, position)
        mean = clean.mean(0) - other.mean(0)
        readout = found.at(SITE, name)
        assert readout.vector is not None
        torch.testing.assert_close(readout.vector, mean, atol=1e-6, rtol=1e-5)
        assert readout.norm == pytest.approx(float(mean.norm()), rel=1e-5)
        held, held_other = rows_of(bridge, task.test, position)
        middle = (clean.mean(0) + other.mean(0)) @ mean / 2
        right = torch.cat([held @ mean > middle, held_other @ mean <= middle]).double()
        assert readout.accuracy == pytest.approx(float(right.mean()))
        fitted = torch.cat([clean @ mean > middle, other @ mean <= middle]).double()
        assert readout.fitted == pytest.approx(float(fitted.mean()))
        assert readout.n == 2 * len(task.test)
        assert readout.p_value == statistics.p_value(readout.accuracy, readout.random)
    at = found.at(SITE, "2 1")
    assert at.accuracy == 1, "where the token differs"
    assert at.p_value < 0.5
    assert abs(np.mean(at.control) - 0.5) < 0.35, "a control task cannot be told on held-out texts"
    assert at.selectivity == at.accuracy - np.mean(at.control)
    before = found.at(SITE, "1")
    assert before.accuracy == 0.5, "before it, nothing differs"
    assert before.norm == 0
    edit = at.edit(bridge, 2.0)
    moved = bridge.run(task.examples.inputs, read=[SITE])[SITE]
    with edited(bridge, [edit]):
        after = bridge.run(task.examples.inputs, read=[SITE])[SITE]
    torch.testing.assert_close((after - moved)[3, 4].double(), 2 * at.vector, atol=1e-5, rtol=1e-4)


def test_a_probe_is_scikit_learns_on_standardised_rows(bridge: HookedModel) -> None:
    task = marked(bridge)
    found = linear_probes(bridge, task, SITE, positions=[-1], n_random=9, n_control=2, strength=0.5)
    clean, other = (rows.numpy() for rows in rows_of(bridge, task.find, 5))
    rows, labels = np.concatenate([clean, other]), np.repeat([1, 0], len(clean))
    mean, spread = rows.mean(0), rows.std(0)
    peer = LogisticRegression(C=0.5, max_iter=5000).fit((rows - mean) / spread, labels)
    held = np.concatenate([side.numpy() for side in rows_of(bridge, task.test, 5)])
    wanted = np.repeat([1, 0], len(held) // 2)
    accuracy = peer.score((held - mean) / spread, wanted)
    assert found.readouts[0].accuracy == pytest.approx(accuracy)
    vector = found.readouts[0].vector
    assert vector is not None
    np.testing.assert_allclose(vector.numpy(), peer.coef_[0] / spread, rtol=1e-3, atol=1e-4)


def test_control_labels_are_learnt_by_heart_and_do_not_carry_over(bridge: HookedModel) -> None:
    """With more numbers than texts a probe fits anything: held-out texts tell."""
    task = marked(bridge, 12)
    found = linear_probes(bridge, task, SITE, positions=[2], n_random=0, n_control=20, strength=1e3)
    readout = found.readouts[0]
    assert np.mean(readout.control_fitted) > 0.9
    assert 0.3 < np.mean(readout.control) < 0.7
    assert readout.selectivity > 0.3


def test_labels_of_ones_own_and_more_than_two(bridge: HookedModel) -> None:
    task = marked(bridge, 30)
    labels = [task.examples.tokens(i)[0] % 3 for i in range(30)]
    found = linear_probes(bridge, task, "blocks.0.hook_resid_pre", labels=labels, positions=[0, 1])
    first, second = found.readouts
    assert first.vector is None
    assert first.random == ()
    assert np.isnan(first.norm)
    assert first.n == len(task.test)
    assert first.fitted > second.fitted - 0.2
    with pytest.raises(ValueError, match="labels: 3 classes, a difference of means needs two"):
        contrastive_directions(bridge, task, labels=labels)
    two = contrastive_directions(bridge, task, SITE, labels=[t % 2 for t in labels], positions=[0])
    assert two.labels == "the given labels"


def test_rows_are_means_over_spans_and_padding_is_left_out(bridge: HookedModel) -> None:
    items = [
        Item((1, 2, 3, 4, 5), ((3,),), spans={"x": (1, 3)}), Item((6, 7, 8), ((3,),), spans={"x": (0, 1)}),
    ]  # fmt: skip
    task = compile_task(bridge, items)
    sites = [bridge.site(SITE), bridge.site("blocks.0.attn.hook_z")]
    found = features_of(bridge, task, sites, [column_of(task, "x"), column_of(task, 3), None])
    for i, tokens in enumerate(([1, 2, 3, 4, 5], [6, 7, 8])):
        cache = bridge.run(torch.tensor([tokens]), read=sites)
        for site in sites:
            rows = cache[site][0].double().flatten(1)
            span = rows[1:3] if i == 0 else rows[:1]
            np.testing.assert_allclose(found[site.name, 0].clean[i], span.mean(0), atol=1e-6)
            np.testing.assert_allclose(found[site.name, 2].clean[i], rows.mean(0), atol=1e-6)
            if i == 0:
                np.testing.assert_allclose(found[site.name, 1].clean[i], rows[3], atol=1e-6)
            else:
                assert np.isnan(found[site.name, 1].clean[i]).all()
    assert found[SITE, 0].corrupted is None


def test_steering_adds_the_direction_in_the_corrupted_run_of_the_test_half(
    bridge: HookedModel,
) -> None:
    task = marked(bridge)
    found = contrastive_directions(bridge, task, SITE, positions=[2], n_random=9, n_control=0)
    grid = steering_grid(bridge, task, found, amount=1.5, n_random=4, seed=3)
    test = task.test
    assert test.counterparts is not None
    vector = found.readouts[0].vector
    assert vector is not None
    for direction, side, sign in (
        ("denoising", test.counterparts, 1.5), ("noising", test.examples, -1.5)
    ):  # fmt: skip

        def change(value: Tensor, sign: float = sign) -> Tensor:
            made = value.clone()
            made[:, 2] += sign * vector.to(value)
            return made

        logits = bridge.logits(side.inputs, {SITE: change})[:, -1].double()
        np.testing.assert_allclose(
            grid.side(direction).patched[0],
            logits[:, 3] - logits[:, 4],
            atol=1e-5,  # type: ignore[arg-type]
        )
        assert grid.side(direction).random.shape == (4, 1, len(test))  # type: ignore[arg-type]
    assert "test" in str(grid.record.task["half"])
    with pytest.raises(
        ValueError, match="is already the find half: take the test half of the whole task"
    ):
        steering_grid(bridge, task.find, found)


def test_classifiers_by_hand() -> None:
    rows = np.array([[0.0, 1.0], [0.0, 3.0], [4.0, 1.0], [4.0, 3.0]])
    labels = np.array([0, 0, 1, 1])
    made = fit("mean_difference", rows, labels)
    np.testing.assert_allclose(made.weights, [[4.0, 0.0]])
    assert made.offsets == [-8.0], "half way between 0 and 16"
    assert made.predict(np.array([[1.9, 9.0], [2.1, -9.0]])).tolist() == [0, 1]
    turned = along(np.array([-1.0, 0.0]), rows, labels)
    assert turned.right(rows, labels).all(), "the sign is fitted"
    constant = fit("logistic", rows, np.array([5, 5, 5, 5]))
    assert constant.predict(rows).tolist() == [5] * 4


def test_signs_of_whole_clusters_change_together() -> None:
    rows = np.array([[1.0, 1.0, 2.0, 2.0], [1.0, -1.0, np.nan, 3.0], [np.nan] * 4])
    p = statistics.paired_ps(rows, [0, 0, 1, 1])
    assert p[0] == 0.5, "two clusters, both positive: 2 of 4 ways"
    assert p[1] == 1.0, "one cluster adds up to 0"
    assert np.isnan(p[2])
    many = np.random.default_rng(0).normal(1, 0.1, (2, 30))
    np.testing.assert_allclose(statistics.paired_ps(many, resamples=499), 1 / 500)


def test_bad_input_is_one_clear_line(bridge: HookedModel) -> None:
    task = marked(bridge)
    alone = of_examples(Examples.given(bridge, task.examples.inputs))
    with pytest.raises(ValueError, match=r"labels 'pair': task .* has no counterparts"):
        linear_probes(bridge, alone)
    with pytest.raises(ValueError, match="labels: 3 for 24 examples of task task"):
        linear_probes(bridge, task, labels=[0, 1, 0])
    with pytest.raises(
        ValueError, match="labels 'template': all examples of task task have the same"
    ):
        linear_probes(bridge, task, labels="template")
    with pytest.raises(
        ValueError, match="task task is already the find half: take the test half of the whole task"
    ):
        linear_probes(bridge, task.find)
    with pytest.raises(ValueError, match="position 6 is outside every text"):
        linear_probes(bridge, task, positions=[6])
    with pytest.raises(
        ValueError,
        match=r"positions \[1\]: site blocks\.0\.attn\.hook_pattern has no text positions",
    ):
        linear_probes(bridge, task, "pattern", positions=[1])
    with pytest.raises(ValueError, match="no label of the test half occurs in the find half"):
        linear_probes(bridge, task, labels=range(24))
    with pytest.raises(ValueError, match="strength 0 must be above 0"):
        linear_probes(bridge, task, strength=0)
    with pytest.raises(ValueError, match="n_control -1 must be 0 or more"):
        linear_probes(bridge, task, n_control=-1)
    both = [
        Item(a, ((3,),), ((4,),), b, group=str(i))
        for i in range(6)
        for a, b in (((1, 5 + i), (2, 5 + i)), ((2, 5 + i), (1, 5 + i)))
    ]
    turned = compile_task(bridge, both)
    with pytest.raises(ValueError, match="has each pair in both directions"):
        contrastive_directions(bridge, turned)
    found = linear_probes(bridge, task, SITE, labels=[i % 2 for i in range(24)], positions=[0])
    with pytest.raises(ValueError, match="expected those of clean or corrupted"):
        steering_grid(bridge, task, found)
