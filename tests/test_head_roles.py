"""Tests of heads' roles with corrections, and copying by weights, on networks whose heads are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from circuits.examples import Examples
from circuits.experiments import Context, run
from circuits.experiments.statistics import corrected, mean_ps
from circuits.localization import (
    copying_heads,
    direct_effects,
    head_effects,
    judge_heads,
    score_heads,
)
from circuits.localization.head_variants import exchanged_heads, mean_changes, moved_heads
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.tasks.builtin import load_task
from circuits.tasks.compiling import compile_task
from circuits.tasks.items import Item
from circuits.tasks.metrics import as_metric


def test_the_one_head_that_copies_by_hand_is_found_and_no_other() -> None:
    """Layer 1's first head copies into what the logits read; the others write where nothing reads."""
    model = load_model("induction-by-hand")
    found = copying_heads(model, range(5, 25), [0])
    copies, lowers = found.roles()
    assert [t.head for t in copies.found] == ["1.0"]
    assert lowers.absent
    own = copies.of("1.0")
    assert (own.value.value, own.chance) == (1.0, 0.5)
    assert found.in_top[found.heads.index("1.0")].all()
    # All logits are equal where a head writes what nothing reads: half of the others count as lower.
    assert np.allclose(np.delete(found.standing, found.heads.index("1.0"), 0), 0.5)
    assert (copies.n_tests, copies.correction) == (6, "holm")


def test_a_head_that_is_turned_round_lowers_what_it_reads() -> None:
    model = load_model("induction-by-hand")
    with torch.no_grad():
        model.parameters["blocks.1.attn.o.weight"][:, :64].neg_()  # the columns of its first head
    copies, lowers = copying_heads(model, range(5, 25), [0]).roles("benjamini-hochberg")
    assert copies.absent
    assert [t.head for t in lowers.found] == ["1.0"]


def test_copying_by_a_loop(bridge: HookedModel) -> None:
    tokens, front = [3, 7, 1, 9], [2, 5]
    found = copying_heads(bridge, tokens, front, after=0, permutations=50)
    weights = {letter: [b.attn for b in bridge.module.blocks] for letter in "VO"}
    for layer in range(2):
        for h in range(4):
            for i, token in enumerate(tokens):
                name = "blocks.0.hook_resid_post"
                x = bridge.run(torch.tensor([[*front, token]]), read=[name])[name][0, -1].double()
                x = (
                    x - x.mean()
                )  # the linear part of the normalisations, whose gains the next lines apply
                gain = bridge.module.blocks[layer].ln1.weight.double()
                v = (x * gain) @ weights["V"][layer].W_V[h].double()
                written = v @ weights["O"][layer].W_O[h].double()
                written = (written - written.mean()) * bridge.module.ln_final.weight.double()
                logits = (written @ bridge.module.W_U.double()).detach()
                others = [float(logits[t]) for t in tokens if t != token]
                lower = np.mean([o < float(logits[token]) for o in others])
                assert found.standing[4 * layer + h, i] == pytest.approx(lower)
                rank = int((logits > logits[token]).sum())
                assert found.in_top[4 * layer + h, i] == (rank < 5)


def test_by_chance_no_head_copies(bridge: HookedModel) -> None:
    """Of eight heads with random weights none does, after the correction; p-values are not always the smallest."""
    copies, lowers = copying_heads(bridge, range(1, 12), [0], seed=3).roles()
    assert copies.absent
    assert lowers.absent
    assert max(t.p_value for t in copies.tests) == 1


