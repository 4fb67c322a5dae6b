"""How long work tells its caller how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], object]
"""Called with how much is done and how much there is, in whatever the work is counted in."""


def begun_later(begin: Callable[[], Progress | None]) -> Progress:
    """The progress of a stage that begins with the first word of it: until then the work is in another stage."""
    begun: list[Progress | None] = []

    def tell(done: int, total: int) -> None:
        if not begun:
            begun.append(begin())
        if begun[0] is not None:
            begun[0](done, total)

    return tell
