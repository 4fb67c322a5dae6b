"""Heads of any transformer are found by tracing, read and changed exactly."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from circuits.models.adapter.hooked_model import HookedModel
from tests.attention_models import CASES, KNOWN, Case, Implementation

Made = tuple[Case, HookedModel, Implementation]
FOUND = [
    pytest.param(
        (name, how, fast),
        id=f"{name}-{how}{'-fast' if fast else ''}",
        marks=[pytest.mark.models] if case.assets else [],
    )
    for name, case in (CASES | KNOWN).items()
    if not case.refused
    for how in case.implementations
    for fast in ((False, True) if name.startswith("torch-encoder") else (False,))
]


@cache
def wrapped(name: str, how: Implementation) -> HookedModel:
    case = (CASES | KNOWN)[name]
    return HookedModel(case.make(how), case.input, name)


@pytest.fixture(params=FOUND)
def made(request: pytest.FixtureRequest) -> Iterator[Made]:
    name, how, fast = request.param
    case = (CASES | KNOWN)[name]
    if case.assets:
        request.getfixturevalue("assets")
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    yield case, wrapped(name, how), how
    torch.backends.mha.set_fastpath_enabled(before)


def expected(case: Case, model: HookedModel, inputs: Tensor) -> dict[str, Tensor]:
    """What the oracle says; windows are an axis of their own where there are several."""
    sites = case.oracle(model.module, inputs)
    return {
        name: value.squeeze(1) if name in model_sites(model, value.ndim - 1) else value
        for name, value in sites.items()
        if not name.endswith("mixed_pattern")
    }


def model_sites(model: HookedModel, rank: int) -> set[str]:
    return {site.name for site in model.sites if len(site.axes) == rank and site.kind != "neuron"}


def close(first: Tensor, second: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


def of_heads(model: HookedModel) -> list[str]:
    return [s.name for s in model.sites if s.kind in ("head", "pattern")]


def test_heads_are_found(made: Made) -> None:
    case, model, _ = made
    found = [(s.name, s.n_units) for s in model.sites if s.name.endswith("hook_z")]
    keys = {s.name: s.n_units for s in model.sites if s.name.endswith("hook_k")}
    assert found == [(f"{name}.hook_z", n) for name, n, _ in case.heads]
    assert keys == {f"{name}.hook_k": kv for name, _, kv in case.heads}


def test_sites_hold_what_attention_computes(made: Made) -> None:
    case, model, _ = made
    inputs = case.input.example(2, seed=1)
    sites = expected(case, model, inputs)
    cache = model.run(inputs, read=list(sites))
    for name, value in sites.items():
        assert cache[name].shape == value.shape, name
        assert tuple(value.shape[1:]) == model.site(name).shape, name
        close(cache[name], value)


def test_intervening_with_what_was_read_changes_nothing(made: Made) -> None:
    case, model, _ = made
    inputs = case.input.example(2, seed=1)
    plain = model.logits(inputs)
    for site in of_heads(model):
        fused = site.endswith(("hook_pattern", "hook_attn_scores"))
        before = model.run(inputs, read=[site])
        after = model.logits(inputs, {site: lambda t, v=before[site]: v.clone()})
        assert torch.equal(after, before.output), site
        close(after, plain) if fused else torch.testing.assert_close(after, plain, rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(model.logits(inputs), plain), "hooks are gone"


def test_sites_are_in_order_of_execution(made: Made) -> None:
    """Whatever comes before a site is known when the pass stops there."""
    case, model, _ = made
    inputs = case.input.example(2, seed=1)
    order: list[str] = []
    looks = {s.name: lambda _, name=s.name: order.append(name) for s in model.sites}
    model.observe(inputs, looks, until=model.sites[-1].name)
    assert order == [s.name for s in model.sites]
    for name in [s for s in of_heads(model) if s.endswith(("hook_z", "hook_q", "hook_pattern"))]:
        read = [s.name for s in model.sites[: 1 + order.index(name)]]
        stopped = model.run(inputs, read=read, until=name)
        assert stopped.output is None
        assert list(stopped) == read


def test_ablating_a_head_is_zeroing_its_output_weights(made: Made) -> None:
    case, model, _ = made
    inputs = case.input.example(2, seed=1)
    for name, n_heads, _ in case.heads:
        for head in range(n_heads):

            def ablate(z: Tensor, head: int = head) -> Tensor:
                kept = torch.ones(z.shape[-2])
                kept[head] = 0
                return z * kept[:, None]

            ablated = model.logits(inputs, {f"{name}.hook_z": ablate})
            with torch.no_grad():
                zeroed = case.output_weights(model.module, name, head)(inputs)
            close(ablated, zeroed, 1e-6 if zeroed.abs().max() < 3 else 1e-5)


def test_an_edit_of_one_head_changes_nothing_else(made: Made) -> None:
    case, model, _ = made
    inputs = case.input.example(2, seed=1)
    for name, n_heads, _ in case.heads:
        site = f"{name}.hook_z"
        plain = model.run(inputs, read=[site])
        # A classifier reads the first position alone after the last layer.
        images = inputs.is_floating_point()
        head, at = n_heads - 1, 0 if images else plain[site].shape[-3] // 2

        def edit(z: Tensor, head: int = head, at: int = at) -> Tensor:
            made = z.clone()
            made[..., at, head, :] += 1
            return made

        edited = model.run(inputs, read=[site], edits={site: edit})
        changed = (edited[site] != plain[site]).any(-1)
        assert changed[..., at, head].all()
        assert changed.sum() == changed[..., at, head].numel(), site
        if causal(case, model, name):
            # To the bit, except where a softmax takes off the largest of all scores, later ones too.
            exact = 0 if case.name not in ("person", "one-hot", "grouped") else 1e-6
            earlier = edited.output[:, :at], plain.output[:, :at]
            torch.testing.assert_close(*earlier, rtol=exact, atol=exact)
        assert not torch.equal(edited.output, plain.output)


def causal(case: Case, model: HookedModel, name: str) -> bool:
    """Whether no query of any attention sees a later key."""
    if name.startswith(("encoder", "decoder")) or case.input.example(1).is_floating_point():
        return False
    inputs = case.input.example(2, seed=1)
    sites = case.oracle(model.module, inputs)
    return all(
        not value.triu(1).any() for key, value in sites.items() if key.endswith("hook_pattern")
    )
