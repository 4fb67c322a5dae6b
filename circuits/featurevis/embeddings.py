"""Feature visualization for token models: the embeddings, which are continuous, that excite a unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.autograd import recording_gradients
from circuits.featurevis.objectives import Objective, Response, as_objective
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.progress import Progress
from circuits.tables import Table

EMBEDDINGS = ("hook_embed", "embed.hook_out", "embed", "embedding", "wte")
"""Names of sites that may hold the embeddings of tokens."""


@dataclass(frozen=True, eq=False)
class Dream:
    """Embeddings on which an objective is large, and the tokens nearest to them.

    Attributes:
        objective: the objective in words.
        embeddings: one embedding for each position.
        activation: the objective's value on them.
        start: its value on the initial embeddings, those of random tokens.
        tokens: the nearest tokens, by cosine.
        cosines: the cosine of each with its nearest token.
        of_tokens: the objective's value on the nearest tokens, which shows how much of it real tokens can reach.
        model_hash: the hash of the model.
        steps: the number of steps done.
        seed: seed of the initial tokens.
    """

    objective: str
    embeddings: Float[Tensor, "position d_model"]
    activation: float
    start: float
    tokens: tuple[int, ...]
    cosines: tuple[float, ...]
    of_tokens: float
    model_hash: str
    steps: int
    seed: int

    def to_dict(self, words: Sequence[str]) -> dict[str, Any]:
        """All but the embeddings, as JSON has it; `words` are the tokens as they are written."""
        return {
            "objective": self.objective, "activation": self.activation, "start_activation": self.start,
            "activation_of_tokens": self.of_tokens, "tokens": self.tokens, "words": list(words),
            "cosines": self.cosines, "model_hash": self.model_hash, "steps": self.steps, "seed": self.seed,
        }  # fmt: skip

    def table(self, words: Sequence[str]) -> Table:
        """The nearest token at each position, and what the objective reaches."""
        rows = [
            (i, repr(word), c) for i, (word, c) in enumerate(zip(words, self.cosines, strict=True))
        ]
        note = (
            f"{self.objective}: {self.activation:.4g} on embeddings, {self.of_tokens:.4g} on the nearest tokens, "
            f"{self.start:.4g} on random ones ({self.steps} steps, seed {self.seed})"
        )
        return Table(("position", "nearest token", "cosine"), rows, note=note)


@recording_gradients()
def dream(
    model: HookedModel,
    target: str | Objective,
    *,
    positions: int = 8,
    steps: int = 128,
    seed: int = 0,
    learning_rate: float = 0.05,
    progress: Progress | None = None,
) -> Dream:
    """The embeddings that excite a unit of a token model most, by gradient ascent.

    Each keeps the norm of a real token's embedding, so that the model stays in the range it was trained on.

    Args:
        model: a token model.
        target: a unit, direction, site or objective.
        positions: the number of positions, at most the model's context.
        steps: number of optimisation steps.
        seed: seed of the initial tokens.
        learning_rate: learning rate of NAdam, in units of the embeddings' norm.
        progress: called with the number of steps done and the total; stops the work if it returns False.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if the model takes images, it has no site of embeddings, an argument is out of range,
            a value is not finite, or no gradient leads from the target to the embeddings.
    """
    spec = model.input
    if not isinstance(spec, TokenInput):
        raise ValueError(
            f"model {model.name} takes images: expected a token model (use `visualize`)"
        )
    if not 1 <= positions <= spec.n_ctx:
        raise ValueError(f"positions {positions} must be from 1 to {spec.n_ctx}")
    if steps < 1:
        raise ValueError(f"steps {steps} must be at least 1")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed {seed} must be from 0 to 2^63 - 1")
    objective = as_objective(model, target)
    place = _embedding_site(model)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(spec.n_vocab, (1, positions), generator=generator)
    if spec.bos is not None:
        tokens[0, 0] = spec.bos
    table = _table(model, place, spec)
    start = model.run(tokens, read=[place], until=place)[place].detach().float()
    # Each embedding keeps the norm of the token that it started from: without that bound, the objective could be raised
    # for ever by length alone, to where no token is.
    norms = start.norm(dim=2, keepdim=True)
    free = (start / norms.clamp_min(1e-6)).clone().requires_grad_(True)
    first = 0 if spec.bos is None else 1  # the beginning-of-text token stays as it is

    def embedded() -> Tensor:
        moved = torch.nn.functional.normalize(free, dim=2) * norms
        return torch.cat([start[:, :first], moved[:, first:]], 1)

    def value(embeddings: Tensor, grad: bool) -> Tensor:
        until = model.last([place, *objective.sites])
        cache = model.run(
            tokens,
            read=objective.sites,
            until=until,
            edits={place: lambda _: embeddings},
            grad=grad,
        )
        found = {name: cache[name] for name in objective.sites}
        return objective.value(Response(embeddings, found))[0]

    optimizer = torch.optim.NAdam([free], lr=learning_rate)
    before = float(value(start, False))
    done = 0
    for step in range(steps):
        own = value(embedded(), True)
        if not torch.isfinite(own):
            raise ValueError(
                f"objective {objective.text} is not a finite number at step {step + 1}"
            )
        if not own.requires_grad:
            raise ValueError(
                f"objective {objective.text}: no gradient leads from it to the embeddings"
            )
        optimizer.zero_grad()
        (-own).backward()
        optimizer.step()
        done = step + 1
        if progress and progress(done, steps) is False:
            break
    final = embedded().detach()
    nearest, cosines = _nearest(final[0], table)
    exact = model.run(nearest[None], read=[place], until=place)[place].detach().float()
    return Dream(
        objective.text,
        final[0].cpu(),
        float(value(final, False)),
        before,
        tuple(nearest.tolist()),
        tuple(cosines.tolist()),
        float(value(exact, False)),
        model.hash,
        done,
        seed,
    )


def _embedding_site(model: HookedModel) -> str:
    known = {name for site in model.sites for name in (site.name, *site.aliases)}
    for name in EMBEDDINGS:
        if name in known:
            return model.site(name).name
    raise ValueError(
        f"model {model.name} has no site of embeddings: expected one of {', '.join(EMBEDDINGS)}"
    )


def _table(model: HookedModel, place: str, spec: TokenInput) -> Float[Tensor, "token d_model"]:
    """The embedding of every token, read from the model itself."""
    rows = []
    for start in range(0, spec.n_vocab, spec.n_ctx):
        # Texts as long as the model takes them, until every token of the vocabulary has been read: at the embedding
        # site nothing has mixed positions yet.
        tokens = torch.arange(start, min(start + spec.n_ctx, spec.n_vocab))[None]
        rows.append(model.run(tokens, read=[place], until=place)[place][0].detach().float())
    return torch.cat(rows)


def _nearest(
    embeddings: Float[Tensor, "position d_model"], table: Float[Tensor, "token d_model"]
) -> tuple[Int[Tensor, " position"], Float[Tensor, " position"]]:
    """The token whose embedding has the largest cosine with each."""
    alike = (
        torch.nn.functional.normalize(embeddings, dim=1)
        @ torch.nn.functional.normalize(table, dim=1).T
    )
    cosines, tokens = alike.max(1)
    return tokens, cosines
