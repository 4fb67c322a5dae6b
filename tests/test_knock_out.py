"""Attention knocked out between spans: equal to masked scores, refused where nothing is left, with twins."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import pytest
import torch
from torch import Tensor

from circuits.edits.attention import KnockOut, knock_out
from circuits.edits.recipes import Recipe, commute, edited, recipe_schema
from circuits.edits.records import parse_edit, read_edit, twin_of
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.zoo.transformers import huggingface_bridge
from circuits.units import Unit

PATTERN = "blocks.1.attn.hook_pattern"


def by_hand(
    model: HookedModel, tokens: Tensor, edit: KnockOut, queries: list[int], keys: list[int]
) -> Tensor:
    """The pattern from queries and keys, with scores of minus infinity where attention is knocked out."""
    q, k = (
        model.run(tokens, read=[f"blocks.1.attn.hook_{p}"])[f"blocks.1.attn.hook_{p}"] for p in "qk"
    )
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / math.sqrt(q.shape[-1])
    later = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(later, -math.inf)
    for head in edit.units.among(model.site(PATTERN)):
        for query in queries:
            scores[:, head, query, keys] = -math.inf
    return scores.softmax(-1)


def test_renormalised_equals_masked_scores(bridge: HookedModel) -> None:
    tokens = bridge.input.example(3)
    edit = knock_out(f"{PATTERN}:0,2", queries=[4, 5, -1], keys=[0, 3, -9], renormalise=True)
    n = tokens.shape[1]
    wanted = by_hand(bridge, tokens, edit, [4, 5, n - 1], [0, 3, n - 9])
    plain = bridge.run(tokens, read=[PATTERN])
    with edited(bridge, [edit]):
        found = bridge.run(tokens, read=[PATTERN])
    torch.testing.assert_close(found[PATTERN].double(), wanted, rtol=0, atol=1e-6)
    logits = bridge.logits(tokens, {PATTERN: lambda _: wanted.float()})
    torch.testing.assert_close(found.output, logits, rtol=0, atol=1e-5)
    untouched = plain[PATTERN].clone()
    untouched[:, [0, 2]] = untouched[:, [0, 2]].index_copy(
        2, torch.tensor([4, 5, n - 1]), found[PATTERN][:, [0, 2]][:, :, [4, 5, n - 1]]
    )
    assert torch.equal(found[PATTERN], untouched), "other heads and other rows keep their bits"


def test_not_renormalised_the_rest_stays_as_it_is(bridge: HookedModel) -> None:
    tokens = bridge.input.example(2)
    plain = bridge.run(tokens, read=[PATTERN])[PATTERN]
    with edited(bridge, [knock_out(f"{PATTERN}:*", queries=range(3, 6), keys=[1, 2])]):
        found = bridge.run(tokens, read=[PATTERN])[PATTERN]
    wanted = plain.clone()
    wanted[:, :, 3:6, 1:3] = 0
    assert torch.equal(found, wanted)
    with edited(bridge, [knock_out(f"{PATTERN}:3")]):  # all attention of a head: it reads nothing
        z = bridge.run(tokens, read=["blocks.1.attn.hook_z"])["blocks.1.attn.hook_z"]
    assert not z[:, :, 3].any()


def test_rows_that_paid_no_attention_keep_their_bits(bridge: HookedModel) -> None:
    """What is knocked out lies in the future of the query: nothing is there to renormalise."""
    tokens = bridge.input.example(2)
    plain = bridge.logits(tokens)
    with edited(
        bridge, [knock_out(f"{PATTERN}:*", queries=[0, 1, 2], keys=[7, 8], renormalise=True)]
    ):
        assert torch.equal(bridge.logits(tokens), plain)


def test_a_row_without_a_key_is_refused(bridge: HookedModel) -> None:
    tokens = bridge.input.example(2)
    before = bridge.logits(tokens)
    edit = knock_out(f"{PATTERN}:1,3", keys=[0], renormalise=True)
    with (
        pytest.raises(
            ValueError,
            match="position 0 of head 1 keeps no key, so that nothing is left to renormalise",
        ),
        edited(bridge, [edit]),
    ):
        bridge.logits(tokens)
    assert torch.equal(bridge.logits(tokens), before)
    with edited(bridge, [knock_out(f"{PATTERN}:1,3", range(1, 12), [0], renormalise=True)]):
        rows = bridge.run(tokens, read=[PATTERN])[PATTERN].sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


def test_it_is_written_read_and_in_the_schema(bridge: HookedModel, tmp_path: Path) -> None:
    edit = knock_out(f"{PATTERN}:0,2", queries=[5, -1], keys=[0], renormalise=True)
    words = f"knock_out {PATTERN}:0,2 queries=5,-1 keys=0 renormalise=true"
    assert read_edit(bridge, words) == edit
    assert read_edit(bridge, str(edit).lower()) == edit
    recipe = Recipe.of(bridge, [edit], "no more of the first token")
    recipe.save(tmp_path / "r.json")
    assert Recipe.load(tmp_path / "r.json") == recipe
    jsonschema.validate(json.loads((tmp_path / "r.json").read_text()), recipe_schema())
    assert parse_edit(edit.to_dict()) == edit
    other = knock_out(f"{PATTERN}:1", keys=[1])
    assert commute(bridge, edit, other)
    assert not commute(bridge, edit, knock_out(f"{PATTERN}:2", keys=[1]))


def test_twins_are_other_heads_or_else_other_keys(bridge: HookedModel) -> None:
    def twin(edit: KnockOut, seed: int, swap: dict[Unit, Unit] | None = None) -> KnockOut | None:
        made = twin_of(bridge, [edit], swap or {}, seed)
        assert made is None or isinstance(made[0], KnockOut)
        return None if made is None else made[0]  # type: ignore[return-value]

    edit = knock_out(f"{PATTERN}:0,2", queries=[5], keys=[1, 2], renormalise=True)
    swap = {Unit(PATTERN, 0): Unit(PATTERN, 3), Unit(PATTERN, 2): Unit(PATTERN, 1)}
    other = twin(edit, 0, swap)
    assert other is not None
    assert (other.units.indices, other.keys, other.renormalise) == ((3, 1), (1, 2), True)
    every = knock_out(f"{PATTERN}:*", queries=[5], keys=[1, 2])
    spans = {twin(every, seed).keys for seed in range(60)}  # type: ignore[union-attr]
    assert spans == {(a, b) for a in (0, 3, 4, 5) for b in (0, 3, 4, 5) if a < b}
    from_the_end = twin(knock_out(f"{PATTERN}:*", queries=[-1], keys=[-3]), 0)
    assert from_the_end is not None
    assert from_the_end.keys in ((-2,), (-1,))
    assert twin(knock_out(f"{PATTERN}:*", keys=[0]), 0) is None
    assert twin(knock_out(f"{PATTERN}:*", queries=[-1], keys=[0]), 0) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("blocks.1.attn.hook_z:0 keys=0", "is not an attention pattern .* expected one of blocks.0.attn.hook_pattern"),
        (f"{PATTERN}:9 keys=0", "does not exist"),
        (f"{PATTERN}:0 keys=0 queries=12", "position 12 in queries .* expected -12 to 11"),
        (f"{PATTERN}:0 keys=0 at=1,2", "does not apply to edit 'knock_out'"),
        (f"{PATTERN}:0 renormalise=true", "leaves no key to renormalise"),
    ],
)  # fmt: skip
def test_bad_knock_outs_are_one_clear_line(bridge: HookedModel, words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_edit(bridge, f"knock_out {words}")


def test_a_position_past_the_end_is_named(bridge: HookedModel) -> None:
    edit = knock_out(f"{PATTERN}:0", queries=[10], keys=[0])
    with (
        pytest.raises(ValueError, match=r"position 10 in queries .* expected -5 to 4"),
        edited(bridge, [edit]),
    ):
        bridge.logits(bridge.input.example(1)[:, :5])
    with pytest.raises(ValueError, match="keys of edit 'knock_out' are empty"):
        knock_out(f"{PATTERN}:0", keys=[])


@pytest.mark.filterwarnings("ignore")  # other packages' own
def test_models_of_transformers(tmp_path: Path) -> None:
    import transformers

    shape = {
        "vocab_size": 20,
        "n_embd": 16,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 12,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(0)
    for kind in ("GPT2", "GPTJ"):
        rest = {"rotary_dim": 2} if kind == "GPTJ" else {}
        config = getattr(transformers, f"{kind}Config")(**shape, **rest)
        folder = tmp_path / kind
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        model = HookedModel(huggingface_bridge(str(folder)), TokenInput(20, 12), kind)
        edit = knock_out(f"{PATTERN}:1", queries=[4, 5], keys=[0, 2], renormalise=True)
        if (
            kind == "GPTJ"
        ):  # shows patterns only after attention is over: changing them would do nothing
            with pytest.raises(ValueError, match="expected one of none in this model"):
                edit.checked(model)
            continue
        tokens = model.input.example(2)

        def masked(scores: Tensor) -> Tensor:
            made = scores.clone()
            for query in (4, 5):
                made[:, 1, query, [0, 2]] = torch.finfo(scores.dtype).min
            return made

        wanted = model.logits(tokens, {"blocks.1.attn.hook_attn_scores": masked})
        with edited(model, [edit]):
            torch.testing.assert_close(model.logits(tokens), wanted, rtol=0, atol=1e-6)
        assert not torch.allclose(model.logits(tokens), wanted, rtol=0, atol=1e-4)
