"""Verdicts that are kept next to a claim file, so that a quick check need not measure everything again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from circuits.claims.claim import ClaimFile, digest
from circuits.claims.files import to_yaml
from circuits.claims.registration import hashes_of
from circuits.claims.verdicts import Verdict, exit_code
from circuits.claims.verifying import Report
from circuits.files import write_json
from circuits.json_files import read_json
from circuits.tables import Table

LONG = 60.0
"""Claims that took longer than this many seconds are not tested by a quick check."""


@dataclass(frozen=True)
class Recorded:
    """What a verification found, as it was recorded.

    Attributes:
        claims_hash: the hash of the claims that were tested, thresholds and model hash included.
        seconds: how long it took.
        verdicts: of each claim, by name.
        numbers: the numbers of each claim, by name.
    """

    claims_hash: str
    seconds: float
    verdicts: Mapping[str, Verdict]
    numbers: Mapping[str, list[float]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def exit_code(self, file: ClaimFile) -> int:
        """See `verdicts.exit_code`."""
        return exit_code([(self.verdicts[claim.name], claim.expect) for claim in file.claims])

    def table(self, file: ClaimFile) -> Table:
        """The recorded verdicts."""
        rows = [(c.name, c.test, self.verdicts[c.name], c.expect) for c in file.claims]
        title = f"{file.name}: as recorded, not measured again ({self.seconds:.0f} s)"
        return Table(("claim", "test", "verdict", "expected"), rows, title)


def recorded_path(path: Path) -> Path:
    """Where the verdicts of a claim file are recorded."""
    return path.with_suffix(".expected.json")


def record(path: Path, report: Report, seconds: float) -> Path:
    """Record a verification next to its claim file; the path is returned."""
    numbers = {j.claim.name: [q.value for q in j.measured.quantities] for j in report.judged}
    made = Recorded(
        claims_hash(report.file, path.parent), round(seconds, 1), {j.claim.name: j.verdict for j in report.judged},
        numbers,
    )  # fmt: skip
    write_json(recorded_path(path), made.to_dict())
    return recorded_path(path)


def claims_hash(file: ClaimFile, folder: Path) -> str:
    """The hash of a claim file's contents, however it is laid out, and of the files that it names."""
    return digest([to_yaml(file), [hashes_of(claim, folder) for claim in file.claims]])


def read_recorded(path: Path, file: ClaimFile) -> Recorded | None:
    """What was recorded of a claim file; None if nothing was.

    Raises:
        ValueError: if it is damaged, or the claims were edited since.
    """
    place = recorded_path(path)
    if not place.is_file():
        return None
    again = f"run: circuits verify {path} --record"
    try:
        made = Recorded(**read_json(place))
        names = [*made.verdicts]
    except (TypeError, AttributeError, ValueError):
        raise ValueError(f"file {str(place)!r} is no record of verdicts; {again}") from None
    if made.claims_hash != claims_hash(file, path.parent) or names != [
        claim.name for claim in file.claims
    ]:
        raise ValueError(
            f"file {str(place)!r} is of other claims than {str(path)!r} holds now; {again}"
        )
    return made
