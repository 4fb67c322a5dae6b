"""State of modules: what a pass changes and the next pass reads, such as a moving average or a counter."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Slot:
    """A buffer or an attribute of a part of a model.

    Attributes:
        path: the part.
        name: the buffer or attribute.
        in_state_dict: whether it is a buffer that the state dict has.
        buffer: whether it is a buffer.
    """

    path: str
    name: str
    in_state_dict: bool = False
    buffer: bool = False

    def __str__(self) -> str:
        return f"{self.path}.{self.name}".lstrip(".")


_STATES: WeakKeyDictionary[nn.Module, tuple[Slot, ...]] = WeakKeyDictionary()
"""What the passes of models change, if it is state. By path, since parts would keep their model alive."""

_CONTAINERS = (list, dict, set, deque)

_TORCHS_OWN = frozenset(vars(nn.Module()))


class Held:
    """The values of slots at one moment. Passes are given copies of the tensors until these are put back.

    Copies, since a tensor that a pass writes into may be one that its gradient needs: it cannot be written back.

    Args:
        module: the model.
        slots: what to hold; None: all buffers, plain tensors, settings and containers.
    """

    def __init__(self, module: nn.Module, slots: Sequence[Slot] | None = None) -> None:
        parts = dict(module.named_modules())
        copies: dict[int, Tensor] = {}  # what is shared stays shared
        self._held: list[tuple[Slot, dict[str, Any], Any, Any]] = []
        for slot in _slots(parts) if slots is None else slots:
            table = parts[slot.path]._buffers if slot.buffer else vars(parts[slot.path])
            if slot.name not in table:
                continue
            value = before = table[slot.name]
            if isinstance(value, Tensor):
                if id(value) not in copies:
                    copies[id(value)] = value.detach().clone()
                table[slot.name] = copies[id(value)]
            elif isinstance(value, _CONTAINERS):
                before = copy.copy(value)
            self._held.append((slot, table, value, before))

    def changed(self) -> list[Slot]:
        """The slots that have other values now."""
        return [slot for slot, table, _, before in self._held if _is_changed(slot, table, before)]

    def put_back(self, everything: bool = True) -> None:
        """Put the values back, or only the objects whose values have not changed."""
        for slot, table, value, before in self._held:
            changed = _is_changed(slot, table, before)
            if changed and not everything:
                continue
            if changed and isinstance(value, _CONTAINERS):
                value.clear()
                (value.extend if isinstance(value, list | deque) else value.update)(before)
            table[slot.name] = value


def _slots(parts: dict[str, nn.Module]) -> Iterator[Slot]:
    plain = (bool, int, float, str, tuple, type(None), *_CONTAINERS)
    for path, part in parts.items():
        for name, value in part._buffers.items():
            if value is None or _is_copyable(value):
                yield Slot(path, name, name not in part._non_persistent_buffers_set, True)
        for name, value in vars(part).items():
            if name not in _TORCHS_OWN and (isinstance(value, plain) or _is_copyable(value)):
                yield Slot(path, name)


def _is_copyable(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and not isinstance(value, nn.Parameter)
        and value.layout == torch.strided
        and not (value.is_quantized or value.is_meta)
    )


def _is_changed(slot: Slot, table: dict[str, Any], before: Any) -> bool:
    return slot.name not in table or not _same(table[slot.name], before)


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
            return False
        # By value, since idempotent writes (a clamp) are no change. NaN equals NaN.
        return bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, list | tuple | deque):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    plain = isinstance(one, bool | int | float | str | set)
    return plain and (one == other or one != one)


@contextmanager
def holding(module: nn.Module, everything: bool = False) -> Iterator[None]:
    """Put back, after the block, what passes inside it change, if that is state; or all that they change."""
    slots = _STATES.get(module, ())
    if not slots and not everything:
        yield
        return
    held = Held(module, None if everything else slots)
    try:
        yield
    finally:
        held.put_back()


def remember_state(module: nn.Module, changed: Sequence[Slot]) -> None:
    """Have `holding` put back these slots of a model."""
    _STATES[module] = tuple(changed)
