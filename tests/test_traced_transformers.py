"""Residual streams and weights of transformers that are no bridges, next to bridges and to weights read off by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from circuits.attribution.logits import direct_logit_attribution
from circuits.experiments.patching import patch_paths
from circuits.models.adapter.composition import composition_scores, ov, qk
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.adapter.transformer import Letter, Transformer
from circuits.models.paths.routes import stream_of
from tests.attention_models import CASES, Case
from tests.person_models import CONTEXT, N_VOCAB, NanoGPT
from tests.transformer_families import bridged

FAMILIES = ("gpt2", "gpt-j", "falcon", "llama", "gemma2", "olmo2", "cohere", "opt")
"""Learned and rotary positions, parallel layers, one key for all heads, norms after attention and of queries, scaled
and capped logits, an MLP whose rows are not by example."""


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[HookedModel, HookedModel]:
    """A model as a bridge and as its own module."""
    bridge, inner = bridged(request.param, tmp_path_factory.mktemp(request.param))
    return bridge, HookedModel(inner, bridge.input, request.param)


def names(model: HookedModel) -> dict[str, str]:
    return {name: site.name for site in model.sites for name in (site.name, *site.aliases)}


LAID_OUT = ("q_normed", "k_normed")
"""Where bridges show the layout of the module that they wrap, heads not split or before positions."""


def test_sites_hold_what_those_of_a_bridge_hold(pair: tuple[HookedModel, HookedModel]) -> None:
    bridge, traced = pair
    tokens = bridge.input.example(2)
    shared = [n for n in names(traced) if n in names(bridge) and not n.endswith(LAID_OUT)]
    for layer in (0, 1):
        some = (
            "attn.hook_q",
            "attn.hook_k",
            "attn.hook_v",
            "attn.hook_pattern",
            "attn.hook_z",
            "hook_resid_post",
        )
        assert {f"blocks.{layer}.{part}" for part in some} <= set(shared)
    one, other = bridge.run(tokens, read=shared), traced.run(tokens, read=shared)
    for name in shared:
        assert traced.site(name).axes == bridge.site(name).axes
        torch.testing.assert_close(
            other[name], one[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_weights_and_parts_of_logits_are_those_of_a_bridge(
    pair: tuple[HookedModel, HookedModel],
) -> None:
    one, other = (Transformer(model) for model in pair)
    for make in (qk, ov):
        for head in (0, 3):
            wanted, made = (make(transformer, 1, head) for transformer in (one, other))
            torch.testing.assert_close(
                made.left @ made.right, wanted.left @ wanted.right, rtol=1e-4, atol=1e-5
            )
    scores = [composition_scores(ov(t, 0, 1), qk(t, 1, 2), ov(t, 1, 2)) for t in (one, other)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)
    found, again = (direct_logit_attribution(m, m.input.example(2), "token:3") for m in pair)
    assert set(again.names) == set(found.names)
    for name, values in zip(again.names, again.values.T, strict=True):
        wanted = found.values[:, found.names.index(name)]
        torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt-j", "gemma2"])
def test_paths_have_the_effects_that_they_have_in_a_bridge(family: str, tmp_path: Path) -> None:
    bridge, inner = bridged(family, tmp_path)
    traced = HookedModel(inner, bridge.input, family)
    clean = bridge.input.example(2)
    corrupted = (clean + 3) % N_VOCAB
    some = [
        ("0.1", "1.2.q"),
        ("token", "logits"),
        ("mlp:0", "1.0.v"),
        ("0.3", "mlp:1"),
        ("1.1", "logits"),
    ]
    found, again = (patch_paths(m, clean, corrupted, some) for m in (bridge, traced))
    assert bool((found.effects.abs().amax(1) > 1e-4).all())
    torch.testing.assert_close(again.effects, found.effects, rtol=1e-3, atol=1e-5)


BY_HAND = {name: case for name, case in CASES.items() if case.qk is not None and not case.refused}


@pytest.mark.parametrize("name", BY_HAND)
def test_weights_by_head_are_those_of_the_state_dict(name: str) -> None:
    case: Case = BY_HAND[name]
    module = case.make(case.implementations[0])
    model = HookedModel(module, case.input, name)
    if isinstance(model.transformer, str):
        pytest.skip(f"no residual stream: {model.transformer}")
    found = Transformer(model)
    letters: tuple[Letter, ...] = ("Q", "K", "V")
    for layer in range(len(found.layers)):
        out, _ = found.writes_of(layer)
        for head in range(len(out)):
            query, key, value = (found.reads(letter, layer, head)[0] for letter in letters)
            where = f"blocks.{layer}.attn"
            torch.testing.assert_close(query @ key.T, _double(case.qk(module, where, head)))
            torch.testing.assert_close(value @ out[head], _double(case.ov(module, where, head)))


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double()


def test_weights_that_are_not_those_of_the_heads_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = HookedModel(NanoGPT(slow=True), TokenInput(N_VOCAB, CONTEXT), "nano")
    transformer = Transformer(model)
    assert not isinstance(model.transformer, str)
    turned = model.transformer.attention

    def wrong(name: str, layer: int) -> Tensor | None:
        found = turned(name, layer)  # type: ignore[arg-type]
        return found if found is None or name != "W_K" else found.flip(0)

    monkeypatch.setattr(transformer.parts, "attention", wrong)
    with pytest.raises(
        ValueError, match=r"blocks\.1\.attn\.hook_k of nano is off by .* of its size"
    ):
        transformer.reads("K", 1, 0)


def test_a_model_without_a_stream_says_why() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(N_VOCAB, 8)
            self.mix = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            return self.mix(x, x, x, need_weights=False)[0]

    model = HookedModel(Alone(), TokenInput(N_VOCAB, 6), "alone")
    assert model.site("blocks.0.attn.hook_z").shape == (6, 2, 4)
    with pytest.raises(
        ValueError,
        match=r"model alone has no residual stream: what blocks\.0\.attn puts out is added to",
    ):
        stream_of(model)
