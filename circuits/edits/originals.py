"""The bytes that an edit replaced, for undoing it to the bit."""

from __future__ import annotations

import hashlib

import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save as written_tensors
from torch import Tensor

from circuits.tensors import tensor_bytes

_GAP = 4
"""Up to this many unchanged elements between two runs are stored rather than ending a run."""


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 over a tensor's type, shape and bytes."""
    # Type and shape too: the same bytes may be other numbers.
    digest = hashlib.sha256(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def original_bytes(before: Tensor, after: Tensor) -> bytes:
    """What a tensor was where it changed, as safetensors: runs of elements and their bytes."""
    size = before.element_size()
    # As bytes and not as numbers: NaN differs from itself, and -0.0 equals 0.0 although its bytes differ.
    old, new = _as_bytes(before).reshape(-1, size), _as_bytes(after).reshape(-1, size)
    at = (old != new).any(1).nonzero().flatten()
    # Each run costs two int64 numbers, more than a few unchanged elements in between.
    # Changed elements 3, 4, 9 and 20 with a gap of at most 4: differences 1, 5 and 11, breaks behind 4 and behind 9;
    # runs 3-5, 9-10 and 20-21 with their ends left out.
    breaks = (at.diff() > _GAP).nonzero().flatten()
    starts = at[torch.cat([torch.zeros(1, dtype=torch.int64), breaks + 1])]
    ends = at[torch.cat([breaks, torch.tensor([len(at) - 1])])] + 1
    kept = torch.cat([old[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)])
    runs = torch.stack([starts, ends - starts], 1)
    return written_tensors({"runs": runs.contiguous(), "bytes": kept.contiguous()})


def with_original(after: Tensor, data: bytes) -> Tensor:
    """The tensor as it was, from `original_bytes`."""
    stored = read_tensors(data)
    flat = _as_bytes(after).clone().reshape(-1, after.element_size())
    done = 0
    for start, n in stored["runs"].tolist():
        flat[start : start + n] = stored["bytes"][done : done + n]
        done += n
    made = flat.reshape(-1).view(after.dtype).reshape(after.shape)
    return made.to(after.device)
