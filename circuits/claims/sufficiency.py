"""Tests of whether a circuit does what the model does: faithfulness, accuracy, equivalence, and where else it holds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from circuits.claims.evidence import Loss, Mean, Region, Share, is_clear
from circuits.claims.hypotheses import blind_below, hsic_p, shi_equivalence_p
from circuits.claims.parts import ABLATIONS
from circuits.claims.settings import ClaimTest, Parameter, Settings
from circuits.claims.subject import Subject, load_claims_task, unseen
from circuits.claims.verdicts import Level, Measured, Quantity, quantity
from circuits.tasks.metrics import accuracy
from circuits.tasks.spec import TaskSpec
from circuits.tasks.task import Task

DRAWS = 999
"""How many permutations the test of independence makes."""

FAITHFUL = (
    Parameter("least", "the least faithfulness", 0.9, -10, 10),
    Parameter("most", "the largest faithfulness", 1.1, -10, 10),
)

DIRECTIONS = Parameter(
    "directions", "in which runs", "both", choices=("both", "noising", "denoising"), form="text"
)


def _region(settings: Settings) -> Region:
    return Region(settings["least"], settings["most"])


# --- faithfulness ------------------------------------------------------------------------------------


def faithfulness(subject: Subject, settings: Settings, level: Level) -> Measured:
    """f(C) in the clean run with all else ablated and, where there is one, in the corrupted run with C restored."""
    if why := subject.no_effect(level=level.each):
        return subject.cannot(why)
    _, kept = subject.circuit
    wanted = settings["directions"]
    directions = [d for d in subject.directions(kept) if wanted in ("both", d)]
    if not directions:
        why = f"directions {wanted}: there is no run in which restoring this circuit says something"
        return subject.cannot(why)
    found = []
    for direction in directions:
        values = subject.values([kept])[0] if direction == "noising" else subject.restored(kept)
        found.append(quantity(
            f"faithfulness ({direction})", subject.faithfulness(values), _region(settings), level,
            parts=len(directions),
        ))  # fmt: skip
    notes = [] if len(directions) == 2 else [f"tested by {directions[0]} only"]
    notes.append(_spread(subject))
    return Measured(tuple(found), subject.said(), subject.seed, tuple(notes), _metric(subject))


def _spread(subject: Subject) -> str:
    """How far single examples are off, which a mean does not show."""
    _, kept = subject.circuit
    _, whole = subject.ends()
    off = subject.values([kept])[0] - whole
    low, middle, high = np.quantile(off, [0.05, 0.5, 0.95])
    unit = subject.test.metric.unit or subject.test.metric.name
    return f"circuit minus model over examples ({unit}): 5 % {low:.3g}, median {middle:.3g}, 95 % {high:.3g}"


def _metric(subject: Subject) -> dict[str, float]:
    """The metric of nothing, of the circuit and of all."""
    _, kept = subject.circuit
    empty, whole = subject.ends()
    own = subject.values([kept])[0]
    return {
        "nothing": float(empty.mean()),
        "circuit": float(own.mean()),
        "model": float(whole.mean()),
    }


def ablations(subject: Subject, settings: Settings, level: Level) -> Measured:
    """Faithfulness under several ablations; a circuit that is faithful under one only says so."""
    _, kept = subject.circuit
    parts, _ = subject.circuit
    chosen = settings["ablations"]
    if other := next((a for a in chosen if a not in parts.ablations), ""):
        return subject.cannot(f"ablation {other}: {parts.word} take {', '.join(parts.ablations)}")
    found: list[Quantity] = []
    for name in chosen:
        if why := subject.no_effect(ablation=name, level=level.each):
            return subject.cannot(why)
        values = subject.values([kept], ablation=name)[0]
        found.append(quantity(
            f"faithfulness ({name})", subject.faithfulness(values, ablation=name), _region(settings), level,
            parts=len(chosen),
        ))  # fmt: skip
    return Measured(tuple(found), subject.said(), subject.seed)


def elsewhere(subject: Subject, settings: Settings, level: Level) -> Measured:
    """Faithfulness on the test halves of other tasks, such as other templates of the same behaviour."""
    _, kept = subject.circuit
    found, said = [], []
    for spec in settings["tasks"]:
        task = other_task(subject, spec)
        if why := subject.no_effect(task, level=level.each):
            return subject.cannot(why)
        values = subject.values([kept], task=task)[0]
        said.append(subject.said(task))
        found.append(quantity(
            f"faithfulness on {spec}", subject.faithfulness(values, task), _region(settings), level,
            parts=len(settings["tasks"]),
        ))  # fmt: skip
    return Measured(tuple(found), "; ".join(said), subject.seed)


def check_tasks(subject: Subject, settings: Settings) -> None:
    """Raise if a task cannot be made; what it asks is not looked at."""
    for spec in settings["tasks"]:
        load_claims_task(subject.model, TaskSpec(spec, len(subject.task), subject.task.seed))


def other_task(subject: Subject, spec: str) -> Task:
    """The test half of another task, with as many examples as the subject's."""
    return load_claims_task(
        subject.model, TaskSpec(spec, len(subject.task), subject.task.seed)
    ).test


