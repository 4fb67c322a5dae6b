"""What a model puts out for one input, in one run or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import altair as alt
import numpy as np
from jaxtyping import Float

from circuits.effects import Prediction
from circuits.figures.charts import Figure, Row, data, lines, named_ticks, run_color
from circuits.stimuli.spelling import marked

_TOKEN = 14  # pixels between tokens


def predictions_figure(runs: Mapping[str, Sequence[Prediction]]) -> Figure:
    """Probabilities of the same outputs in each run, by the runs' names."""
    rows: list[Row] = [
        {"run": run, "output": _label(p, predictions), "probability": p.probability}
        for run, predictions in runs.items()
        for p in predictions
    ]
    tips = [
        alt.Tooltip("run:N"), alt.Tooltip("output:N"), alt.Tooltip("probability:Q", format=".4f"),
    ]  # fmt: skip
    bars = alt.Chart(data(rows)).mark_bar()
    made = bars.encode(
        alt.X(
            "probability:Q",
            title="probability",
            scale=alt.Scale(domain=[0, 1]),
            axis=alt.Axis(tickCount=5),
        ),
        alt.Y("output:N", title="output", sort=None, axis=alt.Axis(labelLimit=160)),
        yOffset=alt.YOffset("run:N", sort=None),
        color=run_color(runs),
        tooltip=tips,
    )
    return made.properties(height=alt.Step(16))


def _label(prediction: Prediction, among: Sequence[Prediction]) -> str:
    """A prediction's name, with its number where two share a name (ImageNet has two cranes)."""
    alone = sum(p.name == prediction.name for p in among) == 1
    # Tokens may begin with a blank or be one; blanks inside a name are a class's.
    bare = prediction.name.lstrip(" ")
    name = marked(" " * (len(prediction.name) - len(bare))) * (bare != prediction.name) + bare
    name = name.replace("\n", "↵") or marked("")
    return name if alone else f"{name} ({prediction.index})"


def losses_figure(
    runs: Mapping[str, Float[np.ndarray, " position"]], words: Sequence[str]
) -> Figure:
    """How surprising each token is, in each run; `words` are those that are predicted."""
    rows: list[Row] = [
        {"run": run, "place": i, "token": word, "loss": loss}
        for run, losses in runs.items()
        for i, (word, loss) in enumerate(zip(words, losses.tolist(), strict=True))
    ]
    size = max(_TOKEN, 640 / max(1, len(words))) if len(words) < 48 else 640 / len(words)
    x = alt.X("place:O", title="token", axis=named_ticks(words, size, True))
    y = alt.Y("loss:Q", title="loss, nats")
    tips = {"run:N": "run", "token:N": "token", "loss:Q": "nats"}
    return lines(rows, x, y, tips, runs)
