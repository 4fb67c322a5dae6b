"""Tests of a circuit against chance: random circuits, and one found with right and wrong answers swapped."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from circuits.claims.evidence import Ratio, Region, Share
from circuits.claims.parts import EdgeParts, Mask, drawn_like
from circuits.claims.settings import ClaimTest, Parameter, Settings
from circuits.claims.subject import Subject
from circuits.claims.sufficiency import DIRECTIONS
from circuits.claims.verdicts import Level, Measured, Quantity, quantity
from circuits.discovery import greedy, score_edges
from circuits.discovery.finding import swapped
from circuits.discovery.scoring import METHODS

_TRIES = 20


def random_circuits(subject: Subject, settings: Settings, level: Level) -> Measured:
    """In how many random circuits of like size, layers and kinds |1 - f| is larger than in the circuit."""
    if why := subject.no_effect(level=level.each):
        return subject.cannot(why)
    parts, kept = subject.circuit
    rng = np.random.default_rng(subject.seed)
    drawn, same = _different(lambda: parts.like(kept, rng), kept, settings["circuits"])
    if not drawn:
        why = "there is no other circuit of its size, layers and kinds to compare with"
        return subject.cannot(why)
    values = subject.values([kept, *drawn])
    f = np.array([subject.faithfulness(row).value for row in values])
    off = np.abs(1 - f)
    found = _beaten(off[1:] > off[0] * (1 + 1e-9), f[1:], settings, level)
    on_path = float(np.mean([parts.connected(c).sum() / max(1, c.sum()) for c in drawn]))
    notes = (
        f"faithfulness {f[0]:.3g}; of random circuits {f[1:].min():.3g} to {f[1:].max():.3g}; {on_path:.0%} of their "
        f"{parts.word} lie on a path from the input to the output",
        *_few(len(drawn), same, settings["circuits"]),
    )
    return Measured((found,), subject.said(), subject.seed, notes)


def _beaten(worse: np.ndarray, null: np.ndarray, settings: Settings, level: Level) -> Quantity:
    return quantity(
        "share of random circuits that are worse", Share(worse.astype(float), range(len(worse))),
        Region(low=settings["least"]), level, null=tuple(null.tolist()),
        null_is="random circuits of the same size, layers and kinds",
    )  # fmt: skip


def _different(draw: Callable[[], Mask], kept: Mask, n: int) -> tuple[list[Mask], int]:
    """Different random sets that are not the circuit, at most n, and how often the circuit itself was drawn."""
    # The same set twice is one piece of evidence.
    found, same = dict[bytes, Mask](), 0
    for _ in range(n * _TRIES):
        one = draw()
        if (one == kept).all():
            same += 1
        else:
            found.setdefault(np.packbits(one).tobytes(), one)
        if len(found) == n:
            break
    return [*found.values()], same


def _few(n: int, same: int, wanted: int) -> tuple[str, ...]:
    if n == wanted and not same:
        return ()
    return (
        f"{n} different random circuits were found; {same} draws were the circuit itself and do not count",
    )


def partial_necessity(subject: Subject, settings: Settings, level: Level) -> Measured:
    """How often ablating random parts, as many of each layer and kind, hurts less than ablating the circuit.

    Shi et al. (2024). They are drawn from the whole model or from what is outside the circuit.
    """
    if why := subject.no_effect(level=level.each):
        return subject.cannot(why)
    parts, kept = subject.circuit
    rng = np.random.default_rng(subject.seed)
    among = ~kept if settings["drawn_from"] == "complement" else None
    drawn, same = _different(
        lambda: drawn_like(parts.classes, kept, rng, among), kept, settings["circuits"]
    )
    # Fewer parts would hurt less by their number alone.
    drawn = [one for one in drawn if one.sum() == kept.sum()]
    if not drawn:
        return subject.cannot(
            f"there are not as many other parts of its layers and kinds in the {settings['drawn_from']} to ablate"
        )
    values = subject.values([~kept, *(~one for one in drawn)])
    lost = 1 - np.array([subject.faithfulness(row).value for row in values])
    found = _beaten(lost[1:] < lost[0] - 1e-9 * abs(lost[0]), lost[1:], settings, level)
    notes = [
        f"ablating the circuit loses {lost[0]:.3g} of the effect, random parts {lost[1:].min():.3g} to "
        f"{lost[1:].max():.3g}"
    ]
    return Measured(
        (found,),
        subject.said(),
        subject.seed,
        (*notes, *_few(len(drawn), same, settings["circuits"])),
    )


def knockout(subject: Subject, settings: Settings, level: Level) -> Measured:
    """What is left of the effect without the circuit, in both runs: near 0 if nothing else carries the behaviour."""
    if why := subject.no_effect(level=level.each):
        return subject.cannot(why)
    _, kept = subject.circuit
    wanted = settings["directions"]
    directions = [d for d in subject.directions(~kept) if wanted in ("both", d)]
    if not directions:
        return subject.cannot(
            f"directions {wanted}: there is no run in which restoring all else says something"
        )
    found = []
    for direction in directions:
        values = subject.values([~kept])[0] if direction == "noising" else subject.restored(~kept)
        found.append(quantity(
            f"faithfulness of all else ({direction})", subject.faithfulness(values), Region(high=settings["most"]),
            level, parts=len(directions),
        ))  # fmt: skip
    note = (
        "noising shows what the circuit takes away from the clean run; denoising, what all else restores in the "
        "corrupted one: redundant parts outside show in the first, parts that work only together in the second"
    )
    return Measured(tuple(found), subject.said(), subject.seed, (note,))


def swapped_answers(subject: Subject, settings: Settings, level: Level) -> Measured:
    """How much more faithful the circuit is than one found in the same way with answers swapped at random."""
    parts, kept = subject.circuit
    if not isinstance(parts, EdgeParts):
        why = "a circuit of units is not searched for: the test is about circuits of edges"
        return subject.cannot(why)
    if why := subject.no_effect(level=level.each):
        return subject.cannot(why)
    if not subject.find.compared:
        why = f"task {subject.task.name} names no wrong answers to swap with the right ones"
        return subject.cannot(why)
    scores = score_edges(
        parts.graph, swapped(subject.find, subject.seed), settings["method"], ablation=subject.ablation,
        seed=subject.seed,
    )  # fmt: skip
    other = greedy(parts.graph, scores.worth(), int(kept.sum()))
    own, theirs = subject.values([kept, other])
    empty, whole = subject.ends()
    found = quantity(
        "faithfulness of the circuit less that of the swapped search",
        Ratio(own - theirs, whole - empty, subject.test.clusters), Region(low=settings["least"]), level,
    )  # fmt: skip
    f = subject.faithfulness(theirs).value
    note = f"the circuit of {int(other.sum())} edges that was found with answers swapped has a faithfulness of {f:.3g}"
    return Measured((found,), subject.said(), subject.seed, (note,))


_CIRCUITS = (
    Parameter("least", "the least share of random circuits that are worse", 0.9, 0, 1),
    Parameter("circuits", "how many random circuits", 200, 10, 10**5, whole=True),
)

TESTS = (
    ClaimTest(
        "random-circuits", ("sufficient",),
        "The share of connected random circuits of like size, layers and kinds that are less faithful.",
        _CIRCUITS, random_circuits,
    ),
    ClaimTest(
        "swapped-answers", ("sufficient",),
        "By how much the circuit is more faithful than one that the same search finds with answers swapped at random.",
        (
            Parameter("least", "the least difference of faithfulness", 0.1, 0, 10),
            Parameter("method", "how edges are scored", "eap-ig", choices=METHODS, form="text"),
        ), swapped_answers,
    ),
    ClaimTest(
        "knockout", ("necessary",),
        "What is left of the effect with the circuit ablated, and restored by all else.",
        (Parameter("most", "the largest faithfulness of all else", 0.1, -10, 10), DIRECTIONS), knockout,
    ),
    ClaimTest(
        "partial-necessity", ("necessary",),
        "How often ablating as many random parts hurts less than ablating the circuit (Shi et al. 2024).",
        (*_CIRCUITS, Parameter(
            "drawn_from", "where random parts are drawn from", "complement", choices=("complement", "model"),
            form="text",
        )), partial_necessity,
    ),
)  # fmt: skip
