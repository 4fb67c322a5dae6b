"""Scores of edges: exact patching, approximations by gradients, and baselines.

A score is the change of the task's metric when one edge carries what it carries in the other run (noising), or an
estimate of it. With d the change of what the source adds to the target's input, and m the metric:

- `exact`: m(edge patched) - m(intact), one pass for many edges (path patching of a direct path, Goldowsky-Dill et al.
  2023); `denoising` exchanges the two runs.
- `eap`: d . dm/dx at the intact run, x what the target reads (Syed et al. 2023).
- `clean-corrupted`: the mean of the gradients at both runs.
- `eap-ig`: the mean gradient over inputs between the two (Hanna et al. 2024).
- `eap-ig-activations`: the mean gradient over what the source puts out between the two runs, everything else as it is
  (Marks et al. 2024).
- `relp`: `eap` with gradients by the rules of relevance (Jafari et al. 2025): scales of normalisations and attention
  patterns are constants, an activation is x times the constant act(x)/x, each factor of a product gets half.
- `weights`: the norm of the path's weight matrix; the same on every example.
- `activations`: the root mean square, over positions, of what the source adds to what the target is given.
- `random`: a draw from the normal distribution, for comparison.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.attribution.propagation import Propagation
from circuits.autograd import recording_gradients
from circuits.discovery.graphs import LIMIT, EdgeGraph, mask_of
from circuits.discovery.results import SIZES, EdgeScores
from circuits.discovery.runs import Ablation, Pair, Runs, output_of
from circuits.discovery.stored import (
    Cost,
    Piece,
    Rows,
    StoredScores,
    check_space,
    kept_rows,
    write_rows,
)
from circuits.discovery.streams import StreamGraph
from circuits.examples import BATCH
from circuits.experiments.outcomes import Record
from circuits.experiments.patched_runs import Direction, merged
from circuits.experiments.running import MEMORY
from circuits.files import Keep, make_now
from circuits.hooks import Change
from circuits.progress import Progress
from circuits.tasks.task import Task

Method = Literal[
    "exact", "eap", "eap-ig", "eap-ig-activations", "clean-corrupted", "relp", "weights", "activations", "random"
]  # fmt: skip

METHODS: tuple[str, ...] = get_args(Method)

Rule = Literal["midpoint", "left", "right"]
"""Where gradients are taken along the path between two runs: at the middles of steps, at their beginnings (counted from
the corrupted run, as the authors of EAP-IG do), or at their ends."""

STEPS = 6
"""The number of steps of integrated gradients. Even, so that the midpoint rule never meets the middle of the path,
where a gate of two equal inputs has its kink."""

_INTEGRATED = ("eap-ig", "eap-ig-activations")
"""The methods that average gradients along a path."""

_PASSES = 8
"""The fewest passes in which the edges into the targets of a site are patched."""


def points(steps: int, rule: Rule) -> list[float]:
    """Where along the path from the corrupted run (0) to the intact one (1) gradients are taken.

    >>> points(2, "midpoint"), points(2, "left"), points(2, "right")
    ([0.25, 0.75], [0.0, 0.5], [0.5, 1.0])
    """
    if steps < 1:
        raise ValueError(f"steps {steps} must be at least 1")
    shifts = {"midpoint": 0.5, "left": 0.0, "right": 1.0}
    if rule not in shifts:
        raise ValueError(f"rule {rule!r}: expected midpoint, left or right")
    return [(k + shifts[rule]) / steps for k in range(steps)]


@recording_gradients()
def score_edges(
    graph: EdgeGraph,
    task: Task,
    method: Method = "eap-ig",
    *,
    direction: Direction = "noising",
    steps: int = STEPS,
    rule: Rule = "midpoint",
    ablation: Ablation = "counterpart",
    shift: int = 0,
    batch: int = BATCH,
    memory: int = MEMORY,
    seed: int = 0,
    progress: Progress | None = None,
    keep: Keep = make_now,
    folder: Path | None = None,
) -> EdgeScores:
    """Score every edge of a graph by what it is worth to a task.

    Args:
        graph: the edges.
        task: the behaviour.
        method: how, see the module.
        direction: of `exact`: `noising` patches one edge of the intact run, `denoising` one of the corrupted run, so
            that it carries what it carries in the intact one.
        steps: of `eap-ig` and `eap-ig-activations`: how many gradients are averaged.
        rule: where they are taken.
        ablation: what an edge carries that is removed; not `optimal`, whose constants belong to a circuit.
        shift: by how many positions the counterpart's position embedding is rolled.
        batch: examples per batch.
        memory: a rough limit for one pass, in bytes.
        seed: of `random`, of the examples that the ablation `resample` draws, and of intervals.
        progress: called with the work done and the total, in examples.
        keep: keeps the numbers of each batch, so that a run which is stopped goes on.
        folder: where scores by gradients over inputs lie, a file for each batch, so that they take no memory (see
            `discovery.stored`); a run which is stopped goes on. It must belong to this very work. If it is None,
            those of more than `LIMIT` edges lie in a temporary folder, and others in memory.

    Raises:
        ValueError: if the task has no counterparts and needs them, the metric's gradient at the intact run is zero by
            definition (KL divergence) and the method takes it only there, or a score is not finite.
    """
    _check(method, direction, task)
    if ablation == "optimal":
        raise ValueError(
            "ablation optimal: its constants are learned for a circuit, not for single edges; expected another to "
            "score edges by, such as mean"
        )
    notes: tuple[str, ...] = ()
    if method in SIZES and ablation == "counterpart" and task.counterparts is None:
        ablation = "zero"
        notes = ("the task has no counterparts: edges that are removed carry nothing",)
    runs = Runs(graph, task, ablation=ablation, shift=shift, batch=batch, memory=memory, seed=seed)
    settings: dict[str, Any] = {"grain": graph.grain, "ablation": ablation}
    settings |= {"shift": shift} if shift else {}
    settings |= {"direction": direction} if method == "exact" else {}
    settings |= {"steps": steps, "rule": rule} if method in _INTEGRATED else {}
    collected, between = _Collected(len(task)), points(steps, rule)
    alphas = _taken(method, between)
    if alphas is not None and (folder is not None or len(graph) > LIMIT):
        values = _stored(runs, alphas, method == "relp", folder, collected, progress)
    else:
        _collect(runs, _scorer(method, runs, direction, between), collected, keep, progress)
        values = collected.values
    if method == "random":
        values = np.random.default_rng(seed).standard_normal((len(task), len(graph)))
    entering = mask_of(len(graph.sources), list(graph.inputs))
    return EdgeScores(
        method, settings, graph.edges, values, collected.clean, collected.corrupted,
        tuple(np.flatnonzero(entering[graph.ends[:, 0]]).tolist()),
        task.metric.name, task.metric.unit, task.metric.better, task.clusters, Record.of(graph.model, task, seed),
        (*notes, *_held_patterns(method, graph, values), *_post_norms(method, graph)),
    )  # fmt: skip


def _check(method: str, direction: Direction, task: Task) -> None:
    """Raise ValueError unless there is such a method, and it fits the direction and the metric."""
    if method not in METHODS:
        raise ValueError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    if direction == "denoising" and method != "exact":
        raise ValueError(f"direction denoising belongs to the method exact, not to {method}")
    if method in ("eap", "relp") and "intact" in task.metric.needs:
        raise ValueError(
            f"metric {task.metric.name} compares with the intact run, where its gradient is zero: expected the method "
            "eap-ig or exact, or another metric"
        )


def _taken(method: str, alphas: Sequence[float]) -> Sequence[float] | None:
    """Between which inputs gradients are taken by a method; None of one that takes none over inputs."""
    taken = {"eap": [1.0], "relp": [1.0], "clean-corrupted": [0.0, 1.0], "eap-ig": alphas}
    return taken.get(method)


def in_files(method: str) -> bool:
    """Whether a large graph's scores by a method are written to files: those by gradients over inputs."""
    return _taken(method, ()) is not None


