"""What was measured of an autoencoder, kept beside its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from circuits.files import write_json
from circuits.hdf5 import file_hash
from circuits.sae.metrics import Metrics
from circuits.sae.substitution import Behaviour


def evaluation_path(code: Path) -> Path:
    """Where it is kept: beside the autoencoder's file."""
    return code.with_suffix(".eval.json")


def as_evaluation(rows: Metrics, behaviour: Behaviour, examples: str) -> dict[str, Any]:
    """What was measured of an autoencoder, as JSON has it; `examples` says which the behaviour was measured on."""
    return {
        "rows": rows.to_dict(),
        "behaviour": {**behaviour.to_dict(), "examples": examples},
    }


def save_evaluation(code: Path, found: Mapping[str, Any]) -> Path:
    """Keep what was measured, with the hash of the file that it was measured on.

    Args:
        code: the autoencoder's file.
        found: as `as_evaluation` makes it.
    """
    path = evaluation_path(code)
    write_json(path, {"file_hash": file_hash(code), **found})
    return path


def load_evaluation(code: Path) -> dict[str, Any] | None:
    """What was measured; None if nothing was, or on another file of that name, or by an earlier version.

    Raises:
        ValueError: if what is there is damaged.
    """
    path = evaluation_path(code)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        current = found["file_hash"] == file_hash(code) and "record" in found["behaviour"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged: measure again with `circuits sae eval`"
        ) from error
    return found if current else None
