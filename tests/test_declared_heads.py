"""Attention that is refused with a reason, and declared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuits.models.adapter.declaring import read_declarations
from circuits.models.adapter.flow import Flow
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.zoo.loading import load_model
from tests.attention_models import CASES
from tests.person_models import CONTEXT, N_VOCAB, WIDTH

WHAT_WEIGHS = {
    "sigmoid": ("tril@0", "tril@1"),
    "retention": ("mul@1", "mul@4"),
    "over-heads": ("tril@0", "tril@1"),
}


def declared(name: str) -> dict[str, dict[str, Any]]:
    return {f"blocks.{n}.attn": {"pattern": call} for n, call in enumerate(WHAT_WEIGHS[name])}


@pytest.mark.parametrize("name", WHAT_WEIGHS)
def test_what_is_no_softmax_is_refused_and_said(name: str) -> None:
    case = CASES[name]
    model = HookedModel(case.make(), case.input)
    assert not [s for s in model.sites if s.kind in ("head", "pattern")]
    assert set(WHAT_WEIGHS[name]) == model.left_out.keys()
    for why in model.left_out.values():
        assert "\n" not in why
        assert "expected a softmax over keys" in why
        assert ("such as heads" in why) == (name == "over-heads")
    with pytest.raises(KeyError, match="no heads here"):
        model.site(WHAT_WEIGHS[name][0])


def test_linear_attention_is_said_to_have_no_pattern() -> None:
    case = CASES["linear"]
    model = HookedModel(case.make(), case.input)
    assert list(model.left_out) == ["cumsum@0", "cumsum@2"]
    assert all("linear attention" in why for why in model.left_out.values())


@pytest.mark.parametrize("name", WHAT_WEIGHS)
def test_a_declaration_gives_all_sites(name: str) -> None:
    case = CASES[name]
    model = HookedModel(case.make(), case.input, attention=declared(name))
    assert not model.left_out
    inputs = case.input.example(2, seed=1)
    sites = case.oracle(model.module, inputs)
    plain = model.logits(inputs)
    for site, value in sites.items():
        found = model.run(inputs, read=[site])[site]
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)
        assert torch.equal(model.logits(inputs, {site: lambda t, v=found: v.clone()}), plain)
    for attention, n_heads, _ in case.heads:
        for head in range(n_heads):

            def ablate(z: Tensor, head: int = head) -> Tensor:
                return torch.where(torch.arange(z.shape[2])[:, None] == head, 0, z)

            ablated = model.logits(inputs, {f"{attention}.hook_z": ablate})
            zeroed = case.output_weights(model.module, attention, head)(inputs)
            torch.testing.assert_close(ablated, zeroed, rtol=1e-5, atol=1e-5)


def test_a_softmax_can_be_declared_too() -> None:
    """It takes the place of the one that is found, and others keep what is left of the names."""
    case = CASES["person"]
    found = HookedModel(case.make(), case.input)
    # A norm, the scale of the scores, the softmax.
    second = [call for call in Flow(found.program).calls if call.startswith("div@")][-3]
    given = {"blocks.0.attn": {"pattern": second}}
    model = HookedModel(case.make(), case.input, attention=given)
    inputs = case.input.example(2, seed=1)
    names = [f"blocks.{n}.attn.hook_z" for n in range(2)]
    first, last = found.run(inputs, read=names).values()
    assert torch.equal(model.run(inputs, read=names)[names[0]], last)
    assert torch.equal(model.run(inputs, read=names)[names[1]], first)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": {"patern": "mul@1"}}, "a has no 'patern': expected pattern, keys, scores, q, k"),
        ({"a": {"keys": -1}}, "a lacks 'pattern'"),
        ({"a": {"pattern": 3}}, "pattern of a is 3: expected a text"),
        ({"a": {"pattern": "mul"}}, "expected a call MODULE/FUNCTION@NUMBER"),
        ({"a": {"pattern": "mul@1", "keys": True}}, "keys of a is True: expected a whole number"),
        ({"a b": {"pattern": "mul@1"}}, "'a b' is no name of an attention"),
        ({"a": {"pattern": "mul@1", "keys": 4}}, "it has 4 axes, no axis 4"),
        ({"a": {"pattern": "mul@1[1]"}}, r"mul@1 puts out 1 tensors, no \[1\]"),
        ({"a": {"pattern": "arange@0"}}, "arange@0 does not depend on the input"),
        ({"a": {"pattern": "mul@1", "keys": 1}}, "an axis that queries and keys share"),
        ({"a": {"pattern": "mul@1", "k": "__getitem__@0"}}, "cannot be followed to the product"),
    ],
)
def test_a_wrong_declaration_is_refused_in_a_line(given: dict[str, Any], message: str) -> None:
    case = CASES["retention"]
    with pytest.raises(ValueError, match=message) as error:
        HookedModel(case.make(), case.input, attention=given)
    assert "\n" not in str(error.value)


def test_a_declaration_is_a_table() -> None:
    with pytest.raises(ValueError, match="attention: a is 'mul@1': expected a table with pattern"):
        read_declarations({"a": "mul@1"})


def test_an_unknown_call_is_refused_with_those_like_it() -> None:
    case = CASES["retention"]
    with pytest.raises(KeyError, match="unknown call 'mull@1': did you mean mul@1"):
        HookedModel(case.make(), case.input, attention={"blocks.0.attn": {"pattern": "mull@1"}})


class Odd(nn.Module):
    """Attention of one layer in which values are weighed by a sum over features of queries and keys.

    Args:
        rescaled: divide the pattern by its sum after it is declared.
    """

    def __init__(self, rescaled: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(N_VOCAB, WIDTH), nn.Linear(WIDTH, N_VOCAB)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.rescaled = rescaled

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        pattern = torch.tanh(q[:, :, :, None] + k[:, :, None]).sum(-1).softmax(-1)
        if self.rescaled:
            pattern = pattern / pattern.square().sum(-1, keepdim=True)
        return self.head(x + self.o((pattern @ v).transpose(1, 2).flatten(2)))


def test_attention_without_a_product_of_queries_and_keys() -> None:
    module = Odd()
    given = {"pattern": "softmax@0"}
    tokens = TokenInput(N_VOCAB, CONTEXT)
    with pytest.raises(ValueError, match="say which are q and k, with q_axes and k_axes"):
        HookedModel(module, tokens, attention={"blocks.0.attn": given})
    axes = "batch head position d_head"
    more = {"q": "transpose@0", "q_axes": axes, "k": "transpose@1", "k_axes": axes}
    model = HookedModel(module, tokens, attention={"blocks.0.attn": given | more})
    inputs = tokens.example(2)
    names = [f"blocks.0.attn.hook_{x}" for x in ("q", "k", "v", "pattern", "z")]
    q, k, v, pattern, z = model.run(inputs, read=names).values()
    x = module.embed(inputs)
    for linear, value in ((module.q, q), (module.k, k), (module.v, v)):
        torch.testing.assert_close(value.flatten(2), linear(x))
    torch.testing.assert_close(z, torch.einsum("bhqk,bkhd->bqhd", pattern, v))
    with pytest.raises(ValueError, match="for which 'batch head' are no axes"):
        HookedModel(module, tokens, attention={"a": given | more | {"q_axes": "batch head"}})


def test_a_declaration_is_recomputed() -> None:
    """The pattern is rescaled after the tensor that is declared."""
    axes = {"q_axes": "batch head position d_head", "k_axes": "batch head position d_head"}
    given = {"pattern": "softmax@0", "q": "transpose@0", "k": "transpose@1", **axes}
    tokens = TokenInput(N_VOCAB, CONTEXT)
    with pytest.raises(
        ValueError, match=r"pattern @ v differs from what its heads read by [0-9.]+"
    ):
        HookedModel(Odd(rescaled=True), tokens, attention={"blocks.0.attn": given})
    right = {"blocks.0.attn": given | {"pattern": "div@0"}}
    model = HookedModel(Odd(rescaled=True), tokens, attention=right)
    assert model.site("blocks.0.attn.hook_z").n_units == 4


SOURCE = """
from circuits.models.adapter.hooked_model import HookedModel
from tests.attention_models import CASES

