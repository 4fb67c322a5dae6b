"""The provenance of a store: what it was made from, and with which options."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from circuits.files import write_json
from circuits.json_files import read_json
from circuits.units import Site

Layout = Literal["blocks", "rows"]
"""The layout of whole activations in a file: in blocks of rows and units, or row by row."""

Precision = Literal["float32", "bfloat16", "float16"]
"""The precision of the forward pass."""


class StaleCacheError(ValueError):
    """A store was made from another model, other data or with other options than those asked for."""


@dataclass(frozen=True)
class Depth:
    """What is kept of a model's activations, in addition to the summaries of all sites.

    Attributes:
        full: names of the sites whose whole tensors are kept.
        covariance: names of the sites whose units' covariance is kept.
        layout: the layout of the whole tensors.
        compress: whether they are compressed if that pays.
        precision: the precision of the forward pass.
        positions: how many positions of an example histograms count; all if there are no more.
        seed: the seed of the choice of positions.
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
        model: the name by which `load_model` loads the model.
        model_hash: the hash of the model.
        data: the name by which `open_source` opens the data.
        data_hash: the hash of its examples.
        sites: the recorded sites.
        examples: the names of the examples, in order.
        input: the model's preprocessing.
        version: the version of the package that wrote the store.
        depth: what was kept in addition to summaries.
        batch: examples in a forward pass.
        shard: examples in a shard.
        same: sites that share the tensor of an earlier site, name -> that site's name; such a tensor is kept once.
        left_out: how many files of the data's folder are no examples, by reason.
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
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def stored(self) -> tuple[Site, ...]:
        """The sites whose numbers are kept: one of those that share a tensor."""
        return tuple(s for s in self.sites if s.name not in self.same)

    @property
    def places(self) -> dict[str, slice]:
        """The slice of each site's units among those of all stored sites, which are concatenated in the file."""
        found: dict[str, slice] = {}
        start = 0
        for site in self.stored:
            found[site.name] = slice(start, start + site.n_units)
            start += site.n_units
        # Sites that share a tensor share the slice too, so that readers need not know of it.
        return found | {name: found[other] for name, other in self.same.items()}

    def kept(self, names: Iterable[str]) -> frozenset[str]:
        """The stored sites under which the tensors of some sites are kept."""
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
            raw = read_json(path)
            sites = tuple(_of(Site, s) for s in raw.pop("sites"))
            depth = _of(Depth, raw.pop("depth"))
            made = cls(sites=sites, depth=depth, examples=tuple(raw.pop("examples")), **raw)
            made._check_types()
            return made
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"activation store {str(folder)!r} has a damaged {path.name}: delete the folder and "
                "harvest again"
            ) from error

    def _check_types(self) -> None:
        numbers = (self.batch, self.shard, *(n for site in self.sites for n in site.shape))
        tables = (self.input, self.same, self.left_out)
        texts = (
            self.model, self.model_hash, self.data, self.data_hash, self.version, *self.examples,
            *(name for site in self.sites for name in (site.name, site.kind, *site.axes)), *self.depth.full,
        )  # fmt: skip
        for values, form in ((numbers, int), (tables, dict), (texts, str)):
            if not all(isinstance(value, form) for value in values):
                raise TypeError(f"a value is not of type {form.__name__}")

    def write(self, folder: Path) -> None:
        """Write `provenance.json`."""
        write_json(folder / "provenance.json", asdict(self))

    def difference(self, other: Provenance) -> str | None:
        """In words, the first field in which `other` differs; None if it was made in the same way.

        The names of model and data do not count, since their hashes do. Nor does the batch size, nor what else the
        data's folder holds.
        """
        for one in fields(self):
            # Names may change with the same content, which has its hash; `batch` is noted only, as a harvest that is
            # resumed goes on with the one it began with.
            if one.name in ("model", "data", "batch", "left_out"):
                continue
            ours, theirs = getattr(self, one.name), getattr(other, one.name)
            # Compared as JSON, since what was read from a file has lists where the other has tuples.
            if json.dumps(ours, default=asdict) != json.dumps(theirs, default=asdict):
                was, now = _where_unlike(theirs, ours)
                return f"{one.name} was {was}, is {now}"
        return None


def run_name(version: str, sites: Sequence[Site], depth: Depth) -> str:
    """The name of a store's folder: eight hexadecimal digits of a hash of the options."""
    # With the version: another version of the package does not read this one's store, but makes its own.
    key = json.dumps([version, *(s.name for s in sites), asdict(depth)])
    return hashlib.sha256(key.encode()).hexdigest()[:8]


def _of(kind: type, raw: dict[str, Any]) -> Any:
    """A dataclass from its JSON object, with lists as tuples."""
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
    # Twenty characters of what both have in common, so that it can be seen where in a long list the difference is.
    start = max(same - 20, 0) if max(len(a), len(b)) > 60 else 0
    return _excerpt(a, start), _excerpt(b, start)


def _excerpt(text: str, start: int) -> str:
    kept = text[start:] if len(text) - start <= 60 else f"{text[start : start + 57]}…"
    return f"…{kept}" if start else kept
