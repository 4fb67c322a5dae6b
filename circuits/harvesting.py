"""One pass of a model over a dataset into an activation store (layer 4)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.models.adapter import HookedModel
from circuits.models.inputs import ImageInput, TokenInput
from circuits.models.sites import unit_activations
from circuits.stimuli.sources import ImageSource, Source, TextSource, batches
from circuits.store import BINS, ActivationStore, Provenance, Summary, merge, writing
from circuits.units import Site
from circuits.workspace import ModelRecord, Workspace

SHARD_EXAMPLES = 256
"""Examples in one shard of summaries."""

EDGE_EXAMPLES = 16
"""How many examples at the start fix the edges of the histograms."""

Progress = Callable[[int, int], object]
"""Called with how much is done and how much there is."""


def harvest(
    model: HookedModel,
    source: Source,
    sites: Sequence[str],
    workspace: Workspace,
    record: ModelRecord | None = None,
    batch: int = 16,
    progress: Progress | None = None,
) -> ActivationStore:
    """Record what the units of some sites do on every example; resume if it was interrupted.

    Args:
        model: the model.
        source: the data.
        sites: names of sites.
        workspace: where the store goes.
        record: how the model is loaded, for the app; its name if it is not given.
        batch: examples in one forward pass. Results do not depend on it beyond float rounding.
        progress: told the number of examples done and in all.

    Returns:
        The finished store; at once if it was finished before.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if the model cannot take the data, or an example cannot be read.
        PermissionError: if the workspace cannot be written.
    """
    chosen = [model.site(name) for name in dict.fromkeys(sites)]
    if not chosen:
        raise ValueError("sites is empty: name at least one site")
    if model.edited:
        raise ValueError(f"model {model.name} is edited: harvest it outside the edit")
    if batch < 1:
        raise ValueError(f"batch {batch} must be at least 1")
    inputs = Inputs(model, source)
    chosen = [inputs.fitted(site) for site in chosen]
    provenance = _provenance(model, source, chosen, record)
    key = json.dumps([provenance.version, *(s.name for s in chosen)])
    run = hashlib.sha256(key.encode()).hexdigest()[:8]
    folder = workspace.writable().store_folder(provenance.model_hash, source.hash, run)
    inputs.check_first()
    plain = ModelRecord(model.name, provenance.model_hash)
    workspace.register(record or plain, replace=record is not None)
    with writing(folder, provenance) as writer:
        if progress:
            progress(writer.rows, len(source))
        edges = writer.edges() or _first_edges(model, inputs, chosen, batch)
        for shard in batches(len(source), SHARD_EXAMPLES):
            if shard.stop <= writer.rows:
                continue
            parts: dict[str, list[Summary]] = {site.name: [] for site in chosen}
            for examples in inputs.passes(shard, batch):
                values = _activations(model, inputs, examples, chosen)
                for name, (value, places) in values.items():
                    parts[name].append(summarize(value, edges[name], places))
                if progress:
                    progress(examples.stop, len(source))
            writer.add({name: merge(summaries) for name, summaries in parts.items()})
        if not writer.finished:
            writer.finish()
    return ActivationStore.open(folder, provenance.model_hash)


def _provenance(
    model: HookedModel, source: Source, sites: Sequence[Site], record: ModelRecord | None
) -> Provenance:
    return Provenance(
        model=record.spec if record else model.name,
        model_hash=model.hash,
        data=source.spec,
        data_hash=source.hash,
        sites=tuple(sites),
        examples=source.names,
        input=model.input.describe(),
        version=version("circuits-workbench"),
    )


Values = Float[np.ndarray, "example unit position"]
Places = Int[np.ndarray, " position"]


def _activations(
    model: HookedModel, inputs: Inputs, examples: range, sites: Sequence[Site]
) -> dict[str, tuple[Values, Places]]:
    """Each site's activations, and where its positions lie among those of the longest example."""
    cache = model.run(inputs.batch(examples), read=sites, until=model.last(sites))
    found = {}
    for site in sites:
        value = cache[site]
        numbers = unit_activations(site, value).to("cpu", torch.float32).numpy()
        if not np.isfinite(numbers).all():
            bad = examples[int((~np.isfinite(numbers)).any(axis=(1, 2)).argmax())]
            raise ValueError(
                f"site {site.name}: an activation of example {inputs.source.names[bad]!r} is NaN or "
                "infinite"
            )
        shape = tuple(value.shape[site.axes.index(axis)] for axis in site.position_axes)
        places = np.arange(math.prod(shape))
        if shape != site.position_shape:
            places = np.ravel_multi_index(np.unravel_index(places, shape), site.position_shape)
        found[site.name] = numbers, places
    return found


