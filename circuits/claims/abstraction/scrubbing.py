"""Causal scrubbing: whether a model loses anything if only what a hypothesis calls relevant is kept.

Chan et al. (2022). A hypothesis names edges between heads, MLPs, the input and the logits, and for a node the variable
of an algorithm on which what it puts out depends. What the hypothesis permits is done at random: a node is given, along
its edges, what its parents put out on another example with the same value of their variable, scrubbed in turn, and
along all other edges what a random example gives. Loss recovered is (L_random - L_scrubbed) / (L_random - L_model).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.checks import clipped
from circuits.claims.abstraction.algorithms import Algorithm
from circuits.claims.abstraction.interchange import ALGORITHM, hashes, named
from circuits.claims.abstraction.pairs import Deck, Example
from circuits.claims.evidence import Mean, Ratio, Region
from circuits.claims.settings import ClaimTest, Parameter, Settings
from circuits.claims.subject import Subject
from circuits.claims.verdicts import Level, Measured, quantity
from circuits.discovery import edge_graph
from circuits.discovery.streams import StreamGraph
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tables import between
from circuits.tasks.targets import output_site
from circuits.units import unknown

LOGITS = "logits"

ANSWER = "answer"
"""The variable that is the algorithm's answer."""

_BATCH = 64
_MOST_RUNS = 20_000

Rows = Int[np.ndarray, " row"]
"""For each row of a run the number of an example."""


def node_of(target: str) -> str:
    """The node that a target belongs to: that of `1.0.k` is the head `1.0`."""
    return target[:-2] if target[-2:] in (".q", ".k", ".v") else target


@dataclass(frozen=True)
class Hypothesis:
    """Which edges matter, and on what nodes depend.

    Attributes:
        edges: source and target of each, as edge graphs name them (`0.0`, `1.0.k`).
        variables: by node the variable on which its output depends; that of others may depend on all of the input.
    """

    edges: tuple[tuple[str, str], ...]
    variables: Mapping[str, str]

    @classmethod
    def parse(cls, edges: Sequence[str], variables: Sequence[str]) -> Hypothesis:
        """Read edges `SOURCE -> TARGET` and variables `NODE: VARIABLE`.

        Raises:
            ValueError: if one is not of its form, a variable is of no node of the edges, there is a cycle, or a node
                does not lead to the logits.

        >>> Hypothesis.parse(["0.0 -> 1.0.k", "1.0 -> logits"], ["1.0: copied"]).parents("1.0")
        (('0.0', '1.0.k'),)
        """
        read = []
        for text in edges:
            source, arrow, target = (part.strip() for part in text.partition("->"))
            if not (source and arrow and target):
                raise ValueError(f"edge {clipped(repr(text))}: expected SOURCE -> TARGET")
            read.append((source, target))
        depends: dict[str, str] = {}
        for text in variables:
            node, _, variable = (part.strip() for part in text.rpartition(": "))
            if not node or not variable or node in depends:
                raise ValueError(
                    f"variable {clipped(repr(text))}: expected NODE: VARIABLE, once for each node"
                )
            depends[node] = variable
        made = cls(tuple(dict.fromkeys(read)), depends)
        made._check()
        return made

    def parents(self, node: str) -> tuple[tuple[str, str], ...]:
        """The edges into a node."""
        return tuple(edge for edge in self.edges if node_of(edge[1]) == node)

    def _check(self) -> None:
        reached = self._above(LOGITS, (LOGITS,))
        for node in (
            *(n for edge in self.edges for n in (edge[0], node_of(edge[1]))),
            *self.variables,
        ):
            if node not in reached:
                self._above(node, (node,))  # a cycle is said to be one
                raise ValueError(
                    f"node {clipped(repr(node))} leads along no edges of the hypothesis to the logits"
                )

    def _above(self, node: str, way: tuple[str, ...]) -> set[str]:
        found = {node}
        for source, _ in self.parents(node):
            if source in way:
                raise ValueError(
                    f"the hypothesis has a cycle: {' <- '.join((*way[way.index(source) :], source))}"
                )
            found |= self._above(source, (*way, source))
        return found


