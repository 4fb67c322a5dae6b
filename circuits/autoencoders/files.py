"""Autoencoders on disk: one safetensors file, with the record of the autoencoder in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from circuits.autoencoders.autoencoder import About, Autoencoder
from circuits.files import finite
from circuits.tensors import write_tensors

FILE = "sae.safetensors"
"""The file of an autoencoder in its folder."""

FORMAT = 1
"""The version of the header."""

_KEY = "circuits.autoencoder"
_NEEDED = ("W_enc", "b_enc", "W_dec", "b_dec")
_OPTIONAL = {"relu": (), "topk": (), "jumprelu": ("threshold",)}


def save_autoencoder(code: Autoencoder, path: str | Path) -> Path:
    """Write an autoencoder: to a file that ends in `.safetensors`, or into a folder as `sae.safetensors`.

    Returns:
        The file.
    """
    path = Path(path)
    target = path if path.suffix == ".safetensors" else path / FILE
    header = {
        "format": FORMAT, "activation": code.activation, "k": code.k, "about": finite(asdict(code.about))
    }  # fmt: skip
    tensors = {name: getattr(code, name) for name in (*_NEEDED, "threshold", "W_skip")}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    write_tensors(target, tensors, {_KEY: json.dumps(header, allow_nan=False)})
    return target


def load_autoencoder(path: str | Path) -> Autoencoder:
    """Read an autoencoder: a file, or the folder that holds it.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file was not written by `save_autoencoder`, or tensors are missing, unknown or do not fit.
    """
    target = Path(path)
    if target.is_dir():
        target = target / FILE
    if not target.is_file():
        raise FileNotFoundError(f"there is no autoencoder at {str(path)!r}: expected a {FILE}")
    tensors, metadata = read_tensors(target)
    try:
        header = json.loads(metadata[_KEY])
        about = About(**{f.name: header["about"][f.name] for f in fields(About)})
        form, activation, k = header["format"], header["activation"], header["k"]
        # The header may have been edited: each field must be of the type of its default.
        wrong = [n for n, v in vars(about).items() if not isinstance(v, type(getattr(About(), n)))]
        if wrong or not (k is None or type(k) is int):
            raise ValueError(f"wrong kind of {wrong or 'k'}")
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"autoencoder {str(target)!r} was not written by circuits, or its header is damaged; files of other tools "
            "are read by `circuits sae import`"
        ) from error
    if form != FORMAT:
        raise ValueError(f"autoencoder {str(target)!r} has format {form}: expected {FORMAT}")
    if activation not in _OPTIONAL:
        raise ValueError(
            f"autoencoder {str(target)!r} has activation {activation!r}: expected one of {', '.join(_OPTIONAL)}"
        )
    check_tensors(target, tensors, (*_NEEDED, *_OPTIONAL[activation]), ("W_skip",))
    arguments: Mapping[str, Any] = {**tensors, "activation": activation, "k": k, "about": about}
    try:
        return Autoencoder(**arguments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"autoencoder {str(target)!r}: {error}") from error


def is_autoencoder(path: Path) -> bool:
    """Whether a file's header says that `save_autoencoder` wrote it."""
    try:
        with safe_open(path, framework="pt") as file:
            return _KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a safetensors file, in float32, and the metadata of its header.

    Raises:
        ValueError: if it is not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{str(path)!r} is not a safetensors file: {first}") from error
    return {
        n: t.to(torch.float32) if t.is_floating_point() else t for n, t in tensors.items()
    }, metadata


def check_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    needed: tuple[str, ...],
    optional: tuple[str, ...] = (),
) -> None:
    """Raise ValueError if tensors are missing or unknown."""
    missing = [name for name in needed if name not in tensors]
    extra = [name for name in tensors if name not in (*needed, *optional)]
    if missing or extra:
        what = [f"lacks {', '.join(missing)}"] if missing else []
        what += [f"holds unknown {', '.join(extra[:8])}"] if extra else []
        raise ValueError(
            f"autoencoder {str(path)!r} {' and '.join(what)}: expected {', '.join((*needed, *optional))}"
        )
