"""What was measured of an autoencoder, kept beside its file (layer 5)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from circuits.files import write_json
from circuits.hdf5 import file_hash


def evaluation_path(code: Path) -> Path:
    """Where it is kept: beside the autoencoder's file."""
    return code.with_suffix(".eval.json")


def save_evaluation(code: Path, found: Mapping[str, Any]) -> Path:
    """Keep what was measured, with the hash of the file that it was measured on.

    Args:
        code: the autoencoder's file.
        found: as JSON has it: `rows` (see `Metrics`) and `behaviour` (see `Behaviour`).
    """
    path = evaluation_path(code)
    write_json(path, {"file_hash": file_hash(code), **found})
    return path


def load_evaluation(code: Path) -> dict[str, Any] | None:
    """What was measured; None if nothing was, or on another file of that name.

    Raises:
        ValueError: if what is there is damaged.
    """
    path = evaluation_path(code)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        known = found["file_hash"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged: measure again with `circuits sae eval`"
        ) from error
    return found if known == file_hash(code) else None
