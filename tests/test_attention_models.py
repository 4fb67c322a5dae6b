"""The oracles of attention agree with themselves and with the models' outputs."""

from __future__ import annotations

import pytest
import torch

from tests.attention_models import CASES, Case, projections, watched

ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def close(first: torch.Tensor, second: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)


@ALL
def test_pattern_and_z(case: Case) -> None:
    """Rows of patterns sum to one, and z is the pattern's product with the values."""
    module, inputs = case.make(), case.input.example(2, seed=1)
    sites = case.oracle(module, inputs)
    for name, n_heads, n_kv in case.heads:
        pattern, z, v = (sites[f"{name}.hook_{site}"] for site in ("pattern", "z", "v"))
        assert pattern.shape[-3] == z.shape[-2] == n_heads
        assert v.shape[-2] == n_kv
        close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
        made = torch.einsum(
            "...hqk,...khd->...qhd", pattern, v.repeat_interleave(n_heads // n_kv, -2)
        )
        close(z, made)
        # Neither saturated nor uniform, so that a mistake in scores shows.
        assert (pattern.amax(-1) < 0.99).float().mean() > 0.2, name
        assert (pattern.amax(-1) - pattern.amax(-1).amin(-1, keepdim=True)).amax() > 0.1, name
        rows = pattern.flatten(0, -3)[:, -1]  # the last query sees all keys that any sees
        assert (rows.amax(-1) > 1.5 * rows.sum(-1) / (rows > 0).sum(-1)).float().mean() > 0.2, name


@ALL
def test_zeroed_heads_change_the_output(case: Case) -> None:
    module, inputs = case.make(), case.input.example(2, seed=1)
    with torch.no_grad():
        before = module(inputs)
        for name, n_heads, _ in case.heads:
            for head in range(n_heads):
                after = case.output_weights(module, name, head)(inputs)
                assert (after - before).abs().max() > 1e-3, (name, head)
        torch.testing.assert_close(module(inputs), before, rtol=0, atol=0)


@ALL
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


@ALL
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
