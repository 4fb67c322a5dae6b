"""The same network with its weights shuffled: what is left when nothing was learned (layer 3)."""

from __future__ import annotations

import copy

import torch

from circuits.models.adapter import HookedModel


def randomized(model: HookedModel, seed: int = 0) -> HookedModel:
    """A copy of a model in which the numbers of each weight tensor are shuffled (Adebayo et al. 2018).

    Each tensor keeps its numbers, so sizes of activations stay near what they were; what the numbers
    have to do with each other is lost. Buffers (batch-norm statistics) are shuffled too.

    Args:
        model: it is not changed.
        seed: of the shuffling.
    """
    module = copy.deepcopy(model.module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tensor in sorted(module.state_dict().items()):
            if tensor.is_floating_point() and tensor.numel() > 1:
                order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
                tensor.copy_(tensor.flatten()[order].reshape(tensor.shape))
    aliases = {alias: site.name for site in model.sites for alias in site.aliases}
    return HookedModel(
        module, model.input, f"{model.name}, randomized (seed {seed})", aliases, model.classes
    )
