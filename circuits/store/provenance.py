"""Where a store's numbers come from, and how it was asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from circuits.files import write_json
from circuits.units import Site

Layout = Literal["blocks", "rows"]
"""How full activations lie in a file: blocks of rows and units, or whole rows one after another."""

Precision = Literal["float32", "bfloat16", "float16"]
"""What the forward pass computes in."""


class StaleCacheError(ValueError):
    """A store was made from something else than what is asked for now."""


@dataclass(frozen=True)
class Depth:
    """What is kept of a model's activations, beside the summaries of all sites.

    Attributes:
        full: names of the sites whose whole tensors are kept.
        covariance: names of the sites whose units' covariance is kept.
        layout: of the whole tensors.
        compress: whether they are compressed, if a probe says that it pays.
        precision: what the forward pass computes in.
        positions: at how many positions of an example the histograms look; all if there are no more.
        seed: of the choice of positions.
    """

    full: tuple[str, ...] = ()
    covariance: tuple[str, ...] = ()
    layout: Layout = "blocks"
    compress: bool = False
    precision: Precision = "float32"
    positions: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Provenance:
    """Where a store's numbers come from.

    Attributes:
        model: what `load_model` took.
        model_hash: of its weights.
        data: what `open_source` took.
        data_hash: of its examples.
        sites: what was recorded.
        examples: the examples' names, in order.
        input: the model's preprocessing.
        version: of the package that wrote it.
        depth: what was kept.
        batch: examples in one forward pass.
        shard: examples in one shard.
        same: sites whose tensor is another's, by name -> that other's; kept once.
    """

    model: str
    model_hash: str
    data: str
    data_hash: str
    sites: tuple[Site, ...]
    examples: tuple[str, ...]
    input: dict[str, Any]
    version: str
    depth: Depth
    batch: int
    shard: int
    same: dict[str, str]

    @property
    def stored(self) -> tuple[Site, ...]:
        """The sites whose numbers are kept: one of each that share a tensor."""
        return tuple(s for s in self.sites if s.name not in self.same)

    @property
    def places(self) -> dict[str, slice]:
        """Where each site's units are among those of all stored sites, laid side by side."""
        found: dict[str, slice] = {}
        start = 0
        for site in self.stored:
            found[site.name] = slice(start, start + site.n_units)
            start += site.n_units
        return found | {name: found[other] for name, other in self.same.items()}

    def kept(self, names: Iterable[str]) -> frozenset[str]:
        """The stored sites that have the tensors of some sites."""
        return frozenset(self.same.get(name, name) for name in names)

    @classmethod
    def read(cls, folder: Path) -> Provenance:
        """Read `provenance.json`.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it cannot be understood.
        """
        path = folder / "provenance.json"
        try:
            raw = json.loads(path.read_text())
            sites = tuple(_of(Site, s) for s in raw.pop("sites"))
            depth = _of(Depth, raw.pop("depth"))
            return cls(sites=sites, depth=depth, examples=tuple(raw.pop("examples")), **raw)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"activation store {str(folder)!r} has a damaged {path.name}: delete the folder and "
                "harvest again"
            ) from error

    def write(self, folder: Path) -> None:
        """Write `provenance.json`."""
        write_json(folder / "provenance.json", asdict(self))

    def difference(self, other: Provenance) -> str | None:
        """In words, the first thing in which `other` differs; None if it was made the same way.

        How model and data are called does not count: their hashes do. Nor does the batch.
        """
        for field in fields(self):
            if field.name in ("model", "data", "batch"):
                continue
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            # json has no tuples
            if json.dumps(ours, default=asdict) != json.dumps(theirs, default=asdict):
                was, now = _where_unlike(theirs, ours)
                return f"{field.name} was {was}, is {now}"
        return None


def run_name(version: str, sites: Sequence[Site], depth: Depth) -> str:
    """The name of a store's folder: eight digits that follow what was asked for."""
    key = json.dumps([version, *(s.name for s in sites), asdict(depth)])
    return hashlib.sha256(key.encode()).hexdigest()[:8]


def _of(kind: type, raw: dict[str, Any]) -> Any:
    lists = {k: tuple(v) for k, v in raw.items() if isinstance(v, list)}
    return kind(**{**raw, **lists})


def _where_unlike(one: Any, other: Any) -> tuple[str, str]:
    """Two values for a message: in full if both are short, else from just before they first differ.

    >>> _where_unlike(list(range(30)), [*range(29), 7])
    ('…24, 25, 26, 27, 28, 29]', '…24, 25, 26, 27, 28, 7]')
    """
    a, b = str(one), str(other)
    shortest = min(len(a), len(b))
    same = next((i for i in range(shortest) if a[i] != b[i]), shortest)
    start = max(same - 20, 0) if max(len(a), len(b)) > 60 else 0
    return _excerpt(a, start), _excerpt(b, start)


def _excerpt(text: str, start: int) -> str:
    kept = text[start:] if len(text) - start <= 60 else f"{text[start : start + 57]}…"
    return f"…{kept}" if start else kept