def _collect(
    runs: Runs, scorer: Scorer, collected: _Collected, keep: Keep, progress: Progress | None
) -> None:
    """Score every batch in memory; `keep` gives back the numbers of those that an earlier run has scored."""
    for number, pair in enumerate(runs.pairs()):

        def made(pair: Pair = pair) -> dict[str, Any]:
            return collected.numbers(runs, pair, scorer(pair))

        collected.add(pair.part.which, keep(f"batch {number}", made))
        if progress is not None:
            progress(collected.done, len(runs.task))


def _stored(
    runs: Runs,
    alphas: Sequence[float],
    relevance: bool,
    folder: Path | None,
    collected: _Collected,
    progress: Progress | None,
) -> StoredScores:
    """Scores by gradients over inputs, in files."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        return _in_folder(runs, alphas, relevance, folder, collected, progress)
    own = Path(mkdtemp(prefix="circuits-scores-"))
    try:
        made = _in_folder(runs, alphas, relevance, own, collected, progress)
    except BaseException:
        shutil.rmtree(own, ignore_errors=True)
        raise
    made.remove_with(own)
    return made


def _in_folder(
    runs: Runs,
    alphas: Sequence[float],
    relevance: bool,
    folder: Path,
    collected: _Collected,
    progress: Progress | None,
) -> StoredScores:
    """The same, in a folder that is there; batches of which a file is there are not scored again."""
    graph, n = runs.graph, len(runs.graph)
    there = sum(path.stat().st_size for path in folder.glob("batch-*.h5"))
    check_space(folder, Cost.of(n, len(runs.task)), there)
    files, examples = list[Path](), list[tuple[int, ...]]()
    for number, pair in enumerate(runs.pairs()):
        path, which = folder / f"batch-{number}.h5", tuple(pair.part.which)
        rows = kept_rows(path, which, n)
        if rows is None:
            clean = runs.value(pair.intact, pair.intact)[0]
            rows = Rows(clean.tolist(), runs.corrupted(pair).tolist())
            slopes = [_sloped(runs, pair, alpha, relevance) for alpha in alphas]
            pieces = graph.pieces(pair.clean, pair.other, slopes, relevance)
            write_rows(path, which, n, _finite(runs, which, pieces), rows)
        collected.note(which, rows.clean, rows.corrupted)
        files.append(path)
        examples.append(which)
        if progress is not None:
            progress(collected.done, len(runs.task))
    return StoredScores(tuple(files), tuple(examples), n)


def _finite(runs: Runs, which: Sequence[int], pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Pieces of scores, all of which are numbers."""
    for examples, edges, scores in pieces:
        _check_finite(runs, which[examples], scores, edges.start)
        yield examples, edges, scores


