"""The logit lens: what a transformer would predict if it stopped at each depth.

nostalgebraist 2020, "interpreting GPT: the logit lens". The residual stream at a depth replaces the final one, and the
model's own final normalisation and unembedding do the rest. If the normalisation's scale is held at that of the final
stream, logits are linear in the stream, and what a layer adds to a logit is what it adds to the stream (the accumulated
residual; Elhage et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.examples import BATCH, encoded
from circuits.experiments import INTACT, Context, Record, Variant, run
from circuits.experiments.statistics import interval
from circuits.files import finite
from circuits.hooks import Change
from circuits.localization.pairing import OtherPairs
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.adapter.transformer import Transformer
from circuits.progress import Progress
from circuits.tables import Table, between, visible
from circuits.tasks.metrics import Metric, as_metric
from circuits.tasks.targets import output_site
from circuits.tasks.task import Task
from circuits.units import Site

Norm = Literal["own", "held"]
"""The final normalisation: recomputed for each depth's stream (`own`), or with the final stream's scale (`held`)."""


@dataclass(frozen=True)
class Depth:
    """What the residual stream at one depth predicts.

    Attributes:
        site: the site of the stream.
        value: the metric, averaged over examples.
        low: lower end of its 95 % interval: bootstrap over examples, by cluster.
        high: upper end of the interval.
        null: the mean of the metric with the stream of another example, drawn at random; NaN if there is none.
    """

    site: str
    value: float
    low: float
    high: float
    null: float


@dataclass(frozen=True, eq=False)
class Lens:
    """A task's metric at each depth.

    Attributes:
        metric: what was measured.
        norm: how the final normalisation was computed.
        sites: the depths, in order; the last is the stream that the model itself reads out.
        values: the metric at each depth.
        random: the metric with the stream of another example; NaN where there is none.
        intact: the metric of the model itself.
        clusters: a number for each example, shared by those of one template instance.
        record: where the numbers come from.
    """

    metric: Metric
    norm: Norm
    sites: tuple[str, ...]
    values: Float[np.ndarray, "depth example"]
    random: Float[np.ndarray, "depth example"]
    intact: Float[np.ndarray, " example"]
    clusters: tuple[int, ...]
    record: Record

    @property
    def depths(self) -> tuple[Depth, ...]:
        """The mean over examples at each depth, with its interval."""
        found = []
        for site, values, random in zip(self.sites, self.values, self.random, strict=True):
            ends = interval(values, clusters=self.clusters, seed=self.record.seed)
            known = random[~np.isnan(random)]
            null = float(known.mean()) if len(known) else float("nan")
            found.append(Depth(site, float(values.mean()), *ends, null))
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; None for what is not finite."""
        return finite({
            "metric": self.metric.name, "unit": self.metric.unit, "norm": self.norm,
            "depths": [asdict(d) for d in self.depths], "values": self.values.tolist(),
            "intact": self.intact.tolist(), "record": asdict(self.record),
        })  # fmt: skip

    def tables(self) -> Iterator[Table]:
        """The metric at each depth."""
        rows = [(d.site, d.value, between(d.low, d.high), d.null) for d in self.depths]
        columns = ("stopped at", self.metric.name, "95 % interval", "another example's stream")
        title = f"{self.metric.name} of {self.record.measured_on}; {self.intact.mean():.4g} of the whole model"
        yield Table(columns, rows, f"{title}, seed {self.record.seed}")


