"""Evaluations of autoencoders, kept in a file next to the autoencoder's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from circuits.files import write_json
from circuits.hdf5 import file_hash
from circuits.json_files import read_json
from circuits.sae.metrics import Metrics
from circuits.sae.substitution import Behaviour


def evaluation_path(code: Path) -> Path:
    """The path of an autoencoder's evaluation: next to the autoencoder's file."""
    return code.with_suffix(".eval.json")


def as_evaluation(rows: Metrics, behaviour: Behaviour, examples: str) -> dict[str, Any]:
    """An evaluation as a dictionary for JSON; `examples` says on which examples the behaviour was measured."""
    return {
        "rows": rows.to_dict(),
        "behaviour": {**behaviour.to_dict(), "examples": examples},
    }


def save_evaluation(code: Path, found: Mapping[str, Any]) -> Path:
    """Write an evaluation, with the hash of the file that it belongs to.

    Args:
        code: the autoencoder's file.
        found: the evaluation, from `as_evaluation`.
    """
    path = evaluation_path(code)
    write_json(path, {"file_hash": file_hash(code), **found})
    return path


def load_evaluation(code: Path) -> dict[str, Any] | None:
    """Read an evaluation; None if there is none, or it is of another file of that name or an earlier version.

    Raises:
        ValueError: if the file is damaged.
    """
    path = evaluation_path(code)
    if not path.is_file():
        return None
    try:
        found = read_json(path)
        current = found["file_hash"] == file_hash(code) and "record" in found["behaviour"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"evaluation {str(path)!r} is damaged: evaluate again with `circuits sae eval`"
        ) from error
    return found if current else None
