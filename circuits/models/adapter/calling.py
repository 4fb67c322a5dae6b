"""Calling the model itself: what goes wrong inside it is said in a line that names the model and its input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from circuits import hooks
from circuits.errors import raised, raised_at, raises_interrupt


class ForwardError(ValueError, RuntimeError):
    """Raised for an error inside a model's forward pass. Also a RuntimeError: whoever tries whether a model can run on
    something catches what torch raises.
    """


_PLAIN = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, ArithmeticError)
"""Errors of torch and of Python itself, whose words say by themselves what is wrong."""

_OURS = Path(hooks.__file__).parent
_MODELS = tuple(str(_OURS / part) for part in ("models/zoo", "cleanroom", "autoencoders"))


@contextmanager
def naming_model(name: str, inputs: Tensor) -> Iterator[None]:
    """Let errors of a model's forward pass on these inputs name the model, the inputs' shape and the first error.

    Raises:
        ForwardError: from the model's own error. Errors of our hooks and lack of memory are passed on as they are.
    """
    try:
        yield
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) and not raises_interrupt(error):
            raise
        passed_on = (ForwardError, torch.OutOfMemoryError, MemoryError, Warning)
        if isinstance(error, passed_on) or _is_ours(error.__traceback__):
            raise
        first = (str(error) or type(error).__name__).splitlines()[0]
        what = first if isinstance(error, _PLAIN) else f"its code {raised(error)}"
        where = raised_at(error) if isinstance(error, _PLAIN) else ""
        raise ForwardError(
            f"model {name} cannot run on an input of shape {tuple(inputs.shape)}: {what}"
            f"{f' ({where})' if where else ''}"
        ) from error


def _is_ours(traceback: TracebackType | None) -> bool:
    """Whether an error was raised in a hook or a rule of this library, and not in the model's own code."""
    frames = []
    while traceback is not None:
        frames.append(traceback.tb_frame.f_code)
        traceback = traceback.tb_next
    if any(code.co_filename == hooks.__file__ and code.co_name == "_visited" for code in frames):
        return True
    # A torch function mode stands between the model's code and torch; what torch raises is not the mode's.
    last = frames[-1]
    inside = last.co_filename.startswith(str(_OURS)) and not last.co_filename.startswith(_MODELS)
    return len(frames) > 1 and inside and last.co_name != "__torch_function__"


def check_has_numbers(module: nn.Module, name: str) -> None:
    """Raise ValueError if some tensor of a model is on torch's meta device, where there are no numbers."""
    named = (*module.named_parameters(), *module.named_buffers())
    bad = next((which for which, tensor in named if tensor.is_meta), None)
    if bad is not None:
        raise ValueError(
            f"tensor {bad} of model {name} is on torch's meta device, without numbers: expected a model with weights "
            "(module.to_empty(device='cpu'), then module.load_state_dict(…))"
        )


def check_weights_finite(module: nn.Module, name: str) -> None:
    """Raise ValueError if a parameter of a model holds NaN or infinity, which what is made of its weights would too."""
    # Of parameters alone: buffers may hold minus infinity, as masks do.
    for which, parameter in module.named_parameters():
        bad = int((~torch.isfinite(parameter.detach())).sum())
        if bad:
            raise ValueError(
                f"weight {which} of model {name}: {bad} of its {parameter.numel()} numbers are NaN or infinite"
            )
