"""The evidence besides heads' roles, a function a stage: behaviour, circuit, other counterparts, edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from cases.ioi import drawing
from cases.ioi.subject import CORRUPTIONS, ORDERS, START, Subject, bare, layer_of
from cases.stages import Stage
from circuits.claims.specificity import common_means, damage
from circuits.discovery import Runs, check_scores, evaluate, greedy, refine, score_edges
from circuits.discovery.comparing import shared
from circuits.discovery.finding import SWAPPED, swapped
from circuits.discovery.found import circuit_graph
from circuits.discovery.graphs import EdgeGraph, Mask
from circuits.discovery.nulls import random_circuit
from circuits.discovery.searching import least_size, values_of
from circuits.experiments import Variant, run
from circuits.experiments.statistics import UNBOUNDED, corrected, interval, mean_ps, p_value
from circuits.figures import circuit_figure, faithfulness_figure
from circuits.files import Keep, part_of
from circuits.localization.head_variants import (
    HeadVectors,
    exchanged_heads,
    mean_changes,
    moved_heads,
)
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.paths.selecting import select_sites
from circuits.progress import Progress, portion
from circuits.tasks.metrics import METRICS, logit_difference
from circuits.tasks.spec import TaskSpec
from circuits.tasks.task import Task

MEASURES = ("logit_difference", "probability", "accuracy", "top5")
OTHERS = ("greater-than", "agreement")
"""The tasks on which the circuit should do nothing."""

_STEPS = (-2.0, -1.0, 1.0, 2.0)
"""How far outputs are moved along a direction, as multiples of the difference of means."""


def interval_of(
    values: Float[np.ndarray, " example"],
    clusters: Sequence[int],
    seed: int,
    within: tuple[float, float] = UNBOUNDED,
) -> dict[str, float]:
    """A mean with its interval over template instances."""
    low, high = interval(np.asarray(values, float), clusters=clusters, seed=seed, within=within)
    return {"value": float(np.mean(values)), "low": low, "high": high}


def grown(graph: EdgeGraph, worth: Float[np.ndarray, " edge"], n: int) -> Mask:
    """The circuit of n edges that is grown from the logits, or of as few more as reach the input."""
    kept = greedy(graph, worth, n)
    return (
        kept
        if kept.any()
        else greedy(graph, worth, least_size(graph, partial(greedy, graph, worth), n))
    )


# --- 1. behaviour --------------------------------------------------------------------------------


def behaviour(subject: Subject) -> Stage:
    """How well the model does the task, with nothing and with `<|im_start|>` in front, and where attention sinks."""
    models = {"nothing": subject.model, "<|im_start|>": bare(subject.model, START)}
    n, seed = subject.sizes.behaviour, subject.options.seed
    rows, sinks, left_out = [], {}, {}
    for front, model in models.items():
        task = TaskSpec("ioi", n, seed).compile(model)
        rows += _behaviour(front, task, seed)
        sinks[front] = _sink(model, task.subset(range(min(16, len(task)))))
        left_out = {reason: list(names) for reason, names in task.left_out.items()}
    return Stage({"rows": rows, "sink": sinks, "left_out": left_out, "n": n})


def _behaviour(front: str, task: Task, seed: int) -> list[dict[str, Any]]:
    """The measures by order; by chance: the same on the counterparts, which name neither IO nor S."""
    measures = [METRICS[name] for name in MEASURES]
    own, other = (run(task.model, [], task, measures=measures, corrupted=c) for c in (False, True))
    templates = np.array([q.template for q in task.questions])
    made = []
    for order in ORDERS:
        rows = np.flatnonzero((templates == order) | (order == "both"))
        clusters = [task.clusters[i] for i in rows]
        row: dict[str, Any] = {
            "front": front,
            "order": order,
            "examples": len(rows),
            "independent": len(set(clusters)),
        }
        for name in MEASURES:
            within = UNBOUNDED if name == "logit_difference" else (0.0, 1.0)
            row[name] = interval_of(own.of(name)[rows], clusters, seed, within)
            row[f"{name}_by_chance"] = float(other.of(name)[rows].mean())
        right = own.of("logit_difference")[rows] > 0
        row["io_above_s"] = interval_of(right, clusters, seed, (0.0, 1.0))
        row["io_above_s_by_chance"] = float((other.of("logit_difference")[rows] > 0).mean())
        made.append(row)
    return made


def _sink(model: HookedModel, task: Task) -> dict[str, Any]:
    """How much attention goes to the first position, and how long the stream is there."""
    sites, shares, even = select_sites(model, "pattern"), [], []
    stream = model.site(f"blocks.{len(sites) // 2}.hook_resid_post")
    lengths: dict[str, list[float]] = {"first": [], "others": []}
    for part in task.batches():
        cache = model.run(part.inputs, mask=part.mask, read=[*sites, stream])
        for row in range(len(part.inputs)):
            n = part.inputs.shape[1] if part.mask is None else int(part.mask[row].sum())
            seen = torch.cat([s.by_unit(cache[s])[row, :, 2:n, 0] for s in sites])
            shares.append(seen.double().mean(1).numpy())
            even.append(float(np.mean([1 / (q + 1) for q in range(2, n)])))
            norms = cache[stream][row, :n].norm(dim=1)
            lengths["first"].append(float(norms[0]))
            lengths["others"].append(float(norms[1:].median()))
    by_head = np.mean(shares, 0)
    return {
        "mean_share": float(by_head.mean()), "even_share": float(np.mean(even)),
        "heads_above_half": int((by_head > 0.5).sum()), "heads": len(by_head), "examples": len(task),
        "norm_first": float(np.median(lengths["first"])), "norm_others": float(np.median(lengths["others"])),
    }  # fmt: skip


# --- 2, 4. the circuit ---------------------------------------------------------------------------


def circuit(subject: Subject, told: Progress, keep: Keep) -> Stage:
    """The circuit by EAP-IG, refined by exact patching, and how good it is on the `test` half."""
    sizes, seed, graph, task = subject.sizes, subject.options.seed, subject.graph, subject.task()
    scores, other = (
        score_edges(
            graph, half, "eap-ig", steps=sizes.steps, seed=seed, progress=portion(told, k, k + 1, 10),
            keep=part_of(keep, name),
        )
        for k, (name, half) in enumerate(
            {"scores": task.find, "swapped": swapped(task.find, seed)}.items()
        )
    )  # fmt: skip
    kept = grown(graph, scores.worth(), sizes.edges)
    others = {SWAPPED: grown(graph, other.worth(), sizes.edges)}
    made = evaluate(
        graph, task.test, kept, scores=scores if sizes.curves else None, find=task.find, others=others,
        n_random=sizes.random, n_curves=sizes.curves, seed=seed, progress=portion(told, 2, 5, 10),
        keep=part_of(keep, "evaluation"),
    )  # fmt: skip
    find = Runs(graph, task.find)
    checked = check_scores(find, scores, sizes.minimal, seed, portion(told, 5, 6, 10))
    smaller = refine(
        find, scores.worth(), sizes.refined, progress=portion(told, 6, 7, 10), keep=part_of(keep, "refined")
    )  # fmt: skip
    refined = _against_greedy(subject, task.test, scores.worth(), smaller)
    told(8, 10)
    minimal = _minimality(subject, task.test, kept)
    told(9, 10)
    edges = [" -> ".join(edge) for edge in made.edges]
    said = made.to_dict()
    numbers = {
        "evaluation": {k: v for k, v in said.items() if k not in ("edges", "record")}, "agreement": checked.to_dict(),
        "completeness_of_scores": scores.completeness, "edges": edges,
        "heads": sorted({e[0] for e in made.edges if e[0][0].isdigit()}, key=_order),
        "refined": refined | {"edges": [" -> ".join(graph.edges[i]) for i in np.flatnonzero(smaller).tolist()]},
        "swapped": said["others"][SWAPPED], "minimality": minimal,
        "specificity": _specificity(subject, task.test, kept), "find": len(task.find),
        "test": len(task.test), "independent": len(set(task.test.clusters)),
    }  # fmt: skip
    drawn = circuit_graph(
        graph, drawing.strongest(graph, kept, scores), scores, task, {"search": "greedy"}
    )
    drawn.graph.pop("made")
    caption = f"The {drawing.DRAWN} strongest edges of the circuit; an edge raises or lowers the logit difference."
    figures = {caption: circuit_figure(drawn)}
    if made.defined:
        figures["Faithfulness on the test half, next to random circuits and rankings."] = (
            faithfulness_figure(made)
        )
    return Stage(numbers, figures)


def _order(head: str) -> tuple[int, int]:
    layer, index = head.split(".")
    return int(layer), int(index)


def _against_greedy(
    subject: Subject, test: Task, worth: Float[np.ndarray, " edge"], smaller: Mask
) -> dict[str, Any]:
    """A circuit that exact patching chose, the one of its size by scores, and random ones of its size."""
    graph, rng = subject.graph, np.random.default_rng(subject.options.seed)
    n = int(smaller.sum())
    randoms = [random_circuit(graph, smaller, rng) for _ in range(subject.sizes.random)]
    none, full = np.zeros(len(graph), bool), np.ones(len(graph), bool)
    values = values_of(
        Runs(graph, test), [none, full, smaller, grown(graph, worth, max(1, n)), *randoms]
    ).mean(1)
    f = ((values[2:] - values[0]) / (values[1] - values[0])).tolist()
    return {"n": n, "faithfulness": f[0], "by_scores": f[1], "random": f[2:]}


def _minimality(subject: Subject, test: Task, kept: Mask) -> dict[str, Any]:
    """What single edges of the circuit are worth in it, and whether that is different from nothing (Holm)."""
    rng, graph = np.random.default_rng(subject.options.seed), subject.graph
    edges = np.flatnonzero(kept)
    chosen = np.sort(rng.choice(edges, min(subject.sizes.minimal, len(edges)), replace=False))
    runs = Runs(graph, test)
    without = []
    for edge in chosen.tolist():
        fewer = kept.copy()
        fewer[edge] = False
        without.append(fewer)
    outside = rng.choice(np.flatnonzero(~kept), len(chosen), replace=False)
    with_more = [kept | (np.arange(len(kept)) == edge) for edge in outside]
    values = values_of(runs, [kept, *without, *with_more])
    changes, null = np.split(values[1:] - values[0], 2)
    p = corrected(mean_ps(changes, test.clusters))
    sizes, other = np.abs(changes.mean(1)), np.abs(null.mean(1))
    return {
        "tried": len(chosen), "of": len(edges), "needed": int((np.array(p) < 0.05).sum()),
        "median": float(np.median(sizes)), "largest": float(sizes.max()),
        "above_null": float((sizes > np.quantile(other, 0.95)).mean()), "null_median": float(np.median(other)),
        "null_is": "adding as many random edges to the circuit", "correction": "holm",
    }  # fmt: skip


def _specificity(subject: Subject, test: Task, kept: Mask) -> dict[str, Any]:
    """The damage that ablating the circuit by means does to its task and to others, next to random circuits.

    Edges out of the embedding and of MLPs carry the text itself, and random circuits of the same kinds have them too:
    no task is left without them. So it is also measured of the edges out of heads alone.
    """
    rng, graph = np.random.default_rng(subject.options.seed), subject.graph
    tasks = {"indirect-object": test} | {name: subject.other(name).test for name in OTHERS}
    of_heads = kept & np.array([graph.sources[s][0].isdigit() for s in graph.ends[:, 0]])
    n = max(2, subject.sizes.random // 5)
    chosen = {"the circuit": kept, "its edges out of heads": of_heads}
    randoms = {
        name: [random_circuit(graph, own, rng) for _ in range(n)] for name, own in chosen.items()
    }
    constants, made = common_means(graph, [*tasks.values()]), dict[str, Any]()
    for task_name, task in tasks.items():
        circuits = [c for name, own in chosen.items() for c in (own, *randoms[name])]
        rows = damage(graph, circuits, task, constants)
        effect = interval_of(rows[0].effect, task.clusters, subject.options.seed)
        made[task_name] = {
            "effect": effect, "defined": bool(effect["low"] > 0 or effect["high"] < 0), "examples": len(task),
            "accuracy_intact": rows[0].right[1], "ablated": {},
        }  # fmt: skip
        for k, (name, own) in enumerate(chosen.items()):
            first, *others = rows[k * (n + 1) : (k + 1) * (n + 1)]
            made[task_name]["ablated"][name] = {
                "edges": int(own.sum()), "damage": float(first.lost.mean() / first.effect.mean()),
                "random": [float(o.lost.mean() / o.effect.mean()) for o in others], "accuracy": first.right[0],
            }  # fmt: skip
    return made


# --- 2. other counterparts and orders ------------------------------------------------------------


def corruptions(subject: Subject, edges: Sequence[str], told: Progress) -> Stage:
    """What is found with other counterparts and with each order alone, next to chance, and how far it carries over."""
    graph, sizes = subject.graph, subject.sizes
    others = CORRUPTIONS[:1] if subject.options.fast else CORRUPTIONS
    asked = [(c, "both") for c in others] + [(CORRUPTIONS[0], o) for o in ORDERS[1:]]
    masks, effects, values = (
        dict[str, Mask](),
        dict[str, Any](),
        dict[str, Float[np.ndarray, " edge"]](),
    )
    tests: dict[str, Task] = {}
    for k, (corruption, order) in enumerate(asked):
        task, name = subject.task(corruption, order), f"{corruption}, {order}"
        scores = score_edges(
            graph, task.find, "eap-ig", steps=sizes.steps, progress=portion(told, k, k + 1, len(asked) + 1)
        )  # fmt: skip
        masks[name] = grown(graph, scores.worth(), sizes.edges)
        values[name], tests[name] = scores.mean, task.test
        effects[name] = {
            "clean": float(scores.clean.mean()),
            "corrupted": float(scores.corrupted.mean()),
        }
    names = list(masks)
    alike = [[shared(masks[a], masks[b]) for b in names] for a in names]
    rng = np.random.default_rng(subject.options.seed)
    chance = [
        shared(random_circuit(graph, masks[a], rng), masks[b])
        for a in names
        for b in names
        if a != b
    ]
    carried = {}
    for name, test in tests.items():
        ends = [np.zeros(len(graph), bool), np.ones(len(graph), bool)]
        found = values_of(Runs(graph, test), [*ends, masks[name], graph.mask(list(edges))]).mean(1)
        own, first = ((v - found[0]) / (found[1] - found[0]) for v in found[2:])
        carried[name] = {"own": float(own), "first": float(first), "examples": len(test)}
    # Summed over positions, scores of the two orders can cancel: what is strong in both, with opposite signs.
    abba, baba = (values[f"{CORRUPTIONS[0]}, {order}"] for order in ORDERS[1:])
    strong = masks[f"{CORRUPTIONS[0]}, ABBA"] & masks[f"{CORRUPTIONS[0]}, BABA"]
    opposed = float((np.sign(abba) != np.sign(baba))[strong].mean()) if strong.any() else None
    return Stage({
        "names": names, "jaccard": alike, "jaccard_by_chance": float(np.mean(chance)), "effects": effects,
        "faithfulness": carried, "opposed_in_both_orders": opposed, "strong_in_both": int(strong.sum()),
        "lost_together": int((strong & ~masks[f"{CORRUPTIONS[0]}, both"]).sum()), "edges": sizes.edges,
    })  # fmt: skip


# --- 5. edits ------------------------------------------------------------------------------------


def edits(subject: Subject, found: Mapping[str, Any], told: Progress) -> Stage:
    """What removing, steering and keeping some heads does, next to random ones.

    Args:
        subject: what the case is about.
        found: the numbers of the stage `heads`.
        told: called with what is done and all there is.
    """
    heads: Sequence[str] = found["inhibitors"]
    task, rng = (
        subject.task("abc", n=subject.sizes.heads),
        np.random.default_rng(subject.options.seed),
    )
    names, layers = subject.heads, [layer_of(h) for h in heads]
    free = {n: [h for h in names if layer_of(h) == n and h not in heads] for n in set(layers)}
    draws = [random_heads(free, layers, rng) for _ in range(subject.sizes.random)]
    predicted = _removed(subject, task.find, [heads])[0]
    measured, *others = _removed(subject, task.test, [heads, *draws], portion(told, 0, 1, 6))
    seed = subject.options.seed
    ablation = {
        "heads": list(heads), "predicted": interval_of(predicted, task.find.clusters, seed),
        "measured": interval_of(measured, task.test.clusters, seed), "random": [float(o.mean()) for o in others],
        "p_value": p_value(float(measured.mean()), [float(o.mean()) for o in others]),
        "null_is": "as many random heads of the same layers",
    }  # fmt: skip
    steered = _steering(subject, heads, rng, portion(told, 1, 5, 6))
    # Roles were tested on `test`, and movers chosen on `find`: neither half may say what they are worth together.
    kept = _kept(subject, subject.fresh(task), found, rng, portion(told, 5, 6, 6))
    rows = [_bar("heads removed, on find", "predicted", ablation["predicted"])]
    rows += [
        _bar("heads removed, on test", "measured", ablation["measured"]),
        _null_bar("random heads", ablation["random"]),
    ]
    for step in steered["steps"]:
        rows += [
            _bar(f"moved {step['times']:+g}, on find", "predicted", step["predicted"]),
            _bar(f"moved {step['times']:+g}, on test", "measured", step["measured"]),
            _null_bar(f"random directions, {step['times']:+g}", step["random"]),
        ]
    caption = "Change of the logit difference by removing and by steering the heads that move the movers' queries."
    return Stage(
        {"ablation": ablation, "steering": steered, "kept": kept},
        {caption: drawing.bars(rows, "change, logits")},
    )


def random_heads(
    free: Mapping[int, Sequence[str]], layers: Sequence[int], rng: np.random.Generator
) -> list[str]:
    """Different heads, as many of each layer as `layers` names it, or all that are free there if those are fewer."""
    made = list[str]()
    for layer in dict.fromkeys(layers):
        n = min(layers.count(layer), len(free[layer]))
        made += map(str, rng.choice(free[layer], n, replace=False))
    return made


_WRITERS = (
    "name mover",
    "S suppressor",
    "negative name mover",
    "backup name mover",
    "S-inhibition",
)
"""The roles of heads that name the answer, and that tell others where to look."""

_READERS = ("duplicate token", "previous token", "induction")
"""The roles of heads that find out which name stands twice."""


def _kept(
    subject: Subject,
    test: Task,
    found: Mapping[str, Any],
    rng: np.random.Generator,
    told: Progress,
) -> list[dict[str, Any]]:
    """What is left if all heads but those with some roles put out what they put out on the counterpart.

    As Wang et al. 2022 (section 4) keep the heads of a circuit, with every MLP; they replace other heads by means
    over texts with three names, here it is one such text. The null keeps as many random heads of each layer.
    """
    made, names = list[dict[str, Any]](), subject.heads
    roles = {
        "heads that write": _WRITERS,
        "these and heads that look for copies": (*_WRITERS, *_READERS),
    }
    intact, other = (
        run(subject.model, [], test, measures=[logit_difference], corrupted=c).of(
            logit_difference.name
        )
        for c in (False, True)
    )
    by_layer = {n: [h for h in names if layer_of(h) == n] for n in set(map(layer_of, names))}
    for k, (what, some) in enumerate(roles.items()):
        own = {h for role in some for h in found["roles"][role]["found"]}
        sets = [own]
        for _ in range(subject.sizes.kept):
            sets.append(set(random_heads(by_layer, sorted(map(layer_of, own)), rng)))
        changes = _removed(
            subject, test, [[h for h in names if h not in kept] for kept in sets], portion(told, k, k + 1, len(roles))
        )  # fmt: skip
        left = intact + changes[0]
        made.append({
            "what": what, "heads": sorted(own, key=_order),
            "left": interval_of(left, test.clusters, subject.options.seed), "intact": float(intact.mean()),
            "none": float(other.mean()), "share": float(left.mean() / intact.mean()),
            "random": [float((intact + c).mean() / intact.mean()) for c in changes[1:]],
            "examples": len(test), "independent": len(set(test.clusters)),
            "null_is": "as many random heads of each layer",
        })  # fmt: skip
    return made


def _bar(what: str, kind: str, found: Mapping[str, float]) -> dict[str, Any]:
    return {"what": what, "kind": kind, **found}


def _null_bar(what: str, values: Sequence[float]) -> dict[str, Any]:
    return {
        "what": what,
        "kind": "random",
        "value": float(np.mean(values)),
        "low": min(values),
        "high": max(values),
    }


def _changed(
    model: HookedModel, task: Task, variants: Sequence[Variant], told: Progress | None = None
) -> list[Float[np.ndarray, " example"]]:
    """How the logit difference changes in each variant."""
    made = run(model, variants, task, measures=[logit_difference], progress=told)
    name = logit_difference.name
    return [made.of(name, v.name) - made.of(name) for v in variants]


def _removed(
    subject: Subject, task: Task, sets: Sequence[Sequence[str]], told: Progress | None = None
) -> list[Float[np.ndarray, " example"]]:
    """The same if each set of heads puts out what it puts out in the counterpart's run."""
    variants = [exchanged_heads(str(k), subject.model, heads) for k, heads in enumerate(sets)]
    return _changed(subject.model, task, variants, told)