def make():
    case = CASES["sigmoid"]
    return HookedModel(case.make(), case.input, "own", attention={"blocks.1.attn": {"pattern": "tril@1"}})
"""


def written(folder: Path, text: str) -> str:
    (folder / "own.py").write_text(SOURCE)
    (folder / "own.attention.toml").write_text(text)
    return f"python:{folder / 'own.py'}:make"


def test_a_file_beside_the_model_declares(tmp_path: Path) -> None:
    name = written(tmp_path, '[make."blocks.0.attn"]\npattern = "tril@0"\nkeys = -1\n')
    model = load_model(name)
    assert [s.name for s in model.sites if s.name.endswith("hook_z")] == [
        "blocks.0.attn.hook_z",
        "blocks.1.attn.hook_z",
    ]
    (tmp_path / "own.attention.toml").unlink()
    assert load_model(name).left_out.keys() == {"tril@0"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[make", "own.attention.toml' is not TOML"),
        ("make = 3", 'make is 3: expected tables .FUNCTION."NAME".'),
        ('[make."a"]\npatern = "tril@0"', "make: a has no 'patern': expected pattern, keys"),
        ('[other."a"]\nkeys = 1', "other: a lacks 'pattern'"),
        ("pattern = 'tril@0'", "pattern is 'tril@0': expected tables"),
        ("[make]\na = 1", "make: a is 1: expected a table"),
        ("[a]" + "[" * 100_000, "is not TOML"),
    ],
)
def test_a_damaged_file_is_refused_in_a_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_model(written(tmp_path, text))
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    name = written(tmp_path, "")
    (tmp_path / "own.attention.toml").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8"):
        load_model(name)