@dataclass(frozen=True, eq=False)
class LensTokens:
    """The first choice at each depth and position of a text.

    Attributes:
        tokens: the text's tokens.
        sites: the depths, in order.
        first: the most probable next token.
        probability: its probability.
        words: the token as text.
    """

    tokens: tuple[str, ...]
    sites: tuple[str, ...]
    first: Int[np.ndarray, "depth position"]
    probability: Float[np.ndarray, "depth position"]
    words: tuple[tuple[str, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "tokens": list(self.tokens), "sites": list(self.sites), "first": self.first.tolist(),
            "words": [list(row) for row in self.words], "probability": self.probability.tolist(),
        }  # fmt: skip

    def tables(self) -> Iterator[Table]:
        """The first choice at each depth, a column for each position."""
        rows = [
            (site, *map(visible, row)) for site, row in zip(self.sites, self.words, strict=True)
        ]
        yield Table(
            ("after", *map(visible, self.tokens)), rows, "most probable next token at each depth"
        )


def logit_lens(
    model: HookedModel,
    task: Task,
    *,
    norm: Norm = "own",
    middle: bool = False,
    metric: str | Metric | Callable[[Tensor], Tensor] | None = None,
    null: bool = True,
    batch: int = BATCH,
    seed: int = 0,
    progress: Progress | None = None,
) -> Lens:
    """A task's metric if the model stopped at each depth, at the positions that the task counts.

    Args:
        model: a transformer.
        task: what is measured on.
        norm: whether the final normalisation is recomputed for each depth's stream or keeps the final stream's scale.
        middle: also measure between attention and MLP of each layer.
        metric: what is measured; the task's own if None.
        null: also measure with the stream of another example of the same length.
        batch: examples per batch.
        seed: seed of the other examples and of intervals.
        progress: called with the work done and the total, in examples times runs.

    Raises:
        KeyError: if there is no such metric.
        ValueError: if the model is not a bridge, or the metric does not fit the task or reads a site inside the model.
    """
    if norm not in get_args(Norm):
        raise ValueError(f"norm {norm!r} is not one of {', '.join(get_args(Norm))}")
    asked = task if metric is None else task.with_metric(as_metric(metric))
    depths = lens_sites(model, middle)
    far = [s for s in asked.metric.sites() if model.site(s) != output_site(model)]
    if far:
        raise ValueError(
            f"metric {asked.metric.name} reads {far[0]}: the lens changes only the output, so expected a metric of it"
        )
    others = OtherPairs(model, asked, asked.examples, depths, 1 if null else 0, seed)
    variants = [_stopped_at(model, site, depths[-1], norm, None) for site in depths]
    if null:
        variants += [_stopped_at(model, site, depths[-1], norm, others) for site in depths]
    outcomes = run(
        model, variants, asked, measures=[asked.metric], batch=batch, seed=seed, progress=progress
    )
    values = outcomes.values[asked.metric.name][1:]
    random = np.full((len(depths), len(asked)), np.nan)
    if null:
        random = np.where(others.there(0), values[len(depths) :], np.nan)
    return Lens(
        asked.metric, norm, tuple(s.name for s in depths), values[: len(depths)], random,
        outcomes.of(asked.metric.name, INTACT), asked.clusters, outcomes.record,
    )  # fmt: skip


def lens_tokens(
    model: HookedModel, text: str | Sequence[int], *, norm: Norm = "own", middle: bool = False
) -> LensTokens:
    """The first choice for the next token at each depth and position of a text.

    Args:
        model: a transformer.
        text: a text, or tokens.
        norm: as in `logit_lens`.
        middle: as in `logit_lens`.

    Raises:
        ValueError: if the model is not a bridge, or cannot take the text.
    """
    depths, spec = lens_sites(model, middle), model.input
    assert isinstance(spec, TokenInput), "a bridge takes tokens"
    tokens = encoded(spec, text)[None]
    cache = model.run(tokens, read=depths)
    streams = {s.name: cache[s] for s in depths}
    end, last = output_site(model), depths[-1]
    found = []
    for site in depths:
        edits = _lens_edits(model, streams[site.name], streams[last.name], last, norm)
        found.append(end.rows(model.run(tokens, read=[end], edits=edits)[end]))
    best = torch.cat(found).double().softmax(-1).max(-1)
    words = tuple(tuple(spec.word(t) for t in row) for row in best.indices.tolist())
    return LensTokens(
        tuple(spec.word(t) for t in tokens[0].tolist()), tuple(s.name for s in depths), best.indices.cpu().numpy(),
        best.values.cpu().numpy(), words,
    )  # fmt: skip


def lens_sites(model: HookedModel, middle: bool = False) -> list[Site]:
    """The residual stream at each depth of a transformer: before each layer, and after the last one.

    Args:
        model: a transformer.
        middle: also between attention and MLP.

    Raises:
        ValueError: if the model is not a bridge, or lacks a site of the stream.
    """
    return [model.site(name) for name in Transformer(model).streams(middle)]


def _stopped_at(
    model: HookedModel, site: Site, last: Site, norm: Norm, others: OtherPairs | None
) -> Variant:
    """The model with the final stream replaced by that of a depth, the example's own or another example's."""

    def live(context: Context) -> Mapping[str, Change]:
        assert context.batch is not None, "called in an experiment"
        source = context.intact if others is None else others.tensors(0, context.batch)
        return _lens_edits(model, source[site.name], source[last.name], last, norm)

    name = site.name + ("" if others is None else ", of another example")
    sites = (last.name,) if norm == "own" else (Transformer(model).normalised,)
    return Variant(name, live=live, sites=sites, reads=(site.name, last.name))


def _lens_edits(
    model: HookedModel, stream: Tensor, end: Tensor, last: Site, norm: Norm
) -> dict[str, Change]:
    if norm == "own":
        return {last.name: lambda value: stream}
    # Held: y = factor * gain * (x - centre(x)) + bias with the factor of the final stream, put in after the
    # normalisation. In float64, so that differences between depths add up.
    transformer = Transformer(model)
    own = transformer.norm("final")
    with model.lock:
        made = (own.held(stream, end) + own.bias).to(stream)
    return {transformer.normalised: lambda value: made}
