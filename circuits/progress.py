"""How long work tells its caller how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], object]
"""Called with how much is done and how much there is, in whatever the work is counted in."""

_FINE = 100
"""Into as many steps a unit of work is divided where a portion of it tells its own progress."""


def begun_later(begin: Callable[[], Progress | None]) -> Progress:
    """The progress of a stage that begins with the first word of it: until then the work is in another stage."""
    begun: list[Progress | None] = []

    def tell(done: int, total: int) -> None:
        if not begun:
            begun.append(begin())
        if begun[0] is not None:
            begun[0](done, total)

    return tell


def portion(progress: Progress | None, first: int, last: int, of: int) -> Progress:
    """The progress of a portion of work: from `first` to `last`, where all of the work is `of`.

    >>> portion(lambda done, total: print(f"{done} of {total}"), 1, 3, 4)(5, 10)
    200 of 400
    """

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress(round(_FINE * (first + (last - first) * done / max(total, 1))), _FINE * of)

    return tell
