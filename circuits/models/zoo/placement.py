"""On which device a model is, and of which type its numbers are."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.sites import is_bridge

Precision = Literal["float32", "float64", "bfloat16", "float16"]
"""The types that a model's numbers can be given."""


def device_named(device: str | torch.device) -> torch.device:
    """A device that is there.

    Raises:
        ValueError: if this machine has none of that name.
    """
    try:
        found = torch.device(device)
        # Tensors of `meta` have no numbers; the CPU takes any number, and is one.
        if found.type != "meta" and not (found.type == "cpu" and found.index):
            torch.empty(1, device=found)
            return found
    except (RuntimeError, AssertionError, NotImplementedError):
        pass
    raise ValueError(
        f"device {str(device)!r} is not there on this machine: expected one of {', '.join(_devices())}"
    )


def _devices() -> list[str]:
    cards = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cpu", *cards, *(["mps"] if torch.backends.mps.is_available() else [])]


def precision_named(dtype: str | torch.dtype) -> torch.dtype:
    """A type of numbers.

    Raises:
        ValueError: if it is none that a model can have.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in get_args(Precision):
        raise ValueError(f"dtype {name!r} is not one of {', '.join(get_args(Precision))}")
    return getattr(torch, name)


def in_precision(model: HookedModel, dtype: torch.dtype) -> HookedModel:
    """The model with floating-point numbers of a type, in place; found again, since other numbers are another model."""
    if all(p.dtype == dtype for p in model.module.parameters() if p.is_floating_point()):
        return model
    _move(model, dtype=dtype)
    return model.around(model.module, model.name)


def _move(model: HookedModel, **where: torch.dtype | torch.device) -> None:
    # A bridge would print what it does, between a command's tables.
    quiet = {"print_details": False} if is_bridge(model.module) else {}
    model.module.to(**where, **quiet)  # type: ignore[arg-type]


def on_device(model: HookedModel, device: torch.device) -> HookedModel:
    """The model on a device, in place."""
    _move(model, device=device)
    return model
