"""Claims about a model: statements with the tests that could refute them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from circuits.claims.parts import Ablation
from circuits.claims.verdicts import ALPHA, Expected
from circuits.tasks.spec import TaskSpec


@dataclass(frozen=True)
class CircuitSpec:
    """Which circuit claims are about; one of the first four is given, or none where claims need no circuit.

    Attributes:
        saved: the name under which it is saved in the workspace.
        file: a file of edges, see `discovery.formats`.
        edges: its edges, each written `source -> target`.
        units: its units, each `SITE:1,2,5-9` or a site.
        sites: of `units`: the sites at which all other units are replaced; a transformer's usual ones if empty.
        graph: of `edges` and `file`: between which parts, as `edge_graph` takes it.
    """

    saved: str = ""
    file: str = ""
    edges: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    graph: Mapping[str, Any] = field(default_factory=dict)

    @property
    def given(self) -> bool:
        """Whether there is a circuit."""
        return bool(self.saved or self.file or self.edges or self.units)


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        name: what it is called in its file.
        kind: what is claimed, e.g. `sufficient`.
        test: the test that could refute it.
        settings: the test's thresholds and choices, all of them: what the file does not name has its default.
        statement: the claim in words.
        expect: the verdict that the author expects.
        why: why a claim is in the file that is expected to be refuted.
        circuit: the circuit that it is about; that of the file if None.
    """

    name: str
    kind: str
    test: str
    settings: Mapping[str, Any]
    statement: str = ""
    expect: Expected = "holds"
    why: str = ""
    circuit: CircuitSpec | None = None

    @property
    def settings_line(self) -> str:
        """The settings in one line: `least 0.9, most 1.1`."""
        return ", ".join(f"{name} {value}" for name, value in self.settings.items())


@dataclass(frozen=True)
class ClaimFile:
    """A file of claims.

    Attributes:
        name: what it is called.
        model: the model, as `load_model` takes it.
        model_hash: the hash of the model that the claims are about.
        claims: the claims.
        task: the task.
        circuit: the circuit.
        ablation: what everything outside the circuit carries, under which the claims are made.
        shift: see `discovery.score_edges`.
        roles: what the parts of the circuit do, in words.
        about: the story, in a few sentences.
        weights: the model's file of weights, if it has one.
        seed: of everything random.
        alpha: the chance of any wrong verdict in the file.
    """

    name: str
    model: str
    model_hash: str
    claims: tuple[Claim, ...]
    task: TaskSpec = field(default_factory=TaskSpec)
    circuit: CircuitSpec = field(default_factory=CircuitSpec)
    ablation: Ablation = "counterpart"
    shift: int = 0
    roles: Mapping[str, str] = field(default_factory=dict)
    about: str = ""
    weights: str = ""
    seed: int = 0
    alpha: float = ALPHA


def digest(facts: Any) -> str:
    """SHA-256 (hexadecimal) of facts, as JSON has them."""
    return hashlib.sha256(
        json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()