def _check_finite(runs: Runs, which: Sequence[int], scores: Tensor, first: int = 0) -> None:
    """Raise ValueError unless the scores of some examples and of edges from one on are numbers."""
    if bool(torch.isfinite(scores).all()):
        return
    row, edge = (~torch.isfinite(scores)).nonzero()[0].tolist()
    raise ValueError(
        f"the score of edge {' -> '.join(runs.graph.edges[first + edge])} is not finite on example "
        f"{runs.task.examples.names[which[row]]!r}"
    )


def _held_patterns(
    method: str, graph: EdgeGraph, values: np.ndarray | StoredScores
) -> tuple[str, ...]:
    """What is to be said of `relp`: edges into queries and keys act through attention patterns alone."""
    if method != "relp":
        return ()
    ways = [graph.way(t).startswith(("q", "k")) for t in range(len(graph.targets))]
    held = np.array(ways)[graph.ends[:, 1]]
    stored = isinstance(values, StoredScores)
    if not held.any() or (values.any(held) if stored else values[:, held].any()):
        return ()
    return (
        f"relp holds attention patterns constant: all {held.sum()} edges into queries and keys score exactly 0, "
        "whatever they are worth",
    )


def _post_norms(method: str, graph: EdgeGraph) -> tuple[str, ...]:
    """What is to be said of heads whose sum is normalised before it is added to the stream."""
    if method not in ("clean-corrupted", "eap-ig") or not isinstance(graph, StreamGraph):
        return ()
    if not any(graph.stream.norm("ln1_post", layer) for layer in range(graph.stream.n_layers)):
        return ()
    return (
        "what heads add passes a normalisation, whose slope is taken in the intact run alone: scores of their edges "
        "are not complete, however many steps there are",
    )


