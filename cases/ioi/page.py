"""The case's report: what was found, next to what is known of GPT-2 small."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cases.pages import figures_of, interval_text, table_of, write_html

COLUMNS = ("what", "here", "by chance", "GPT-2 small")

_GPT2 = {
    "duplicate token": "3 heads", "previous token": "2 heads", "induction": "4 heads", "S-inhibition": "4 heads",
    "name mover": "3 heads", "negative name mover": "2 heads", "backup name mover": "8 heads",
    "S suppressor": "none named",
}  # fmt: skip
"""How many heads have each role in GPT-2 small: Wang et al. 2022, figure 2, with the less important ones that it has in
brackets: 26 in all."""

_TITLE = "Who is given something: indirect objects in SmolLM2"


def rows_of(results: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The main results in a few rows."""
    both = results["behaviour"]["rows"][0]
    rows: list[tuple[Any, ...]] = [
        ("logit difference of IO and S", interval_text(both["logit_difference"], 2),
         f"{both['logit_difference_by_chance']:.2f}", "3.56"),
        ("IO above S", interval_text(both["io_above_s"], 3), f"{both['io_above_s_by_chance']:.2f}", "0.993"),
        ("probability of IO", interval_text(both["probability"], 2), f"{both['probability_by_chance']:.3f}", "0.49"),
        ("IO is the first of all tokens", interval_text(both["accuracy"], 2), f"{both['accuracy_by_chance']:.3f}", ""),
    ]  # fmt: skip
    for role, known in _GPT2.items():
        found = results["heads"]["roles"][role]["found"]
        rows.append(
            (
                f"{role} heads",
                f"{len(found)}: {', '.join(found[:8])}" if found else "absent",
                "",
                known,
            )
        )
    made = results["circuit"]["evaluation"]
    rows += [
        (f"faithfulness of {len(results['circuit']['edges'])} edges", _interval(made["faithfulness"], 2),
         _range(made["random_circuits"]), ""),
        ("all other edges (complement)", _interval(made["complement"], 2), "", ""),
        ("smallest circuit with f of 0.9, edges", made["smallest_faithful"], "", ""),
        ("the same size, answers swapped at random", _interval(results["circuit"]["swapped"], 2), "", ""),
    ]  # fmt: skip
    ablation = results["edits"]["ablation"]
    rows += [
        (f"difference left with {len(kept['heads'])} of 270 heads ({kept['what']}), share", f"{kept['share']:.2f}",
         _range(kept["random"]), "0.87 with 26 of 144 heads, others by means")
        for kept in results["edits"]["kept"]
    ]  # fmt: skip
    rows.append((
        f"removing {', '.join(ablation['heads'])}: change of the logit difference",
        interval_text(ablation["measured"], 2), _range(ablation["random"]), "",
    ))  # fmt: skip
    return rows


def write_page(
    path: Path, results: Mapping[str, Any], figures: Mapping[str, Mapping[str, Path]]
) -> None:
    """Write the report; it shows the numbers of `results` and nothing else."""
    parts = [
        f"<h1>{_TITLE}</h1><p><q>When Mary and John got to the store, John gave a ring to</q> goes on with <q> "
        "Mary</q> (IO) and not with <q> John</q> (S). Wang et al. (2022) took apart how GPT-2 small does that. This "
        "page asks which of it holds in SmolLM2-135M-Instruct: 30 layers of 9 heads, whose keys and values are shared "
        "by three. "
        f"{escape(in_words(results))}</p>",
        "<p><b>A coarse run (--fast)</b>: with so few independent texts a role may be called absent that larger runs "
        "find.</p>" if results["fast"] else "",
        table_of(COLUMNS, rows_of(results)),
        *_differences(results),
        *_behaviour(results["behaviour"]),
        *_heads(results["heads"]), *_figures(figures, "heads"),
        *_edits(results["edits"]), *_figures(figures, "edits"),
        *_circuit(results["circuit"]), *_figures(figures, "circuit"),
        *_corruptions(results["corruptions"]),
        *_facts(results),
    ]  # fmt: skip
    write_html(path, _TITLE, parts)


