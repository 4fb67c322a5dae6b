"""Kinds of heads on hand-written and trained networks, and attention patterns weighted by values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from circuits.examples import Examples
from circuits.localization import attention_patterns, score_heads
from circuits.localization.heads import detection_pattern, repeated_tokens, shuffled
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.zoo.loading import load_model
from circuits.models.zoo.transformers import native_bridge


def test_the_heads_of_induction_are_what_they_are_known_for() -> None:
    found = score_heads(load_model("induction"))
    first = found.of("previous_token")
    assert str(first[0].head) == "blocks.0.attn.hook_pattern:3"
    assert first[0].is_one
    assert first[0].score > 0.9 > 0.3 > first[1].score
    copying = found.of("induction")
    assert {s.head.site for s in copying[:4]} == {"blocks.1.attn.hook_pattern"}
    assert all(s.is_one and s.score > 0.8 for s in copying[:4])
    assert not any(s.is_one for s in copying[4:])
    assert not any(s.is_one for s in found.of("duplicate_token"))


def test_hand_written_heads_reach_what_can_be_reached() -> None:
    found = score_heads(load_model("induction-by-hand"), n=8)
    previous, induction = found.of("previous_token")[0], found.of("induction")[0]
    assert str(previous.head) == "blocks.0.attn.hook_pattern:0"
    assert str(induction.head) == "blocks.1.attn.hook_pattern:0"
    for score in (previous, induction):
        assert score.score == pytest.approx(1, abs=1e-4)
    same = {str(s.head) for s in found.of("duplicate_token")[:2]}
    assert same == {"blocks.0.attn.hook_pattern:1", "blocks.1.attn.hook_pattern:1"}
    assert found.matrix("induction")[1, 0] == pytest.approx(induction.score)


def test_scores_by_a_loop(bridge: HookedModel) -> None:
    """Texts of two lengths; every attention is looked up one by one."""
    rows = [[1, 2, 3, 1, 2, 3, 1], [4, 4, 5, 4]]
    examples = Examples.texts(bridge, rows)
    found = score_heads(bridge, examples=examples)
    for i, row in enumerate(rows):
        for layer in range(2):
            name = f"blocks.{layer}.attn.hook_pattern"
            pattern = bridge.run(torch.tensor([row]), read=[name])[name][0].double()
            for h in range(4):
                for k, kind in enumerate(found.kinds):
                    shares = []
                    for q in range(len(row)):
                        keys = [
                            key for key in range(len(row))
                            if {
                                "previous_token": key == q - 1 and q > 1,  # at 1 there is nowhere else to look
                                "duplicate_token": key < q and row[key] == row[q],
                                "induction": 0 < key <= q and key - 1 < q and row[key - 1] == row[q],
                            }[kind]
                        ]  # fmt: skip
                        if keys:
                            shares.append(float(pattern[h, q, keys].sum()))
                    assert found.scores[k, 4 * layer + h, i] == pytest.approx(
                        np.mean(shares), abs=1e-6
                    )


def test_patterns_are_transformer_lenses() -> None:
    from transformer_lens import head_detector

    tokens = torch.randint(6, (1, 15), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(tokens, dtype=torch.bool)
    for kind in ("previous_token", "duplicate_token", "induction"):
        peer = getattr(head_detector, f"get_{kind}_head_detection_pattern")(tokens)
        torch.testing.assert_close(detection_pattern(kind, tokens, real)[0].float(), peer)


def test_the_overall_share_is_transformer_lenses() -> None:
    from transformer_lens.head_detector import compute_head_attention_similarity_score

    model = load_model("induction")
    examples = Examples.given(model, repeated_tokens(model.input, 2, 20))  # type: ignore[arg-type]
    found = score_heads(model, ["induction"], examples=examples)
    name = "blocks.1.attn.hook_pattern"
    pattern = model.run(examples.inputs, read=[name])[name]
    peer = []
    for row, tokens in zip(pattern, examples.inputs, strict=True):
        places = detection_pattern("induction", tokens[None], tokens[None] >= 0)[0].float()
        peer.append(
            compute_head_attention_similarity_score(
                row[2], places, exclude_bos=False, exclude_current_token=False, error_measure="mul"
            )
        )
    assert found.overall[0, 4 + 2] == pytest.approx(np.mean(peer), abs=1e-5)


def test_a_head_that_looks_back_a_fixed_way_is_none_of_them() -> None:
    """It would pass for an induction head on texts that all repeat after the same number of tokens."""
    model = load_model("induction")
    name = "blocks.1.attn.hook_pattern"

    def back(value: torch.Tensor) -> torch.Tensor:
        made = torch.zeros_like(value)
        n = value.shape[2]
        for q in range(n):
            made[:, :, q, max(0, q - 11)] = 1
        return made

    with model.intervening({name: back}):
        found = score_heads(model, ["induction"])
    assert all(s.score < 0.3 for s in found.of("induction"))


def test_texts_repeat_at_several_distances_and_shuffled_ones_do_not() -> None:
    spec = TokenInput(50, 40, bos=7)
    tokens = repeated_tokens(spec, 20, seed=1)
    assert (tokens[:, 0] == 7).all()
    assert not (tokens[:, 1:] == 7).any()
    distances = set()
    for row in tokens:
        fits = [d for d in range(1, 30) if (row[-5:] == row[-5 - d : -d]).all()]
        distances.add(fits[0])
    assert len(distances) > 5
    real = torch.ones_like(tokens, dtype=torch.bool)
    mixed = shuffled(tokens, real, torch.Generator().manual_seed(0))
    assert (mixed[:, 0] == 7).all()
    assert (mixed.sort(1).values == tokens.sort(1).values).all()
    assert (mixed != tokens).any(1).all()


# --- attention patterns --------------------------------------------------------------------------


def test_weighted_patterns_by_hand_with_shared_values() -> None:
    made = native_bridge(
        d_model=16, d_head=4, n_heads=4, n_key_value_heads=2, n_layers=1, n_ctx=12, d_vocab=20, d_mlp=24, act_fn="silu",
        gated_mlp=True, normalization_type="RMS", positional_embedding_type="rotary",
    )  # fmt: skip
    model = HookedModel(made, TokenInput(20, 12), "grouped")
    tokens = [3, 1, 4, 1, 5]
    found = attention_patterns(model, tokens, ["0.2", "blocks.0.attn.hook_z:1"])
    cache = model.run(
        torch.tensor([tokens]), read=["blocks.0.attn.hook_pattern", "blocks.0.attn.hook_v"]
    )
    for pattern, head, group in zip(found.patterns, (2, 1), (1, 0), strict=True):
        raw = cache["blocks.0.attn.hook_pattern"][0, head].double()
        length = cache["blocks.0.attn.hook_v"][0, :, group].double().norm(dim=-1)
        torch.testing.assert_close(pattern.raw, raw)
        weighted = raw * length
        torch.testing.assert_close(pattern.weighted, weighted / weighted.sum(1, keepdim=True))
        torch.testing.assert_close(pattern.weighted.sum(1), torch.ones(5).double())
    assert found.tokens == ("3", "1", "4", "1", "5")


def test_a_sink_is_named(bridge: HookedModel) -> None:
    tokens = list(range(1, 11))

    def sinking(value: torch.Tensor) -> torch.Tensor:
        made = value * 0.2
        made[:, 1, :, 0] += 0.8
        return made

    with bridge.intervening({"blocks.0.attn.hook_pattern": sinking}):
        found = attention_patterns(bridge, tokens, ["0.1", "0.2"])
    sink, other = found.patterns
    assert sink.sink == 0
    received = sink.raw[2:, 0].mean()
    assert sink.sink_share == pytest.approx(float(received))
    assert (other.sink, other.sink_share) == (None, 0.0)


def test_bad_input_is_one_clear_line(bridge: HookedModel, branches: HookedModel) -> None:
    with pytest.raises(
        ValueError, match="model Branches takes images: heads are scored by what they attend to"
    ):
        score_heads(branches)
    with pytest.raises(ValueError, match="model Branches takes images: expected a token model"):
        attention_patterns(branches, "1 2", ["0.1"])
    with pytest.raises(
        ValueError,
        match=r"length 13: expected 6 \(the shortest that repeats anything\) to 12 \(the model's context\)",
    ):
        score_heads(bridge, length=13)
    with pytest.raises(
        ValueError, match="n 1 must be at least 2: scores are compared text by text"
    ):
        score_heads(bridge, n=1)
    with pytest.raises(
        ValueError, match="texts: one of them has no position where a head of kind duplicate_token"
    ):
        score_heads(bridge, examples=Examples.texts(bridge, [[1, 2, 3], [1, 1, 2]]))
    with pytest.raises(KeyError, match=r"unknown head of tiny-bridge '0\.4': did you mean"):
        attention_patterns(bridge, [1, 2], ["0.4"])
    with pytest.raises(
        ValueError, match=r"head 'blocks\.0\.mlp\.hook_post:1': the units of .* are not heads"
    ):
        attention_patterns(bridge, [1, 2], ["blocks.0.mlp.hook_post:1"])
    with pytest.raises(ValueError, match="heads are empty"):
        attention_patterns(bridge, [1, 2], [])