# --- example by example ------------------------------------------------------------------------------


def accuracy_kept(subject: Subject, settings: Settings, level: Level) -> Measured:
    """How much less often the circuit is right than the model, whose own accuracy is the ceiling."""
    if not subject.test.answered:
        why = f"task {subject.test.name} has no answers, so that nothing is right or wrong"
        return subject.cannot(why)
    _, kept = subject.circuit
    empty, whole = subject.ends(metric=accuracy)
    if not is_clear(Mean(whole - empty, subject.test.clusters), level.each):
        return subject.cannot(
            "the model is right no more often than with every part ablated: there is nothing to lose"
        )
    own = subject.values([kept], metric=accuracy)[0]
    loss = Loss(whole - own, subject.test.clusters)
    lost = quantity("accuracy lost", loss, Region(high=settings["most"]), level)
    rates = f"circuit {own.mean():.1%}, model {whole.mean():.1%}, nothing kept {empty.mean():.1%}"
    note = f"accuracy: {rates}; the model's is the ceiling"
    details = {
        "circuit": float(own.mean()),
        "model": float(whole.mean()),
        "nothing": float(empty.mean()),
    }
    return Measured((lost,), subject.said(), subject.seed, (note,), details)


def equivalence(subject: Subject, settings: Settings, level: Level) -> Measured:
    """Whether circuit and model can be exchanged example by example.

    The circuit's score exceeds the model's about as often as not (two one-sided exact tests, ties one half), *and* the
    .9 quantile of |s(C) - s(M)| is small: the first alone would pass a circuit that is far off on both sides.
    """
    if why := subject.no_effect(level=level.each):
        return subject.cannot(why)
    _, kept = subject.circuit
    task = subject.test
    _, whole = subject.ends()
    own = subject.values([kept])[0]
    tie = np.isclose(own, whole, rtol=1e-6, atol=1e-9)
    wins = np.where(tie, 0.5, (own > whole).astype(float))
    # The allowed error is fixed on the other half, before the examples of this one are looked at.
    empty, full = subject.ends(subject.find)
    bound = settings["delta"] * abs(float((full - empty).mean()))
    near = (np.abs(own - whole) <= bound).astype(float)
    eps = settings["eps"]
    found = (
        quantity(
            "P(circuit > model)", Share(wins, task.clusters), Region(0.5 - eps, 0.5 + eps), level, parts=2
        ),
        quantity(
            f"share of examples with |s(C) - s(M)| <= {bound:.3g}", Share(near, task.clusters),
            Region(low=settings["quantile"]), level, parts=2,
        ),
    )  # fmt: skip
    shi = shi_equivalence_p(wins, task.clusters, eps)
    note = (
        f"the test of Shi et al. (2024), whose null hypothesis is that they are equivalent, gives p = {shi:.3g}; a "
        "large p there is no evidence of equivalence"
    )
    return Measured(found, subject.said(), subject.seed, (note,), {"shi_p": shi, "delta": bound})


def independence(subject: Subject, settings: Settings, level: Level) -> Measured:
    """Whether what is left of the score without the circuit depends on the model's score (HSIC, by permutations).

    Gretton et al. (2008); Shi et al. (2024). It can refute that the rest carries nothing, and cannot show it, so that
    the best verdict is *undecided*; the smallest dependence that it could have seen is printed.
    """
    if (least := level.corrected(1 / (1 + settings["draws"]))) >= level.alpha:
        return subject.cannot(
            f"{settings['draws']} permutations give a corrected p of at least {least:.3g}: nothing could be refuted"
        )
    _, kept = subject.circuit
    _, whole = subject.ends()
    rest = subject.values([~kept])[0]
    clusters = subject.test.clusters
    statistic, p, null = hsic_p(rest, whole, clusters, settings["draws"], subject.seed)
    seen = blind_below(whole, clusters, 1 - level.each, subject.seed)
    made = Quantity(
        "HSIC of complement and model", statistic, float("nan"), float("nan"), Region(high=0), 1.0, level.corrected(p),
        n=len(rest), clusters=len(set(clusters)), null=null, null_is="permuted examples",
    )  # fmt: skip
    said = (
        f"a correlation below {seen:.2f} could not have been seen"
        if seen < 1
        else "no dependence could be seen"
    )
    why = f"not refuted (p {level.corrected(p):.3g}): {said} with {len(set(clusters))} independent examples"
    if np.ptp(rest) == 0 or np.ptp(whole) == 0:
        what = "the complement's score" if np.ptp(rest) == 0 else "the model's score"
        return subject.cannot(f"{what} is the same on all examples")
    return Measured(
        (made,), subject.said(), subject.seed, (), {"detectable_correlation": seen}, cannot_hold=why
    )