class _Collected:
    """The numbers of a task's examples, in the task's order."""

    def __init__(self, n: int) -> None:
        self.n, self.done = n, 0
        self.values = np.zeros((0, 0))
        self.clean, self.corrupted = np.zeros(n), np.zeros(n)

    @staticmethod
    def numbers(runs: Runs, pair: Pair, scores: Tensor) -> dict[str, Any]:
        """A batch's numbers, as JSON has them."""
        _check_finite(runs, pair.part.which, scores)
        clean = runs.value(pair.intact, pair.intact)[0]
        return {
            "scores": scores.tolist(), "clean": clean.tolist(), "corrupted": runs.corrupted(pair).tolist(),
        }  # fmt: skip

    def add(self, which: Sequence[int], made: Mapping[str, Any]) -> None:
        scores = np.array(made["scores"])
        if not self.values.size:
            self.values = np.zeros((self.n, scores.shape[1]))
        self.values[list(which)] = scores
        self.note(which, made["clean"], made["corrupted"])

    def note(self, which: Sequence[int], clean: list[float], corrupted: list[float]) -> None:
        """Add the metric of some examples, with no edge patched and with every edge."""
        rows = list(which)
        self.clean[rows], self.corrupted[rows] = clean, corrupted
        self.done += len(rows)


Slopes = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Of one run: the sites that the graph reads, and the metric's gradient at those that edges lead to."""

Scorer = Callable[[Pair], Float[Tensor, "example edge"]]


def _scorer(method: str, runs: Runs, direction: Direction, alphas: Sequence[float]) -> Scorer:
    if method == "exact":
        return lambda pair: exact(runs, pair if direction == "noising" else pair.exchanged())
    if method == "random":
        return lambda pair: torch.zeros(len(pair.part), len(runs.graph))
    if method == "weights":
        norms = torch.from_numpy(runs.graph.weight_norms())
        return lambda pair: norms.expand(len(pair.part), -1)
    if method == "activations":
        return lambda pair: runs.graph.sizes(pair.clean, pair.part.mask)
    if method == "eap-ig-activations":
        return lambda pair: _by_activations(runs, pair, alphas)
    taken = _taken(method, alphas)
    assert taken is not None, "a method over inputs"
    return lambda pair: _by_inputs(runs, pair, taken, relevance=method == "relp")


# --- exact patching ----------------------------------------------------------------------------------


