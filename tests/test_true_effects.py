"""What removing a head costs on the behaviour that its model was made for, worked out in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from circuits.experiments.ablation import ablate
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.tasks.builtin import load_task


def log_p(model: HookedModel, tokens: Tensor, site: str, head: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the model as it is, and with a head's output set to zero at every position."""

    def without(value: Tensor) -> Tensor:
        made = value.clone()
        made[:, :, head] = 0
        return made

    intact, changed = model.logits(tokens), model.logits(tokens, {site: without})
    return intact.double().log_softmax(-1), changed.double().log_softmax(-1)


@pytest.mark.parametrize(
    ("name", "true"),
    [
        ("addition-by-hand", 4.68),
        pytest.param("modular-addition", 0.044, marks=pytest.mark.models),
    ],
)
def test_a_head_of_addition_is_read_at_the_equals_sign(
    name: str, true: float, request: pytest.FixtureRequest
) -> None:
    if name == "modular-addition":
        request.getfixturevalue("assets")
    model = load_model(name)
    # all of them: on a few hundred, the mean of modular-addition depends on which few are hard
    task = load_task(model, n=113 * 113)
    effect = ablate(model, ["blocks.0.attn.hook_z:0"], task, n_random=0, batch=2048).effects[
        "cross_entropy"
    ]
    a, b = (
        v.flatten() for v in torch.meshgrid(torch.arange(113), torch.arange(113), indexing="ij")
    )
    tokens = torch.stack([a, b, torch.full_like(a, 113)], 1)
    before, after = log_p(model, tokens, "blocks.0.attn.hook_z", 0)
    answer = ((a + b) % 113)[:, None]
    plain = float((before[:, -1].gather(1, answer) - after[:, -1].gather(1, answer)).mean())
    assert effect.n == 113 * 113
    assert effect.change == pytest.approx(plain, abs=1e-6)
    assert plain == pytest.approx(true, rel=0.05)


def copied(row: list[int]) -> set[int]:
    """The positions whose next token is the one that followed the last time, told from the tokens alone.

    The pattern goes on to the end with one period, and its first round cannot be copied.
    """
    n = len(row)
    period = next(k for k in range(6, 25) if row[-6:] == row[-6 - k : n - k])
    start = next(s for s in range(1, n) if row[s + period :] == row[s : n - period])
    return set(range(start + period, n - 1))


@pytest.mark.parametrize(("unit", "true"), [("0:3", 3.27), ("1:0", 0.135)])
def test_a_head_of_induction_is_read_where_copying_is_possible(unit: str, true: float) -> None:
    model = load_model("induction")
    layer, head = unit.split(":")
    site = f"blocks.{layer}.attn.hook_z"
    task = load_task(model, n=64)
    effect = ablate(model, [f"{site}:{head}"], task, n_random=0).effects["cross_entropy"]
    tokens = task.examples.inputs
    before, after = log_p(model, tokens, site, int(head))
    following = tokens[:, 1:, None]
    change = (before[:, :-1].gather(2, following) - after[:, :-1].gather(2, following))[..., 0]
    counted = [sorted(q.positions or ()) for q in task.questions]
    plain = torch.stack([c[at].mean() for c, at in zip(change, counted, strict=True)]).mean()
    assert effect.change == pytest.approx(float(plain), abs=1e-6)
    # a token before the pattern may by chance be as if it belonged to it
    alone = [sorted(copied(row)) for row in tokens.tolist()]
    assert sum(a == b for a, b in zip(alone, counted, strict=True)) >= 58
    told = torch.stack([c[at].mean() for c, at in zip(change, alone, strict=True)]).mean()
    assert effect.change == pytest.approx(float(told), rel=0.02)
    assert effect.change == pytest.approx(true, rel=0.15)
