"""Where a behaviour is: heads by what they look at, the lens by hand, probes on held-out pairs, patterns by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from circuits.localization import (
    attention_patterns,
    contrastive_directions,
    linear_probes,
    logit_lens,
    score_heads,
)
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.tasks.builtin import load_task


@pytest.fixture(scope="module")
def induction() -> HookedModel:
    return load_model("induction")


def test_the_known_heads_of_induction_come_first(induction: HookedModel) -> None:
    """Head 0.3 looks one back; all four heads of layer 1 are induction heads (see the model's card)."""
    scores = score_heads(induction, n=16)
    previous = scores.of("previous_token")
    assert str(previous[0].head) == "blocks.0.attn.hook_pattern:3"
    assert previous[0].score > 0.9 > 5 * previous[0].chance
    assert previous[0].p_value < 0.05
    first = {str(s.head) for s in scores.of("induction")[:4]}
    assert {name.split(":")[0] for name in first} == {"blocks.1.attn.hook_pattern"}


def test_scores_are_the_share_of_attention_that_goes_one_back(induction: HookedModel) -> None:
    scores = score_heads(induction, ["previous_token"], n=4, seed=5)
    from circuits.localization.heads import repeated_tokens

    tokens = repeated_tokens(induction.input, 4, seed=5)  # type: ignore[arg-type]
    name = "blocks.0.attn.hook_pattern"
    pattern = induction.run(tokens, read=[name])[name].double()
    share = (
        pattern.diagonal(-1, 2, 3)[..., 1:].mean(-1).mean(0)
    )  # head; at 1 there is nowhere else to look
    for score in scores.of("previous_token"):
        if score.head.site == name:
            assert score.score == pytest.approx(float(share[score.head.index]), abs=1e-5)


def test_the_lens_is_the_models_own_unembedding_at_each_depth(bridge: HookedModel) -> None:
    task = load_task(bridge, texts=["1 2 3 4", "5 6 7 8"], answer="9", against="3")
    lens = logit_lens(bridge, task, null=False)
    tokens = task.examples.inputs
    module = bridge.module
    intact = bridge.logits(tokens).double()
    wanted = intact[:, -1, 9] - intact[:, -1, 3]
    np.testing.assert_allclose(lens.values[-1], wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lens.intact, wanted, rtol=1e-4, atol=1e-5)
    stream = bridge.run(tokens, read=[lens.sites[0]])[lens.sites[0]]
    with torch.no_grad():
        logits = module.unembed(module.ln_final(stream)) if hasattr(module, "ln_final") else module.unembed(stream)  # type: ignore[operator]  # fmt: skip
    by_hand = (logits[:, -1, 9] - logits[:, -1, 3]).double()
    np.testing.assert_allclose(lens.values[0], by_hand, rtol=1e-4, atol=1e-5)


def test_probes_are_judged_on_pairs_that_they_were_not_fitted_on() -> None:
    """A clean sum and its counterpart are both sums of random numbers, which no direction tells apart."""
    model = load_model("addition-by-hand")
    task = load_task(model, "addition:corruption=first", n=80)
    site = "blocks.0.hook_resid_post"
    for found in (
        contrastive_directions(model, task, [site], n_random=19, n_control=3),
        linear_probes(model, task, [site], n_random=19, n_control=3),
    ):
        for readout in found.readouts:
            assert 0 <= readout.accuracy <= 1
            assert readout.n <= 2 * len(task.test)
            assert len(readout.random) == 19
        # pairs are drawn at random: nothing tells clean from corrupted but chance
        assert max(r.accuracy for r in found.readouts) < 0.75


def test_value_weighted_attention_by_hand(bridge: HookedModel) -> None:
    text = [3, 1, 4, 1, 5, 9]
    made = attention_patterns(bridge, text, ["0.2"])
    names = ("blocks.0.attn.hook_pattern", "blocks.0.attn.hook_v")
    cache = bridge.run(torch.tensor([text]), read=names)
    pattern = cache[names[0]][0, 2].double()
    lengths = cache[names[1]][0, :, 2].double().norm(dim=-1)
    (head,) = made.patterns
    torch.testing.assert_close(head.raw.double(), pattern, atol=1e-6, rtol=0)
    weighted = pattern * lengths
    torch.testing.assert_close(
        head.weighted.double(), weighted / weighted.sum(-1, keepdim=True), atol=1e-5, rtol=0
    )


def test_what_is_refused() -> None:
    shapes = load_model("shapes")
    with pytest.raises(ValueError, match="shapes"):
        score_heads(shapes)
    with pytest.raises(ValueError, match="shapes"):
        attention_patterns(shapes, [1, 2], ["0.1"])
    with pytest.raises(ValueError, match="shapes"):
        logit_lens(shapes, load_task(shapes, n=4))
