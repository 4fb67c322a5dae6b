"""The real language model, for tests that are skipped where it was not fetched."""

from __future__ import annotations

from pathlib import Path

import pytest

from circuits.models.zoo.converting import is_converted
from circuits.workspace import Workspace


def fetched_smollm2() -> Path:
    """The folder of smollm2 in the default workspace; skips the test if there is none."""
    place = Workspace.default()
    folder = place.converted_folder("smollm2")
    if not is_converted(folder):
        pytest.skip(
            f"smollm2 is not in {str(place.root)!r}: `circuits fetch smollm2` puts it there"
        )
    return folder.resolve()