def in_words(results: Mapping[str, Any]) -> str:
    """What was found, in two sentences."""
    heads, circuit = results["heads"], results["circuit"]
    there = [role for role in _GPT2 if heads["roles"][role]["found"]]
    missing = [role for role in _GPT2 if not heads["roles"][role]["found"]]
    text = f"With a test and a correction for each role, there are heads of these kinds: {', '.join(there) or 'none'}"
    text += f"; absent are: {', '.join(missing)}. " if missing else ". "
    made = circuit["evaluation"]
    if made["faithfulness"]["value"] is None:
        return f"{text}Whether the circuit is faithful is undefined: too few examples to tell the effect from 0."
    said = f"The circuit of {len(circuit['edges'])} edges keeps {_interval(made['faithfulness'], 2)} of the effect"
    other = circuit["swapped"]["value"]
    if other is None:
        return f"{text}{said}."
    beats = made["faithfulness"]["low"] is not None and made["faithfulness"]["low"] > other
    return (
        f"{text}{said}; one of its size that was found with answers swapped at random keeps {other:.2f}"
        + (
            "."
            if beats
            else ", which is not clearly less: the search may find edges that any question of this form needs."
        )
    )


def _differences(results: Mapping[str, Any]) -> Iterator[str]:
    """What agrees with GPT-2 small, and what differs."""
    roles = results["heads"]["roles"]
    agrees, differs = [], []
    for role, known in _GPT2.items():
        found = roles[role]["found"]
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        line = (
            f"{role}: {', '.join(found[:8]) if found else 'no head'}{more} (GPT-2 small: {known})"
        )
        (agrees if bool(found) == (known != "none named") else differs).append(line)
    direct = results["heads"]["tests"]["direct"]["heads"]
    if direct:
        best = direct[0]
        kind = (
            "copies"
            if best["head"] in results["heads"]["tests"]["copies"]["found"]
            else "does not copy"
        )
        line = f"the head that adds most to the answer, {best['head']} ({best['value']['value']:.2f} logits), {kind}"
        (agrees if kind == "copies" else differs).append(
            f"{line} what it reads; in GPT-2 small it is a name mover"
        )
    signals = results["heads"]["signals"]
    place, name = (sum(t["value"] for t in signals[k].values()) for k in ("position", "token"))
    line = (
        f"through the movers' queries {place:.2f} logits are lost if the first two names trade places, which turns the "
        f"signal of the position round, and {name:.2f} if other names stand there"
    )
    if place > name:
        agrees.append(f"{line}: more is about the position, as in GPT-2 small")
    else:
        differs.append(f"{line}: more is about the name, where in GPT-2 small it is the position")
    yield "<h2>Next to GPT-2 small</h2>"
    yield f"<p>Agrees:</p><ul>{''.join(f'<li>{escape(a)}' for a in agrees) or '<li>nothing'}</ul>"
    yield f"<p>Differs:</p><ul>{''.join(f'<li>{escape(d)}' for d in differs) or '<li>nothing'}</ul>"


def _behaviour(found: Mapping[str, Any]) -> Iterator[str]:
    columns = (
        "in front",
        "order",
        "examples",
        "logit difference",
        "IO above S",
        "P(IO)",
        "IO first of all",
        "in the top 5",
    )
    rows = [
        (r["front"], r["order"], f"{r['examples']} ({r['independent']} independent)",
         *(_with_chance(r, k) for k in ("logit_difference", "io_above_s", "probability", "accuracy", "top5")))
        for r in found["rows"]
    ]  # fmt: skip
    yield "<h2>Behaviour</h2>"
    yield table_of(columns, rows)
    yield (
        "<p>In round brackets 95 % intervals (bootstrap over template instances), in square ones the same on texts "
        "with three other names, which name neither IO nor S.</p>"
    )
    sinks = [
        (front, f"{s['mean_share']:.2f} (even attention: {s['even_share']:.2f})",
         f"{s['heads_above_half']} of {s['heads']}",
         s["norm_first"], s["norm_others"])
        for front, s in found["sink"].items()
    ]  # fmt: skip
    yield "<p>Nothing stands in front of a text by default, and the first position is a sink all the same:</p>"
    columns = (
        "in front",
        "attention to the first position",
        "heads with more than half",
        "length of the stream there",
        "elsewhere",
    )
    yield table_of(columns, sinks)


def _with_chance(row: Mapping[str, Any], name: str) -> str:
    return f"{interval_text(row[name], 2)} [{row[f'{name}_by_chance']:.2f}]"


