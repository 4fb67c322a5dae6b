"""What the case is about: the model, its tasks, how many examples, and runs with single edges patched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float

from circuits.discovery import Runs
from circuits.discovery.searching import Masks, values_of
from circuits.discovery.streams import StreamGraph
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.zoo.loading import load_model
from circuits.progress import Progress
from circuits.tasks.spec import TaskSpec
from circuits.tasks.task import Task

MODEL = "smollm2"
"""The model, as `circuits.load_model` takes it."""

START = 1
"""`<|im_start|>`: the tokenizer puts no token in front of a text, and the case puts this one there where it says so."""

CORRUPTIONS = ("abc", "third_name", "swap")
"""The counterparts on which circuits are found: three other names; S2 is a third name; S2 is IO."""

ORDERS = ("both", "ABBA", "BABA")


@dataclass(frozen=True)
class Options:
    """What a run is to show.

    Attributes:
        fast: fewer examples, steps and random comparisons, and heads of fewer layers: for a test.
        seed: of everything random.
    """

    fast: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
        behaviour: examples of the behaviour.
        pairs: examples with counterparts, half of them to find and half of them to test.
        heads: the same for tests of heads.
        steps: of integrated gradients.
        edges: of the circuit that is looked for.
        refined: edges of the circuit that is refined by exact patching.
        random: random circuits, heads and directions.
        curves: random rankings.
        kept: random sets of heads that are kept while all others carry the counterpart.
        minimal: edges of the circuit that are taken out one at a time.
        texts: random repeated texts.
        layers: how many layers in front of the movers are looked at for what moves their queries; all if None.
    """

    behaviour: int = 256
    pairs: int = 64
    heads: int = 128
    steps: int = 5
    edges: int = 300
    refined: int = 60
    random: int = 49
    curves: int = 2
    kept: int = 19
    minimal: int = 60
    texts: int = 64
    layers: int | None = None

    @classmethod
    def of(cls, options: Options) -> Sizes:
        """Those of a run."""
        if not options.fast:
            return cls()
        return cls(16, 16, 40, 2, 100, 8, 3, 0, 2, 2, 18, 4)


@dataclass(frozen=True, eq=False)
class Subject:
    """The model with its edges and tasks.

    Attributes:
        model: the model; nothing is put in front of its texts.
        options: what is shown.
    """

    model: HookedModel
    options: Options

    @classmethod
    def of(cls, options: Options) -> Subject:
        """The case's model.

        Raises:
            FileNotFoundError, ValueError: if it is not there.
        """
        return cls(bare(load_model(MODEL)), options)

    @property
    def sizes(self) -> Sizes:
        return Sizes.of(self.options)

    @cached_property
    def graph(self) -> StreamGraph:
        """The direct paths between its heads, MLPs, embedding and logits."""
        return StreamGraph(self.model)

    @property
    def heads(self) -> list[str]:
        """All heads, layer by layer, written `layer.head`."""
        return [s for s in self.graph.sources if s[0].isdigit()]

    def task(self, corruption: str = "abc", order: str = "both", n: int = 0) -> Task:
        """The indirect-object task with some counterparts."""
        spec = f"ioi:corruption={corruption},templates={order}"
        return TaskSpec(spec, n or self.sizes.pairs, self.options.seed).compile(self.model)

    def fresh(self, seen: Task) -> Task:
        """As many texts as the halves of a task have, of another seed, without those that the task has."""
        spec = TaskSpec("ioi:corruption=abc,templates=both", len(seen), self.options.seed + 1)
        drawn, known = spec.compile(self.model), set(seen.examples.names)
        left = [i for i, name in enumerate(drawn.examples.names) if name not in known]
        return drawn.subset(left[: len(seen.test)])

    def other(self, name: str) -> Task:
        """Another task, on which the circuit should do nothing."""
        return TaskSpec(name, self.sizes.pairs, self.options.seed).compile(self.model)

    def changes(
        self,
        task: Task,
        sets: Sequence[Sequence[str]],
        without: Sequence[str] = (),
        told: Progress | None = None,
    ) -> Float[np.ndarray, "set example"]:
        """How the task's metric changes if each set of edges carries what it carries in the counterpart's run.

        Args:
            task: the examples.
            sets: edges, written `SOURCE -> TARGET`, of each patch.
            without: edges that carry the counterpart's in all of these runs and in the one that they are compared with.
            told: called with what is done and all there is.
        """
        graph = self.graph
        base = ~graph.mask(list(without)) if without else np.ones(len(graph), bool)
        masks = Masks(len(graph), [base])
        for edges in sets:
            masks.append(base & ~graph.mask(list(edges)) if edges else base)
        values = values_of(Runs(graph, task), masks, told)
        return values[1:] - values[0]


def bare(model: HookedModel, start: int | None = None) -> HookedModel:
    """The same model with nothing, or one token, in front of every text."""
    spec = model.input
    assert isinstance(spec, TokenInput), "a language model"
    return (
        model
        if spec.bos == start
        else HookedModel(model.module, replace(spec, bos=start), model.name)
    )


def layer_of(head: str) -> int:
    """The layer of a head written `layer.head`."""
    return int(head.partition(".")[0])
