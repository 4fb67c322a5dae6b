"""Whole activations in HDF5 files."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np
import torch
from jaxtyping import Float

from circuits.store.provenance import Depth

CHUNK = (4096, 64)
"""Rows and columns of a block (an HDF5 chunk) of whole activations."""

WORTH_COMPRESSING = 0.8
"""Compression pays if the first block becomes at most this share of its size."""


def write_full(group: Any, values: Float[np.ndarray, "row column"], depth: Depth) -> None:
    """Write whole activations as float16, or as float32 if a finite one is too large for float16."""
    # Converted block by block, so that there is no second copy of all of them.
    wide = torch.from_numpy(values)
    kind = torch.float16 if _fits_half(wide) else torch.float32
    numpy_kind = np.float16 if kind == torch.float16 else np.float32
    n, width = values.shape
    if depth.layout == "rows" or 0 in values.shape:
        out = group.create_dataset("activations", values.shape, numpy_kind)
        for start in range(0, n, CHUNK[0]):
            rows = wide[start : start + CHUNK[0]].to(kind).numpy()
            out.write_direct(rows, dest_sel=np.s_[start : start + len(rows)])
        return
    chunk = (min(n, CHUNK[0]), min(width, CHUNK[1]))
    packing: dict[str, Any] = {}
    if depth.compress and _pays(wide[: chunk[0], : chunk[1]].to(kind).numpy()):
        # lzf is fast to read; `shuffle` puts the bytes of equal significance next to each other, which compress better.
        packing = {"compression": "lzf", "shuffle": True}
    out = group.create_dataset("activations", values.shape, numpy_kind, chunks=chunk, **packing)
    block = np.zeros(chunk, numpy_kind)
    target = torch.from_numpy(block)
    for start in range(0, n, chunk[0]):
        for left in range(0, width, chunk[1]):
            part = wide[start : start + chunk[0], left : left + chunk[1]]
            if packing:
                out[start : start + len(part), left : left + part.shape[1]] = part.to(kind).numpy()
                continue
            # Written past HDF5's cache of chunks and its conversions: the block is what is stored, so that it must be
            # whole. At the borders the rest is zero, so that equal activations give equal files.
            if part.shape != chunk:
                target.zero_()
            target[: part.shape[0], : part.shape[1]].copy_(part)
            out.id.write_direct_chunk((start, left), block)


def _fits_half(values: torch.Tensor) -> bool:
    """Whether all finite activations are in the range of float16."""
    if values.numel() == 0:
        return True
    top = torch.finfo(torch.float16).max
    least, most = torch.aminmax(values)
    if (
        -top <= least and most <= top
    ):  # False if there is a NaN, which the slower way below leaves out
        return True
    finite = values[torch.isfinite(values)]
    return finite.numel() == 0 or bool(finite.abs().max() <= top)


def _pays(block: np.ndarray) -> bool:
    """Whether a block gets enough smaller when it is compressed, tried in a file in memory."""
    with h5py.File("probe", "w", driver="core", backing_store=False) as file:
        made = file.create_dataset(
            "block", data=block, chunks=block.shape, compression="lzf", shuffle=True
        )
        return made.id.get_storage_size() <= WORTH_COMPRESSING * block.nbytes