def test_heads_are_judged_by_paired_tests_that_are_corrected() -> None:
    rng = np.random.default_rng(0)
    values, chance = rng.normal(size=(2, 6, 40))
    values[1] += 2
    values[4] -= 2
    clusters = [i // 2 for i in range(40)]
    heads = [f"0.{h}" for h in range(6)]
    above = judge_heads(
        "mover", heads, values, chance, measure="effect", clusters=clusters, n_tests=9
    )
    below = judge_heads(
        "mover", heads, values, chance, measure="effect", clusters=clusters, side="below"
    )
    assert [t.head for t in above.found] == ["0.1"]
    assert [t.head for t in below.found] == ["0.4"]
    raw = mean_ps(values - chance, clusters)
    assert [t.p_value for t in below.tests] == list(corrected(raw))
    assert above.of("0.1").p_value == pytest.approx(9 * raw[1])
    assert above.of("0.1").chance == pytest.approx(chance[1].mean())
    said = above.to_dict(2)
    assert (said["found"], said["absent"], said["n_tests"]) == (["0.1"], False, 9)
    assert [h["head"] for h in said["heads"]] == ["0.1", "0.4"]


def test_an_effect_of_no_consequence_is_no_role() -> None:
    """Where chance lies on the other side of 0, no effect differs from it too."""
    rng = np.random.default_rng(1)
    values = np.array([[0.0], [0.02], [1.0]]) + 0.001 * rng.normal(size=(3, 30))
    chance = np.full((3, 30), -0.01)
    heads = ["0.0", "0.1", "0.2"]

    def found(least: float | None, sign: int = 1) -> list[str]:
        side = "above" if sign > 0 else "below"
        tests = judge_heads(
            "r", heads, sign * values, sign * chance, measure="m", side=side, least=least
        )
        return [t.head for t in tests.found]

    assert found(None) == ["0.2", "0.1", "0.0"]
    assert found(0.0015) == found(0.0015, -1) == ["0.2", "0.1"]
    assert found(0.05) == found(0.05, -1) == ["0.2"]


def test_without_the_first_token_scores_are_shares_of_the_rest_by_a_loop(
    bridge: HookedModel,
) -> None:
    rows = [[1, 2, 3, 1, 2, 3, 1], [5, 4, 5, 4, 4, 5, 4]]
    found = score_heads(bridge, examples=Examples.texts(bridge, rows), first=False)
    for i, row in enumerate(rows):
        for layer in range(2):
            name = f"blocks.{layer}.attn.hook_pattern"
            pattern = bridge.run(torch.tensor([row]), read=[name])[name][0].double()
            for h in range(4):
                for k, kind in enumerate(found.kinds):
                    there = rest = 0.0
                    for q in range(len(row)):
                        keys = [
                            key for key in range(1, len(row))
                            if {
                                "previous_token": key == q - 1 and q > 2,  # at 2 only the first token is left
                                "duplicate_token": key < q and row[key] == row[q],
                                "induction": key <= q and key - 1 < q and row[key - 1] == row[q],
                            }[kind]
                        ]  # fmt: skip
                        if keys:
                            there += float(pattern[h, q, keys].sum())
                            rest += float(pattern[h, q, 1:].sum())
                    assert found.scores[k, 4 * layer + h, i] == pytest.approx(
                        there / rest, abs=1e-6
                    )


def test_a_sink_hides_a_head_and_without_it_the_head_is_found(bridge: HookedModel) -> None:
    """A head pays nine tenths of its attention to the first token, and the rest to the previous one."""

    def sunk(value: torch.Tensor) -> torch.Tensor:
        made, n = value.clone(), value.shape[2]
        made[:, 1] = 0.1 * torch.eye(n).roll(-1, 1).to(value)
        made[:, 1, :, 0] += 0.9
        return made

    with bridge.intervening({"blocks.0.attn.hook_pattern": sunk}):
        hidden = score_heads(bridge, ["previous_token"], n=8).of("previous_token")
        shown = score_heads(bridge, ["previous_token"], n=8, first=False).of("previous_token")
    assert str(shown[0].head) == "blocks.0.attn.hook_pattern:1"
    assert shown[0].score == pytest.approx(1)
    assert max(s.score for s in hidden if str(s.head) == "blocks.0.attn.hook_pattern:1") < 0.11


# --- direct effects ------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["", "kl", "logit_difference"])
def test_direct_effects_are_those_of_path_patching(bridge: HookedModel, metric: str) -> None:
    """Several counted positions, texts of two lengths, a last normalisation that is computed again or held."""
    if metric == "logit_difference":
        texts = ["1 2 3 4", "4 5 6", "2 2 7 1", "9 8 7"]
        items = [Item(t, (" 8",), (" 1", " 2"), t.replace(t[0], "11", 1)) for t in texts]
        task = compile_task(
            bridge, [replace(i, answers=((8,),), against=((1,), (2,))) for i in items], name="own"
        )
    else:
        task = load_task(bridge, "repeats", n=6)
        task = task.with_metric(as_metric(metric)) if metric else task
    own = direct_effects(bridge, task, batch=4)
    peer = head_effects(bridge, task, n_random=0)
    assert own.heads == peer.heads
    np.testing.assert_allclose(own.values, peer.direct, atol=1e-5)
    held = direct_effects(bridge, task, hold_norm=True)
    np.testing.assert_allclose(held.values, peer.direct_held, atol=1e-5)
    np.testing.assert_allclose(own.base, peer.grid.side().base, atol=1e-5)


def test_with_heads_removed_the_rest_is_measured_in_the_changed_run(bridge: HookedModel) -> None:
    task = load_task(bridge, "repeats", n=6)
    own = direct_effects(bridge, task, without=["0.1", "1.2"])

    removed = exchanged_heads("removed", bridge, ["0.1", "1.2"])
    made = run(bridge, [removed], task, measures=[task.metric])
    np.testing.assert_allclose(own.base, made.of(task.metric.name, "removed"), atol=1e-5)
    # What carries the counterpart's output already has no direct effect left, and layer 0 has the one it had.
    whole = direct_effects(bridge, task)
    assert np.abs(own.values[[1, 6]]).max() == 0
    assert np.abs(whole.values[[1, 6]]).max() > 1e-4
    assert np.abs(own.values[4] - whole.values[4]).max() > 1e-6


def test_bad_input_is_one_clear_line(bridge: HookedModel, branches: HookedModel) -> None:
    values = np.ones((2, 3))
    asked = [
        (lambda: copying_heads(branches, [1, 2, 3], [0]), "takes images: expected a model of tokens"),
        (lambda: copying_heads(bridge, [1, 1, 2], [0]), "expected at least 3, all different"),
        (lambda: copying_heads(bridge, [1, 2, 3], [0], after=2), "after 2: expected a layer, 0 to 1"),
        (lambda: copying_heads(bridge, [1, 2, 3], [0], permutations=-1), "permutations -1: expected 0 or more"),
        (lambda: copying_heads(bridge, [1, 2, 99999], [0]), "token 99999 is not in the vocabulary"),
        (lambda: judge_heads("r", ["0.0"], values, measure="m"), "values have 2 rows: expected one for each of 1"),
        (lambda: judge_heads("r", ["a", "b"], values, measure="m", least=-1), "least -1: expected a number of at"),
        (lambda: judge_heads("r", ["a", "b"], values, measure="m", n_tests=1), "n_tests 1: expected at least"),
        (lambda: judge_heads("r", ["a", "b"], values, values[:1], measure="m"), r"chance has shape \(1, 3\)"),
        (lambda: judge_heads("r", ["a", "b"], values, measure="m", clusters=[0, 0, 0]), "at least two clusters"),
        (lambda: judge_heads("r", ["a", "b"], values, measure="m", side="x"), "side 'x': expected one of above, below"),  # type: ignore[arg-type]
    ]  # fmt: skip
    for make, message in asked:
        with pytest.raises(ValueError, match=message) as raised:
            make()
        assert "\n" not in str(raised.value)
    task = load_task(bridge, "repeats", n=4)
    with pytest.raises(
        ValueError, match=r"without 'mlp:0' is no head: expected some written layer\.head"
    ):
        direct_effects(bridge, task, without=["mlp:0"])
    with pytest.raises(KeyError, match=r"7\.0"):
        direct_effects(bridge, task, without=["7.0"])
    with pytest.raises(ValueError, match="has no counterparts: there is nothing to patch from"):
        direct_effects(bridge, replace(task, counterparts=None))
    with pytest.raises(KeyError, match=r"head '9\.9' was not tested"):
        judge_heads("r", ["a", "b"], values, measure="m").of("9.9")


# --- variants ------------------------------------------------------------------------------------


def test_heads_are_moved_at_the_counted_position_and_nowhere_else(bridge: HookedModel) -> None:
    """Moved once along the change of each template, heads put out on average what they do in the counterparts."""
    texts = {"one": ["1 2 3 4", "2 2 7 1"], "other": ["4 5 6", "9 8 7"]}
    items = [
        Item(t, ((8,),), ((1,),), t.replace(t[0], "11", 1), template=name, group=t)
        for name, some in texts.items() for t in some
    ]  # fmt: skip
    task = compile_task(bridge, items, name="own")
    heads, site = ["0.2", "1.0"], "blocks.0.attn.hook_z"
    along = mean_changes(bridge, task, heads)
    assert set(along) == {"one", "other"}
    by_hand = []
    for text in texts["one"]:
        tokens = torch.tensor([[int(w) for w in text.split()], [11, *map(int, text.split()[1:])]])
        z = bridge.run(tokens, read=[site])[site][:, -1, 2]
        by_hand.append(z[1] - z[0])
    torch.testing.assert_close(along["one"][site][0].float(), torch.stack(by_hand).mean(0))
    seen: dict[str, torch.Tensor] = {}
    still = {t: {s: 0 * v for s, v in vectors.items()} for t, vectors in along.items()}
    variants = [
        moved_heads(name, bridge, task, heads, vectors, 2.0) for name, vectors in (("moved", along), ("still", still))
    ]  # fmt: skip
    made = run(bridge, variants, task, measures=[task.metric])
    np.testing.assert_array_equal(made.of(task.metric.name, "still"), made.of(task.metric.name))
    for part in task.batches():
        context = Context(part, {}, {})
        z = bridge.run(part.inputs, mask=part.mask, read=[site])[site]
        assert variants[0].live is not None
        after = variants[0].live(context)[site](z)
        for row, i in enumerate(part.which):
            (end,) = task.questions[i].positions or ()
            expected = z[row].clone()
            expected[end, 2] += 2 * along[task.questions[i].template][site][0].float()
            torch.testing.assert_close(after[row], expected)
            seen[task.examples.names[i]] = after[row]
    assert len(seen) == 4


def test_exchanged_heads_do_what_path_patching_into_everything_does(bridge: HookedModel) -> None:
    task = load_task(bridge, "repeats", n=6)
    made = run(bridge, [exchanged_heads("x", bridge, ["0.3"])], task, measures=[task.metric])
    total = head_effects(bridge, task, ["0.3"], n_random=0).total[0]
    own = made.of(task.metric.name, "x") - made.of(task.metric.name)
    np.testing.assert_allclose(own, total, atol=1e-5)


def test_variants_of_what_is_no_head_are_refused(bridge: HookedModel) -> None:
    task = load_task(bridge, "repeats", n=4)
    with pytest.raises(ValueError, match="head 'mlp:0' is no head"):
        exchanged_heads("x", bridge, ["mlp:0"])
    with pytest.raises(ValueError, match="of task repeats: expected one counted position"):
        mean_changes(bridge, task, ["0.1"])
    one = compile_task(bridge, [Item("1 2", ((8,),), ((1,),), "3 2", template="t")] * 1, name="own")
    with pytest.raises(KeyError, match="template 't' has no directions: expected one of u"):
        moved_heads("x", bridge, one, ["0.1"], {"u": {}}, 1.0)
