"""Tests of networks that learned to add: which frequencies they use, and how they multiply angles.

Nanda et al. (2023): the logits of c after a + b = are nearly sums of cos(w_k (a + b - c)) over a few key frequencies.
*Restricted* loss keeps these alone, *excluded* loss takes them away. Zhong et al. (2023): a *clock* turns angles by
products of what the two numbers are written as, a *pizza* does not; the two differ in how alike the gradients with
respect to the two numbers are, and in how far the answer's logit depends on their distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.checks import clipped, whole
from circuits.claims.evidence import Known, Mean, Region
from circuits.claims.settings import ClaimTest, Parameter, Settings
from circuits.claims.subject import Subject
from circuits.claims.verdicts import Level, Measured, Quantity, quantity
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.adapter.sites import main_output

Logits = Float[Tensor, "a b c"]

_BATCH = 2048


def sums(model: HookedModel) -> Logits:
    """The logits of all answers c to all sums a + b, of a model of texts `a b =` whose last token is `=`.

    Raises:
        ValueError: if the model takes no texts of three tokens.
    """
    if not isinstance(model.input, TokenInput) or model.input.n_ctx < 3:
        raise ValueError(f"model {model.name}: expected one that takes three tokens, `a b =`")
    p = model.input.n_vocab - 1
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    texts = torch.cat([pairs, torch.full((len(pairs), 1), p)], 1)
    found = torch.cat([model.logits(part)[:, -1, :p].double() for part in texts.split(_BATCH)])
    return found.reshape(p, p, p)


def wave_part(logits: Logits, frequencies: Sequence[int]) -> Logits:
    """The part of the logits that is made of cos(w_k (a + b)) and sin(w_k (a + b)), each with any dependence on c.

    Both functions of (a, b) have the mean square 1 / 2 over all pairs, and are orthogonal to each other and to those of
    other frequencies, so that a projection is a mean of products.
    """
    p = logits.shape[0]
    total = torch.arange(p)[:, None] + torch.arange(p)[None]
    found = torch.zeros_like(logits)
    for k in frequencies:
        for wave in (torch.cos, torch.sin):
            basis = wave(2 * torch.pi * k * total.double() / p)
            found += 2 * basis[:, :, None] * einsum(basis, logits, "a b, a b c -> c") / p**2
    return found


def losses(logits: Logits, which: Bool[Tensor, "a b"]) -> float:
    """The mean cross entropy of the right answer over some sums, in nats."""
    p = logits.shape[0]
    right = (torch.arange(p)[:, None] + torch.arange(p)[None]) % p
    return float(F.cross_entropy(logits[which], right[which]))


def trained_on(p: int, share: float, seed: int) -> Bool[Tensor, "a b"]:
    """Which sums a network was trained on, as `circuits.models.zoo.training.addition` draws them."""
    order = torch.randperm(p * p, generator=torch.Generator().manual_seed(seed))
    found = torch.zeros(p * p, dtype=torch.bool)
    found[order[: int(share * p * p)]] = True
    return found.reshape(p, p)


def keys_of(texts: Sequence[str], p: int) -> list[int]:
    """Frequencies as numbers.

    Raises:
        ValueError: if one is no whole number from 1 to half of p, one is named twice, or too many are named for there
            to be as many others.
    """
    most = p // 2
    keys = []
    for text in texts:
        k = whole(text)
        if k is None or not 1 <= k <= most:
            raise ValueError(
                f"frequencies: {clipped(repr(text))}, expected a whole number from 1 to {most}"
            )
        keys.append(k)
    if len(set(keys)) < len(keys):
        raise ValueError(f"frequencies {', '.join(texts)}: one is named twice")
    if 2 * len(keys) > most:
        raise ValueError(
            f"frequencies: {len(keys)}, expected at most {most // 2}, half of all {most}"
        )
    return keys


def _check(subject: Subject, settings: Settings) -> None:
    if isinstance(subject.model.input, TokenInput):
        keys_of(settings["frequencies"], subject.model.input.n_vocab - 1)


def _check_regions(subject: Subject, settings: Settings) -> None:
    if settings["symmetry_least"] <= -1 and settings["symmetry_most"] >= 1:
        raise ValueError(
            "symmetry_least and symmetry_most: expected one that excludes something of -1 to 1"
        )
    if settings["irrelevance_least"] <= 0 and settings["irrelevance_most"] >= 10:
        raise ValueError(
            "irrelevance_least and irrelevance_most: expected one that excludes something"
        )


def key_frequencies(subject: Subject, settings: Settings, level: Level) -> Measured:
    """Restricted and excluded loss, on the sums that were trained on and on all others, over the whole domain."""
    logits = sums(subject.model)
    p = logits.shape[0]
    keys = keys_of(settings["frequencies"], p)
    mean = logits.mean((0, 1), keepdim=True)
    part = wave_part(logits, keys)
    restricted, excluded = mean + part, logits - part
    rng = np.random.default_rng(subject.seed)
    rest = [k for k in range(1, p // 2 + 1) if k not in keys]
    others = [
        wave_part(logits, rng.choice(rest, len(keys), replace=False).tolist())
        for _ in range(settings["draws"])
    ]
    ours = trained_on(p, settings["train_share"], settings["train_seed"])
    made = partial(quantity, level=level, parts=4)
    least, most = Region(low=settings["excluded"]), Region(high=settings["restricted"])
    found: list[Quantity] = []
    for name, which in (("training", ours), ("test", ~ours)):
        null = tuple(losses(mean + other, which) for other in others)
        found += [
            made(
                f"restricted loss, {name} sums", Known(losses(restricted, which)), most, unit="nats",
                n=int(which.sum()), exact=True, null=null, null_is="as many other frequencies alone",
            ),
            made(
                f"excluded loss, {name} sums", Known(losses(excluded, which)), least, unit="nats",
                n=int(which.sum()), exact=True, null=tuple(losses(logits - other, which) for other in others),
                null_is="the logits without as many other frequencies",
            ),
        ]  # fmt: skip
    whole = ", ".join(
        f"{name} {losses(logits, w):.3g}" for name, w in (("training", ours), ("test", ~ours))
    )
    share = float(part.square().sum() / (logits - mean).square().sum())
    note = f"loss of the model: {whole} nats; the key frequencies are {share:.1%} of the logits' variance"
    return Measured(tuple(found), f"all {p * p} sums", subject.seed, (note,))


def clock_or_pizza(subject: Subject, settings: Settings, level: Level) -> Measured:
    """Gradient symmetry and distance irrelevance (Zhong et al. 2023, sections 3.2 and 4.1)."""
    model = subject.model
    logits = sums(model)
    p = logits.shape[0]
    row = torch.arange(p)
    total = (row[:, None] + row[None]) % p
    right = logits.gather(2, total[:, :, None])[:, :, 0]
    # By the difference of the two numbers: where the logit of the right answer depends on that alone, nothing is left.
    by_distance = torch.stack([right[row, (row - d) % p] for d in range(p)])
    irrelevance = float(by_distance.std(1, correction=0).mean() / right.std(correction=0))
    symmetry = _gradient_symmetry(model, settings["sums"], subject.seed)
    made = partial(quantity, level=level, parts=2)
    found = (
        made(
            "gradient symmetry", Mean(symmetry, range(len(symmetry))),
            Region(settings["symmetry_least"], settings["symmetry_most"]),
        ),
        made(
            "distance irrelevance", Known(irrelevance),
            Region(settings["irrelevance_least"], settings["irrelevance_most"]), n=p * p, exact=True,
        ),
    )  # fmt: skip
    note = "Zhong et al. (2023) give symmetry .99 and irrelevance .17 for their pizza, .33 and .85 for their clock"
    return Measured(
        found, f"{len(symmetry)} sums with a random answer each; all sums", subject.seed, (note,)
    )


def _gradient_symmetry(model: HookedModel, n: int, seed: int) -> Float[np.ndarray, " sum"]:
    """For random a, b and c the cosine between the gradients of the logit of c with respect to both embeddings."""
    assert isinstance(model.input, TokenInput), "checked before"
    p = model.input.n_vocab - 1
    drawn = torch.randint(0, p, (n, 3), generator=torch.Generator().manual_seed(seed))
    texts = torch.cat([drawn[:, :2], torch.full((n, 1), p)], 1)
    cache = model.run(texts, read=[model.embedding], grad=True)
    embedded = cache[model.embedding]
    asked = main_output(cache.output)[torch.arange(n), -1, drawn[:, 2]].sum()
    [grad] = torch.autograd.grad(asked, [embedded])
    return F.cosine_similarity(grad[:, 0], grad[:, 1], dim=-1).double().numpy()


TESTS = (
    ClaimTest(
        "key-frequencies", ("algorithm",),
        "Of a network that adds: the loss with only some frequencies of a + b left in the logits, and without them, on "
        "training and test sums apart (Nanda et al. 2023).",
        (
            Parameter("frequencies", "the key frequencies, of one turn of p", form="texts"),
            Parameter("restricted", "the largest loss with these alone, in nats", 0.1, 0, 100),
            Parameter("excluded", "the least loss without them", 1.0, 0, 1000),
            Parameter("train_share", "which share of all sums was trained on", 0.3, 0.001, 0.999),
            Parameter("train_seed", "the seed of the training", 0, 0, 2**32 - 1, whole=True),
            Parameter("draws", "random sets of other frequencies to compare with", 20, 1, 1000, whole=True),
        ), key_frequencies, circuit=False, check=_check,
    ),
    ClaimTest(
        "clock-or-pizza", ("algorithm",),
        "Of a network that adds: how alike the gradients for both numbers are, and how far the answer's logit does not "
        "depend on their difference (Zhong et al. 2023).",
        (
            Parameter("symmetry_least", "the least gradient symmetry", -1, -1, 1),
            Parameter("symmetry_most", "the largest gradient symmetry", 1, -1, 1),
            Parameter("irrelevance_least", "the least distance irrelevance", 0, 0, 10),
            Parameter("irrelevance_most", "the largest distance irrelevance", 10, 0, 10),
            Parameter("sums", "sums for the gradients", 500, 10, 10**5, whole=True),
        ), clock_or_pizza, circuit=False, check=_check_regions,
    ),
)  # fmt: skip
