"""Pairs of examples for interchange interventions: a base, whose run is changed, and a source of values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from circuits.claims.abstraction.algorithms import Algorithm, Inputs
from circuits.claims.abstraction.places import Intervention, Place, Positions
from circuits.examples import Examples
from circuits.models.adapter.inputs import TokenInput
from circuits.tasks.metrics import accuracy
from circuits.tasks.task import Question, Task, output_width
from circuits.units import unknown


@dataclass(frozen=True)
class Example:
    """An example of a task, cut after one of its counted positions.

    Attributes:
        index: in the task.
        stop: the position after which it is cut, which is where the answer is read; None of images.
    """

    index: int
    stop: int | None


@dataclass(frozen=True)
class Pair:
    """A base and a source.

    Attributes:
        base: the example whose run is changed.
        source: the example from whose run values come.
        cluster: a number that pairs share which are not independent.
    """

    base: Example
    source: Example
    cluster: int


class Deck:
    """A task's examples, of which pairs are made.

    A text with several counted positions is cut after one of them, so that the answer is read at its end; both texts of
    a pair have the same length. This needs a model in which later tokens do not act on earlier ones.

    Args:
        task: some or all examples of a task.

    Raises:
        ValueError: if answers have several tokens, or texts would have to be cut and the model reads ahead.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.model = task, task.model
        self.texts = isinstance(task.model.input, TokenInput)
        if task.feeding == "fed":
            raise ValueError(
                f"task {task.name} has answers of several tokens: an algorithm answers by one token or class"
            )
        self._cuts = self.texts and any(self._must_cut(i) for i in range(len(task)))
        if self._cuts and task.model.padding != "right":
            raise ValueError(
                f"task {task.name} counts positions before a text's end, and {task.model.name} reads ahead of them: "
                "interchange needs one counted position, the last"
            )

    def _must_cut(self, index: int) -> bool:
        positions = self.task.questions[index].positions
        return positions != (len(self.task.examples.load(index)) - 1,)

    # --- pairs -----------------------------------------------------------------------------------

    @cached_property
    def _clusters(self) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for i, cluster in enumerate(self.task.clusters):
            found.setdefault(cluster, []).append(i)
        return list(found.values())

    def _stops(self, index: int) -> tuple[int | None, ...]:
        return (self.task.questions[index].positions or ()) if self.texts else (None,)

    def deal(self, seed: int) -> list[Pair]:
        """Pairs such that those of different clusters have no example in common.

        Clusters of examples are put together two and two at random, those with the same counted positions first; each
        example is the base of one pair at most and the source of one.
        """
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(self._clusters)).tolist()
        order.sort(key=lambda c: self._stops(self._clusters[c][0]))  # stable: random among equals
        pairs = []
        for number, (first, second) in enumerate(zip(order[::2], order[1::2], strict=False)):
            for i, j in zip(self._clusters[first], self._clusters[second], strict=False):
                for base, source in ((i, j), (j, i)):
                    pairs += self._pair(base, source, number, rng)
        return pairs

    def draw(self, n: int, seed: int) -> list[Pair]:
        """Pairs of any two examples, drawn with replacement: for fitting, not for judging."""
        rng = np.random.default_rng(seed)
        pairs: list[Pair] = []
        for _ in range(20 * n):
            if len(pairs) == n:
                break
            base, source = rng.integers(len(self.task), size=2).tolist()
            if base != source:
                pairs += self._pair(base, source, len(pairs), rng)
        return pairs

    def _pair(self, base: int, source: int, cluster: int, rng: np.random.Generator) -> list[Pair]:
        both = [stop for stop in self._stops(base) if stop in self._stops(source)]
        if not both:
            return []
        stop = both[int(rng.integers(len(both)))]
        return [Pair(Example(base, stop), Example(source, stop), cluster)]

    # --- what algorithms and places are told -----------------------------------------------------

    def inputs(self, example: Example) -> Inputs:
        """What an algorithm is given."""
        examples = self.task.examples
        if self.texts:
            assert example.stop is not None, "texts are cut"
            return examples.tokens(example.index)[: example.stop + 1]
        if examples.labels is not None:
            return examples.labels[example.index]
        return examples.names[example.index]

    def positions(self, place: Place, example: Example) -> Positions:
        """A place's positions in an example.

        Raises:
            KeyError, ValueError: as `Place.positions`.
        """
        if place.position is None:
            return None
        assert example.stop is not None, "texts are cut"
        question = self.task.questions[example.index]
        return place.positions(
            example.stop + 1, question.spans, self.task.examples.names[example.index]
        )

    def fits(self, places: Iterable[Place], pair: Pair) -> bool:
        """Whether places have as many positions in a pair's source as in its base.

        Raises:
            KeyError, ValueError: as `Place.positions`.
        """
        both = ((self.positions(p, pair.base), self.positions(p, pair.source)) for p in places)
        return all(a is None or b is None or len(a) == len(b) for a, b in both)

    # --- as a task -------------------------------------------------------------------------------

    def as_task(self, name: str, pairs: Sequence[Pair], answers: Sequence[int]) -> Task:
        """The task of giving certain answers on the bases, with the sources as counterparts."""
        questions = tuple(
            Question(
                None if p.base.stop is None else (p.base.stop,),
                ((answer,),),
                group=f"pair {p.cluster}",
            )
            for p, answer in zip(pairs, answers, strict=True)
        )
        bases, sources = (
            self._examples([getattr(p, side) for p in pairs]) for side in ("base", "source")
        )
        return Task(
            name, bases, questions, accuracy, sources, half=self.task.half, seed=self.task.seed
        )

    def _examples(self, chosen: Sequence[Example]) -> Examples:
        if not self.texts:
            return self.task.examples.subset([example.index for example in chosen])
        tokens = [self.inputs(example) for example in chosen]
        names = [self.task.examples.names[example.index] for example in chosen]
        return Examples.texts(self.model, tokens, names)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Asked:
    """Pairs with what an algorithm answers when variables of the base have the source's values.

    Attributes:
        pairs: the pairs.
        own: the algorithm's answer on each base.
        counterfactual: its answer with the variables from the source.
    """

    pairs: tuple[Pair, ...]
    own: tuple[int, ...]
    counterfactual: tuple[int, ...]

    @cached_property
    def differing(self) -> Asked:
        """Those whose counterfactual answer is another than the base's own: on the others nothing has to happen."""
        kept = [i for i in range(len(self.pairs)) if self.own[i] != self.counterfactual[i]]
        return self.subset(kept)

    def subset(self, which: Sequence[int]) -> Asked:
        """Some of them, by index."""
        return Asked(
            tuple(self.pairs[i] for i in which), tuple(self.own[i] for i in which),
            tuple(self.counterfactual[i] for i in which),
        )  # fmt: skip

    @property
    def clusters(self) -> list[int]:
        """The cluster of each pair."""
        return [pair.cluster for pair in self.pairs]


