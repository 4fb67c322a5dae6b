"""Fine-tuning to the same effect: the baseline that an edit has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.autograd import recording_gradients
from circuits.examples import Examples, as_examples
from circuits.models.adapter.copying import deep_copy
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.matrices import parameter_names
from circuits.models.adapter.sites import main_output
from circuits.models.paths.logits import answers, check_answer


@dataclass(frozen=True, eq=False)
class FineTuned:
    """Weights after fine-tuning.

    Attributes:
        tensors: the changed parameters, by name; `model.rewriting(tensors)` applies them.
        steps: the number of steps taken.
        probability: the target's probability at the end, the lowest over the examples.
        norm: the norm of the change over all parameters.
    """

    tensors: dict[str, Tensor]
    steps: int
    probability: float
    norm: float


@recording_gradients()
def fine_tune(
    model: HookedModel,
    examples: Examples | Tensor,
    target: int,
    *,
    parameters: Sequence[str] | None = None,
    enough: float = 0.99,
    learning_rate: float = 1e-3,
    steps: int = 500,
) -> FineTuned:
    """Train a copy of a model's parameters by Adam until it answers examples with a target.

    Args:
        model: the model; it is not changed.
        examples: texts of equal length, or images.
        target: the token (after the last position) or class that they should get.
        parameters: the names of the parameters to train; all if None.
        enough: the probability at which training stops.
        learning_rate: learning rate of Adam.
        steps: the largest number of steps.

    Raises:
        KeyError: if there is no such parameter.
        ValueError: if the target is out of range, or a parameter is in half precision.
    """
    own = model.parameters
    names = list(own) if parameters is None else list(parameters)
    missing = [name for name in names if name not in own]
    if missing:
        raise KeyError(f"no parameter {missing[0]!r} of {model.name}")
    check_answer(model, target)
    short = next((name for name in names if torch.finfo(own[name].dtype).bits < 32), None)
    if short is not None:
        raise ValueError(
            f"parameter {short} of {model.name} has the type {own[short].dtype}, which cannot hold the small steps of "
            "training: expected float32 (model.module.float() before it is wrapped)"
        )
    if steps < 0 or not 0 < enough <= 1 or learning_rate <= 0:
        raise ValueError(
            f"steps {steps}, enough {enough}, learning_rate {learning_rate}: expected steps of 0 or more, enough in "
            "(0, 1], and a positive rate"
        )
    with model.lock:
        # Locked, so that the copy is not taken in the middle of somebody's edit. In evaluation mode, as the model is
        # used.
        module = deep_copy(model.module).eval()
    theirs = parameter_names(module)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    trained = {name: theirs[name].requires_grad_(True) for name in names}
    adam = torch.optim.Adam(list(trained.values()), lr=learning_rate)
    inputs, reached, step = model.fitted(as_examples(model, examples).inputs), 0.0, 0
    # One round more than steps: the last one only measures.
    for step in range(steps + 1):
        logits = main_output(module(inputs.clone()))
        log_p = answers(model, logits).log_softmax(-1)[:, target]
        # The least sure of the examples decides, as for a rank-one edit.
        reached = log_p.exp().min().item()
        if reached >= enough or step == steps:
            break
        adam.zero_grad()
        (-log_p.mean()).backward()
        adam.step()
    # Hooks of a bridge keep the last residual stream in the module that they were made for, also when a copy runs. A
    # pass without gradients takes its place, since a module that holds a graph cannot be copied.
    model.logits(inputs)
    tensors = {name: tensor.detach().requires_grad_(False) for name, tensor in trained.items()}
    squares = [(t - own[name].data).double().square().sum() for name, t in tensors.items()]
    return FineTuned(tensors, step, reached, torch.stack(squares).sum().sqrt().item())
