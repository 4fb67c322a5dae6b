"""Exporting a store's numbers as npz, safetensors or parquet."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from circuits.files import replacing
from circuits.store.reading import ActivationStore
from circuits.store.rows import Rows
from circuits.store.summaries import Summary
from circuits.tensors import write_tensors

Format = Literal["npz", "safetensors", "parquet"]

LARGEST = 8 << 30
"""The most bytes of whole activations that are exported to a file which has to be built in memory."""

_ROWS = 1 << 16
"""Rows in a group of a parquet file, which are in memory together."""


def export(store: ActivationStore, site: str, path: Path, kind: Format, full: bool = False) -> None:
    """Export a site's summary, or its whole activations, into one file, which appears only when it is complete.

    `npz` and `safetensors` hold the fields of `Summary`, or `activations` with `example` and `position`; their
    provenance is in the array or metadata entry `provenance`, as JSON. `parquet` has a row for each example and unit
    (maximum, argmax, mean), or for each position of an example (example, position_0 …, unit_0 …), and needs the
    package pyarrow.

    Raises:
        KeyError: if the site was not recorded, or its whole activations were not.
        ImportError: if pyarrow is missing.
        ValueError: if whole activations are too large for a file that is built in memory.
        OSError: if the file cannot be written.
    """
    rows = store.rows(site) if full else None
    arrays = {} if rows is not None else _summary_arrays(store.summary(site))
    facts = asdict(store.provenance)
    # The provenance of a model with hundreds of sites would be larger than one site's numbers.
    note = json.dumps({**facts, "sites": [s for s in facts["sites"] if s["name"] == site]})
    if kind == "parquet":
        if importlib.util.find_spec("pyarrow") is None:
            raise ImportError("export to parquet needs the package pyarrow: pip install pyarrow")
        with replacing(path) as temporary:
            if rows is None:
                _parquet_summary(temporary, arrays, note)
            else:
                _parquet_rows(temporary, rows, note)
        return
    if rows is not None:
        arrays = _row_arrays(rows, kind)
    if kind == "safetensors":
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        write_tensors(path, tensors, {"provenance": note})
        return
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, provenance=np.array(note), **arrays)


def _summary_arrays(summary: Summary) -> dict[str, Any]:
    return {f.name: np.ascontiguousarray(getattr(summary, f.name)) for f in fields(summary)}


def _row_arrays(rows: Rows, kind: str) -> dict[str, Any]:
    # float32, whatever the shards have.
    size = 4 * rows.shape[0] * rows.shape[1]
    if size > LARGEST:
        raise ValueError(
            f"whole activations of {rows.site} take {size / 1e9:.1f} GB, too many for one {kind} file: "
            "export to parquet"
        )
    return {
        "activations": rows.range(0, len(rows)),
        "example": rows.example,
        "position": rows.position,
    }


def _parquet(path: Path, note: str, tables: Any) -> None:
    """Write tables (dicts of columns) with the same columns to one file, one after another."""
    import pyarrow
    from pyarrow import parquet

    writer = None  # the schema is known with the first table
    try:
        for columns in tables:
            table = pyarrow.table(columns).replace_schema_metadata({"provenance": note})
            writer = writer or parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _parquet_summary(path: Path, arrays: dict[str, Any], note: str) -> None:
    n, units = arrays["maximum"].shape
    # So many examples that a table has about as many rows (one for each example and unit) as tables of whole
    # activations.
    step = max(1, _ROWS // units)

    def tables() -> Any:
        for start in range(0, n, step):
            stop = min(start + step, n)
            columns = {
                "example": np.repeat(np.arange(start, stop, dtype=np.int64), units),
                "unit": np.tile(np.arange(units, dtype=np.int32), stop - start),
            }
            for name in ("maximum", "argmax", "mean"):
                columns[name] = arrays[name][start:stop].ravel()
            yield columns

    _parquet(path, note, tables())


def _parquet_rows(path: Path, rows: Rows, note: str) -> None:
    def tables() -> Any:
        for start in range(0, len(rows), _ROWS):
            stop = min(start + _ROWS, len(rows))
            # Parquet stores columns: transposed, each is contiguous.
            values = np.ascontiguousarray(rows.range(start, stop).T)
            columns = {"example": rows.example[start:stop]}
            for axis in range(rows.position.shape[1]):
                columns[f"position_{axis}"] = np.ascontiguousarray(rows.position[start:stop, axis])
            yield columns | {f"unit_{u}": values[u] for u in range(len(values))}

    _parquet(path, note, tables())
