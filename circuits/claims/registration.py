"""Registration: what is claimed is written down, hashed and dated, before the examples that judge it are drawn.

It is kept in the workspace's database, where nothing is changed or deleted. A claim about the same thing (model, task,
circuit, kind, statement, and what its settings name) has one history, in which earlier runs and changed thresholds
stand; a claim that is edited has another hash, and starts a history of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuits.claims.claim import Claim, ClaimFile, digest
from circuits.claims.settings import Settings
from circuits.claims.subject import Subject
from circuits.claims.verdicts import Verdict
from circuits.database import Database
from circuits.hdf5 import file_hash

KIND = "claim"

_TASK, _DRAWN = ("spec", "metric", "data"), ("examples", "seed", "take")

_FILES = (".py", ".json", ".csv", ".tsv", ".npz", ".npy")


@dataclass(frozen=True)
class Earlier:
    """An earlier run of a claim.

    Attributes:
        registered: when it was registered, in UTC.
        settings: with which thresholds and choices.
        verdict: what came out; empty if the run did not end.
        changed: the settings that are others now, each as (then, now).
    """

    registered: str
    settings: Mapping[str, Any]
    verdict: str
    changed: Mapping[str, tuple[Any, Any]]

    @property
    def outcome(self) -> str:
        """The verdict, or that there is none."""
        return self.verdict or "not ended"

    @property
    def changes(self) -> list[str]:
        """What is different now, a setting each: `least was 0.8, is 0.9`."""
        return [f"{name} was {then}, is {now}" for name, (then, now) in self.changed.items()]


@dataclass(frozen=True)
class Registration:
    """A claim as it was registered.

    Attributes:
        claim: the claim.
        identity: the hash of what is claimed about what.
        terms: the hash of that with thresholds, test, seed and expected verdict.
        registered: when, in UTC.
        earlier: earlier runs, the oldest first.
    """

    claim: Claim
    identity: str
    terms: str
    registered: str
    earlier: tuple[Earlier, ...]


def terms_of(file: ClaimFile, claim: Claim, subject: Subject) -> tuple[str, dict[str, Any]]:
    """What is claimed about what, hashed, and the terms under which it is tested."""
    parts = [] if subject.parts is None or subject.kept is None else _names(subject)
    spec = file.task
    # How examples are drawn is no part of the claim: drawing others is another run of it.
    more = {k: v for k, v in spec.to_dict().items() if k not in (*_TASK, *_DRAWN)}
    about = {
        "model": subject.model.hash, "circuit": parts,
        "task": [*(getattr(spec, name) for name in _TASK), *([more] if more else [])],
        "ablation": subject.ablation, "shift": file.shift, "claim": claim.kind, "test": claim.test,
        "statement": claim.statement, "named": _named(claim), "files": hashes_of(claim, subject.folder),
    }  # fmt: skip
    terms = {
        **_plain(claim.settings), "seed": file.seed, "alpha": file.alpha, "tests": len(file.claims),
        "expect": claim.expect, "task_seed": spec.seed, "task_examples": spec.examples, "task_hash": subject.task.hash,
        **({} if spec.take == "spread" else {"task_take": spec.take}),
    }  # fmt: skip
    return digest(about), terms


def _named(claim: Claim) -> dict[str, Any]:
    """The settings that name something, such as a unit: of another unit it is another claim. Numbers are thresholds."""
    return {name: v for name, v in _plain(claim.settings).items() if isinstance(v, str | list)}


def hashes_of(claim: Claim, folder: Path) -> dict[str, str]:
    """The hashes of files below a folder that a claim's settings name, by name: an edited file makes another claim."""
    named = {text.partition(":")[0] for text in claim.settings.values() if isinstance(text, str)}
    paths = {name: folder / name for name in sorted(named) if Path(name).suffix in _FILES}
    return {name: file_hash(path) for name, path in paths.items() if path.is_file()}


def _names(subject: Subject) -> list[str]:
    parts, kept = subject.circuit
    return sorted(name for name, own in zip(parts.names, kept, strict=True) if own)


def _plain(settings: Settings) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()}


def earlier_runs(
    database: Database, file: ClaimFile, claim: Claim, subject: Subject
) -> tuple[Earlier, ...]:
    """The earlier runs of a claim, the oldest first."""
    identity, terms = terms_of(file, claim, subject)
    found: list[dict[str, Any]] = []
    for record in database.history(KIND, subject.model.hash, identity):
        body = record.body or {}
        if body.get("event") == "registered":
            found.append({"when": record.created, "verdict": "", **body})
        else:  # of the last run that was registered under these terms
            own = [run for run in found if run["hash"] == body.get("hash")]
            if own:
                own[-1]["verdict"] = body["verdict"]
    return tuple(
        Earlier(run["when"], then := run["terms"], run["verdict"], _changed(then, terms))
        for run in found
    )


def _changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        name: (then.get(name), now.get(name))
        for name in dict.fromkeys((*then, *now))
        if then.get(name) != now.get(name)
    }


def register(
    database: Database,
    file: ClaimFile,
    claim: Claim,
    subject: Subject,
    earlier: tuple[Earlier, ...] = (),
) -> Registration:
    """Write a claim down before its test half is looked at.

    Raises:
        OSError: if the database cannot be written.
    """
    identity, terms = terms_of(file, claim, subject)
    hashed = digest([identity, terms])
    body = {
        "event": "registered",
        "terms": terms,
        "hash": hashed,
        "file": file.name,
        "claim": claim.name,
    }
    saved = database.save(KIND, subject.model.hash, identity, body)
    return Registration(claim, identity, hashed, saved.created, earlier)


def conclude(database: Database, subject: Subject, made: Registration, verdict: Verdict) -> None:
    """Add to a claim's history how its run ended."""
    body = {"event": "verdict", "hash": made.terms, "verdict": verdict}
    database.save(KIND, subject.model.hash, made.identity, body)
