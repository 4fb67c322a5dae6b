"""Attention that a person declares in a file next to a model of their own: `NAME.attention.toml` next to `NAME.py`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from circuits.json_files import read_text
from circuits.models.adapter.declaring import read_declarations
from circuits.specs import split_key

SUFFIX = ".attention.toml"


def declared_attention(name: str) -> Mapping[str, Mapping[str, Any]]:
    """What the file next to `FILE.py` declares about the attention of the model that its function makes.

    Empty if there is no such file.

    The file has a table for each function and each attention: `[make."blocks.0.attn"]` with
    `pattern = "layers.0/sigmoid@0"` (`circuits.models.adapter.declaring`).

    Args:
        name: `FILE.py:FUNCTION`, or `MODULE:FACTORY`, which has no file.

    Raises:
        ValueError: if it is not such a file.
    """
    source, function = split_key(name)
    path = Path(source).with_suffix(SUFFIX)
    if not source.endswith(".py") or not path.exists():
        return {}
    what = f"file {str(path)!r}"
    try:
        found = tomllib.loads(read_text(path, what))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{what} is not TOML: {error}") from None
    for key, tables in found.items():
        if not isinstance(tables, dict):
            raise ValueError(
                f'{what}: {key} is {tables!r}: expected tables [FUNCTION."NAME"], such as [make."blocks.0.attn"]'
            )
        read_declarations(tables, f"{what}: {key}")
    return found.get(function, {})
