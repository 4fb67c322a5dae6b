"""The base of weight edits: parameters that are copied before they are changed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from circuits.edits.records import Edit
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.matrices import WeightMatrix
from circuits.units import unknown


class Weights:
    """A model's parameters with edits applied, copy on write: the model's own tensors are never written to.

    Args:
        model: the model, whose current parameters are taken.
        tensors: parameters that are already changed, by name.
    """

    def __init__(self, model: HookedModel, tensors: Mapping[str, Tensor] | None = None) -> None:
        self.model = model
        # Tensors of an earlier position of the ledger take the place of the model's; they too are cloned before they
        # are changed.
        self._given = {name: p.data for name, p in model.parameters.items()} | dict(tensors or {})
        self._before = dict(tensors or {})
        self._own: dict[str, Tensor] = {}

    @cached_property
    def matrices(self) -> Sequence[WeightMatrix]:
        """The model's weight matrices."""
        return self.model.matrices

    @property
    def changed(self) -> dict[str, Tensor]:
        """The parameters that are not the model's own, by name."""
        return self._before | self._own

    def value(self, name: str) -> Tensor:
        """A parameter's current value, read-only."""
        return self._own[name] if name in self._own else self._given[name]

    def writable(self, name: str) -> Tensor:
        """A parameter's copy that may be written to."""
        if name not in self._own:
            self._own[name] = self._given[name].clone()
        return self._own[name]

    def apply(self, edit: WeightEdit) -> None:
        """Make an edit.

        Raises:
            ValueError: if a parameter is no longer finite; the weights must not be used then.
        """
        edit.apply(self)
        for name in dict.fromkeys(edit.parameters(self.matrices)):
            # Weights that were not finite before are the model's own affair; only an edit that makes them so is
            # refused.
            if not bool(torch.isfinite(self.value(name)).all()) and bool(
                torch.isfinite(self._given[name]).all()
            ):
                raise ValueError(
                    f"edit '{edit}' makes {name} infinite or NaN: expected finite weights"
                )


class WeightEdit(Edit):
    """An edit of parameters."""

    @abstractmethod
    def parameters(self, matrices: Sequence[WeightMatrix]) -> list[str]:
        """The names of the parameters that it may change."""

    @abstractmethod
    def apply(self, weights: Weights) -> None:
        """Change the weights."""


def check_alone(edit: WeightEdit, matrices: Sequence[WeightMatrix]) -> None:
    """Raise ValueError if a parameter that an edit changes lies in the memory of another tensor."""
    # In memory an edit changes one of the two; a baked file that is loaded changes both.
    names = set(edit.parameters(matrices))
    for m in matrices:
        for name, others in m.aliases.items():
            if name in names:
                raise ValueError(
                    f"{name} of layer {m.name} lies in the same memory as {', '.join(others)}, and an edit would "
                    "change only one of them: expected a parameter with memory of its own (clone it, or use one "
                    "nn.Parameter in both places)"
                )


def layer_named(matrices: Sequence[WeightMatrix], name: str) -> WeightMatrix:
    """The matrix of a layer.

    Raises:
        KeyError: if there is none.
    """
    found = next((m for m in matrices if m.name == name), None)
    if found is None:
        names = [m.name for m in matrices]
        listed = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
        raise KeyError(
            f"{unknown('layer with weights', name, names).args[0]} (there are {listed}; a layer whose weights are "
            "computed from other parameters, as by weight norm or pruning, cannot be edited)"
        )
    return found