def breaking_inputs(subject: Subject, settings: Settings, level: Level) -> Measured:
    """How often inputs of the task's own grammar break the circuit, and which break it most.

    Inputs are drawn by another seed than the file's, without those that were seen; an input breaks the circuit if it is
    off by more than a share of the model's mean effect.
    """
    if why := subject.no_effect(level=level.each):
        return subject.cannot(why)
    _, kept = subject.circuit
    known = {*subject.task.examples.identities, *subject.seen}
    spec = subject.task_spec
    drawn = load_claims_task(
        subject.model,
        replace(spec, seed=spec.seed + 1 + subject.seed, examples=settings["inputs"]),
        subject.folder,
    )
    new = unseen(drawn, known)
    if len(new) < 2:
        why = f"task {drawn.name} has no other inputs than {len(known)} known ones: nothing was searched"
        return subject.cannot(why)
    task = drawn.subset(new)
    empty, whole = subject.ends(subject.find)
    bound = settings["error"] * abs(float((whole - empty).mean()))
    _, all_ = subject.ends(task)
    off = np.abs(subject.values([kept], task=task)[0] - all_)
    worst = np.argsort(-off, kind="stable")[:10].tolist()
    found = quantity(
        f"share of inputs off by more than {bound:.3g}", Share((~(off <= bound)).astype(float), task.clusters),
        Region(high=settings["most"]), level,
    )  # fmt: skip
    details = {"worst": [{"input": task.examples.names[i], "off": float(off[i])} for i in worst]}
    note = f"the worst input, {task.examples.names[worst[0]]!r}, is off by {off[worst[0]]:.3g}"
    return Measured((found,), subject.said(task), subject.seed, (note,), details)


TESTS = (
    ClaimTest(
        "faithfulness", ("sufficient",),
        "The share of the model's effect that the circuit alone carries, a ratio of means over examples (Marks et al. "
        "2024), in the clean run with all else ablated and in the corrupted run with the circuit restored.",
        (*FAITHFUL, DIRECTIONS),
        faithfulness,
    ),
    ClaimTest(
        "accuracy", ("sufficient",),
        "How much less often the circuit is right than the model.",
        (Parameter("most", "the largest loss of accuracy", 0.05, 0, 1),), accuracy_kept,
    ),
    ClaimTest(
        "equivalence", ("equivalent",),
        "Whether the circuit scores higher than the model as often as not, and the two are close on nine examples of "
        "ten; a strict form of the test of Shi et al. (2024).",
        (
            Parameter("eps", "how far P(circuit > model) may be from one half", 0.1, 0, 0.5),
            Parameter("delta", "how far the circuit may be off, as a share of the model's effect", 0.25, 0, 100),
            Parameter("quantile", "on which share of the examples", 0.9, 0, 1),
        ), equivalence,
    ),
    ClaimTest(
        "independence", ("complete",),
        "Whether the score without the circuit still depends on the model's score (HSIC; Shi et al. 2024).",
        (Parameter("draws", "permutations", DRAWS, 99, 10**5, whole=True),), independence,
    ),
    ClaimTest(
        "ablations", ("robust",),
        "Faithfulness under several ablations.",
        (*FAITHFUL, Parameter(
            "ablations", "which", ("counterpart", "resample", "mean", "zero"), choices=ABLATIONS, form="texts"
        )),
        ablations,
    ),
    ClaimTest(
        "other-tasks", ("general",),
        "Faithfulness on other tasks, such as other templates of the same behaviour.",
        (*FAITHFUL, Parameter("tasks", "the tasks, as `--task` takes them", form="texts")), elsewhere,
        check=check_tasks,
    ),
    ClaimTest(
        "breaking-inputs", ("general",),
        "How often other inputs of the task's grammar break the circuit, and which break it most.",
        (
            Parameter("inputs", "how many inputs are drawn", 500, 10, 10**6, whole=True),
            Parameter("error", "from which error on it breaks, as a share of the model's effect", 0.5, 0, 100),
            Parameter("most", "the largest share of inputs that may break it", 0.05, 0, 1),
        ), breaking_inputs,
    ),
)  # fmt: skip
