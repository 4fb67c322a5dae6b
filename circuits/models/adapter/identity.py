"""What a model is: hashes of its weights and of what it computes with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from circuits.models.adapter.program import Program, own_tensors

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
        _add(digest, name, tensor, instead)
    return digest.hexdigest()


def program_digest(program: Program) -> str:
    """SHA-256 over the operations of a pass with their constants."""
    return hashlib.sha256("\n".join(program.describe()).encode()).hexdigest()


def model_digest(module: nn.Module, program: Program, operations: str, instead: Replaced) -> str:
    """SHA-256 over what `weights_digest` covers, the settings of all modules, the operations of a pass (their
    `program_digest`), and the tensors that they read beside the state dict.

    Other tensors among a module's attributes are left out: what no operation reads may be what a module notes while
    it runs, and would change the hash from run to run.
    """
    digest = hashlib.sha256(weights_digest(module, instead).encode())
    for name, part in module.named_modules():
        digest.update(f"{name}|{_settings(part)}|".encode())
    digest.update(operations.encode())
    hashed = {id(tensor) for _, tensor in _state(module)}
    own, read = own_tensors(module), set(program.sources.values())
    for name in sorted(read & own.keys()):
        if id(own[name]) not in hashed:
            _add(digest, name, own[name], instead)
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


def _add(digest: Any, name: str, tensor: Tensor, instead: Replaced) -> None:
    digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    tensor = instead.get(tensor.data_ptr(), tensor)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():  # an empty tensor cannot be viewed as bytes
        digest.update(flat.view(torch.uint8).numpy().data)
