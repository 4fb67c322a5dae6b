"""The logit lens against the same computed by hand, and what layers add up to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from circuits.attribution import direct_logit_attribution
from circuits.localization import lens_tokens, logit_lens
from circuits.localization.pairing import OtherPairs
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.zoo.loading import load_model
from circuits.models.zoo.transformers import native_bridge
from circuits.tasks import Item, Task, UnitActivation, compile_task
from circuits.tasks.builtin import load_task
from circuits.tasks.targets import parse_target

TOKENS = torch.randint(20, (5, 7), generator=torch.Generator().manual_seed(6))
SITES = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"]


def read_at(model: HookedModel) -> Task:
    """A logit difference at the last and at the third position."""
    items = [
        Item(tuple(row), ((3,),), ((9,),), positions=(2, -1), group=str(i)) for i, row in enumerate(TOKENS.tolist())
    ]  # fmt: skip
    return compile_task(model, items)


def normalised(x: Tensor, kind: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if kind == "LN" else x
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


@pytest.fixture(params=["LN", "RMS"])
def transformer(request: pytest.FixtureRequest) -> HookedModel:
    extra = {"final_rms": True} if request.param == "RMS" else {}
    bridge: Any = native_bridge(
        d_model=16, d_head=4, n_heads=4, n_layers=2, n_ctx=12, d_vocab=20, d_mlp=24, act_fn="gelu",
        normalization_type=request.param, **extra,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, p in bridge.named_parameters():
            if "ln_final" in name:
                p.copy_(torch.randn(p.shape, generator=generator))
    return HookedModel(bridge, TokenInput(20, 12), request.param)


def test_each_depth_goes_through_the_final_normalisation(transformer: HookedModel) -> None:
    model, bridge = transformer, transformer.module
    norm: Any = bridge.ln_final  # type: ignore[union-attr]
    weight, bias = norm.weight.detach(), getattr(norm, "bias", None)
    cache = model.run(TOKENS, read=SITES)
    found = logit_lens(model, read_at(model))
    assert found.sites == tuple(SITES)
    for k, site in enumerate(SITES):
        read = normalised(cache[site], model.name) * weight + (0 if bias is None else bias.detach())
        logits = read @ bridge.W_U.detach() + bridge.b_U.detach()  # type: ignore[union-attr, operator]
        wanted = (logits[..., 3] - logits[..., 9])[:, [2, 6]].mean(1)
        np.testing.assert_allclose(found.values[k], wanted, atol=1e-5)
    np.testing.assert_allclose(found.values[-1], found.intact, atol=1e-6)
    assert found.depths[1].value == pytest.approx(found.values[1].mean())


def test_held_at_its_scale_layers_add_what_they_write(transformer: HookedModel) -> None:
    model = transformer
    task = compile_task(
        model, [Item(tuple(row), ((3,),), ((9,),), group=str(i)) for i, row in enumerate(TOKENS.tolist())]
    )  # fmt: skip
    held = logit_lens(model, task, norm="held", null=False)
    np.testing.assert_allclose(held.values[-1], held.intact, atol=1e-5)
    parts = direct_logit_attribution(model, TOKENS, parse_target(model, "token:3", "9"))
    by_name = dict(zip(parts.names, parts.values.T, strict=True))
    for layer in range(2):
        added = held.values[layer + 1] - held.values[layer]
        own = [v for name, v in by_name.items() if name.startswith(f"blocks.{layer}.")]
        np.testing.assert_allclose(added, torch.stack(own).sum(0), atol=1e-5)


def test_the_null_is_another_examples_stream(bridge: HookedModel) -> None:
    task = read_at(bridge)
    found = logit_lens(bridge, task, seed=5)
    site = bridge.site(SITES[1])
    partner = OtherPairs(bridge, task, task.examples, [site], 1, 5).partners[0]
    assert all(p != i for i, p in enumerate(partner))
    np.testing.assert_allclose(found.random[1], found.values[1][partner], atol=1e-6)


def test_copying_is_there_only_behind_the_last_layer() -> None:
    model = load_model("induction")
    found = logit_lens(model, load_task(model, n=8), metric="accuracy")
    assert found.values[-1].mean() > 0.95
    assert (found.values[:-1].mean(1) < 0.2).all()
    assert found.random[-1].mean() < 0.2


def test_first_choices_of_a_text(bridge: HookedModel) -> None:
    found = lens_tokens(bridge, TOKENS[0].tolist(), middle=True)
    assert found.sites == (
        "blocks.0.hook_resid_pre", "blocks.0.hook_resid_mid", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid",
        "blocks.1.hook_resid_post",
    )  # fmt: skip
    p = bridge.logits(TOKENS[:1])[0].double().softmax(-1)
    assert found.first[-1].tolist() == p.argmax(-1).tolist()
    np.testing.assert_allclose(found.probability[-1], p.amax(-1), atol=1e-6)
    held = lens_tokens(bridge, TOKENS[0].tolist(), norm="held")
    np.testing.assert_allclose(held.probability[-1], p.amax(-1), atol=1e-5)
    assert found.words[-1][0] == str(found.first[-1][0])


def test_bad_input_is_one_clear_line(bridge: HookedModel, branches: HookedModel) -> None:
    task = read_at(bridge)
    with pytest.raises(
        ValueError,
        match="model Branches has no residual stream: no attention was found in it",
    ):
        lens_tokens(branches, "1 2")
    inside = task.with_metric(UnitActivation.named(bridge, "blocks.0.mlp.hook_post:3"))
    with pytest.raises(
        ValueError, match=r"reads blocks\.0\.mlp\.hook_post: the lens changes only the output"
    ):
        logit_lens(bridge, inside)
    with pytest.raises(ValueError, match="token 25 is not in the vocabulary"):
        lens_tokens(bridge, [1, 25])
