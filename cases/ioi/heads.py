"""Heads by role: each role has a test of its own, its chance level, and Holm's correction over all heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from cases.ioi import drawing
from cases.ioi.subject import Subject, layer_of
from cases.stages import Stage
from circuits.localization import (
    Copying,
    RoleTests,
    attention_patterns,
    copying_heads,
    direct_effects,
    judge_heads,
    score_heads,
)
from circuits.localization.heads import CHANCE, KINDS
from circuits.models.adapter.inputs import TokenInput
from circuits.models.paths.selecting import select_sites
from circuits.progress import Progress, portion
from circuits.tasks.task import Task
from circuits.tasks.templates.words import NAMES

LEAST = 0.3
"""The least share of attention (that to the first token left out) with which a head counts as one of a kind."""

LEAST_EFFECT = 0.01
"""The least share of the logit difference by which a head has to raise or lower it to count: an effect of a thousandth
differs from none too, with enough texts."""

_SHOWN = 12
"""Heads of each role in `results.json`."""

_KINDS = tuple(kind.replace("_", " ") for kind in KINDS)

_STAND_INS = 3
"""How many heads stand in for a role that no head has, where later stages need some."""

_BEFORE = "gave it to"
"""What stands in front of a name where copying is measured."""

SIGNALS = {"abc": "both", "flip": "position", "random_names": "token"}
"""What a counterpart takes away: which name is repeated; with `flip` only at which place the repeated name stood first,
with `random_names` only who it is."""


def heads(subject: Subject, told: Progress) -> Stage:
    """All roles, and figures of what heads do."""
    task = subject.task(n=subject.sizes.heads)
    found, copying = _found_movers(subject, task.find), _copying(subject)
    copies, lowers = copying.roles()
    told(1, 8)
    names = subject.heads
    measured = direct_effects(subject.model, task.test)
    direct = -measured.values
    judged: dict[str, Any] = {
        "clusters": task.test.clusters, "seed": subject.options.seed, "unit": "logits",
        "least": LEAST_EFFECT * float(measured.base.mean()),
    }  # fmt: skip
    lost = "logit difference that is lost at the logits alone"
    speaks = judge_heads("speaks for the answer", names, direct, measure=lost, **judged)
    against = judge_heads(
        "speaks against the answer", names, direct, measure=lost, side="below", **judged
    )
    seen = attention_from_end(subject, task.test)
    told(2, 8)
    movers = [h for h in found if copies.of(h).holds or lowers.of(h).holds] or found[:_STAND_INS]
    into = _into_queries(subject, movers, judged["least"], portion(told, 2, 6, 8))
    told(6, 8)
    grown, after, removed = _backups(subject, task.test, direct, movers, judged)
    told(7, 8)
    roles = _by_attention(subject) | {
        "name mover": _both(speaks, copies), "negative name mover": _both(against, lowers),
        "S suppressor": _both(speaks, lowers), "S-inhibition": into["abc"].to_dict(_SHOWN),
        "backup name mover": _both(grown, copies, after),
    }  # fmt: skip
    tests = {
        "direct": speaks.to_dict(_SHOWN), "against": against.to_dict(_SHOWN), "copies": copies.to_dict(_SHOWN),
        "lowers": lowers.to_dict(_SHOWN), "grown": grown.to_dict(_SHOWN),
    }  # fmt: skip
    found_inhibitors = roles["S-inhibition"]["found"]
    inhibitors = found_inhibitors or _top(into["abc"])
    signals = {
        SIGNALS[c]: {h: _said(tests_of.of(h)) for h in inhibitors if _has(tests_of, h)}
        for c, tests_of in into.items()
    }
    places = {
        h: {p: float(seen[p][names.index(h)].mean()) for p in seen}
        for h in _shown(roles, movers, inhibitors)
    }
    numbers: dict[str, Any] = {
        "roles": roles, "tests": tests, "movers": movers, "movers_found": bool(found), "signals": signals,
        "attention_from_end": places, "inhibitors": inhibitors, "inhibitors_found": bool(found_inhibitors),
        "removed": removed, "heads": len(names),
        "copied_in_top5": {h: float(copying.in_top[i].mean()) for i, h in enumerate(names) if h in places},
        "chance_in_top5": copying.chance_in_top, "examples": len(task.test),
        "independent": len(set(task.test.clusters)), "names": len(copying.tokens),
    }  # fmt: skip
    text = task.test.examples.tokens(0)
    shown = list(dict.fromkeys([*numbers["inhibitors"][:2], *movers[:3]]))
    figures = {
        "What each head adds to the logit difference directly, on the test half (logits).": drawing.grid(
            names, direct.mean(1), "direct effect, logits"
        ),
        "Attention of heads on one text: what moves the movers' queries, and movers.": drawing.attention(
            attention_patterns(subject.model, text, shown)
        ),
    }
    return Stage(numbers, figures)


def _said(test: Any) -> dict[str, Any]:
    return {
        "value": test.value.value, "low": test.value.low, "high": test.value.high, "chance": test.chance,
        "p_value": test.p_value, "holds": test.holds,
    }  # fmt: skip


def _has(tests: RoleTests, head: str) -> bool:
    return any(t.head == head for t in tests.tests)


def _top(tests: RoleTests) -> list[str]:
    """The heads with the largest measure, whatever it is by chance, where none has the role."""
    return [t.head for t in sorted(tests.tests, key=lambda t: -t.value.value)[:_STAND_INS]]


def _shown(roles: dict[str, Any], movers: Sequence[str], inhibitors: Sequence[str]) -> list[str]:
    """The heads whose attention from the last token is listed: those that have to do with names."""
    of_names = (h for name in roles if name not in _KINDS for h in roles[name]["found"][:_SHOWN])
    return list(dict.fromkeys([*movers, *inhibitors, *of_names]))


def _both(one: RoleTests, *others: RoleTests) -> dict[str, Any]:
    """A role that takes several tests: the heads that pass all of them."""
    passed = [t.head for t in one.found if all(other.of(t.head).holds for other in others)]
    every = (one, *others)
    return {
        "found": passed, "absent": not passed,
        "only_the_first_test": [t.head for t in one.found if t.head not in passed],
        "tests": [test.role for test in every],
        "heads": [{"head": h} | {test.role: _said(test.of(h)) for test in every} for h in passed],
    }  # fmt: skip


def _found_movers(subject: Subject, find: Task) -> list[str]:
    """The heads that speak for the answer on the `find` half, the strongest first: whose queries are looked into."""
    found = direct_effects(subject.model, find)
    values = -found.values
    tests = judge_heads(
        "speaks for the answer", subject.heads, values, measure="direct effect", clusters=find.clusters,
        seed=subject.options.seed, least=LEAST_EFFECT * float(found.base.mean()),
    )  # fmt: skip
    strong = [t.head for t in tests.found]
    return strong or [subject.heads[i] for i in np.argsort(-values.mean(1))[:_STAND_INS]]


def _copying(subject: Subject) -> Copying:
    """How heads copy names, by weights alone."""
    spec = subject.model.input
    assert isinstance(spec, TokenInput), "a language model"
    front = spec.encode(_BEFORE)
    behind = [
        spec.encode(f"{_BEFORE} {name}") for name in NAMES[: 24 if subject.options.fast else None]
    ]
    tokens = [t[-1] for t in behind if len(t) == len(front) + 1]
    return copying_heads(subject.model, tokens, front, seed=subject.options.seed)


def _by_attention(subject: Subject) -> dict[str, Any]:
    """Heads that look at the previous token, at earlier copies, or behind them, on random repeated tokens."""
    scored = score_heads(
        subject.model, n=subject.sizes.texts, length=40, first=False, seed=subject.options.seed
    )
    made = {}
    for name, kind in zip(_KINDS, KINDS, strict=True):
        rows = scored.of(kind)
        passed = [s for s in rows if s.is_one and s.score >= LEAST]
        made[name] = {
            "found": [_written(s.head.site, s.head.index) for s in passed], "absent": not passed,
            "above_chance": sum(s.is_one for s in rows), "chance_is": CHANCE[kind], "least": LEAST,
            "correction": "holm", "n_tests": len(scored.heads) * len(KINDS),
            "heads": [
                {"head": _written(s.head.site, s.head.index), "value": s.score, "low": s.low, "high": s.high,
                 "chance": s.chance, "p_value": s.p_value}
                for s in rows[:_SHOWN]
            ],
        }  # fmt: skip
    return made


def _written(site: str, index: int) -> str:
    """A head as `layer.head`, from its attention pattern."""
    return f"{site.split('.')[1]}.{index}"


def attention_from_end(
    subject: Subject, task: Task
) -> dict[str, Float[np.ndarray, "head example"]]:
    """The attention from the last token to the first token, IO, S1 and S2."""
    model, names = subject.model, subject.heads
    sites = select_sites(model, "pattern")
    made = {p: np.zeros((len(names), len(task))) for p in ("first token", "io", "s1", "s2")}
    for part in task.batches():
        cache = model.run(part.inputs, mask=part.mask, read=sites, until=model.last(sites))
        for row, i in enumerate(part.which):
            (end,), spans = task.questions[i].positions or (-1,), task.questions[i].spans
            seen = np.concatenate(
                [s.by_unit(cache[s])[row, :, end].double().numpy() for s in sites]
            )
            for place, values in made.items():
                start, stop = spans.get(place, (0, 1))
                values[:, i] = seen[:, start:stop].sum(1)
    return made


def _into_queries(
    subject: Subject, movers: Sequence[str], least: float, told: Progress
) -> dict[str, RoleTests]:
    """What heads do to the answer by way of the movers' queries alone, compared with other heads' queries.

    Path patching (Wang et al. 2022, section 3.2), of all movers together, from counterparts that take away the token
    signal, the position signal, or both; the null is the same path into as many other heads of the movers' layers, or
    all others if they are fewer. A head that does nothing through the movers' queries, and harm through the others',
    differs from that null: so it also has to do something of consequence through the movers' (`least`).
    """
    sizes, names = subject.sizes, subject.heads
    rng, last = np.random.default_rng(subject.options.seed), max(map(layer_of, movers))
    first = 0 if sizes.layers is None else min(map(layer_of, movers)) - sizes.layers
    senders = [h for h in names if first <= layer_of(h) < last]
    others: list[str] = []
    for layer in map(layer_of, movers):
        free = [h for h in names if layer_of(h) == layer and h not in (*movers, *others)]
        others += [str(rng.choice(free))] if free else []
    made = {}
    for k, corruption in enumerate(SIGNALS):
        test = subject.task(corruption).test
        values, chance = (
            -subject.changes(
                test,
                [[f"{h} -> {r}.q" for r in to if layer_of(r) > layer_of(h)] for h in senders],
                told=portion(told, 2 * k + half, 2 * k + half + 1, 2 * len(SIGNALS)),
            )
            for half, to in enumerate((movers, others))
        )
        made[corruption] = judge_heads(
            "S-inhibition", senders, values, chance,
            measure=f"logit difference that is lost through the queries of {', '.join(movers)}", unit="logits",
            chance_is=f"the same through the queries of {', '.join(others)}", clusters=test.clusters,
            n_tests=len(names), least=least, seed=subject.options.seed,
        )  # fmt: skip
    return made


def _backups(
    subject: Subject,
    test: Task,
    direct: Float[np.ndarray, "head example"],
    movers: Sequence[str],
    judged: dict[str, Any],
) -> tuple[RoleTests, RoleTests, dict[str, Any]]:
    """How direct effects grow when the movers are removed, compared with random heads of their layers removed."""
    rng, names = np.random.default_rng(subject.options.seed), subject.heads
    without = direct_effects(subject.model, test, without=movers)
    chance, others = np.zeros_like(direct), list[list[str]]()
    n = 1 if subject.options.fast else 5
    for _ in range(n):
        free = [h for h in names if layer_of(h) in {*map(layer_of, movers)} and h not in movers]
        others.append(
            sorted(map(str, rng.choice(free, min(len(movers), len(free)), replace=False)))
        )
        chance += (-direct_effects(subject.model, test, without=others[-1]).values - direct) / n
    grown = judge_heads(
        "grows when movers are removed", names, -without.values - direct, chance,
        measure="growth of the direct effect", chance_is="as many random heads of their layers removed", **judged,
    )  # fmt: skip
    # A head that speaks against the answer also grows when it does so less: a backup speaks for it in the end.
    after = judge_heads(
        "speaks for the answer then", names, -without.values, measure="direct effect with the movers removed", **judged
    )  # fmt: skip
    left = {
        "heads": list(movers),
        "logit_difference_left": float(without.base.mean()),
        "others": others,
    }
    return grown, after, left
