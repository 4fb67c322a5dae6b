"""The parts of a unit's page (layer 7)."""

from __future__ import annotations

import streamlit as st

from apps import session
from circuits.harvesting import Inputs
from circuits.models.adapter import HookedModel
from circuits.models.topology import INPUT
from circuits.plots import histogram_figure, kernels_figure, predictions_figure
from circuits.stimuli.images import ImageSource
from circuits.store import ActivationStore
from circuits.units import Unit
from circuits.weights import Connection

STRONGEST = 24  # examples offered first for an ablation


def statistics_panel(store: ActivationStore, unit: Unit) -> None:
    """How active the unit is over the dataset."""
    s, p = store.statistics(unit), store.provenance
    st.subheader("How active it is")
    st.plotly_chart(histogram_figure(s), key="histogram", config={"displayModeBar": False})
    st.caption(
        f"{len(p.examples)} examples of {p.data}: mean {s.mean:.3g}, standard deviation {s.std:.3g}, "
        f"skewness {s.skewness:.3g}, largest {s.maximum:.3g}, above zero at {100 * s.density:.1f} % of "
        f"positions."
    )
    notes = []
    if s.looked_at < s.count:
        drawn = f"a random {s.looked_at:,} of {s.count:,} positions (seed {p.depth.seed})"
        notes.append(
            f"The histogram, the skewness and the tail look at {drawn}; all else at every one."
        )
    if s.tail.rate == s.tail.rate:  # it could be fitted
        notes.append(
            f"Above {s.tail.threshold:.3g} (the top {100 * s.tail.share:.2g} %) the chance falls as "
            f"exp(−{s.tail.rate:.3g} · activation), ± {s.tail.error:.2g}; the largest gap between the "
            f"two distributions is {s.tail.distance:.2f}."
        )
    if s.nonfinite:
        notes.append(f"{s.nonfinite:,} activations are NaN or infinite and left out.")
    if notes:
        st.caption(" ".join(notes))


def weights_panel(model: HookedModel, unit: Unit, model_hash: str) -> None:
    """The strongest weights in and out, each with a way to the unit at its other end."""
    built_from, builds = session.connections_of(model, unit, model_hash)
    for title, connections, end in (
        ("Built from", built_from, "source"),
        ("Builds", builds, "target"),
    ):
        st.subheader(title)
        if not connections:
            st.caption("No weights connect it to another site on this side.")
            continue
        kernels = [c for c in connections if c.kernel.ndim == 2 and c.kernel.numel() > 1]
        if kernels:
            st.plotly_chart(kernels_figure(kernels, end), key=f"kernels-{end}")
        for column, connection in zip(st.columns(len(connections)), connections, strict=True):
            with column:
                _connection(model, connection, end)
    st.caption("Strength is the norm of the kernel; “typical” the median norm of those beside it.")


def _connection(model: HookedModel, connection: Connection, end: str) -> None:
    other: Unit = getattr(connection, end)
    st.button(
        _written(model, other),
        help=_written(model, other),
        key=f"go-{end}-{connection.layer}-{other}",
        on_click=session.go_to,
        args=(other,),
        disabled=other.site == INPUT,  # the model's input has no page
    )
    st.caption(_in_words(connection, heads=model.site(connection.target.site).kind == "head"))


def _in_words(connection: Connection, heads: bool) -> str:
    """What a connection does, in a line."""
    strength = f"strength {connection.norm:.3g} (typical {connection.typical:.3g})"
    if heads:
        q, k, v = connection.kernel.tolist()
        return f"composition Q {q:.2g}, K {k:.2g}, V {v:.2g}; {strength}"
    balanced = abs(connection.total) < 0.05 * connection.kernel.abs().sum().item()
    sign = "excites and inhibits" if balanced else "excites" if connection.total > 0 else "inhibits"
    via = f" through {', '.join(connection.through)}" if connection.through else ""
    return f"{sign}, {strength}{via}"


def _written(model: HookedModel, unit: Unit) -> str:
    """A unit with what it is known to be: a class, or what it was written to detect."""
    names = model.unit_names.get(unit.site, ())
    if unit.site != INPUT and model.site(unit.site).kind == "logit":
        names = model.classes
    return f"{unit} · {names[unit.index]}" if names else str(unit)


def ablation_panel(
    model: HookedModel, store: ActivationStore, unit: Unit, inputs: Inputs, model_hash: str
) -> None:
    """A switch that removes the unit, and what the model's predictions become."""
    st.subheader("What it does")
    names = store.provenance.examples
    best = [e.index for e in store.top_examples(unit, STRONGEST)]
    order = best + [i for i in range(len(names)) if i not in set(best)]
    example = st.selectbox(
        "Example (strongest first)", order, format_func=lambda i: names[i], key=f"example-{unit}"
    )
    removed = st.toggle("Ablate this unit", key="ablate", help="Sets it to zero everywhere.")
    if isinstance(inputs.source, ImageSource):
        st.image(inputs.picture(example), width=160)
    before = session.intact(model, inputs, example, model_hash)
    if not removed:
        st.plotly_chart(predictions_figure({"intact": before}), key="predictions")
        return
    ablated = session.ablated(model, unit, inputs, example, model_hash)
    figure = predictions_figure({"intact": before, f"{unit} removed": ablated.predictions})
    st.plotly_chart(figure, key="predictions")
    report = ablated.report
    kl = report.measures["kl"]
    baseline = sorted(kl.random)
    st.caption(
        f"KL from the intact prediction: {kl.change:.3g} nats; removing each of "
        f"{len(baseline)} random units of the site instead: {baseline[0]:.3g} to {baseline[-1]:.3g} "
        f"(seed {report.seed}). Undone afterwards: "
        f"{'identical to the bit' if report.restored else 'NOT restored'}."
    )
