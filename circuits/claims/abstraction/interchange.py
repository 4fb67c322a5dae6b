"""Interchange interventions: whether a model answers as an algorithm does when a variable comes from another input.

Geiger et al. (2021, 2022). In the model's run on a base, the place at which it is claimed to hold a variable gets what
it carries in the run on a source; in the algorithm's run on the base, the variable gets the value that it has on the
source. The share of pairs on which both give the same answer is the interchange intervention accuracy. It is counted
over pairs on which the algorithm's answer changes: on all others a place that does nothing would be right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.claims.abstraction.algorithms import ALGORITHMS, Algorithm, load_algorithm
from circuits.claims.abstraction.pairs import Asked, Deck, Pair, asked
from circuits.claims.abstraction.places import Intervention, Mixing, Place
from circuits.claims.evidence import Region, Share
from circuits.claims.settings import ClaimTest, Parameter, Settings
from circuits.claims.subject import Subject
from circuits.claims.verdicts import Level, Measured, Quantity, quantity
from circuits.experiments import Variant, run
from circuits.experiments.variants import Context
from circuits.hooks import Change
from circuits.models.adapter.hooked_model import HookedModel
from circuits.progress import Progress
from circuits.tasks.metrics import accuracy
from circuits.tasks.task import TaskBatch, output_width

LEAST_PAIRS = 4
"""With fewer independent pairs nothing is tested."""

Basis = Float[Tensor, "column dimension"]

NAME = "interchange"


@dataclass(frozen=True, eq=False)
class Interchange:
    """Interventions on a model's places, on given pairs.

    Attributes:
        deck: the examples.
        places: whose values come from the source.
        bases: by place, an orthonormal basis along which alone values are taken over; places without one take all.
    """

    deck: Deck
    places: Sequence[Place]
    bases: Mapping[Place, Basis] = field(default_factory=dict)

    def variant(self, model: HookedModel, pairs: Sequence[Pair]) -> Variant:
        """The model with the places of each base changed to those of its source.

        Args:
            model: the model that runs; the deck's own, or one of its shape.
            pairs: in the order of the task's examples.
        """
        sites = tuple(dict.fromkeys(place.site(model).name for place in self.places))
        live = partial(self._changes, model, pairs)
        return Variant(NAME, live=live, sites=sites, reads=sites)

    def _changes(
        self, model: HookedModel, pairs: Sequence[Pair], context: Context
    ) -> Mapping[str, Change]:
        assert context.batch is not None, "within an experiment"
        return self.changes(model, pairs, context.batch, context.counterpart)

    def changes(
        self,
        model: HookedModel,
        pairs: Sequence[Pair],
        batch: TaskBatch,
        source: Mapping[str, Tensor],
    ) -> dict[str, Change]:
        """The changes of a batch, by site.

        Args:
            model: the model that runs.
            pairs: of the whole task.
            batch: some of its examples.
            source: the tensors of the sites in the runs on the sources.
        """
        found: dict[str, Change] = {}
        for place in self.places:
            site = place.site(model)
            mixing = Mixing(site, place.columns(site), self.bases.get(place))
            at, theirs = (self._positions(place, pairs, batch, side) for side in ("base", "source"))
            change = partial(mixing.mixed, other=source[site.name], at=at, source=theirs)
            found[site.name] = _then(found.get(site.name), change)
        return found

    def _positions(
        self, place: Place, pairs: Sequence[Pair], batch: TaskBatch, side: str
    ) -> Tensor | None:
        """Each row of a batch with each of the place's positions there, where texts may be padded."""
        if place.position is None:
            return None
        n = len(batch.which)
        first = [0] * n if batch.mask is None else batch.mask.int().argmax(1).tolist()
        found = []
        for row, i in enumerate(batch.which):
            positions = self.deck.positions(place, getattr(pairs[i], side)) or ()
            found += [(row, first[row] + position) for position in positions]
        return torch.tensor(found)

    def outcomes(
        self,
        pairs: Sequence[Pair],
        answers: Sequence[int],
        *,
        model: HookedModel | None = None,
        progress: Progress | None = None,
    ) -> Float[np.ndarray, " pair"]:
        """Whether each pair's changed run gives an answer: 1, 0, or 1/n where n first choices are tied.

        Args:
            pairs: the pairs.
            answers: what each should answer.
            model: the model that runs; the deck's own if None.
            progress: called with the work done and the total.
        """
        model = model or self.deck.model
        task = self.deck.as_task(NAME, pairs, answers)
        made = run(
            model, [self.variant(model, pairs)], task, measures=[accuracy], progress=progress
        )
        return made.values[accuracy.name][1]


def _then(first: Change | None, then: Change) -> Change:
    return then if first is None else lambda value: then(first(value))


# --- the test ----------------------------------------------------------------------------------------