_ALONE = 0.9
"""Which share of examples may have a value of a variable that no other example has."""


@dataclass(frozen=True, eq=False)
class Scrubbing:
    """Examples of one length, their variables, and the runs of a hypothesis.

    Attributes:
        graph: the model's edges.
        hypothesis: what is tried.
        tokens: of each example, up to the position where the answer is read.
        keys: by variable, a text for each example that is the same where the variable is.
    """

    graph: StreamGraph
    hypothesis: Hypothesis
    tokens: Int[Tensor, "example position"]
    keys: Mapping[str, Sequence[str]]

    @property
    def model(self) -> HookedModel:
        """The model."""
        return self.graph.model

    @cached_property
    def _same(self) -> dict[str, list[Rows]]:
        """By variable, for each example those with the same value."""
        found = {}
        for variable, keys in self.keys.items():
            places: dict[str, list[int]] = {}
            for i, key in enumerate(keys):
                places.setdefault(key, []).append(i)
            found[variable] = [np.array(places[key]) for key in keys]
        return found

    def equivalent(self, node: str, rows: Rows, rng: np.random.Generator) -> Rows:
        """For each example another one that a node may not tell from it, drawn at random; perhaps itself."""
        variable = self.hypothesis.variables.get(node)
        if variable is None:
            return rows
        return np.array([rng.choice(self._same[variable][i]) for i in rows.tolist()])

    def logits(self, rng: np.random.Generator) -> Float[Tensor, "example output"]:
        """The scrubbed logits of each example at its last position."""
        return self._output(LOGITS, np.arange(len(self.tokens)), rng)

    def plain(self, rows: Rows) -> Float[Tensor, "row output"]:
        """The model's own logits at the last position."""
        return self._run(LOGITS, rows, [], {})

    def _output(self, node: str, rows: Rows, rng: np.random.Generator) -> Tensor:
        """What a node puts out, scrubbed, when it stands for some examples."""
        edges = self.hypothesis.parents(node)
        if not edges and node != LOGITS:
            return self._run(node, rows, [], {})
        given: dict[str, Tensor] = {}
        for parent in dict.fromkeys(source for source, _ in edges):
            given[parent] = self._output(parent, self.equivalent(parent, rows, rng), rng)
        other = rng.integers(len(self.tokens), size=len(rows))
        return self._run(node, other, edges, given)

    def _run(
        self, node: str, rows: Rows, edges: Sequence[tuple[str, str]], given: Mapping[str, Tensor]
    ) -> Tensor:
        """What a node puts out in runs on some examples in which it is given other outputs along some edges."""
        off = torch.from_numpy(self.graph.mask(list(edges))).float()[None]
        site = self._site(node)
        parts = []
        for start in range(0, len(rows), _BATCH):
            some = slice(start, start + _BATCH)
            tokens = self.tokens[torch.from_numpy(rows[some])]
            changes = self.graph.changes(off, self._sites(given, some)) if edges else {}
            made = self.model.run(tokens, read=[site], edits=changes)[site]
            parts.append(made[:, -1] if node == LOGITS else self._own(node, made))
        return torch.cat(parts)

    def _site(self, node: str) -> str:
        stream = self.graph.stream
        return (
            output_site(self.model).name
            if node == LOGITS
            else stream.output_site(stream.sender(node))
        )

    def _own(self, node: str, made: Tensor) -> Tensor:
        """What one node writes of its site's tensor."""
        sender = self.graph.stream.sender(node)
        return made[..., sender.head, :] if sender.kind == "head" else made

    def _sites(self, given: Mapping[str, Tensor], some: slice) -> dict[str, Tensor]:
        """Nodes' outputs as tensors of their sites; what other heads of a site put out is read along no edge."""
        stream, found = self.graph.stream, {}
        for node, value in given.items():
            sender, site, own = stream.sender(node), self._site(node), value[some]
            if sender.kind != "head":
                found[site] = own
                continue
            if site not in found:
                found[site] = own.new_zeros(
                    *own.shape[:-1], self.model.site(site).n_units, own.shape[-1]
                )
            found[site][..., sender.head, :] = own
        return found


# --- the test ----------------------------------------------------------------------------------------


