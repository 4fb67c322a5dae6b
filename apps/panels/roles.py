"""What heads do by what they attend to: previous-token, duplicate-token and induction heads."""

from __future__ import annotations

import streamlit as st

from apps import cached
from apps.address import action, link, part, plain, python
from apps.showing import show
from apps.subject import Look
from circuits.localization import HeadScores, shown_pattern
from circuits.localization.heads import CHANCE, HeadScore
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.units import Unit
from circuits.workspace import ModelRecord

LISTED = 8
SEED = 0


@part
def roles_panel(look: Look) -> None:
    """How much a head is of each kind, and its rank among all heads of the model."""
    if not isinstance(look.model.input, TokenInput):
        return
    head = shown_pattern(look.model, look.unit)
    if head is None:
        return
    st.subheader("Its role")
    found = _scored(look.model)
    if found is None:
        return
    rows = []
    for kind in found.kinds:
        ranked = found.of(kind)
        place, own = next((i, s) for i, s in enumerate(ranked) if s.head == head)
        rows.append(
            {"kind": kind.replace("_", " "), **_row(own), "rank": f"{place + 1} of {len(ranked)}"}
        )
    st.dataframe(rows, hide_index=True)
    _how(found)
    link("heads", "All heads of the model", model=cached.label_of(look.record))


def all_roles_panel(record: ModelRecord, model: HookedModel) -> None:
    """Every head's score for every kind, and the heads with the highest."""
    found = _scored(model)
    if found is None:
        return
    show(cached.heads_drawn(model, found), "heads")
    _how(found)
    label = cached.label_of(record)
    for kind in found.kinds:
        ranked = found.of(kind)
        st.subheader(f"{plain(kind.replace('_', ' ').capitalize())} heads")
        ones = sum(s.is_one for s in ranked)
        st.caption(f"{ones:d} of {len(ranked):d} attend there more than by chance.")
        rows = [{"head": _short(s.head), **_row(s)} for s in ranked[:LISTED]]
        st.dataframe(rows, hide_index=True)
        with st.container(horizontal=True):
            for one in ranked[:LISTED]:
                unit = cached.output_of_head(model, one.head) or one.head
                link("unit", _short(one.head), model=label, site=unit.site, unit=unit.index)
    python(f"""
import circuits
from circuits.localization import score_heads

model = {record.code}
scores = score_heads(model, seed={SEED})
print([(s.head, s.score, s.chance) for s in scores.of("induction")[:{LISTED}]])
""")


def _scored(model: HookedModel) -> HeadScores | None:
    """The scores of all heads; a button where they have not been computed yet."""
    found = cached.head_scores(model, SEED)
    if found is not None:
        return found
    st.caption(
        "All heads of the model are scored together on texts of random tokens in which a pattern repeats. In a model "
        "of a hundred million weights that takes about half a minute."
    )

    def score() -> None:
        bar = st.progress(0.0, "Scoring heads…")
        cached.head_scores(model, SEED, lambda done, of: bar.progress(done / of, "Scoring heads…"))
        bar.empty()

    action("Score all heads", score, "score-heads")
    return None


def _row(one: HeadScore) -> dict[str, str | float]:
    return {
        "attention there": round(one.score, 3), "95 % interval": f"{one.low:.3f} to {one.high:.3f}",
        "by chance": round(one.chance, 4), "p": f"{one.p_value:.2g}", "more than chance": "yes" if one.is_one else "no",
    }  # fmt: skip


def _short(head: Unit) -> str:
    """A head as `LAYER.HEAD` where its site has a layer."""
    parts = head.site.split(".")
    return f"{parts[1]}.{head.index}" if len(parts) > 2 and parts[0] == "blocks" else str(head)


def _how(found: HeadScores) -> None:
    n = found.scores.shape[2]
    chance = "; ".join(f"{kind.replace('_', ' ')}: {CHANCE[kind]}" for kind in found.kinds)
    st.caption(
        plain(
            f"The share of attention that goes to the previous token, to earlier copies of the token, or to what came "
            f"after those, over {n} texts of random tokens (seed {found.record.seed}). Chance is the same share of "
            f"another place. {chance}. p is corrected for all heads and kinds."
        )
    )
