"""The same task in several models, such as checkpoints, seeds, or a base model and a fine-tuned one.

In each model edges are scored and a circuit is found as in the first; the measures of all models are a curve. The
circuit of the first model, kept in the others, shows whether they compute the behaviour with the same edges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from circuits.discovery.comparing import chance_jaccard, shared
from circuits.discovery.contrasts import Contrast, contrast, rank_correlation
from circuits.discovery.evaluating import Evaluation, evaluate
from circuits.discovery.graphs import EdgeGraph, Mask
from circuits.discovery.results import EdgeScores, Ranking
from circuits.discovery.runs import Ablation
from circuits.discovery.scoring import STEPS, Method, Rule, score_edges
from circuits.discovery.searching import check_size, greedy
from circuits.experiments.statistics import Interval
from circuits.files import finite
from circuits.progress import Progress
from circuits.tables import Table, between, spread
from circuits.tasks.task import Task

_RANDOM = 19


@dataclass(frozen=True, eq=False)
class Member:
    """One model of a series.

    Attributes:
        name: the model.
        intact: the mean metric of the intact model on the `test` half.
        effect: its own effect: by how much removing every edge moves the metric.
        correlation: the rank correlation of its edges' scores with those in the first model.
        jaccard: what its circuit shares with the first model's.
        own: the faithfulness of the circuit that was found in it; NaN if its effect cannot be told from 0.
        of_first: the faithfulness, in this model, of the first model's circuit.
        random: that of random circuits like the first model's.
    """

    name: str
    intact: float
    effect: Interval
    correlation: float
    jaccard: float
    own: Interval
    of_first: Interval
    random: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class ModelSeries:
    """How a behaviour and its circuit differ over models.

    Attributes:
        members: the models, in order.
        metric: what was measured.
        method: how edges were scored.
        size: how many edges a circuit was to have.
        by_chance: the Jaccard index of two circuits of this size whose edges are drawn at random.
        contrasts: for each model after the first, how its scores differ from those in the first, where both have an
            effect that can be told from 0.
        notes: where they have none.
        seed: of everything random.
    """

    members: tuple[Member, ...]
    metric: str
    method: str
    size: int
    by_chance: float
    contrasts: tuple[Contrast, ...]
    notes: tuple[str, ...]
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; None for what is not finite."""
        return finite(asdict(self))

    def tables(self, top: int) -> Iterator[Table | str]:
        """One row for each model, and what differs most between two."""
        columns = (
            "model", self.metric, "effect", "r of scores", "Jaccard", "f", "95 % interval", "f of the first's circuit",
            "of random circuits",
        )  # fmt: skip
        rows = [
            (
                m.name, m.intact, m.effect.value, m.correlation, m.jaccard, m.own.value, between(m.own.low, m.own.high),
                m.of_first.value, spread(m.random),
            )
            for m in self.members
        ]  # fmt: skip
        title = (
            f"circuits of {self.size} edges by {self.method}, test half, Jaccard with the first model's (by chance "
            f"{self.by_chance:.2f}), seed {self.seed}"
        )
        yield Table(columns, rows, title)
        if len(self.contrasts) == 1:
            yield from self.contrasts[0].tables(top)
        yield from self.notes


def compare_models(
    graphs: Mapping[str, EdgeGraph],
    task: Task,
    method: Method = "eap-ig",
    *,
    size: int,
    ranking: Ranking = "absolute",
    steps: int = STEPS,
    rule: Rule = "midpoint",
    ablation: Ablation = "counterpart",
    shift: int = 0,
    n_random: int = _RANDOM,
    seed: int = 0,
    progress: Progress | None = None,
) -> ModelSeries:
    """Find the circuit of a task in several models, and compare each with the first.

    Args:
        graphs: the edges of each model, by what it is called; all models need the same parts and vocabulary.
        task: the whole task.
        method: how edges are scored.
        size: how many edges a circuit has; it is grown backwards from the output.
        ranking: by the size of scores, or by sign.
        steps: of integrated gradients.
        rule: of integrated gradients.
        ablation: what edges outside a circuit carry.
        shift: see `score_edges`.
        n_random: how many random circuits the first model's is compared with, in each model.
        seed: of everything random.
        progress: called with the number of models done and the total.

    Raises:
        ValueError: if there are fewer than two models, their edges differ, or the task does not fit one of them.
    """
    if len(graphs) < 2:
        raise ValueError(f"models {', '.join(graphs) or 'none'}: expected two or more to compare")
    names, rest = list(graphs), list(graphs.values())
    for name, graph in graphs.items():
        if graph.edges != rest[0].edges:
            raise ValueError(
                f"model {name} has {len(graph)} edges that are not those of {names[0]} ({len(rest[0])}): expected "
                "models with the same parts"
            )
    check_size(rest[0], size)
    removal: dict[str, Any] = {"ablation": ablation, "shift": shift, "seed": seed}
    scores, circuits, members = list[EdgeScores](), list[Mask](), list[Member]()
    for name, graph in graphs.items():
        made = score_edges(graph, task.find, method, steps=steps, rule=rule, **removal)
        scores.append(made)
        circuits.append(greedy(graph, made.worth(ranking), size))
        found = evaluate(
            graph,
            task.test,
            circuits[0],
            others={"own": circuits[-1]},
            n_random=n_random,
            **removal,
        )
        members.append(_member(name, found, scores, circuits))
        if progress is not None:
            progress(len(members), len(graphs))
    contrasts, notes = _contrasts(names, scores, size, seed)
    return ModelSeries(
        tuple(members), scores[0].metric, method, size, chance_jaccard(size, size, len(rest[0])),
        tuple(contrasts), tuple(notes), seed,
    )  # fmt: skip


def _member(name: str, found: Evaluation, scores: list[EdgeScores], circuits: list[Mask]) -> Member:
    return Member(
        name, float(found.full.mean()), found.effect, rank_correlation(scores[0].mean, scores[-1].mean),
        shared(circuits[0], circuits[-1]), found.ratio(found.others["own"]), found.faithfulness,
        found.random_faithfulness,
    )  # fmt: skip


def _contrasts(
    names: list[str], scores: list[EdgeScores], size: int, seed: int
) -> tuple[list[Contrast], list[str]]:
    """Of the first model with each other one, and why some could not be made."""
    made, notes = list[Contrast](), list[str]()
    for name, other in zip(names[1:], scores[1:], strict=True):
        try:
            made.append(contrast(scores[0], other, size, names=(names[0], name), seed=seed))
        except ValueError as error:
            notes.append(f"not compared edge by edge: {error}")
    return made, [*dict.fromkeys(notes)]
