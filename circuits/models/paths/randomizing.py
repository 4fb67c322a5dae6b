"""Networks with shuffled weights, as a control: what a method shows where nothing was learned."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from circuits.autograd import recording_gradients
from circuits.models.adapter.copying import deep_copy
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.sites import evaluating


@recording_gradients()
def randomized(
    model: HookedModel, seed: int = 0, modules: Collection[str] | None = None
) -> HookedModel:
    """Return a copy of a model in which the numbers of each weight tensor are shuffled (Adebayo et al. 2018).

    Each tensor keeps its numbers, so that activations keep about their size, while the structure of the weights is
    lost. Buffers (the statistics of batch norms) are shuffled too.

    Args:
        model: the model, which is not changed.
        seed: of the shuffling; a tensor is shuffled the same way whichever other ones are.
        modules: shuffle only the weights of these modules themselves (see `layers_in_order`).

    Raises:
        ValueError: if edits are in force.
    """
    if model.edited:
        raise ValueError(f"model {model.name} is edited: shuffle its weights outside the edit")
    with model.lock:
        module = deep_copy(model.module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # By name, as the order of a state dict is that in which modules were defined.
        for name, tensor in sorted(module.state_dict().items()):
            if tensor.is_floating_point() and tensor.numel() > 1:
                # Drawn for every tensor, also where it is not used: the draws of the next ones do not depend on
                # `modules`.
                order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
                if modules is None or name.rpartition(".")[0] in modules:
                    tensor.copy_(tensor.flatten()[order].reshape(tensor.shape))
    which = "" if modules is None else f", {len(modules)} layers"
    return model.around(module, f"{model.name}, randomized{which} (seed {seed})")


def layers_in_order(model: HookedModel) -> list[str]:
    """The modules that hold weights themselves, in the order in which they are first called.

    A module that is never called, because the module around it uses its weights, has the place of that module.
    """
    names = {m: name for name, m in model.module.named_modules()}
    called: dict[str, int] = {}

    def note(module: nn.Module, args: object) -> None:
        called.setdefault(names[module], len(called))

    with model.lock:
        handles = [m.register_forward_pre_hook(note) for m in names]
        try:
            with evaluating(model.module), torch.no_grad():
                model.module(model.fitted(model.input.example(1)))
        finally:
            for handle in handles:
                handle.remove()

    def when(name: str) -> int:
        # A module that is not called itself (its parameters are read by the one that holds it) comes where its parent
        # does.
        while name and name not in called:
            name = name.rpartition(".")[0]
        return called.get(name, -1)

    own = [name for m, name in names.items() if next(m.parameters(False), None) is not None]
    return sorted(own, key=when)
