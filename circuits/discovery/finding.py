"""`discover`: from a task to a circuit, with the evidence for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from circuits.discovery.agreement import SAMPLE, Checked, check_scores
from circuits.discovery.alternatives import Alternatives, find_alternatives
from circuits.discovery.evaluating import Evaluation, evaluate
from circuits.discovery.found import Discovery, circuit_graph
from circuits.discovery.graphs import LIMIT, EdgeGraph, Mask
from circuits.discovery.pairs import EdgePairs, pair_edges, strongest
from circuits.discovery.pruning import PART, prune
from circuits.discovery.results import SIZES, UNESTIMATED, EdgeScores, Ranking
from circuits.discovery.runs import Ablation, Runs
from circuits.discovery.scoring import STEPS, Method, Rule, in_files, score_edges
from circuits.discovery.searching import (
    SEARCHES,
    Search,
    acdc,
    check_size,
    greedy,
    least_size,
    refine,
    top,
)
from circuits.discovery.stability import SearchStability, stability
from circuits.discovery.stored import Cost, check_space
from circuits.discovery.truth import known_edges, recovered
from circuits.examples import BATCH
from circuits.experiments import N_RANDOM
from circuits.experiments.patched_runs import Direction
from circuits.experiments.running import MEMORY
from circuits.files import Keep, make_now, part_of
from circuits.progress import Progress, begun_later
from circuits.tasks.task import Task

SIZE = 50
"""The number of edges that a search keeps unless it is told otherwise; small graphs keep a quarter of theirs."""

BY_WEIGHT = "by weight magnitude"
TRUE = "edges known to be true"
SWAPPED = "found with answers swapped at random"

CheckOn = Literal["find", "test"]
"""On which half of the examples approximate scores are checked: that which was scored, or the other."""

Stage = Callable[[str], Progress | None]
"""Gives the progress of a stage of the work, by its name."""


def discover(
    graph: EdgeGraph,
    task: Task,
    method: Method = "eap-ig",
    *,
    search: Search = "greedy",
    size: int | None = None,
    threshold: float | None = None,
    ranking: Ranking = "absolute",
    direction: Direction = "noising",
    steps: int = STEPS,
    rule: Rule = "midpoint",
    ablation: Ablation = "counterpart",
    shift: int = 0,
    check: int | None = None,
    check_on: CheckOn = "find",
    pruning_steps: int | None = None,
    n_random: int = N_RANDOM,
    n_curves: int | None = None,
    pairs: int = 0,
    alternatives: int = 0,
    other: Mapping[str, Mask] | None = None,
    truth: Mask | None = None,
    batch: int = BATCH,
    memory: int = MEMORY,
    seed: int = 0,
    stage: Stage = lambda name: None,
    keep: Keep = make_now,
    folder: Path | None = None,
) -> Discovery:
    """Find the circuit of a task: score edges and search on its `find` half, evaluate on its `test` half.

    Args:
        graph: the model's edges.
        task: the whole task.
        method: how edges are scored, see `score_edges`.
        search: `top`: the most important edges; `greedy`: grown backwards from the output; `refine`: from three times
            as many, dropping those with the smallest exact effect; `acdc`: from all, dropping what is not needed;
            `pruning`: a mask over all edges that is learned.
        size: how many edges to keep; 50, or a quarter of a graph of fewer than 200, if None.
        threshold: of `acdc`: how much worse the metric may get by an edge that is dropped.
        ranking: by the size of scores, or by sign.
        direction: of `exact`.
        steps: of integrated gradients.
        rule: of integrated gradients.
        ablation: what edges outside the circuit carry. With `optimal` edges are scored by means, the search
            `pruning` learns what they carry together with the mask, and the evaluation learns it for the circuit.
        shift: see `score_edges`.
        check: how many edges are patched exactly to check approximate scores; 60 if None, none if 0.
        check_on: the half of the examples on which they are patched.
        pruning_steps: of the search `pruning`: how often its mask is changed; 300 if None.
        n_random: how many random circuits the circuit is compared with.
        n_curves: how many random rankings its curve is compared with; 10 if None, or 3 of more than 10,000 edges.
        pairs: how many of the strongest edges are patched two at a time (`pair_edges`); 0 for none, at least 2.
        alternatives: how many further circuits are looked for that are as good and share little with it.
        other: further circuits to compare with, such as another task's, by what they are.
        truth: which edges are known to be true; of models with weights written by hand they are known if it is None.
        batch: examples per batch.
        memory: a rough limit for one pass, in bytes.
        seed: of everything random.
        stage: gives the progress of each stage.
        keep: keeps the numbers of each batch and each step of a search, so that work which is stopped goes on.
        folder: where the scores of a large graph lie, see `score_edges`; it must belong to this very work.

    Raises:
        ValueError: if a setting is out of range, the task has too few examples for two halves, or does not fit.
    """
    _check_choices(graph, method, search, size, threshold, ranking, pruning_steps, check_on)
    _check_counts(
        memory, pairs, n_random=n_random, n_curves=n_curves or 0, alternatives=alternatives, seed=seed, check=check or 0
    )  # fmt: skip
    if ablation == "optimal":
        _check_optimal(search, alternatives)
    work = _Finding(
        graph=graph, find=task.find, test=task.test, method=method, search=search, size=size or usual_size(graph),
        threshold=threshold, ranking=ranking, scoring={"direction": direction, "steps": steps, "rule": rule},
        ablation=ablation, running={"shift": shift, "batch": batch, "memory": memory},
        pruning={} if pruning_steps is None else {"steps": pruning_steps}, seed=seed, stage=stage, keep=keep,
        folder=folder,
    )  # fmt: skip
    work.check_disk()
    scores = work.scores
    checked = work.checked(check, check_on)
    kept = work.searched()
    again = work.stability(kept)
    truth = known_edges(graph, shift) if truth is None else truth
    others, notes = work.nulls(kept, {**(other or {}), **({} if truth is None else {TRUE: truth})})
    notes = (*_fewer(search, size, kept), *notes)
    made = work.evaluated(kept, others, n_random, n_curves)
    further = work.alternatives(kept, alternatives) if alternatives and made.defined else None
    paired = work.pairs(pairs) if pairs else None
    how: dict[str, Any] = {"search": search, "ranking": ranking, "size": work.size}
    how |= {} if threshold is None else {"threshold": threshold}
    circuit = circuit_graph(graph, kept, scores, task, how, again)
    right = None if truth is None else recovered(work.worth, truth)
    return Discovery(circuit, scores, checked, again, made, further, paired, right, notes)


@dataclass(frozen=True, eq=False)
class _Finding:
    """The stages of `discover`, with its arguments.

    Attributes:
        find: the half of the task on which edges are scored and searched.
        test: the half on which the circuit is evaluated.
        size: how many edges to keep.
        scoring: more arguments of `score_edges`, of methods.
        running: those of `Runs`, besides the ablation.
        pruning: those of `prune`.
    """

    graph: EdgeGraph
    find: Task
    test: Task
    method: Method
    search: Search
    size: int
    threshold: float | None
    ranking: Ranking
    scoring: dict[str, Any]
    ablation: Ablation
    running: dict[str, Any]
    pruning: dict[str, Any]
    seed: int
    stage: Stage
    keep: Keep
    folder: Path | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """How runs are made; optimal constants belong to a circuit, so that edges are scored by means."""
        ablation = "mean" if self.ablation == "optimal" else self.ablation
        return {"ablation": ablation, "seed": self.seed, **self.running}

    @cached_property
    def runs(self) -> Runs:
        return self._runs_on(self.find)

    def _runs_on(self, task: Task) -> Runs:
        return Runs(self.graph, task, **self.settings)

    @cached_property
    def scores(self) -> EdgeScores:
        return self._scored(self.find, "scores", self.keep, "scores")

    def _scored(self, task: Task, stage: str, keep: Keep, name: str) -> EdgeScores:
        """The scores on a task; a large graph's lie in a folder of this name, a small one's are kept by `keep`."""
        folder = None if self.folder is None or len(self.graph) <= LIMIT else self.folder / name
        return score_edges(
            self.graph, task, self.method, progress=self.stage(stage), keep=keep,
            folder=folder, **self.scoring, **self.settings,
        )  # fmt: skip

    def check_disk(self) -> None:
        """Raise ValueError unless there is room for the scores of a large graph, those with swapped answers too."""
        n = len(self.graph)
        if n > LIMIT and (sets := sets_on_disk(self.find, self.method)):
            folder = Path(gettempdir()) if self.folder is None else self.folder
            folder.mkdir(parents=True, exist_ok=True)
            there = sum(path.stat().st_size for path in folder.glob("*/batch-*.h5"))
            own = there if self.folder is not None else 0
            check_space(folder, Cost.of(n, len(self.find), sets), own)

    @property
    def worth(self) -> Float[np.ndarray, " edge"]:
        return self.scores.worth(self.ranking)

    def picked(self, worth: Float[np.ndarray, " edge"], n: int) -> Mask:
        """The n edges that are kept by importance. Searches that try edges are not repeated: greedy stands in."""
        return (top if self.search == "top" else greedy)(self.graph, worth, n)

    def chosen(self, mean: Float[np.ndarray, " edge"]) -> Mask:
        """The edges that are kept by mean scores."""
        return self.picked(self.scores.importance(mean, self.ranking), self.size)

    def checked(self, n: int | None, on: CheckOn) -> Checked | None:
        """How far approximate scores agree with exact patching; None of exact ones and baselines."""
        if self.method in UNESTIMATED or n == 0:
            return None
        runs = self.runs if on == "find" else self._runs_on(self.test)
        told, n = self.stage("agreement"), SAMPLE if n is None else n
        return check_scores(runs, self.scores, n, self.seed, told)

    def searched(self) -> Mask:
        """The edges that the search keeps.

        Raises:
            ValueError: if none of them lies on a path from the model's input to its output.
        """
        keep = part_of(self.keep, "search")
        if self.search == "acdc":
            assert self.threshold is not None, "checked before"
            kept = acdc(self.runs, self.threshold, self.stage("search"), keep)
        elif self.search == "refine":
            kept = refine(
                self.runs, self.worth, self.size, self.ranking, self.stage("search"), keep
            )
        elif self.search == "pruning":
            # Its steps take fewer examples than other passes.
            smaller = self.settings | {"batch": min(self.running["batch"], PART)}
            kept = prune(
                Runs(self.graph, self.find, **smaller), self.size, optimal=self.ablation == "optimal", seed=self.seed,
                progress=self.stage("search"), keep=keep, **self.pruning,
            )  # fmt: skip
        else:
            kept = self.picked(self.worth, self.size)
        if not kept.any():
            raise ValueError(
                f"search {self.search}: no path from the model's input to its output is left; expected {self._larger()}"
            )
        return kept

    def _larger(self) -> str:
        """What leaves a path where a search left none."""
        if self.search == "acdc":
            return "a smaller threshold"
        if self.search not in ("top", "greedy"):
            return f"a size above {self.size}"
        enough = least_size(self.graph, partial(self.picked, self.worth), self.size)
        return f"a size of at least {enough}"

    def stability(self, kept: Mask) -> SearchStability | None:
        """How far the same is found on other draws; None of searches that try edges, and of scores by weights."""
        if self.search not in ("top", "greedy") or self.method == "weights":
            return None
        return stability(self.scores, kept, self.chosen, seed=self.seed)

    def nulls(
        self, kept: Mask, other: Mapping[str, Mask]
    ) -> tuple[dict[str, Mask], tuple[str, ...]]:
        """Circuits to compare with, of the same size, and what is to be said of them."""
        found, notes = dict(other), list[str]()
        n = int(kept.sum())
        if self.search not in ("top", "greedy"):
            notes.append(
                f"the search {self.search} is not repeated: circuits to compare with are found by greedy"
            )
        if self.ablation == "optimal":
            notes.append(
                "edges were scored by mean ablation: optimal constants belong to a circuit"
            )
        try:
            found[BY_WEIGHT] = self.picked(self.graph.weight_norms(), n)
        except ValueError as error:
            notes.append(f"not compared with a circuit {BY_WEIGHT}: {error}")
        if _is_swapped(self.find, self.method):
            asked, keep = swapped(self.find, self.seed), part_of(self.keep, "swapped")
            scores = self._scored(asked, "scores with answers swapped", keep, "swapped")
            found[SWAPPED] = self.picked(scores.worth(self.ranking), n)
        return found, tuple(notes)

    def evaluated(
        self, kept: Mask, others: Mapping[str, Mask], n_random: int, n_curves: int | None
    ) -> Evaluation:
        """How good the circuit is on the `test` half."""
        settings: dict[str, Any] = self.settings | {"ablation": self.ablation}
        learning, told = (
            begun_later(partial(self.stage, name)) for name in ("optimal constants", "evaluation")
        )
        return evaluate(
            self.graph, self.test, kept, scores=self.scores, ranking=self.ranking, find=self.find, others=others,
            n_random=n_random, n_curves=n_curves, progress=told, learning=learning,
            keep=part_of(self.keep, "evaluation"), **settings,
        )  # fmt: skip

    def alternatives(self, kept: Mask, n: int) -> Alternatives:
        """Further circuits that are as good."""
        test, told = self._runs_on(self.test), self.stage("alternatives")
        pick = partial(self.picked, n=int(kept.sum()))
        return find_alternatives(self.runs, test, kept, self.worth, pick, n, self.seed, told)

    def pairs(self, n: int) -> EdgePairs:
        """What the strongest edges do two at a time."""
        edges = strongest(self.scores, n, self.ranking)
        told, keep = self.stage("pairs"), part_of(self.keep, "pairs")
        return pair_edges(self.graph, self.find, edges, progress=told, keep=keep, **self.settings)


def sets_on_disk(find: Task, method: Method) -> int:
    """How many sets of scores of a large graph lie in files at once: those of a task, and with swapped answers."""
    return (1 + _is_swapped(find, method)) if in_files(method) else 0


def _is_swapped(find: Task, method: Method) -> bool:
    """Whether edges are scored with swapped answers, too."""
    return method != "random" and find.compared


def usual_size(graph: EdgeGraph) -> int:
    """How many edges a circuit has unless it is told otherwise: 50, or a quarter of a small graph's."""
    return min(SIZE, max(1, len(graph) // 4))


def _check_choices(
    graph: EdgeGraph,
    method: Method,
    search: Search,
    size: int | None,
    threshold: float | None,
    ranking: Ranking,
    pruning_steps: int | None,
    check_on: CheckOn,
) -> None:
    """Raise ValueError unless the choices of a search are known and go together."""
    if search not in SEARCHES:
        raise ValueError(f"search {search!r}: expected one of {', '.join(SEARCHES)}")
    if (search == "acdc") != (threshold is not None):
        raise ValueError("a threshold belongs to the search acdc, which needs one, and to no other")
    if ranking == "signed" and method in SIZES:
        raise ValueError(f"ranking signed: scores by {method} have no sign; expected absolute")
    if size is not None:
        check_size(graph, size)
    if pruning_steps is not None and search != "pruning":
        raise ValueError(
            f"pruning_steps {pruning_steps} belong to the search pruning, not to {search}"
        )
    if check_on not in get_args(CheckOn):
        raise ValueError(f"check_on {check_on!r}: expected find or test")


def _fewer(search: str, size: int | None, kept: Mask) -> tuple[str, ...]:
    """What is to be said of a circuit with fewer edges than were asked for."""
    if size is None or (n := int(kept.sum())) >= size:
        return ()
    return (
        f"{size} edges were asked for, and the circuit has {n}: the search {search} found no more that lie on a path "
        "from the model's input to its output",
    )


def _check_counts(memory: int, pairs: int, **counts: int) -> None:
    """Raise ValueError unless all are whole numbers in their ranges."""
    if memory < 1:
        raise ValueError(f"memory {memory}: expected a number of bytes above 0")
    if pairs == 1:
        raise ValueError("pairs 1: expected at least 2 edges to pair, or 0 for none")
    for name, value in (counts | {"pairs": pairs}).items():
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} {value!r}: expected a whole number, 0 or more")


def _check_optimal(search: Search, alternatives: int) -> None:
    """Raise ValueError if a search tries circuits one by one, for each of which constants would have to be learned."""
    if search in ("refine", "acdc"):
        raise ValueError(
            f"ablation optimal: constants are learned for a circuit, and the search {search} tries many; expected the "
            "search top, greedy or pruning"
        )
    if alternatives:
        raise ValueError(
            f"alternatives {alternatives}: other circuits have other constants; expected 0 with the ablation optimal"
        )


def swapped(task: Task, seed: int) -> Task:
    """The task with right and wrong answers exchanged in half of its examples, drawn at random."""
    rng = np.random.default_rng(seed)
    which = set(rng.permutation(len(task))[: len(task) // 2].tolist())
    asked = tuple(
        replace(q, answers=q.against, against=q.answers) if i in which else q
        for i, q in enumerate(task.questions)
    )
    return replace(task, questions=asked)
