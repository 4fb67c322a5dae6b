"""Alignment search: a planted subspace is found, and a direction that merely works is refused."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from circuits.claims import TESTS, TaskSpec
from circuits.claims.abstraction.algorithms import load_algorithm
from circuits.claims.abstraction.alignment import Search, overlap, sole_reader, split
from circuits.claims.abstraction.pairs import Deck, asked
from circuits.claims.abstraction.places import Intervention
from circuits.claims.subject import Subject, load_claims_task
from circuits.claims.verdicts import Level, Measured
from circuits.environment import TRUST_PYTHON
from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.zoo.loading import load_model
from circuits.tasks.metrics import accuracy
from circuits.tasks.task import Question, Task


@pytest.fixture(scope="module")
def addition() -> Subject:
    model = load_model("addition-by-hand")
    return Subject(model, load_claims_task(model, TaskSpec(examples=600)))


def aligned(subject: Subject, **given: Any) -> Measured:
    test = TESTS["alignment"]
    return test.run(subject, test.settings(given, "alignment"), Level(0.05, 1))


# --- subspaces ---------------------------------------------------------------------------------------


def test_the_overlap_of_lines_is_the_squared_cosine_of_their_angle():
    lines = [torch.tensor([[math.cos(a)], [math.sin(a)]]) for a in (0.2, 1.0)]
    assert math.isclose(overlap(*lines), math.cos(0.8) ** 2, rel_tol=1e-5)


def test_a_subspace_is_split_into_what_is_read_and_what_is_not():
    weights = torch.tensor([[2.0, 0.0, 0.0], [4.0, 0.0, 0.0]])
    read, unread = split(torch.tensor([[0.6], [0.8], [0.0]]), weights)
    torch.testing.assert_close(read.abs(), torch.tensor([[1.0], [0.0], [0.0]]))
    torch.testing.assert_close(unread.abs(), torch.tensor([[0.0], [1.0], [0.0]]))
    assert [part.shape[1] for part in split(torch.eye(3)[:, 1:], weights)] == [0, 2]


def test_only_what_one_layer_alone_reads_is_split(addition: Subject):
    model, deck = addition.model, Deck(addition.test)
    for site, layer in (
        ("blocks.0.mlp.hook_post", "blocks.0.mlp.out"),
        ("blocks.0.attn.hook_z", "blocks.0.attn.o"),
    ):
        found = sole_reader(model, model.site(site), deck)
        assert found is not None
        assert found[0] == layer
        torch.testing.assert_close(found[1], model.parameters[f"{layer}.weight"].detach())
    # The heads read the stream before them, and so do the MLP and the logits, past them.
    assert sole_reader(model, model.site("blocks.0.hook_resid_pre"), deck) is None


# --- what is found -----------------------------------------------------------------------------------


def test_the_planted_subspace_is_found_and_nothing_in_shuffled_weights(addition: Subject):
    made = aligned(
        addition, algorithm="addition", variable="sum @ blocks.0.hook_resid_post @ -1", width=10
    )
    assert made.verdict(0.05)[0] == "holds", made
    found = made.quantities[0]
    assert found.value == 1.0
    assert max(found.null) < 0.1
    # The answer's waves are units 20 to 29 of the stream; what it carries otherwise tells of the numbers too.
    assert overlap(torch.tensor(made.details["basis"]), torch.eye(43)[:, 20:30]) >= 0.99
    assert Measured.from_dict(made.to_dict()).verdict(0.05) == made.verdict(0.05)


def test_a_search_says_the_same_again_and_leaves_the_model(addition: Subject):
    intervention = Intervention.parse("sum @ blocks.0.mlp.hook_post:0-20 @ -1")
    deck = Deck(addition.find)
    pairs = asked(deck, load_algorithm("addition"), intervention, deck.draw(40, 1))
    search = Search(deck, intervention.places["sum"], 3, 4, 5)
    before = addition.model.hash
    first, second = search.basis(pairs), search.basis(pairs)
    assert torch.equal(first, second)
    torch.testing.assert_close(first.T @ first, torch.eye(3))
    assert addition.model.hash == before
    assert not addition.model.edited


def test_plain_hooks_count_the_same(addition: Subject):
    small = replace(addition, task=addition.task.subset(range(160)))
    name = "blocks.0.mlp.hook_post"
    made = aligned(
        small, algorithm="addition", variable=f"sum @ {name} @ -1", width=9, pairs=64, steps=120
    )
    basis, deck = torch.tensor(made.details["basis"]), Deck(small.test)
    module: Any = small.model.module
    weights = small.model.parameters["blocks.0.mlp.out.weight"].detach()
    read = torch.linalg.pinv(weights) @ weights @ basis
    for vectors, quantity in (
        (basis, made.quantities[0]),
        (torch.linalg.qr(read).Q, made.quantities[3]),
    ):
        right = []
        for pair in deck.deal(0):
            base, source = (list(deck.inputs(e)) for e in (pair.base, pair.source))  # type: ignore[arg-type]
            if sum(base) % 113 == sum(source) % 113:
                continue
            kept: dict[str, Tensor] = {}

            def note(value: Tensor, hook: Any, kept: dict[str, Tensor] = kept) -> None:
                kept["value"] = value.clone()

            def put(
                value: Tensor, hook: Any, kept: dict[str, Tensor] = kept, v: Tensor = vectors
            ) -> Tensor:
                value = value.clone()
                value[:, -1] += (kept["value"][:, -1] - value[:, -1]) @ v @ v.T
                return value

            with torch.no_grad():
                module.run_with_hooks(torch.tensor([source]), fwd_hooks=[(name, note)])
                logits = module.run_with_hooks(torch.tensor([base]), fwd_hooks=[(name, put)])
            right.append(int(logits[0, -1].argmax()) == sum(source[:2]) % 113)
        found = np.mean(right) - (
            0.8 * made.quantities[0].value if quantity is made.quantities[3] else 0
        )
        assert abs(found - quantity.value) < 1e-5
    assert 0 < made.quantities[0].value < 1


# --- the illusion ------------------------------------------------------------------------------------

OTHERS = 120


class Past(nn.Module):
    """A text of one token, z * OTHERS + t; z goes to the output past an MLP with random weights.

    Its hidden layer, random features, tells z; what it writes is noise, too small to decide. Half of a direction that
    the layer's output weights cannot read, and that tells z, and half of one that it reads, and that hardly moves with
    z, work together: along their sum z from another input decides (Makelov et al. 2023).
    """

    def __init__(self) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(2 * OTHERS, 16)
        self.hidden, self.act = nn.Linear(16, 512), nn.ReLU()
        self.out, self.unembed = nn.Linear(512, 16, bias=False), nn.Linear(16, 2 * OTHERS)
        with torch.no_grad():
            tokens = torch.randn(OTHERS, 16, generator=drawn).repeat(2, 1, 1)
            tokens[0, :, 0], tokens[1, :, 0] = -1.0, 1.0
            self.embed.weight.copy_(tokens.flatten(0, 1))
            self.hidden.weight.copy_(torch.randn(512, 16, generator=drawn) / 4)
            self.hidden.bias.zero_()
            self.out.weight.copy_(0.03 * torch.randn(16, 512, generator=drawn))
            self.unembed.weight.zero_()
            self.unembed.weight[0, 0], self.unembed.weight[1, 0] = -1.0, 1.0
            self.unembed.bias.fill_(-20.0)
            self.unembed.bias[:2] = 0.0

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.unembed(x + self.out(self.act(self.hidden(x))))


def test_a_direction_that_works_through_random_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(TRUST_PYTHON, "1")
    (tmp_path / "z.py").write_text(
        f"def z(inputs, let):\n    return let('z', inputs[0] // {OTHERS})\n"
    )
    model = HookedModel(Past(), TokenInput(2 * OTHERS, 1), "past")
    names = [str(i) for i in range(2 * OTHERS)]
    questions = tuple(Question((0,), ((i // OTHERS,),)) for i in range(2 * OTHERS))
    task = Task(
        "z", Examples.texts(model, [[i] for i in range(2 * OTHERS)], names), questions, accuracy
    )
    subject = Subject(model, task, folder=tmp_path)
    made = aligned(subject, algorithm="z.py:z", variable="z @ act", width=1, steps=100, pairs=256)
    works, beats_weights, beats_answers, through_what_is_read = made.quantities
    # By everything but the last it is a finding: the whole layer does nothing, and a direction of it decides.
    assert works.value > 0.95
    assert min(beats_weights.low, beats_answers.low) > 0.2
    assert "interchange of the whole place has an accuracy of 0.0%" in made.notes
    assert through_what_is_read.p_refuted < 1e-6
    assert made.verdict(0.05)[0] == "refuted"
    found = re.search(
        r"out reads .*accuracy ([0-9.]+)%\) and cannot read .*accuracy ([0-9.]+)%\)", made.notes[2]
    )
    assert found is not None
    assert max(float(found[1]), float(found[2])) < 10
    # Where z really is, the same test lets it stand.
    held = aligned(
        subject, algorithm="z.py:z", variable="z @ embed", width=1, steps=60, pairs=128, least=0.8
    )
    assert held.verdict(0.05)[0] == "holds", held


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"variable": "sum @ blocks.0.hook_mlp_out:0,1", "width": 3},
            "width 3: expected at most 2",
        ),
        (
            {"variable": "sum @ blocks.0.hook_mlp_out; x @ blocks.0.hook_mlp_out"},
            "expected one variable at one place",
        ),
    ],
)
def test_what_does_not_fit_is_refused(addition: Subject, given: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        aligned(addition, algorithm="addition", **given)
