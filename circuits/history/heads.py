"""The head of append-only logs: one hash over all that they hold, for a person to keep elsewhere."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from circuits.history.log import Log

_TEXT = re.compile(r"(?P<counts>[0-9]{1,15}(-[0-9]{1,15})*)-(?P<hash>[0-9a-f]{64})")


@dataclass(frozen=True)
class Head:
    """How far logs have come. Whoever keeps it can tell later whether their rows up to here are still the same.

    Nothing that is in a file can prove this: who can write the file can write all its hashes.

    Attributes:
        counts: the number of rows of each log.
        hash: SHA-256 over all these rows, in hexadecimal.
    """

    counts: tuple[int, ...]
    hash: str

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.counts))}-{self.hash}"

    @classmethod
    def parse(cls, text: str, n_logs: int) -> Head:
        """Read it as it is written.

        Raises:
            ValueError: if it is none of so many logs.
        """
        found = _TEXT.fullmatch(text.strip())
        counts = tuple(map(int, found["counts"].split("-"))) if found else ()
        if found is None or len(counts) != n_logs:
            said = repr(text) if len(text) <= 90 else f"{text[:89]!r}…"
            form = "-".join(["COUNT"] * n_logs)
            raise ValueError(f"head {said} is not of the form {form}-HASH, as it was printed")
        return cls(counts, found["hash"])

    @classmethod
    def of(
        cls,
        connection: sqlite3.Connection,
        logs: Sequence[Log],
        counts: Sequence[int] | None = None,
    ) -> Head:
        """The head of logs, or what it was when they had fewer rows.

        Args:
            connection: to their database.
            logs: which; those without a table are empty.
            counts: how many of the first rows of each to take; all if not given.
        """
        digest = hashlib.sha256()
        taken = []
        for i, log in enumerate(logs):
            n = 0
            for row in log.rows(connection, -1 if counts is None else counts[i]):
                # ASCII, one line a row: no two lists of rows give the same text. SQLite columns hold bytes too.
                digest.update(
                    json.dumps(row, default=lambda b: {"bytes": b.hex()}).encode() + b"\n"
                )
                n += 1
            digest.update(b"\n")
            taken.append(n)
        return cls(tuple(taken), digest.hexdigest())