class Inputs:
    """A source's examples as a model takes them."""

    def __init__(self, model: HookedModel, source: Source) -> None:
        self.model, self.source = model, source
        wants = "images" if isinstance(model.input, ImageInput) else "tokens"
        if isinstance(model.input, ImageInput) != isinstance(source, ImageSource):
            raise ValueError(f"data {source.spec!r} does not fit: model {model.name} takes {wants}")
        self._length = 0
        if isinstance(source, TextSource):
            assert isinstance(model.input, TokenInput), "checked above"
            self._tokens = [self._encode(text, model.input) for text in source.texts]
            self._length = max(map(len, self._tokens))

    @staticmethod
    def _encode(text: str, spec: TokenInput) -> Tensor:
        tokens = spec.encode(text)
        if spec.bos is not None and tokens[:1] != [spec.bos]:
            tokens = [spec.bos, *tokens]
        return spec.check(torch.tensor([tokens[: spec.n_ctx]]))[0]

    def fitted(self, site: Site) -> Site:
        """The site with the number of positions that the longest text has."""
        if not self._length:
            return site
        shape = tuple(
            self._length if axis in ("position", "query", "key") else n
            for axis, n in zip(site.axes[1:], site.shape, strict=True)
        )
        return Site(**{**vars(site), "shape": shape})

    def check_first(self) -> None:
        """Raise ValueError if the first example cannot be read or does not fit."""
        self.model.check(self.batch(range(1)))

    def first(self, n: int) -> Tensor:
        """The first `n` examples, or all if there are fewer, as one input.

        Raises:
            ValueError: if `n` is not positive, or texts differ in length (see `upto`).
        """
        found = self.upto(n, size=n)
        if len(found) > 1:
            raise ValueError(f"the first {n} texts of {self.source.spec} differ in length")
        return found[0]

    def upto(self, n: int, size: int = 32) -> list[Tensor]:
        """The first `n` examples, or all if there are fewer, in batches of one length each.

        Raises:
            ValueError: if `n` is not positive.
        """
        if n < 1:
            raise ValueError(f"limit {n} must be at least 1")
        return [self.batch(r) for r in self.passes(range(min(n, len(self.source))), size)]

    def passes(self, examples: range, size: int) -> Iterator[range]:
        """Cut a range of examples into batches of at most `size`, of texts of one length each."""
        for batch in batches(len(examples), size):
            start = examples[batch.start]
            stop = examples[batch.stop - 1] + 1
            if isinstance(self.source, TextSource):
                for i in range(start, stop):
                    if len(self._tokens[i]) != len(self._tokens[start]):
                        yield range(start, i)
                        start = i
            yield range(start, stop)

    def batch(self, examples: range) -> Tensor:
        """The examples as one input of the model; texts must be of one length."""
        if isinstance(self.source, ImageSource):
            spec = self.model.input
            assert isinstance(spec, ImageInput), "checked when built"
            return spec.normalize(torch.stack([spec.load(self.source.image(i)) for i in examples]))
        return torch.stack([self._tokens[i] for i in examples])

    def tokens(self, example: int) -> list[int]:
        """The tokens of a text, as the model sees them."""
        return self._tokens[example].tolist()


def _first_edges(
    model: HookedModel, inputs: Inputs, sites: Sequence[Site], batch: int
) -> dict[str, Float[np.ndarray, "unit edge"]]:
    """Histogram edges from the first examples: always the same ones, whatever the batch."""
    low: dict[str, Any] = {}
    high: dict[str, Any] = {}
    for examples in inputs.passes(range(min(EDGE_EXAMPLES, len(inputs.source))), batch):
        for name, (values, _) in _activations(model, inputs, examples, sites).items():
            least, most = values.min(axis=(0, 2)), values.max(axis=(0, 2))
            low[name] = np.minimum(low.get(name, least), least)
            high[name] = np.maximum(high.get(name, most), most)
    return {site.name: histogram_edges(low[site.name], high[site.name]) for site in sites}


def histogram_edges(
    low: Float[np.ndarray, " unit"], high: Float[np.ndarray, " unit"]
) -> Float[np.ndarray, "unit edge"]:
    """Edges of each unit's histogram: `BINS` equal bins over a range, half as wide again, with 0."""
    low = np.minimum(1.5 * low.astype(np.float64), 0.0)
    high = np.maximum(1.5 * high.astype(np.float64), 0.0)
    high = np.where(high > low, high, low + 1.0)
    return low[:, None] + (high - low)[:, None] * np.linspace(0, 1, BINS + 1)


def summarize(values: Values, edges: Float[np.ndarray, "unit edge"], places: Places) -> Summary:
    """Summarise a batch of activations of one site; `places` numbers its positions."""
    n_units = values.shape[1]
    low, width = edges[:, 0], edges[:, 1] - edges[:, 0]
    place = np.floor((values - low[:, None]) / width[:, None]) + 1
    bins = np.clip(place, 0, BINS + 1).astype(np.int64)
    bins += np.arange(n_units)[:, None] * (BINS + 2)
    histogram = np.bincount(bins.ravel(), minlength=n_units * (BINS + 2))
    wide = values.astype(np.float64)
    return Summary(
        maximum=values.max(axis=2),
        argmax=places[values.argmax(axis=2)].astype(np.int32),
        mean=wide.mean(axis=2).astype(np.float32),
        total=wide.sum(axis=(0, 2)),
        square=np.square(wide).sum(axis=(0, 2)),
        positive=(values > 0).sum(axis=(0, 2)),
        minimum=values.min(axis=(0, 2)),
        count=math.prod(values.shape) // n_units,
        edges=edges,
        histogram=histogram.reshape(n_units, BINS + 2),
    )


def find_stores(workspace: Workspace, model_hash: str) -> Iterator[ActivationStore]:
    """The finished stores of a model; unfinished and damaged ones are left out."""
    for folder in workspace.store_folders(model_hash):
        try:
            yield ActivationStore.open(folder, model_hash)
        except (FileNotFoundError, ValueError):
            continue