def exact(
    runs: Runs, pair: Pair, edges: Sequence[int] | None = None
) -> Float[Tensor, "example edge"]:
    """The change of the metric by patching each of some edges (all if None), one at a time, many in one pass."""
    graph = runs.graph
    chosen = np.arange(len(graph)) if edges is None else np.asarray(edges)
    made = torch.zeros(len(pair.part), len(chosen), dtype=torch.float64)
    groups: dict[str, list[int]] = {}
    for place, edge in enumerate(chosen.tolist()):
        groups.setdefault(graph.first_site(int(graph.ends[edge, 1])), []).append(place)
    for site, places in groups.items():
        # The pass without patches costs as much as one with: at most an eighth of all.
        size = min(-(-len(places) // _PASSES), runs.sets_per_pass(pair, site))
        base = runs.patched(pair, torch.zeros(size, len(graph)), alone=site)
        for start in range(0, len(places), size):
            some = places[start : start + size]
            off = torch.zeros(size, len(graph))
            # The last pass is filled up with sets of others: passes of another size would round differently.
            filled = [*some, *places[: size - len(some)]]
            off[torch.arange(size), torch.from_numpy(chosen[filled])] = 1
            made[:, some] = (runs.patched(pair, off, alone=site) - base)[: len(some)].T
    return made


# --- gradients ---------------------------------------------------------------------------------------


def _by_inputs(
    runs: Runs, pair: Pair, alphas: Sequence[float], relevance: bool = False
) -> Float[Tensor, "example edge"]:
    """The mean gradient over inputs between the corrupted run (0) and the intact one (1), times what edges carry."""
    slopes = (_sloped(runs, pair, alpha, relevance) for alpha in alphas)
    mean = _mean_pulled(runs.graph, slopes, len(alphas), relevance)
    return runs.graph.contracted(pair.clean, pair.other, mean, linear=relevance)


def _mean_pulled(
    graph: EdgeGraph, slopes: Iterable[Slopes], n: int, relevance: bool = False
) -> dict[str, Tensor]:
    """The mean over n runs of `EdgeGraph.pulled`, by site."""
    total: dict[str, Tensor] = {}
    for cache, gradients in slopes:
        for site, value in graph.pulled(cache, gradients, linear=relevance).items():
            total[site] = total[site].add_(value) if site in total else value
    return {site: value / n for site, value in total.items()}


def _sloped(runs: Runs, pair: Pair, alpha: float, relevance: bool) -> Slopes:
    """`gradients_at` an input between that of the corrupted run (0) and that of the intact one (1)."""
    sites = () if alpha == 1 else runs.graph.input_sites
    return gradients_at(runs, pair, {s: _between(pair, s, alpha) for s in sites}, relevance)


def _by_activations(
    runs: Runs, pair: Pair, alphas: Sequence[float]
) -> Float[Tensor, "example edge"]:
    """The mean gradient over what the sources of one site put out between the two runs, site by site."""
    graph = runs.graph
    made: Tensor | None = None
    for sites, sources in graph.source_sites():
        mixed = ({s: _between(pair, s, alpha) for s in sites} for alpha in alphas)
        slopes = (gradients_at(runs, pair, edits) for edits in mixed)
        mean = _mean_pulled(graph, slopes, len(alphas))
        scores = graph.contracted(pair.clean, pair.other, mean)
        own = torch.from_numpy(np.isin(graph.ends[:, 0], sources))
        made = torch.zeros_like(scores) if made is None else made
        made[:, own] = scores[:, own]
    assert made is not None, "a graph has sources"
    return made


def _between(pair: Pair, site: str, alpha: float) -> Change:
    """The change that puts in a mixture of the two runs: the other one's tensor at 0, the intact one's at 1."""
    value = torch.lerp(pair.other[site], pair.clean[site], alpha)
    return lambda _: value * 1


def gradients_at(
    runs: Runs, pair: Pair, edits: Mapping[str, Change], relevance: bool = False
) -> Slopes:
    """The sites that the graph reads and the metric's gradient at `slopes`, in a run with some edits.

    With `relevance` the model's operations are replaced by linear ones (`attribution.propagation`); the metric is not.
    Gradients are taken at tensors of zeros that are added at the sites, so that it does not matter whether a site's
    tensor is itself what the model goes on with, or a view of it.
    """
    graph, leaves = runs.graph, dict[str, Tensor]()

    def leaf(site: str) -> Change:
        def add(value: Tensor) -> Tensor:
            # A tensor that several functions take is changed at each: the gradient is the sum over all of them.
            if site not in leaves:
                leaves[site] = torch.zeros_like(value, requires_grad=True)
            return value + leaves[site]

        return add

    taken = [*graph.slopes, *graph.behind]
    sites = (*graph.pull_reads, *graph.behind)
    read = list(dict.fromkeys([*map(runs.model.site, sites), *runs.ends]))
    # What comes after all that is read, as after a unit whose activation is the metric, has no gradient.
    last = None if runs.keep_output else runs.model.last(read)
    changes = merged(runs.model, pair.edits, edits, {site: leaf(site) for site in taken})
    order = {site.name: i for i, site in enumerate(runs.model.sites)}
    cut = runs.cut(pair, max((*taken, *sites), key=lambda name: order[runs.model.site(name).name]))
    changes = changes if cut is None else cut.added(changes)
    # One for all examples: it is not asked what biases are worth on each.
    rules = Propagation("epsilon", 1, pair.clean[graph.reads[0]]) if relevance else nullcontext()
    with rules:
        cache = runs.model.run(
            pair.part.inputs, mask=pair.part.mask, read=read, edits=changes, until=last, grad=True,
            reference=relevance,
        )  # fmt: skip
    tensors = {s.name: cache[s] for s in read}
    reading = runs.reading(pair.part, tensors, cut=cut, output=output_of(cache))
    value = runs.metric.of(reading, pair.intact)
    made = torch.autograd.grad(
        value.sum(), list(leaves.values()), allow_unused=True, retain_graph=bool(graph.behind)
    )
    gradients = dict(zip(leaves, made, strict=True))
    found = {
        site: torch.zeros_like(pair.clean[site]) if gradients.get(site) is None else gradients[site]
        for site in taken
    }
    found |= graph.separated(tensors, found, leaves)
    return {name: value.detach() for name, value in tensors.items()}, found
