"""Tests of what a circuit leaves out and what it could leave out: completeness, minimality and stability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import combinations

import numpy as np

from circuits.claims.evidence import Mean, Ratio, Region
from circuits.claims.parts import EdgeParts, Mask
from circuits.claims.settings import ClaimTest, Parameter, Settings
from circuits.claims.subject import Subject
from circuits.claims.verdicts import Level, Measured, quantity
from circuits.discovery import greedy, score_edges
from circuits.discovery.comparing import shared
from circuits.discovery.evaluating import FAITHFUL
from circuits.discovery.scoring import METHODS
from circuits.discovery.searching import top
from circuits.discovery.stability import DRAWS, STABLE, stability
from circuits.tasks.task import Task

_CANDIDATES = 20
"""Among how many parts, at most, the greedy search for a bad subset chooses in each step."""

_FEWEST = 20
"""The fewest independent examples of which bootstraps and halves say something."""

_ENUMERATED = 4096
"""The most circuits that are all tried."""


# --- completeness ------------------------------------------------------------------------------------


def completeness(subject: Subject, settings: Settings, level: Level) -> Measured:
    """|F(C \\ K) - F(M \\ K)| over subsets K of the circuit: small if it holds all parts that do one job.

    Wang et al. (2022), section 4.1. Subsets are drawn at random, taken by layer and kind, and looked for greedily on
    the `find` half; all are judged on the `test` half.
    """
    if why := subject.no_effect(level=level.each):
        return subject.cannot(why)
    chosen = _subsets(subject, settings)
    _, kept = subject.circuit
    own = subject.values([kept & ~k for k in chosen.values()])
    model = subject.values([~k for k in chosen.values()])
    empty, whole = subject.ends()
    bound = Region(-settings["most"], settings["most"])
    found = [
        quantity(
            f"F(C \\ K) - F(M \\ K), {name} ({int(k.sum())} parts)",
            Ratio(own[i] - model[i], whole - empty, subject.test.clusters), bound, level, parts=len(chosen),
        )
        for i, (name, k) in enumerate(chosen.items())
    ]  # fmt: skip
    worst = max(found, key=lambda q: abs(q.value))
    note = (
        f"the worst of {len(found)} subsets: {worst.name}, {worst.value:.3g} of the model's effect"
    )
    return Measured(tuple(found), subject.said(), subject.seed, (note,))


def _subsets(subject: Subject, settings: Settings) -> dict[str, Mask]:
    """The subsets that are tried, by name."""
    parts, kept = subject.circuit
    rng = np.random.default_rng(subject.seed)
    found: dict[str, Mask] = {}
    for i in range(settings["random"]):
        found[f"random {i + 1}"] = kept & (rng.random(len(kept)) < 0.5)
    for c in np.unique(parts.classes[kept]).tolist():
        own = kept & (parts.classes == c)
        name = parts.names[int(np.flatnonzero(own)[0])]
        found[f"all of the kind and layer of {name}"] = own
    for i, k in enumerate(_worst_on_find(subject, settings["greedy"])):
        found[f"greedy {i + 1}"] = k
    return {name: k for name, k in found.items() if k.any()}


def _worst_on_find(subject: Subject, steps: int) -> list[Mask]:
    """Subsets grown part by part, each part the one that drives circuit and model furthest apart on the find half."""
    _, kept = subject.circuit
    rng = np.random.default_rng(subject.seed)
    chosen, found = np.zeros(len(kept), bool), list[Mask]()
    for _ in range(min(steps, int(kept.sum()))):
        left = np.flatnonzero(kept & ~chosen)
        tried = []
        for part in rng.permutation(left)[:_CANDIDATES].tolist():
            more = chosen.copy()
            more[part] = True
            tried.append(more)
        own = subject.values([kept & ~k for k in tried], task=subject.find).mean(1)
        model = subject.values([~k for k in tried], task=subject.find).mean(1)
        chosen = tried[int(np.abs(own - model).argmax())]
        found.append(chosen)
    return found


# --- minimality --------------------------------------------------------------------------------------


def minimality(subject: Subject, settings: Settings, level: Level) -> Measured:
    """Whether parts could be left out: some part is needed < each is < no subset < no smaller circuit does the job."""
    if why := subject.no_effect(level=level.each):
        return subject.cannot(why)
    tests = {
        "some": _some_needed, "each": _each_needed, "subset": _no_subset, "smallest": _none_smaller,
    }  # fmt: skip
    return tests[settings["level"]](subject, settings, level)


def _without(kept: Mask) -> list[Mask]:
    """The circuit without each of its parts."""
    found = []
    for part in np.flatnonzero(kept).tolist():
        fewer = kept.copy()
        fewer[part] = False
        found.append(fewer)
    return found


def _drops(subject: Subject, circuit: Mask, fewer: Sequence[Mask], task: Task) -> list[Ratio]:
    """How much faithfulness falls by going over to smaller circuits."""
    own, *less = subject.values([circuit, *fewer], task=task)
    empty, whole = subject.ends(task)
    return [Ratio(own - row, whole - empty, task.clusters) for row in less]


def _inflated_bar(subject: Subject, settings: Settings) -> tuple[float, tuple[float, ...]]:
    """The .9 quantile of what removing a random part from the circuit with random parts added does, on the find half.

    Shi et al. (2024) add parts by random walks; here as many are added as the circuit has, of the same kinds.
    """
    parts, kept = subject.circuit
    rng = np.random.default_rng(subject.seed)
    found = []
    for _ in range(settings["inflated"]):
        added = parts.like(kept, rng) & ~kept
        if not added.any():
            continue
        large = kept | added
        fewer = large.copy()
        fewer[int(rng.choice(np.flatnonzero(added)))] = False
        found.append(_drops(subject, large, [fewer], subject.find)[0].value)
    return (float(np.quantile(found, 0.9)) if found else -math.inf), tuple(found)


def _needed(
    subject: Subject, settings: Settings, level: Level, which: Sequence[int], fewer: Sequence[Mask]
) -> Measured:
    parts, kept = subject.circuit
    bar, null = _inflated_bar(subject, settings)
    region = Region(low=max(settings["least"], bar))
    drops = _drops(subject, kept, fewer, subject.test)
    found = [
        quantity(
            f"faithfulness lost without {parts.names[part]}", drop, region, level, parts=len(drops), null=null,
            null_is="random parts that were added to the circuit",
        )
        for part, drop in zip(which, drops, strict=True)
    ]  # fmt: skip
    note = (
        f"a part counts as needed if its removal costs more than {region.low:.3g}: the larger of `least` and the .9 "
        f"quantile of {len(null)} random additions on the find half"
    )
    return Measured(tuple(found), subject.said(), subject.seed, (note,))


def _some_needed(subject: Subject, settings: Settings, level: Level) -> Measured:
    _, kept = subject.circuit
    fewer = _without(kept)
    on_find = [d.value for d in _drops(subject, kept, fewer, subject.find)]
    best = int(np.argmax(on_find))
    return _needed(subject, settings, level, [int(np.flatnonzero(kept)[best])], [fewer[best]])


def _each_needed(subject: Subject, settings: Settings, level: Level) -> Measured:
    _, kept = subject.circuit
    return _needed(subject, settings, level, np.flatnonzero(kept).tolist(), _without(kept))


def _no_subset(subject: Subject, settings: Settings, level: Level) -> Measured:
    """All subsets where there are few, else those that an elimination on the find half finds."""
    _, kept = subject.circuit
    own = np.flatnonzero(kept).tolist()
    if 2 ** len(own) <= _ENUMERATED:
        chosen = [c for n in range(len(own)) for c in combinations(own, n)]
        return _none_faithful(subject, level, chosen, whole=True)
    return _none_faithful(subject, level, _eliminated(subject, kept), whole=False)


def _none_smaller(subject: Subject, settings: Settings, level: Level) -> Measured:
    """All smaller circuits where there are few, else those that an elimination on the find half finds."""
    _, kept = subject.circuit
    n, k = len(kept), int(kept.sum()) - 1
    if sum(math.comb(n, i) for i in range(k + 1)) <= _ENUMERATED:
        chosen = [c for i in range(k + 1) for c in combinations(range(n), i)]
        return _none_faithful(subject, level, chosen, whole=True)
    full = np.ones(n, bool)
    chosen = [c for c in _eliminated(subject, full) if len(c) <= k]
    return _none_faithful(subject, level, [*chosen, *_eliminated(subject, kept)], whole=False)


def _eliminated(subject: Subject, circuit: Mask) -> list[tuple[int, ...]]:
    """Smaller and smaller subsets of a circuit, the least useful tenth of the parts dropped in each step."""
    found: list[tuple[int, ...]] = []
    circuit = circuit.copy()
    while circuit.sum() > 1:
        drops = [d.value for d in _drops(subject, circuit, _without(circuit), subject.find)]
        own = np.flatnonzero(circuit)
        order = np.argsort(drops, kind="stable")
        circuit[own[order[: max(1, len(own) // 10)]]] = False
        found.append(tuple(np.flatnonzero(circuit).tolist()))
    return found


def _none_faithful(
    subject: Subject, level: Level, chosen: Sequence[tuple[int, ...]], *, whole: bool
) -> Measured:
    """Whether no circuit among some is faithful; the one that comes nearest is shown."""
    parts, kept = subject.circuit
    masks = []
    for some in chosen:
        one = np.zeros(len(kept), bool)
        one[list(some)] = True
        masks.append(one)
    if not masks:
        return subject.cannot("there is no smaller circuit to try")
    own, *values = subject.values([kept, *masks])
    made = partial(quantity, level=level, parts=len(masks) + 1)
    itself = made(
        "faithfulness of the circuit", subject.faithfulness(own), Region(FAITHFUL, 2 - FAITHFUL)
    )
    found = []
    for mask, row in zip(masks, values, strict=True):
        f = subject.faithfulness(row)
        # Not faithful is less than .9, or more than 1.1.
        outside = Region(high=FAITHFUL) if f.value <= 1 else Region(low=2 - FAITHFUL)
        found.append(made(f"faithfulness of {int(mask.sum())} {parts.word}", f, outside))
    # Of many circuits, that which is most surely faithful and that which is least surely not decide.
    worst = min(found, key=lambda q: q.p_refuted), max(found, key=lambda q: q.p_holds)
    decisive = {id(q): q for q in (itself, *worst)}
    note = f"{len(masks)} smaller circuits were tried, {'all there are' if whole else 'found by elimination'}"
    why = (
        ""
        if whole
        else "not refuted: no smaller faithful circuit was found, but not all were tried"
    )
    return Measured(
        tuple(decisive.values()), subject.said(), subject.seed, (note,), cannot_hold=why
    )


# --- stability ---------------------------------------------------------------------------------------


def stable(subject: Subject, settings: Settings, level: Level) -> Measured:
    """How much of the circuit is found again on bootstraps and on disjoint halves of the `find` examples."""
    parts, kept = subject.circuit
    if not isinstance(parts, EdgeParts):
        why = "a circuit of units is not searched for: the test is about circuits of edges"
        return subject.cannot(why)
    if (n := len(set(subject.find.clusters))) < _FEWEST:
        return subject.cannot(
            f"the find half has {n} independent examples: expected {_FEWEST} to draw others from"
        )
    graph, size = parts.graph, int(kept.sum())
    scores = score_edges(
        graph, subject.find, settings["method"], ablation=subject.ablation, seed=subject.seed
    )
    pick = partial(top if settings["search"] == "top" else greedy, graph, n=size)
    again: list[Mask] = []

    def choose(mean: np.ndarray) -> Mask:
        made = pick(scores.importance(mean, "absolute"))
        again.append(made)
        return made

    draws = settings["draws"]
    known = stability(scores, kept, choose, draws, subject.seed)
    with_it = np.array([shared(one, kept) for one in again[:draws]])
    halves = np.array(
        [shared(*pair) for pair in zip(again[draws::2], again[draws + 1 :: 2], strict=True)]
    )
    made = partial(
        quantity,
        level=level,
        parts=2,
        null=(known.by_chance,),
        null_is="random circuits of this size",
    )
    found = (
        made(
            "Jaccard index of the circuit and that of a bootstrap", Mean(with_it, range(len(with_it))),
            Region(low=settings["least"]),
        ),
        made(
            "Jaccard index of circuits of disjoint halves", Mean(halves, range(len(halves))),
            Region(low=settings["halves"]),
        ),
    )  # fmt: skip
    notes = (
        f"two bootstraps {known.jaccard:.2f}, by chance {known.by_chance:.2f}; {known.n_clusters} independent examples",
        "intervals are of the mean over draws from these examples, not over other samples",
    )
    return Measured(found, subject.said(subject.find), subject.seed, notes)


TESTS = (
    ClaimTest(
        "completeness", ("complete",),
        "How differently circuit and model react to losing the same parts K of the circuit, over many K (Wang et al. "
        "2022).",
        (
            Parameter("most", "the largest difference, as a share of the model's effect", 0.2, 0, 100),
            Parameter("random", "random subsets", 20, 0, 1000, whole=True),
            Parameter("greedy", "steps of the greedy search for bad subsets", 5, 0, 100, whole=True),
        ), completeness,
    ),
    ClaimTest(
        "minimality", ("minimal",),
        "Whether parts could be left out, on one of four levels: some part is needed, each is, no subset of the "
        "circuit is faithful, or no smaller circuit is.",
        (
            Parameter("level", "which level", "each", choices=("some", "each", "subset", "smallest"), form="text"),
            Parameter("least", "the faithfulness that a part has to cost", 0.01, 0, 10),
            Parameter("inflated", "random additions that it is compared with", 100, 0, 10**4, whole=True),
        ), minimality,
    ),
    ClaimTest(
        "stability", ("stable",),
        "How much of the circuit the search finds again on bootstraps of the examples.",
        (
            Parameter("least", "the least mean Jaccard index", STABLE, 0, 1),
            Parameter("halves", "the least mean Jaccard index of circuits of disjoint halves", 0.5, 0, 1),
            Parameter("draws", "bootstraps, and a tenth as many halves", DRAWS, 30, 10**4, whole=True),
            Parameter("method", "how edges are scored", "eap-ig", choices=METHODS, form="text"),
            Parameter("search", "how edges are chosen", "greedy", choices=("greedy", "top"), form="text"),
        ), stable,
    ),
)  # fmt: skip