def interchange(subject: Subject, settings: Settings, level: Level) -> Measured:
    """The interchange intervention accuracy of each intervention, and for comparison that of a rival algorithm."""
    algorithm, rival = named(subject, settings)
    interventions = parsed(subject.model, settings["variables"])
    deck = Deck(subject.test)
    pairs = deck.deal(subject.seed)
    found: list[Quantity] = []
    notes = [agreement(deck, algorithm, pairs)]
    for intervention in interventions:
        made = asked(deck, algorithm, intervention, pairs).differing
        if why := too_few(made, intervention, len(pairs)):
            return subject.cannot(why)
        one = Interchange(deck, tuple(intervention.places.values()))
        values = one.outcomes(made.pairs, made.counterfactual, progress=subject.progress)
        found.append(quantity(
            f"accuracy of {intervention}", Share(values, made.clusters), Region(low=settings["least"]), level,
            parts=len(interventions), **_null(one, made),
        ))  # fmt: skip
        if rival is not None:
            notes.append(_against(one, made, rival, intervention, float(values.mean())))
    return Measured(
        tuple(found), subject.said(), subject.seed, tuple(notes), hashes(algorithm, rival)
    )


def hashes(*algorithms: Algorithm | None) -> dict[str, str]:
    """The hashes of the files that algorithms are in, by name."""
    return {a.name: a.hash for a in algorithms if a is not None and a.hash}


def named(subject: Subject, settings: Settings) -> tuple[Algorithm, Algorithm | None]:
    """The algorithm and its rival, if there is one."""
    rival = settings.get("rival")
    return (
        load_algorithm(settings["algorithm"], subject.folder),
        load_algorithm(rival, subject.folder) if rival else None,
    )


def parsed(model: HookedModel, texts: Sequence[str]) -> list[Intervention]:
    """Interventions as claim files write them, checked against a model.

    Raises:
        KeyError, ValueError: if one is not of the form, or the model lacks its place.
    """
    found = [Intervention.parse(text) for text in texts]
    if not found:
        raise ValueError("variables: expected at least one")
    for intervention in found:
        for place in intervention.places.values():
            place.site(model)
    return found


def agreement(deck: Deck, algorithm: Algorithm, pairs: Sequence[Pair]) -> str:
    """How often the model and the algorithm agree without any intervention."""
    most = output_width(deck.model) - 1
    answers = [algorithm.answer(deck.inputs(pair.base), most=most) for pair in pairs]
    task = deck.as_task("bases", pairs, answers)
    share = float(run(deck.model, [], task, measures=[accuracy]).values[accuracy.name][0].mean())
    return f"without intervention the model gives the answer of {algorithm.name} on {share:.1%} of the bases"


def too_few(made: Asked, intervention: Intervention, drawn: int) -> str:
    """Why nothing can be said of an intervention; empty if something can."""
    n = len(set(made.clusters))
    if n >= LEAST_PAIRS:
        return ""
    return (
        f"of {drawn} pairs only {n} independent ones have another answer with {', '.join(intervention.variables)} of "
        f"the source: expected at least {LEAST_PAIRS}"
    )


def _null(one: Interchange, made: Asked) -> dict[str, Any]:
    """The accuracy with values from the source of another pair, and what that is."""
    pairs = exchanged(made.pairs)
    answers = [a for a, pair in zip(made.counterfactual, pairs, strict=True) if pair is not None]
    there = [pair for pair in pairs if pair is not None]
    if not there or not all(one.deck.fits(one.places, pair) for pair in there):
        return {}
    share = float(one.outcomes(there, answers).mean())
    return {"null": (share,), "null_is": "values from another pair's source"}


def exchanged(pairs: Sequence[Pair]) -> list[Pair | None]:
    """Each base with the source of another pair, of other examples and the same length; None where there is none."""
    found: list[Pair | None] = []
    for i, pair in enumerate(pairs):
        others = (pairs[(i + k) % len(pairs)] for k in range(1, len(pairs)))
        other = next(
            (o for o in others if o.base.stop == pair.base.stop and o.cluster != pair.cluster), None
        )
        found.append(None if other is None else replace(pair, source=other.source))
    return found


def _against(
    one: Interchange, made: Asked, rival: Algorithm, intervention: Intervention, accuracy_: float
) -> str:
    """The rival's accuracy on the same pairs, and the share on which the two algorithms agree, in words."""
    theirs = asked(one.deck, rival, intervention, made.pairs).counterfactual
    same = float(np.mean([a == b for a, b in zip(theirs, made.counterfactual, strict=True)]))
    share = float(one.outcomes(made.pairs, theirs).mean())
    return (
        f"{intervention}: the rival {rival.name} has an accuracy of {share:.1%} on these pairs, the algorithm "
        f"{accuracy_:.1%}; the two answer alike on {same:.1%}"
    )


def _check(subject: Subject, settings: Settings) -> None:
    named(subject, settings)
    parsed(subject.model, settings["variables"])


ALGORITHM = (
    Parameter(
        "algorithm",
        f"the algorithm: FILE.py:FUNCTION, or one of {', '.join(ALGORITHMS)}",
        form="text",
    ),
)

TESTS = (
    ClaimTest(
        "interchange", ("algorithm",),
        "How often the model answers as an algorithm does when variables come from another input (Geiger et al. 2021), "
        "over pairs of inputs on which the algorithm's answer then changes.",
        (
            *ALGORITHM,
            Parameter(
                "variables", "interventions: VARIABLE @ SITE[:UNITS] [@ POSITION], several at once joined by ;",
                form="texts",
            ),
            Parameter("least", "the least accuracy", 0.9, 0, 1),
            Parameter("rival", "another algorithm with these variables, to compare with", "", form="text"),
        ), interchange, circuit=False, check=_check,
    ),
)  # fmt: skip
