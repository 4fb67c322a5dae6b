"""`verify`: run every test of a claim file, and say what stands."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from circuits.checks import clipped
from circuits.claims.catalogue import TESTS
from circuits.claims.claim import Claim, ClaimFile
from circuits.claims.files import from_yaml, to_yaml
from circuits.claims.registration import Earlier, Registration, conclude, earlier_runs, register
from circuits.claims.subject import Subject, subject_of, with_circuit
from circuits.claims.verdicts import Level, Measured, Verdict, exit_code
from circuits.database import Database
from circuits.factories import from_file
from circuits.files import Keep, finite, keeping
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.progress import Progress
from circuits.tables import Table, between, spread
from circuits.workspace import Workspace

Stage = Callable[[str], Progress | None]
"""Gives the progress of a stage of the work, by its name."""


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict.

    Attributes:
        claim: the claim.
        verdict: what came out.
        why: why, in a sentence.
        measured: what was measured.
        registration: when and as what it was registered; None of a stale claim, which is not tested.
    """

    claim: Claim
    verdict: Verdict
    why: str
    measured: Measured
    registration: Registration | None = None

    @property
    def as_expected(self) -> bool:
        """Whether the verdict is the one that the claim's author expects."""
        return self.verdict == self.claim.expect

    @property
    def conditions(self) -> str:
        """The test with its settings, on which examples it was made, and its seed."""
        claim, measured = self.claim, self.measured
        on = f"; {measured.examples}; seed {measured.seed}" if measured.examples else ""
        return f"Test {claim.test} ({claim.settings_line}){on}."

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, but for numbers that are not finite."""
        made = self.registration
        return {
            "name": self.claim.name, "claim": self.claim.kind, "test": self.claim.test,
            "statement": self.claim.statement, "with": dict(self.claim.settings), "expect": self.claim.expect,
            "why_expected": self.claim.why, "verdict": self.verdict, "as_expected": self.as_expected, "why": self.why,
            "measured": self.measured.to_dict(),
            "registered": None if made is None else made.registered, "hash": None if made is None else made.terms,
            "identity": None if made is None else made.identity,
            "earlier": [] if made is None else [
                {
                    "registered": e.registered, "verdict": e.verdict, "with": dict(e.settings),
                    "changed": {name: list(values) for name, values in e.changed.items()},
                }
                for e in made.earlier
            ],
        }  # fmt: skip

    @classmethod
    def from_dict(cls, claim: Claim, raw: dict[str, Any]) -> Judged:
        """What `to_dict` gave of a claim.

        Raises:
            KeyError, TypeError, ValueError: if it is something else.
        """
        verdict, made = raw["verdict"], None
        if verdict not in get_args(Verdict) or raw["name"] != claim.name:
            raise ValueError(
                f"claim {clipped(repr(raw['name']))} with the verdict {clipped(repr(verdict))}: expected "
                f"{claim.name!r} with one of {', '.join(get_args(Verdict))}"
            )
        if raw["registered"] is not None:
            earlier = tuple(
                Earlier(
                    _text(e["registered"]), dict(e["with"]), _text(e["verdict"]),
                    {name: (then, now) for name, (then, now) in e["changed"].items()},
                )
                for e in raw["earlier"]
            )  # fmt: skip
            identity, terms = _text(raw["identity"]), _text(raw["hash"])
            made = Registration(claim, identity, terms, _text(raw["registered"]), earlier)
        return cls(claim, verdict, _text(raw["why"]), Measured.from_dict(raw["measured"]), made)


@dataclass(frozen=True)
class Report:
    """What stands of a claim file.

    Attributes:
        file: the claims.
        model_hash: the model's hash now.
        judged: the claims with their verdicts, in the file's order.
        circuit: how large the circuit is, in words; empty without one.
    """

    file: ClaimFile
    model_hash: str
    judged: tuple[Judged, ...]
    circuit: str = ""

    @property
    def exit_code(self) -> int:
        """See `verdicts.exit_code`."""
        return exit_code([(j.verdict, j.claim.expect) for j in self.judged])

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; None for what is not finite."""
        return finite({
            "file": to_yaml(self.file), "model_hash": self.model_hash, "circuit": self.circuit,
            "circuits_version": version("circuits-workbench"), "exit_code": self.exit_code,
            "claims": [j.to_dict() for j in self.judged],
        })  # fmt: skip

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Report:
        """What `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: if it is something else.
        """
        file = from_yaml(raw["file"], "file")
        judged = tuple(
            Judged.from_dict(claim, own)
            for claim, own in zip(file.claims, raw["claims"], strict=True)
        )
        return cls(file, _text(raw["model_hash"]), judged, _text(raw["circuit"]))

    def tables(self) -> Iterator[Table | str]:
        """The verdicts, and the numbers behind each."""
        yield self.summary
        for judged in self.judged:
            yield from _details(judged)

    @property
    def summary(self) -> Table:
        """The verdicts, and in the note how often which was reached and how sure they are."""
        file = self.file
        level = Level(file.alpha, len(file.claims))
        rows = [
            (j.claim.name, j.claim.test, j.verdict, j.claim.expect + ("" if j.as_expected else " (!)"), j.why)
            for j in self.judged
        ]  # fmt: skip
        title = f"{file.name}: {file.model}" + (
            f", {self.circuit}, {file.ablation} ablation" if self.circuit else ""
        )
        counts = Counter(j.verdict for j in self.judged)
        sums = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
        other = sum(not j.as_expected for j in self.judged)
        note = (
            f"{sums}; {f'{other} not as expected (!)' if other else 'all as expected'}. {len(file.claims)} tests; the "
            f"chance of any wrong verdict is at most {file.alpha:g} (Bonferroni: each at {1 - level.each:.2g}); "
            f"intervals are of the level {level.each:.4g}; seed {file.seed}"
        )
        return Table(("claim", "test", "verdict", "expected", "why"), rows, title, note)


