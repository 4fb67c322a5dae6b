"""The oracles of attention agree with themselves and with the models' outputs."""

from __future__ import annotations

import pytest
import torch

from tests.attention_models import CASES, Case

ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@ALL
def test_pattern_and_z(case: Case) -> None:
    """Rows of patterns sum to one, and z is the pattern's product with the values."""
    module, inputs = case.make(), case.input.example(2, seed=1)
    sites = case.oracle(module, inputs)
    for name, n_heads, n_kv in case.heads:
        pattern, z, v = (sites[f"{name}.hook_{site}"] for site in ("pattern", "z", "v"))
        assert pattern.shape[-3] == z.shape[-2] == n_heads
        assert v.shape[-2] == n_kv
        torch.testing.assert_close(
            pattern.sum(-1), torch.ones(pattern.shape[:-1]), rtol=1e-5, atol=1e-5
        )
        made = torch.einsum(
            "...hqk,...khd->...qhd", pattern, v.repeat_interleave(n_heads // n_kv, -2)
        )
        torch.testing.assert_close(z, made, rtol=1e-5, atol=1e-5)
        assert (pattern.max(-1).values < 1 - 1e-3).float().mean() > 0.2, "patterns that say nothing"


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
    torch.testing.assert_close(outputs[0], outputs[-1], rtol=1e-5, atol=1e-5)
    first, last = (case.oracle(module, inputs) for module in (made[0], made[-1]))
    torch.testing.assert_close(first, last, rtol=1e-5, atol=1e-5)