def _heads(found: Mapping[str, Any]) -> Iterator[str]:
    roles = found["roles"]
    yield "<h2>Heads by role</h2>"
    yield (
        f"<p>All tests are on the test half ({found['examples']} texts, {found['independent']} independent), "
        f"corrected by Holm's method for all {found['heads']} heads (those by attention for {3 * found['heads']} "
        "tests); what a head does to the difference counts from 1 % of it on. A role that takes two tests is held by "
        "heads that pass both.</p>"
    )
    rows = [
        (role, ", ".join(r["found"][:10]) or "absent",
         "; ".join(r["tests"]) if "tests" in r else r.get("chance_is", ""))
        for role, r in roles.items()
    ]  # fmt: skip
    yield table_of(("role", "heads", "tests, or what attention is compared with"), rows)
    movers = ", ".join(found["movers"])
    state = (
        ""
        if found["inhibitors_found"]
        else " None passes: these are the largest, and stand in for the role below."
    )
    yield (
        f"<h3>What moves the queries of {escape(movers)}</h3><p>Path patching into their queries alone, of what the "
        f"head writes in the counterpart; the null is the same into other heads of these layers.{state}</p>"
    )
    signals = [
        (signal, head, _interval(t, 3), t["chance"], t["p_value"], "yes" if t["holds"] else "no")
        for signal, by_head in found["signals"].items()
        for head, t in list(by_head.items())[:6]
    ]  # fmt: skip
    yield table_of(
        ("signal taken away", "head", "logits lost", "other queries", "p, corrected", "more"),
        signals,
    )
    places = [
        (head, *(p[k] for k in ("first token", "io", "s1", "s2")))
        for head, p in found["attention_from_end"].items()
    ]
    yield "<h3>Where they look from the last token</h3>"
    yield table_of(("head", "first token", "IO", "S1", "S2"), places)
    yield from _details("Direct effects and copying", [
        (name, h["head"], _interval(h["value"], 3), h["chance"], h["p_value"], "yes" if h["holds"] else "no")
        for name, test in found["tests"].items() for h in test["heads"]
    ], ("test", "head", "value", "chance", "p, corrected", "holds"))  # fmt: skip


def _details(title: str, rows: Sequence[Sequence[Any]], columns: Sequence[str]) -> Iterator[str]:
    yield f"<details><summary>{escape(title)}</summary>{table_of(columns, rows)}</details>"


def _edits(found: Mapping[str, Any]) -> Iterator[str]:
    ablation, steering = found["ablation"], found["steering"]
    yield f"<h2>Editing {escape(', '.join(ablation['heads']))}</h2>"
    yield (
        f"<p>Predicted is what was measured on the find half. The difference is {steering['base']:.2f} logits before, "
        f"and {steering['swapped_text']:.2f} if the text itself names IO in the place of S2. Directions of the two "
        f"orders have a cosine of {steering['cosine_of_orders']:.2f}; each is a mean over names, so that it "
        "tells about the position and hardly about the name.</p>"
    )
    rows = [
        ("outputs of the counterpart", interval_text(ablation["predicted"], 2), interval_text(ablation["measured"], 2),
         _range(ablation["random"]), ablation["p_value"])
    ]  # fmt: skip
    rows += [
        (f"moved {s['times']:+g} times along the direction", interval_text(s["predicted"], 2),
         interval_text(s["measured"], 2), _range(s["random"]), s["p_value"])
        for s in steering["steps"]
    ]  # fmt: skip
    yield table_of(("edit", "predicted", "measured", "random (mean, range)", "p"), rows)
    rows = [
        (k["what"], f"{len(k['heads'])}: {', '.join(k['heads'])}", interval_text(k["left"], 2), f"{k['share']:.2f}",
         _range(k["random"]))
        for k in found["kept"]
    ]  # fmt: skip
    yield (
        "<p>Kept: all other heads put out what they put out on the counterpart, and every MLP is computed again; on "
        f"{found['kept'][0]['examples']} texts that no half of the task has. The "
        f"difference is {found['kept'][0]['intact']:.2f} logits with all heads and {found['kept'][0]['none']:.2f} on "
        "the counterpart. In GPT-2 small 26 of 144 heads leave 0.87 of it (others replaced by means).</p>"
    )
    yield table_of(
        ("kept", "heads", "difference left", "share", "random heads (mean, range)"), rows
    )