def scrubbing(subject: Subject, settings: Settings, level: Level) -> Measured:
    """The loss that is recovered when all that the hypothesis permits is done at random."""
    algorithm, _ = named(subject, settings)
    hypothesis = Hypothesis.parse(settings["edges"], settings["variables"])
    deck = Deck(subject.test)
    graph = _graph(subject.model, hypothesis)
    chosen = one_length(deck)
    clusters = [subject.test.clusters[example.index] for example in chosen]
    if len(set(clusters)) < 3:
        why = f"only {len(set(clusters))} independent examples of one length: expected at least 3"
        return subject.cannot(why)
    tokens = torch.tensor([list(deck.inputs(e)) for e in chosen])  # type: ignore[arg-type]
    one = Scrubbing(graph, hypothesis, tokens, keys_of(deck, algorithm, hypothesis, chosen))
    _check_size(hypothesis, settings["draws"])
    random, scrubbed, own = losses(
        one, [answers_at(deck, e) for e in chosen], settings["draws"], subject
    )
    effect = Mean(random - own, clusters)
    low, high = effect.interval(level.each)
    if not low > 0:
        why = (
            f"the model's loss is no smaller than that on random examples: the difference is {effect.value:.3g} nats "
            f"(interval {between(low, high)})"
        )
        return subject.cannot(why)
    found = quantity(
        "loss recovered", Ratio(random - scrubbed, random - own, clusters), Region(low=settings["least"]), level,
        n=len(chosen), clusters=len(set(clusters)), null=(0.0,), null_is="every input from a random example",
    )  # fmt: skip
    notes = (
        f"cross-entropy (nats): model {own.mean():.4g}, scrubbed {scrubbed.mean():.4g}, random {random.mean():.4g}",
        f"{len(chosen)} of {len(subject.test)} examples have the length {tokens.shape[1]}; of each {settings['draws']} "
        "draws",
        *(_freedom(node, variable, one) for node, variable in hypothesis.variables.items()),
    )
    return Measured(
        (found,),
        subject.said(),
        subject.seed,
        notes,
        hashes(algorithm),
        cannot_hold=_nothing_drawn(one),
    )


def _nothing_drawn(one: Scrubbing) -> str:
    """Why a recovered loss says nothing: what the hypothesis permits leaves most examples with themselves alone."""
    if not one.hypothesis.variables:
        return "the hypothesis names no variable, so that nothing is resampled"
    alone = {}
    for variable in dict.fromkeys(one.hypothesis.variables.values()):
        n = Counter(one.keys[variable])
        alone[variable] = float(np.mean([n[key] == 1 for key in one.keys[variable]]))
    if min(alone.values()) <= _ALONE:
        return ""
    said = ", ".join(f"{share:.0%} with their {variable}" for variable, share in alone.items())
    return f"examples are alone ({said}), so that nothing is resampled; expected more examples, or coarser variables"


def _freedom(node: str, variable: str, one: Scrubbing) -> str:
    """How much a variable permits: where every example has a value of its own, nothing was resampled."""
    n = Counter(one.keys[variable])
    return f"{node} may come from {np.mean([n[k] for k in one.keys[variable]]):.3g} examples with the same {variable}"


def _graph(model: HookedModel, hypothesis: Hypothesis) -> StreamGraph:
    graph = edge_graph(model)
    if not isinstance(graph, StreamGraph):
        raise ValueError(
            f"model {model.name} is no transformer: causal scrubbing needs its heads and MLPs"
        )
    if any(graph.stream.norm("ln1_post", i) is not None for i in range(graph.stream.n_layers)):
        raise ValueError(
            f"model {model.name} normalises what attention writes: its heads cannot be scrubbed apart"
        )
    known = (*graph.sources, LOGITS)
    for edge in hypothesis.edges:
        for node in (edge[0], node_of(edge[1])):
            if node not in known:
                raise unknown(f"node of {model.name}", node, known)
    graph.mask(list(hypothesis.edges))  # raises if there is no such edge
    return graph


