"""What a model is: hashes of its weights and of what it computes with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from circuits.models.adapter.program import Program, tensor_bytes, tensor_digest

Replaced = Mapping[int, Tensor]
"""Tensors to hash in the place of others, by the address of the memory of what they replace."""


def weights_digest(module: nn.Module, instead: Replaced) -> str:
    """SHA-256 over the classes of all modules and the names, types, shapes and bytes of the state dict.

    Earlier versions knew models by it. It does not notice another stride, slope or `forward`.
    """
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        digest.update(f"{name}|{type(part).__qualname__}|".encode())
    for name, tensor in _state(module):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor_bytes(instead.get(tensor.data_ptr(), tensor)))
    return digest.hexdigest()


def program_digest(program: Program) -> str:
    """SHA-256 over the operations of a pass with their constants and the tensors that they read."""
    return hashlib.sha256("\n".join(program.describe()).encode()).hexdigest()


def model_digest(module: nn.Module, operations: str, weights: str) -> str:
    """SHA-256 over a model's `weights_digest`, its `program_digest`, the settings of its modules, and what else its
    state dict holds (packed weights of quantised layers).
    """
    digest = hashlib.sha256(f"{weights}|{operations}|".encode())
    for name, part in module.named_modules():
        digest.update(f"{name}|{_settings(part)}|".encode())
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, tuple | list):
            inner = [tensor_digest(v) if isinstance(v, Tensor) else repr(v) for v in value]
            digest.update(f"{name}|{inner}|".encode())
    return digest.hexdigest()


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # A state dict may hold more than tensors (`get_extra_state`). `keep_vars` gives the parameters themselves instead
    # of new views of them, so that they can be told apart by `id`.
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        if isinstance(tensor, Tensor):
            yield name, tensor


def _settings(module: nn.Module) -> str:
    """The hyper-parameters that torch's modules declare, such as a convolution's stride."""
    found: dict[str, Any] = {}
    for name in sorted(getattr(module, "__constants__", ())):
        value = getattr(module, name, None)
        if isinstance(value, bool | int | float | str | tuple | list | None):
            found[name] = value
    return repr(found)