def _steering(
    subject: Subject, heads: Sequence[str], rng: np.random.Generator, told: Progress
) -> dict[str, Any]:
    """Moving the heads' outputs at the last token along what tells a swapped S2 from the right one.

    The direction of each head is the mean difference between the run in which S2 is IO (`swap`) and the clean one, on
    the `find` half: moved once along it, the model should give the answer to the swapped text. ABBA and BABA have
    directions of their own, since S2 is the other one of the two names there, and the two may cancel.
    """
    swap, seed = subject.task("swap", n=subject.sizes.heads), subject.options.seed
    along = mean_changes(subject.model, swap.find, heads)
    drawn = [
        {order: _random_like(one, rng) for order, one in along.items()}
        for _ in range(subject.sizes.random)
    ]
    steps = []

    def moved(
        half: Task,
        directions: Sequence[Mapping[str, HeadVectors]],
        times: float,
        told: Progress | None = None,
    ) -> list[np.ndarray]:
        variants = [
            moved_heads(str(k), subject.model, half, heads, one, times)
            for k, one in enumerate(directions)
        ]
        return _changed(subject.model, half, variants, told)

    for k, times in enumerate(_STEPS):
        (predicted,) = moved(swap.find, [along], times)
        measured, *others = moved(
            swap.test, [along, *drawn], times, portion(told, k, k + 1, len(_STEPS))
        )
        null = [float(o.mean()) for o in others]
        steps.append({
            "times": times, "predicted": interval_of(predicted, swap.find.clusters, seed),
            "measured": interval_of(measured, swap.test.clusters, seed), "random": null,
            "p_value": p_value(float(measured.mean()), null),
        })  # fmt: skip
    base, turned = (
        run(subject.model, [], swap.test, measures=[logit_difference], corrupted=c)
        for c in (False, True)
    )
    one, other = (torch.cat([v.flatten() for v in vectors.values()]) for vectors in along.values())
    return {
        "heads": list(heads), "steps": steps, "base": base.mean("logit_difference"),
        "swapped_text": turned.mean("logit_difference"), "null_is": "random directions of the same norm, head by head",
        "cosine_of_orders": float(torch.cosine_similarity(one, other, 0)),
    }  # fmt: skip


def _random_like(vectors: HeadVectors, rng: np.random.Generator) -> HeadVectors:
    """Random directions, each as long as that of the head."""
    made = {}
    for site, own in vectors.items():
        drawn = torch.from_numpy(rng.standard_normal(own.shape)).to(own)
        made[site] = drawn * (own.norm(dim=1) / drawn.norm(dim=1))[:, None]
    return made