def one_length(deck: Deck) -> list[Example]:
    """The examples that have a counted position in common with most others, cut after it."""
    stops = Counter(stop for q in deck.task.questions for stop in q.positions or ())
    if not stops:
        raise ValueError(f"task {deck.task.name} counts no positions of texts")
    best = max(stops, key=lambda stop: (stops[stop], stop))
    questions = enumerate(deck.task.questions)
    return [Example(i, best) for i, q in questions if best in (q.positions or ())]


def answers_at(deck: Deck, example: Example) -> tuple[int, ...]:
    """The tokens that are right at the end of a cut example."""
    question = deck.task.questions[example.index]
    assert example.stop is not None, "texts are cut"
    assert question.positions is not None, "texts have counted positions"
    if question.labels is not None:
        return (question.labels[question.positions.index(example.stop)],)
    return tuple(answer[0] for answer in question.answers)


def keys_of(
    deck: Deck, algorithm: Algorithm, hypothesis: Hypothesis, chosen: Sequence[Example]
) -> dict[str, list[str]]:
    """The value of each variable on each example, as a text.

    Raises:
        KeyError: if the algorithm has no such variable.
    """
    wanted = set(hypothesis.variables.values())
    found: dict[str, list[str]] = {variable: [] for variable in wanted}
    for example in chosen:
        inputs = deck.inputs(example)
        values: dict[str, Any] = {ANSWER: algorithm.answer(inputs), **algorithm.variables(inputs)}
        for variable in wanted:
            if variable not in values:
                raise unknown(f"variable of algorithm {algorithm.name!r}", variable, values)
            found[variable].append(repr(values[variable]))
    return found


def _check_size(hypothesis: Hypothesis, draws: int) -> None:
    """Raise ValueError if paths through the hypothesis are too many to run each."""

    def runs(node: str) -> int:
        parents = dict.fromkeys(source for source, _ in hypothesis.parents(node))
        return 1 + sum(map(runs, parents))

    if runs(LOGITS) * draws > _MOST_RUNS:
        raise ValueError(
            f"draws {draws}: the hypothesis takes {runs(LOGITS)} runs a draw, and at most {_MOST_RUNS} are made"
        )


def losses(
    one: Scrubbing, answers: Sequence[tuple[int, ...]], draws: int, subject: Subject
) -> tuple[
    Float[np.ndarray, " example"], Float[np.ndarray, " example"], Float[np.ndarray, " example"]
]:
    """The cross-entropy of each example's answers, in nats: on random examples, scrubbed, and in the model."""
    n = len(answers)
    rng = np.random.default_rng(subject.seed)
    random, scrubbed = np.zeros(n), np.zeros(n)
    for draw in range(draws):
        random += _loss(one.plain(rng.integers(n, size=n)), answers) / draws
        scrubbed += _loss(one.logits(rng), answers) / draws
        if subject.progress is not None:
            subject.progress(draw + 1, draws)
    return random, scrubbed, _loss(one.plain(np.arange(n)), answers)


def _loss(
    logits: Float[Tensor, "example output"], answers: Sequence[tuple[int, ...]]
) -> Float[np.ndarray, " example"]:
    log_p = logits.double().log_softmax(-1)
    return np.array(
        [-float(row[list(own)].logsumexp(0)) for row, own in zip(log_p, answers, strict=True)]
    )


def _check(subject: Subject, settings: Settings) -> None:
    named(subject, settings)
    _graph(subject.model, Hypothesis.parse(settings["edges"], settings["variables"]))


TESTS = (
    ClaimTest(
        "scrubbing", ("algorithm",),
        "The loss that is recovered when every node is given what its parents put out on examples that the hypothesis "
        "calls equivalent, and random examples otherwise (causal scrubbing, Chan et al. 2022).",
        (
            *ALGORITHM,
            Parameter("edges", "the hypothesis' edges, SOURCE -> TARGET", form="texts"),
            Parameter(
                "variables", "on what nodes depend, NODE: VARIABLE (or answer); others may on all of the input", (),
                form="texts",
            ),
            Parameter("least", "the least share of the loss", 0.9, -10, 10),
            Parameter("draws", "how often each example is resampled", 4, 1, 1000, whole=True),
        ), scrubbing, circuit=False, check=_check,
    ),
)  # fmt: skip
