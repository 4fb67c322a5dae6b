"""Copying by weights: whether what a head writes for a token raises that token's own logit, among some tokens.

Wang et al. 2022, "Interpretability in the Wild", section 3.3 and appendix on name movers: the stream at a token, after
the first layer, goes through the head's W_OV and the unembedding; a head copies if the token's own logit comes out
among the highest. A head whose OV circuit lowers it is a negative mover (section 3.3) if it attends there. Nothing here
says where a head attends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.experiments.statistics import Correction, Interval, corrected, interval
from circuits.localization.roles import ALPHA, HeadTest, RoleTests
from circuits.models.adapter import composition
from circuits.models.adapter.composition import head_read, head_write
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.adapter.transformer import Transformer

TOP = 5
"""Wang et al. count a token as copied if its logit is among the five highest of the whole vocabulary."""

_LEAST = 3
"""With fewer tokens there is hardly another order to compare with."""

_AT_ONCE = 256
"""How many permutations are computed at a time, to bound memory."""


@dataclass(frozen=True, eq=False)
class Copying:
    """How far heads copy each of some tokens.

    Attributes:
        heads: the heads, written `layer.head`.
        tokens: the tokens.
        standing: the share of the other tokens whose logit is lower than the token's own, head x token, in 0..1; ties
            count half, so that 0.5 is chance.
        in_top: whether the token's own logit is among the five highest of the vocabulary, head x token.
        p_values: of each head's mean standing, two-sided: what it would be if the head's outputs belonged to other
            tokens of the list (permutations).
        n_vocab: the size of the vocabulary.
        seed: of the permutations.
    """

    heads: tuple[str, ...]
    tokens: tuple[int, ...]
    standing: Float[np.ndarray, "head token"]
    in_top: Float[np.ndarray, "head token"]
    p_values: Float[np.ndarray, " head"]
    n_vocab: int
    seed: int

    @property
    def chance_in_top(self) -> float:
        """The share of tokens among the five highest logits by chance."""
        return min(1.0, TOP / self.n_vocab)

    def roles(self, correction: Correction = "holm") -> tuple[RoleTests, RoleTests]:
        """The tests of all heads for copying, and for the opposite: lowering the token's own logit."""
        p = corrected(self.p_values, correction)
        ends = [
            Interval(float(row.mean()), *interval(row, seed=self.seed, within=(0, 1)))
            for row in self.standing
        ]

        def tests(above: bool) -> tuple[HeadTest, ...]:
            apart = [(e.value > 0.5) if above else (e.value < 0.5) for e in ends]
            return tuple(
                HeadTest(head, ends[i], 0.5, p[i], apart[i] and p[i] < ALPHA)
                for i, head in enumerate(self.heads)
            )

        measure = "share of the other tokens with a lower logit than the token's own, by W_OV alone"
        said = "the same outputs given to other tokens of the list, at random"
        how = f"permutation test over {len(self.tokens)} tokens"
        return tuple(
            RoleTests(
                role, measure, "share", said, how, correction, len(self.heads), None, tests(above)
            )
            for role, above in (("copies", True), ("lowers what it reads", False))
        )  # type: ignore[return-value]


def copying_heads(
    model: HookedModel,
    tokens: Sequence[int],
    before: Sequence[int],
    *,
    after: int = 0,
    permutations: int = 0,
    seed: int = 0,
) -> Copying:
    """How far the OV circuit of every head copies each of some tokens to the logits.

    Args:
        model: a transformer.
        tokens: the tokens, such as names; all different.
        before: the tokens in front of each; the first position is often an attention sink and unlike others, so give
            at least one.
        after: the layer after which the stream is taken.
        permutations: the number of permutations; a hundred for each head if 0, so that the smallest p-value survives a
            correction.
        seed: of the permutations.

    Raises:
        ValueError: if the model takes images or its weights by head are not known, there are fewer than three tokens,
            one twice, one that is not in the vocabulary, or no such layer.
    """
    spec = model.input
    if not isinstance(spec, TokenInput):
        raise ValueError(f"model {model.name} takes images: expected a model of tokens")
    transformer = Transformer(model)
    if len(set(tokens)) < max(_LEAST, len(tokens)):
        raise ValueError(f"tokens {list(tokens)}: expected at least {_LEAST}, all different")
    if not 0 <= after < len(transformer.layers):
        raise ValueError(f"after {after}: expected a layer, 0 to {len(transformer.layers) - 1}")
    if permutations < 0:
        raise ValueError(f"permutations {permutations}: expected 0 or more")
    own = torch.tensor(tokens)
    stream = _stream(model, transformer, own, before, after)
    unembed_single = composition.read_weights(transformer, None).float()
    unembed = unembed_single.double()
    heads, standing, in_top, all_of_them = [], [], [], []
    for layer, at in enumerate(transformer.layers):
        if not at.heads:
            continue
        for head in range(model.site(at.heads).n_units):
            written = stream @ head_read(transformer, "V", layer, head).weight
            written = written @ head_write(transformer, layer, head)
            among = _standings(written @ unembed[:, own])
            above = _above(written, unembed_single, own)
            heads.append(f"{layer}.{head}")
            standing.append(among.diagonal().numpy().copy())
            in_top.append((above < TOP).double().numpy())
            all_of_them.append(among.numpy())
    n = permutations or 100 * len(heads)
    p = _permuted(np.stack(all_of_them), n, seed)
    return Copying(
        tuple(heads), tuple(tokens), np.stack(standing), np.stack(in_top), p, spec.n_vocab, seed
    )


def _stream(
    model: HookedModel,
    transformer: Transformer,
    own: Int[Tensor, " token"],
    before: Sequence[int],
    after: int,
) -> Float[Tensor, "token d_model"]:
    """The stream at each token, behind the same tokens, after a layer."""
    front = torch.tensor(before, dtype=torch.int64).expand(len(own), -1)
    inputs = torch.cat([front, own[:, None]], 1)
    site = model.site(transformer.layers[after].after)
    return model.run(inputs, read=[site], until=site)[site][:, -1].double().cpu()


def _above(
    written: Float[Tensor, "token d_model"],
    unembed: Float[Tensor, "d_model vocabulary"],
    own: Int[Tensor, " token"],
) -> Int[Tensor, " token"]:
    """How many logits of the whole vocabulary are higher than the token's own."""
    logits = written.float() @ unembed  # the one large product: in single precision
    return (logits > logits.gather(1, own[:, None])).sum(1)


def _standings(logits: Float[Tensor, "read token"]) -> Float[Tensor, "read token"]:
    """For what is read and each token: the share of the other tokens with a lower logit, ties counting half."""
    apart = logits[:, :, None] - logits[:, None, :]
    return ((apart > 0).double().sum(2) + 0.5 * ((apart == 0).double().sum(2) - 1)) / (
        logits.shape[1] - 1
    )


def _permuted(
    among: Float[np.ndarray, "head read token"], n: int, seed: int
) -> Float[np.ndarray, " head"]:
    """P-values of how far each head's mean standing is from one half, if what was read is exchanged."""
    size = among.shape[1]
    rows = np.arange(size)
    off = np.abs(np.trace(among, axis1=1, axis2=2) / size - 0.5) * (1 - 1e-9)
    rng, at_least = np.random.default_rng(seed), np.zeros(len(among), int)
    for start in range(0, n, _AT_ONCE):
        orders = rng.permuted(np.tile(rows, (min(_AT_ONCE, n - start), 1)), axis=1)
        means = among[:, rows, orders].mean(2)
        at_least += (np.abs(means - 0.5) >= off[:, None]).sum(1)
    return (1 + at_least) / (1 + n)
