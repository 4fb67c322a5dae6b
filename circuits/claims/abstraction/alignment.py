"""Distributed alignment search: the subspace of a place in which a model holds a variable, if it does.

Geiger et al. (2024). An orthonormal basis is learned such that interchange along it makes the model answer as the
algorithm does, on pairs of the `find` half; it is judged on the `test` half. A search finds something in many networks:
so the same search is made in the network with shuffled weights, and for answers dealt out at random. At what one
linear layer alone reads (neurons of an MLP, outputs of heads) the basis is split into what that layer reads and what
it cannot: a direction that works only through both together tells nothing of what the model computes (Makelov et al.
2023).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.autograd import recording_gradients
from circuits.claims.abstraction.interchange import (
    ALGORITHM,
    Basis,
    Interchange,
    agreement,
    hashes,
    named,
    parsed,
    too_few,
)
from circuits.claims.abstraction.pairs import Asked, Deck, asked
from circuits.claims.abstraction.places import Place
from circuits.claims.evidence import Mean, Region, Share
from circuits.claims.settings import ClaimTest, Parameter, Settings
from circuits.claims.subject import Subject
from circuits.claims.verdicts import Level, Measured, Quantity, quantity
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.matrices import WeightMatrix
from circuits.models.paths.randomizing import randomized
from circuits.progress import Progress
from circuits.tasks.targets import output_site
from circuits.tasks.task import TaskBatch
from circuits.units import Site

BATCH = 64
"""Pairs of one step."""

RATE = 0.1
"""The learning rate of Adam."""

_SAME = 1e-4
"""Outputs that differ by less than this share of the largest are the same."""

_RANK = 1e-5
"""Singular values below this share of the largest are 0."""

_MOST_KEPT = 50_000
"""A basis of more numbers is not put into the report."""


def overlap(one: Basis, other: Float[Tensor, "column others"]) -> float:
    """How far two subspaces are the same: the mean squared cosine of their principal angles, 1 if one holds the other.

    >>> e = torch.eye(3)
    >>> overlap(e[:, :2], e[:, 1:]), overlap(e[:, :2], e[:, :1])
    (0.5, 1.0)
    """
    cosines = torch.linalg.svdvals(one.double().T @ other.double())
    return float((cosines**2).mean())


# --- the search --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Search:
    """Learns bases of a place.

    Attributes:
        deck: the examples of the `find` half.
        place: where.
        width: the number of dimensions.
        steps: of Adam.
        seed: of the first basis and the order of pairs.
    """

    deck: Deck
    place: Place
    width: int
    steps: int
    seed: int

    def basis(
        self, made: Asked, model: HookedModel | None = None, progress: Progress | None = None
    ) -> Basis:
        """The basis along which interchange best gives the counterfactual answers, by their cross-entropy.

        Args:
            made: the pairs with their answers.
            model: in which network; the deck's own if None.
            progress: called with the steps done and their number.
        """
        model = model or self.deck.model
        site = self.place.site(model)
        task = self.deck.as_task("pairs", made.pairs, made.counterfactual)
        batches = list(task.batches(BATCH))
        sources = [self._source(model, batch, site) for batch in batches]
        generator = torch.Generator().manual_seed(self.seed)
        n = len(self.place.columns(site))
        with recording_gradients():
            free = torch.randn(n, self.width, generator=generator).to(model.device).requires_grad_()
            adam = torch.optim.Adam([free], lr=RATE)
            slower = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, self.steps)
            for step in range(self.steps):
                k = int(torch.randint(len(batches), (1,), generator=generator))
                basis = _orthonormal(free)
                one = Interchange(self.deck, (self.place,), {self.place: basis})
                loss = self._loss(one, model, made, batches[k], sources[k])
                adam.zero_grad()
                loss.backward()
                adam.step()
                slower.step()
                # Bases of one subspace are as good as each other: without this the numbers would grow from step to
                # step, and turn the basis less and less.
                with torch.no_grad():
                    free.copy_(_orthonormal(free))
                if progress is not None:
                    progress(step + 1, self.steps)
            return _orthonormal(free).detach()

    @staticmethod
    def _source(model: HookedModel, batch: TaskBatch, site: Site) -> dict[str, Tensor]:
        assert batch.counterparts is not None, "sources are the counterparts"
        cache = model.run(batch.counterparts, mask=batch.mask, read=[site], until=site)
        return {site.name: cache[site]}

    @staticmethod
    def _loss(
        one: Interchange,
        model: HookedModel,
        made: Asked,
        batch: TaskBatch,
        source: dict[str, Tensor],
    ) -> Tensor:
        end = output_site(model)
        changes = one.changes(model, made.pairs, batch, source)
        cache = model.run(batch.inputs, mask=batch.mask, read=[end], edits=changes, grad=True)
        rows = end.rows(cache[end])
        flat = rows[:, None] if rows.ndim == 2 else rows.flatten(1, -2)
        places = batch.places(flat.shape[1])
        logits = flat[places.row, places.position]
        return torch.nn.functional.cross_entropy(logits, places.wanted[:, 0].to(logits.device))


def _orthonormal(free: Basis) -> Basis:
    """By Gram and Schmidt: each column keeps its side, so that a small step of the numbers is one of the basis."""
    made = torch.linalg.qr(free)
    return made.Q * made.R.diagonal().sign()


def dealt_again(made: Asked, seed: int) -> Asked:
    """The same pairs with their counterfactual answers dealt out at random."""
    order = np.random.default_rng(seed).permutation(len(made.pairs))
    return replace(made, counterfactual=tuple(made.counterfactual[i] for i in order))


# --- what the next layer reads -----------------------------------------------------------------------


def sole_reader(
    model: HookedModel, site: Site, deck: Deck
) -> tuple[str, Float[Tensor, "row width"]] | None:
    """The linear layer that alone reads a site, by name, with its weights; None if there is none.

    It is tried: what the layer cannot read is changed on some examples, and the output has to stay as it is.

    Args:
        model: the model.
        site: the site.
        deck: examples to try it on.
    """
    for matrix in model.matrices:
        weights = _weights(model, matrix, site)
        if weights is not None and _alone(model, site, weights, deck):
            return matrix.name, weights
    return None


def _weights(
    model: HookedModel, matrix: WeightMatrix, site: Site
) -> Float[Tensor, "row width"] | None:
    """A layer's weights with columns in the order of the site's rows; None if it does not read the site."""
    end = matrix.end(site.name, "reads")
    if end is None or len(matrix.shape) != 2 or matrix.groups != 1:
        return None
    whole = matrix.whole(model.parameters[matrix.weight].detach()) * end.factor.to(model.device)
    made = whole.new_zeros(len(whole), site.width)
    for unit in range(site.n_units):
        columns, own = end.of([unit]), (site.row_units == unit).nonzero().flatten()
        if len(columns) != len(own):
            return None
        made[:, own] = whole[:, columns]
    return made


def _alone(model: HookedModel, site: Site, weights: Tensor, deck: Deck) -> bool:
    end = output_site(model)
    pairs = deck.deal(0)[:8]
    batch = next(deck.as_task("tried", pairs, [0] * len(pairs)).batches(len(pairs)))
    read = row_space(weights)

    def change(value: Tensor) -> Tensor:
        rows = site.rows(value)
        noise = (
            torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)).to(rows)
            * rows.std()
        )
        return site.from_rows(rows + noise - noise @ read @ read.T)

    plain = model.run(batch.inputs, mask=batch.mask, read=[end])[end]
    moved = model.run(batch.inputs, mask=batch.mask, read=[end], edits={site.name: change})[end]
    return bool((moved - plain).abs().max() <= _SAME * plain.abs().max())


def row_space(weights: Float[Tensor, "row column"]) -> Float[Tensor, "column rank"]:
    """An orthonormal basis of what a layer reads."""
    _, sizes, rows = torch.linalg.svd(weights.double(), full_matrices=False)
    return rows[sizes > _RANK * sizes.max()].T.to(weights.dtype)


def split(
    basis: Basis, weights: Float[Tensor, "row column"]
) -> tuple[Float[Tensor, "column read"], Float[Tensor, "column unread"]]:
    """Orthonormal bases of the parts of a subspace that a layer reads and that it cannot read.

    Args:
        basis: of the subspace.
        weights: the layer's.
    """
    read = row_space(weights)
    inside = read @ (read.T @ basis)
    return _spanned(inside), _spanned(basis - inside)


def _spanned(vectors: Basis) -> Float[Tensor, "column kept"]:
    left, sizes, _ = torch.linalg.svd(vectors, full_matrices=False)
    return left[:, sizes > 1e-4]


# --- the test ----------------------------------------------------------------------------------------


def alignment(subject: Subject, settings: Settings, level: Level) -> Measured:
    """Whether a search finds a subspace that holds a variable, and not merely one that works."""
    algorithm, _ = named(subject, settings)
    intervention = parsed(subject.model, [settings["variable"]])[0]
    if len(intervention.places) != 1:
        raise ValueError(f"variable {settings['variable']!r}: expected one variable at one place")
    place = intervention.places[intervention.variables[0]]
    site = place.site(subject.model)
    width, most = settings["width"], len(place.columns(site))
    if width > most:
        raise ValueError(f"width {width}: expected at most {most}, the numbers at {place}")
    find, test = Deck(subject.find), Deck(subject.test)
    dealt = test.deal(subject.seed)
    judged = asked(test, algorithm, intervention, dealt).differing
    if why := too_few(judged, intervention, len(dealt)):
        return subject.cannot(why)
    fitted = asked(find, algorithm, intervention, find.draw(settings["pairs"], subject.seed))
    search = Search(find, place, width, settings["steps"], subject.seed)
    trial = _Trial(subject, search, test, fitted, judged)
    basis, values = trial.own()
    found = _quantities(trial, values, settings, level)
    notes = [agreement(test, algorithm, dealt), trial.whole()]
    parts, note = trial.halves(basis)
    if parts is not None:
        kept = settings["keep"]
        found.append(_compared(
            f"accuracy of what is read, less {kept:g} of the whole", parts - kept * values, judged, 0.0, level
        ))  # fmt: skip
    facts: dict[str, Any] = dict(hashes(algorithm))
    if basis.numel() <= _MOST_KEPT:
        facts["basis"] = basis.tolist()
    notes += [
        note,
        f"{width} of {most} dimensions, found on {len(fitted.pairs)} pairs of the find half",
    ]
    return Measured(tuple(found), subject.said(), subject.seed, tuple(notes), facts)


@dataclass(frozen=True, eq=False)
class _Trial:
    """A search and the searches that it is compared with, judged on the test half.

    Attributes:
        subject: the model and the seed of what is shuffled.
        search: finds bases.
        test: the examples of the test half.
        fitted: pairs of the find half, on which bases are found.
        judged: pairs of the test half whose answer changes.
    """

    subject: Subject
    search: Search
    test: Deck
    fitted: Asked
    judged: Asked

    def _values(
        self, basis: Basis | None, model: HookedModel | None = None, judged: Asked | None = None
    ) -> Float[np.ndarray, " pair"]:
        judged, place = judged or self.judged, self.search.place
        bases = {} if basis is None else {place: basis}
        one = Interchange(self.test, (place,), bases)
        return one.outcomes(judged.pairs, judged.counterfactual, model=model)

    def own(self) -> tuple[Basis, Float[np.ndarray, " pair"]]:
        """What is found in the model itself."""
        basis = self.search.basis(self.fitted, progress=self.subject.progress)
        return basis, self._values(basis)

    def shuffled(self) -> Float[np.ndarray, " pair"]:
        """The same in the network with shuffled weights."""
        other = randomized(self.subject.model, self.subject.seed)
        return self._values(self.search.basis(self.fitted, other), other)

    def at_random(self) -> Float[np.ndarray, " pair"]:
        """The same for answers dealt out at random."""
        seed = self.subject.seed
        basis = self.search.basis(dealt_again(self.fitted, seed))
        return self._values(basis, judged=dealt_again(self.judged, seed))

    def whole(self) -> str:
        """The accuracy of the whole place, in words: a subspace that beats it by far is suspect."""
        return f"interchange of the whole place has an accuracy of {float(self._values(None).mean()):.1%}"

    def halves(self, basis: Basis) -> tuple[Float[np.ndarray, " pair"] | None, str]:
        """The outcomes along what the next layer reads, if one alone reads the place, and a note."""
        model, place = self.subject.model, self.search.place
        site = place.site(model)
        reader = sole_reader(model, site, self.test)
        if reader is None:
            return None, (
                f"no linear layer alone reads {site.name}: what is read and what is not cannot be told apart, so that "
                "only the shuffled network and random answers can refute it"
            )
        name, weights = reader
        parts = split(basis, weights[:, place.columns(site)])
        read, unread = (self._values(part) for part in parts)
        return read, (
            f"{name} reads a part of the subspace ({parts[0].shape[1]} dimensions, accuracy {read.mean():.1%}) and "
            f"cannot read another ({parts[1].shape[1]} dimensions, accuracy {unread.mean():.1%})"
        )


def _quantities(
    trial: _Trial, values: Float[np.ndarray, " pair"], settings: Settings, level: Level
) -> list[Quantity]:
    judged, least = trial.judged, settings["excess"]
    shuffled, at_random = trial.shuffled(), trial.at_random()
    return [
        quantity(
            f"accuracy of {trial.search.width} dimensions", Share(values, judged.clusters),
            Region(low=settings["least"]), level, parts=_PARTS,
            null=(float(shuffled.mean()), float(at_random.mean())), null_is="shuffled weights, random answers",
        ),
        _compared("accuracy less that in shuffled weights", values - shuffled, judged, least, level),
        _compared("accuracy less that for random answers", values - at_random, judged, least, level),
    ]  # fmt: skip


_PARTS = 4


def _compared(
    name: str, differences: Float[np.ndarray, " pair"], judged: Asked, least: float, level: Level
) -> Quantity:
    return quantity(
        name, Mean(differences, judged.clusters), Region(low=least), level, parts=_PARTS,
    )  # fmt: skip


def _check(subject: Subject, settings: Settings) -> None:
    named(subject, settings)
    parsed(subject.model, [settings["variable"]])


TESTS = (
    ClaimTest(
        "alignment", ("algorithm",),
        "Whether a search finds a subspace of a place along which interchange gives the algorithm's answers (Geiger et "
        "al. 2024), more than in shuffled weights and for random answers, and through what the next layer reads.",
        (
            *ALGORITHM,
            Parameter("variable", "the variable and its place: VARIABLE @ SITE[:UNITS] [@ POSITION]", form="text"),
            Parameter("width", "dimensions of the subspace", 1, 1, 10**5, whole=True),
            Parameter("least", "the least accuracy", 0.9, 0, 1),
            Parameter("excess", "by how much it is to exceed shuffled weights and random answers", 0.2, 0, 1),
            Parameter("keep", "the share of it that is to be left along what the next layer reads", 0.8, 0, 1),
            Parameter("pairs", "pairs of the find half", 1024, 8, 10**6, whole=True),
            Parameter("steps", "steps of the search", 250, 1, 10**6, whole=True),
        ), alignment, circuit=False, check=_check,
    ),
)  # fmt: skip
