"""The oracles of attention agree with themselves and with the models' outputs."""

from __future__ import annotations

import pytest
import torch

from circuits.models.zoo.loading import load_model
from tests.attention_models import CASES, KNOWN, Case, Implementation, projections, watched

PATTERNS = ("pattern", "mixed_pattern", "implied_pattern")
EVERY = [
    pytest.param(case, id=name, marks=[pytest.mark.models] if case.assets else [])
    for name, case in (CASES | KNOWN).items()
]

EVERY_KNOWN = [
    pytest.param(name, marks=[pytest.mark.models] if case.assets else [])
    for name, case in KNOWN.items()
]


@pytest.fixture(params=EVERY)
def case(request: pytest.FixtureRequest) -> Case:
    if request.param.assets:
        request.getfixturevalue("assets")
    return request.param


def close(first: torch.Tensor, second: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


def test_pattern_and_z(case: Case) -> None:
    """Rows of patterns sum to one, and z is the values' sum, weighed by the pattern or what is made of it."""
    module, inputs = case.make(), case.input.example(2, seed=1)
    sites = case.oracle(module, inputs)
    for name, n_heads, n_kv in case.heads:
        given = {x: sites[f"{name}.hook_{x}"] for x in PATTERNS if f"{name}.hook_{x}" in sites}
        z, v = sites[f"{name}.hook_z"], sites[f"{name}.hook_v"]
        pattern, weights = next(iter(given.values())), list(given.values())[-1]
        assert pattern.shape[-3] == z.shape[-2] == n_heads
        assert v.shape[-2] == n_kv
        close(
            z,
            torch.einsum(
                "...hqk,...khd->...qhd", weights, v.repeat_interleave(n_heads // n_kv, -2)
            ),
        )
        assert list(given) == (["pattern", "mixed_pattern"] if case.mixed else list(given)[:1])
        sums = pattern.sum(-1)
        if case.refused:
            assert "implied_pattern" in given or (sums - 1).abs().max() > 0.1
            continue
        close(sums, torch.ones_like(sums))
        # Neither saturated nor uniform, so that a mistake in scores shows.
        last = pattern.flatten(0, -3)[:, -1]  # the last query sees all keys that any sees
        assert (pattern.amax(-1) < 0.99).float().mean() > 0.2, name
        assert (last.amax(-1) > 1.5 / (last > 0).sum(-1)).float().mean() > 0.2, name


def test_zeroed_heads_change_the_output(case: Case) -> None:
    module, inputs = case.make(), case.input.example(2, seed=1)
    with torch.no_grad():
        before = module(inputs)
        for name, n_heads, _ in case.heads:
            for head in range(n_heads):
                after = case.output_weights(module, name, head)(inputs)
                assert (after - before).abs().max() > 1e-3, (name, head)
        torch.testing.assert_close(module(inputs), before, rtol=0, atol=0)


def test_implementations_agree(case: Case) -> None:
    inputs = case.input.example(2, seed=1)
    made = [case.make(implementation) for implementation in case.implementations]
    with torch.no_grad():
        outputs = [module(inputs) for module in made]
    assert isinstance(outputs[0], torch.Tensor)
    close(outputs[0], outputs[-1])
    first, last = (case.oracle(module, inputs) for module in (made[0], made[-1]))
    assert first.keys() == last.keys()
    for site, value in first.items():
        close(value, last[site])


def test_weights_give_what_is_computed(case: Case) -> None:
    """Projections of what is read, products of queries and keys, and what heads write, from the weights alone."""
    module, inputs = (
        case.make("eager" if "eager" in case.implementations else None),
        case.input.example(2, seed=1),
    )
    sites = case.oracle(module, inputs)
    for attention in case.attentions:
        if attention.q in ("", "-"):  # computed from the weights in the first place
            continue
        w = case.weights(module, attention)
        with torch.no_grad():
            seen = watched(module, inputs, projections((attention,)))
        calls = {x: seen[f"{attention.module}.{getattr(attention, x)}"] for x in "qkvo"}
        flat = {x: sites[f"{attention.name}.hook_{x}"].flatten(0, -4) for x in "qkvz"}
        for letter in "qkv":
            bias = getattr(w, f"{letter}_bias")
            flat[letter] = flat[letter] if bias is None else flat[letter] - bias
            made = torch.einsum("bpm,mhd->bphd", calls[letter][0][0], getattr(w, letter))
            close(made, flat[letter])
        written = torch.einsum("bphd,hdm->bpm", flat["z"], w.o)
        close(written if w.o_bias is None else written + w.o_bias, calls["o"][2])
        for head in range(attention.n_heads):
            group = head * attention.n_kv_heads // attention.n_heads
            qk, ov = (found(module, attention.name, head) for found in (case.qk, case.ov))
            scores = torch.einsum("bqd,bkd->bqk", flat["q"][:, :, head], flat["k"][:, :, group])
            close(calls["q"][0][0] @ qk @ calls["k"][0][0].mT, scores, 1e-4)
            close(calls["v"][0][0] @ ov, flat["v"][:, :, group] @ w.o[head])


@pytest.mark.parametrize("how", ["eager", "sdpa"])
@pytest.mark.parametrize("name", EVERY_KNOWN)
def test_plain_modules_are_the_built_in_models(
    name: str, how: Implementation, request: pytest.FixtureRequest
) -> None:
    if KNOWN[name].assets:
        request.getfixturevalue("assets")
    inputs = KNOWN[name].input.example(2, seed=1)
    with torch.no_grad():
        close(KNOWN[name].make(how)(inputs), load_model(name).module(inputs))