def _text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise TypeError(f"{clipped(repr(raw))} is no text")
    return raw


_SHOWN = 8


def _details(judged: Judged) -> Iterator[Table | str]:
    """The numbers of one claim, its notes, and its history."""
    measured = judged.measured
    rows = [
        (q.name, q.value, between(q.low, q.high), str(q.region), q.p_holds, q.p_refuted, spread(q.null))
        for q in measured.by_doubt[:_SHOWN]
    ]  # fmt: skip
    if rows:
        columns = ("number", "value", "interval", "claimed", "p (for)", "p (against)", "null")
        left = len(measured.quantities) - len(rows)
        note = measured.examples + (f"; {left} more numbers that hold more surely" if left else "")
        yield Table(columns, rows, f"{judged.claim.name}: {judged.verdict}", note)
    yield from measured.notes
    made = judged.registration
    for run in () if made is None else made.earlier:
        since = (
            f"changed since: {', '.join(run.changes)}" if run.changes else "with the same settings"
        )
        yield f"{judged.claim.name}: tested before, registered {run.registered}, {run.outcome}; {since}"


def load(file: ClaimFile, folder: Path) -> HookedModel:
    """The model that claims are about.

    Raises:
        FileNotFoundError, KeyError, ValueError: if there is no such model, or loading it would run code that is not
            trusted.
    """
    spec = from_file(
        "model", file.model, f"claim file {file.name!r}", "load it and give it to verify"
    )
    return load_model(spec, folder / file.weights if file.weights else None)


def verify(
    file: ClaimFile,
    place: Workspace,
    *,
    folder: str | Path = ".",
    model: HookedModel | None = None,
    stage: Stage = lambda name: None,
) -> Report:
    """Test every claim of a file.

    Each claim is registered before the `test` half of the examples is looked at. Work that is stopped goes on where it
    was when the same file is verified again.

    Args:
        file: the claims.
        place: the workspace: saved circuits, the register, and what is kept of stopped work.
        folder: where files that the claim file names are looked for.
        model: the model, if it is loaded; it is loaded as the file says if None.
        stage: gives the progress of each test.

    Raises:
        FileNotFoundError, KeyError, ValueError: if the model, the task, the circuit or a setting does not fit; nothing
            is registered then.
        OSError: if the workspace cannot be written.
    """
    folder = Path(folder)
    model = model or load(file, folder)
    if not model.has_hash(file.model_hash):
        why = f"the model's hash is {model.hash[:16]} now, the claims are about {file.model_hash[:16]}"
        stale = tuple(Judged(c, "stale", why, Measured(())) for c in file.claims)
        return Report(file, model.hash, stale)
    running = _Running()
    subject = subject_of(file, model, place, folder, running)
    level = Level(file.alpha, len(file.claims))
    database = place.writable().database
    subjects = _subjects(file, subject)
    made = _registered(file, subjects, database)
    work = place.model_folder(model.hash) / "claims"
    judged = []
    for one, own in zip(made, subjects, strict=True):
        kept = work / one.terms[:16]
        kept.mkdir(parents=True, exist_ok=True)
        running.progress = stage(one.claim.name)
        judged.append(_judged(one, own, level, keeping(kept)))
        conclude(database, own, one, judged[-1].verdict)
    for one in made:  # all is in the report now: the next verification computes everything again
        shutil.rmtree(work / one.terms[:16], ignore_errors=True)
    size = "" if subject.kept is None or subject.parts is None else (
        f"{int(subject.kept.sum())} of {len(subject.kept)} {subject.parts.word}"
    )  # fmt: skip
    return Report(file, model.hash, tuple(judged), size)


class _Running:
    """The progress of whichever claim is tested now."""

    progress: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, total)


def _subjects(file: ClaimFile, subject: Subject) -> list[Subject]:
    """What each claim is about; claims about the same circuit share what is computed of it."""
    made = [(file.circuit, subject)]
    for claim in file.claims:
        own = claim.circuit
        if own is not None and all(own != circuit for circuit, _ in made):
            made.append((own, with_circuit(subject, own, file.shift)))
    return [
        next(s for circuit, s in made if circuit == (c.circuit or file.circuit))
        for c in file.claims
    ]


def _registered(
    file: ClaimFile, subjects: Sequence[Subject], database: Database
) -> list[Registration]:
    """All claims of a file, registered once the settings of every one were found to fit."""
    claims = list(zip(file.claims, subjects, strict=True))
    for claim, own in claims:
        TESTS[claim.test].check(own, claim.settings)
    # What came before is read first: claims of one file that differ in their settings only share a history.
    before = [earlier_runs(database, file, claim, own) for claim, own in claims]
    return [
        register(database, file, claim, own, runs)
        for (claim, own), runs in zip(claims, before, strict=True)
    ]


def _judged(made: Registration, subject: Subject, level: Level, keep: Keep) -> Judged:
    claim = made.claim
    raw = keep("measured", lambda: TESTS[claim.test].run(subject, claim.settings, level).to_dict())
    measured = Measured.from_dict(raw)
    verdict, why = measured.verdict(level.alpha)
    return Judged(claim, verdict, why, measured, made)
