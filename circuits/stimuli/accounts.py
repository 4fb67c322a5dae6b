"""An account of data from files: what was taken, and what was not and why, in one line."""

from __future__ import annotations

from collections.abc import Mapping

from circuits.stimuli.images import ImageSource
from circuits.stimuli.texts import TextSource
from circuits.tables import by_reason, kinds


def left_out(source: ImageSource | TextSource) -> dict[str, int]:
    """How many files of a folder are no examples, by reason."""
    if not isinstance(source, ImageSource):
        return {}
    return {kind: len(names) for kind, names in kinds(source.left_out).items()}


def account(
    source: ImageSource | TextSource, taken: int, chosen: str, skipped: Mapping[str, str]
) -> str:
    """What of a folder was taken, and what was not and why, in one line; empty if it is no folder.

    Args:
        source: the data.
        taken: how many images were taken.
        chosen: how they were chosen, in words.
        skipped: the chosen ones that cannot be read, with the reasons.
    """
    if not isinstance(source, ImageSource) or source.folder is None:
        return ""
    text = f"{source.spec}: {taken} of {len(source)} images taken ({chosen})"
    if skipped:
        text += f"; skipped {by_reason(skipped)}"
    if source.left_out:
        text += f"; not among the images: {by_reason(source.left_out)}"
    return text