def _circuit(found: Mapping[str, Any]) -> Iterator[str]:
    made = found["evaluation"]
    yield "<h2>The circuit</h2>"
    yield (
        f"<p>EAP-IG on {found['find']} texts, measured on {found['test']} others ({found['independent']} independent); "
        f"scores of the input's edges miss {_number(found['completeness_of_scores'])} of the whole effect.</p>"
    )
    rows: list[tuple[Any, ...]] = [
        ("the circuit", len(found["edges"]), _interval(made["faithfulness"], 3)),
        (
            "all other edges",
            made["n_edges"] - len(found["edges"]),
            _interval(made["complement"], 3),
        ),
        (
            "random circuits of its size and kinds",
            len(found["edges"]),
            _range(made["random_circuits"]),
        ),
    ]
    rows += [(name, o["edges"], _interval(o, 3)) for name, o in made["others"].items()]
    refined = found["refined"]
    rows += [
        ("refined by exact patching", refined["n"], _number(refined["faithfulness"])),
        ("the same number by scores", refined["n"], _number(refined["by_scores"])),
        ("random circuits like the refined one", refined["n"], _range(refined["random"])),
    ]
    yield table_of(("circuit", "edges", "faithfulness"), rows)
    minimal = found["minimality"]
    yield (
        f"<p>Of {minimal['tried']} of its edges, taken out one at a time, {minimal['needed']} change the logit "
        f"difference (Holm, p below 0.05); {minimal['above_null']:.0%} change it by more than 95 % of random edges "
        f"that are added (medians {minimal['median']:.3g} and {minimal['null_median']:.3g} logits).</p>"
    )
    rows = [
        (task, interval_text(s["effect"], 2), f"{name} ({a['edges']})",
         a["damage"] if s["defined"] else "no clear effect",
         _range(a["random"]), f"{a['accuracy']:.2f} of {s['accuracy_intact']:.2f}")
        for task, s in found["specificity"].items()
        for name, a in s["ablated"].items()
    ]  # fmt: skip
    yield (
        "<p>Specificity: the damage that ablating edges does, by one mean for all tasks, over each task's own effect. "
        "Edges out of the embedding and of MLPs carry the text itself, which no task can do without:</p>"
    )
    yield table_of(
        ("task", "own effect", "ablated (edges)", "damage", "random circuits", "accuracy left"),
        rows,
    )


def _corruptions(found: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>Other counterparts, and each order alone</h2>"
    rows = [
        (
            name,
            f["own"],
            f["first"],
            found["effects"][name]["clean"],
            found["effects"][name]["corrupted"],
        )
        for name, f in found["faithfulness"].items()
    ]
    yield table_of(
        ("found with", "faithfulness of its own", "of the first circuit", "clean", "counterpart"),
        rows,
    )
    columns = ("Jaccard", *found["names"])
    yield table_of(
        columns, [(n, *row) for n, row in zip(found["names"], found["jaccard"], strict=True)]
    )
    opposed = found["opposed_in_both_orders"]
    said = "" if opposed is None else f", {opposed:.0%} of them with opposite signs"
    yield (
        f"<p>Random circuits of the same kinds share {found['jaccard_by_chance']:.3f}. {found['strong_in_both']} edges "
        f"are in the circuits of both orders ({found['edges']} each){said}; {found['lost_together']} of these are lost "
        "if the orders are taken together, since scores are sums over positions.</p>"
    )


def _facts(results: Mapping[str, Any]) -> Iterator[str]:
    names = [name for some in results["behaviour"]["left_out"].values() for name in some[:8]]
    seconds = {
        name: results[name]["seconds"]
        for name in ("behaviour", "heads", "edits", "circuit", "corruptions")
    }
    yield (
        f"<h2>Made from</h2><p>Weights: {escape(str(results['hashes']))}; seed {results['seed']}"
        f"{', coarse (--fast): its intervals are wide and its p-values cannot be small' if results['fast'] else ''}. "
        f"Seconds by stage: {escape(', '.join(f'{k} {v}' for k, v in seconds.items()))}. Names of several tokens are "
        f"left out: {escape(', '.join(names) or 'none')}.</p>"
    )


def _figures(figures: Mapping[str, Mapping[str, Path]], stage: str) -> list[str]:
    """A stage's figures, without a heading of their own."""
    return figures_of("", figures[stage])[1:]


def _interval(found: Mapping[str, Any] | None, digits: int) -> str:
    return "n/a" if found is None else interval_text(found, digits)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3g}"


def _range(values: Sequence[float]) -> str:
    """The mean of several numbers, and the range in which they lie."""
    if not values:
        return "n/a"
    return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})"