def asked(
    deck: Deck, algorithm: Algorithm, intervention: Intervention, pairs: Sequence[Pair]
) -> Asked:
    """What an algorithm answers on pairs; pairs whose places have other numbers of positions are left out.

    Raises:
        KeyError: if the algorithm has no such variable, or the task no such span.
        ValueError: if the algorithm fails, or answers what the model cannot put out.
    """
    width = output_width(deck.model)
    known: dict[Example, tuple[int, Mapping[str, object]]] = {}

    def run(example: Example) -> tuple[int, Mapping[str, object]]:
        if example not in known:
            inputs = deck.inputs(example)
            known[example] = (
                algorithm.answer(inputs, most=width - 1),
                algorithm.variables(inputs),
            )
        return known[example]

    kept, own, changed = [], [], []
    for pair in pairs:
        if not deck.fits(intervention.places.values(), pair):
            continue
        values = run(pair.source)[1]
        lacking = next((name for name in intervention.variables if name not in values), None)
        if lacking is not None:
            raise unknown(f"variable of algorithm {algorithm.name!r}", lacking, values)
        given = {name: values[name] for name in intervention.variables}
        kept.append(pair)
        own.append(run(pair.base)[0])
        changed.append(algorithm.answer(deck.inputs(pair.base), given, most=width - 1))
    return Asked(tuple(kept), tuple(own), tuple(changed))
