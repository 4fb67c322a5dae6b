"""Claim files: YAML, with the JSON schema `docs/schemas/claims.json`.

Only plain YAML is taken: no tags (which can make objects), no anchors and aliases (of which a few lines can stand for
gigabytes), no key twice, one document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import yaml

from circuits.checks import clipped
from circuits.claims.catalogue import KINDS, TESTS
from circuits.claims.claim import CircuitSpec, Claim, ClaimFile
from circuits.claims.parts import ABLATIONS
from circuits.claims.verdicts import ALPHA, Expected
from circuits.examples import How
from circuits.files import replacing
from circuits.json_files import read_text
from circuits.tasks.images import Kind
from circuits.tasks.spec import TaskSpec
from circuits.units import unknown

LAYOUT = 1
"""Version of the file's layout."""

_MOST_BYTES = 2**20
_MOST_DEPTH = 20
_MOST_CLAIMS = 500


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ValueError(
                    f"line {key_node.start_mark.line + 1}: key {clipped(repr(key))} is no text"
                )
            if key in found:
                raise ValueError(
                    f"line {key_node.start_mark.line + 1}: {clipped(repr(key))} stands twice"
                )
            found[key] = self.construct_object(value_node, deep=True)
        return found


def _constructed(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _constructed)


def parse_yaml(text: str, what: str) -> Any:
    """Plain YAML.

    Raises:
        ValueError: if it is none, or holds a tag, an anchor, an alias, a key twice or several documents.
    """
    if len(text.encode()) > _MOST_BYTES:
        raise ValueError(f"{what} has more than {_MOST_BYTES} bytes")
    try:
        depth, documents = 0, 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise ValueError(
                    f"line {line}: anchors and aliases (& and *) are not taken: write it out"
                )
            if getattr(event, "tag", None):
                raise ValueError(
                    f"line {line}: tags such as {clipped(str(event.tag))} are not taken"
                )
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            documents += isinstance(event, yaml.DocumentStartEvent)
            if depth > _MOST_DEPTH:
                raise ValueError(f"line {line}: nested more than {_MOST_DEPTH} deep")
        if documents != 1:
            raise ValueError(f"{documents} documents: expected one")
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{what} is no YAML: {place}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{what} is no YAML: {clipped(str(error).splitlines()[0], 120)}") from None
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


# --- from YAML ---------------------------------------------------------------------------------------


def read_claims(path: str | Path) -> ClaimFile:
    """Read a claim file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not of the form that the schema says; one line that names the place, the value and what
            would have been valid.
    """
    path = Path(path)
    what = f"claim file {str(path)!r}"
    return from_yaml(parse_yaml(read_text(path, what), what), what)


def from_yaml(raw: Any, what: str) -> ClaimFile:
    """A claim file from what YAML or JSON holds; see `read_claims`."""
    try:
        return _file(raw)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def _file(raw: Any) -> ClaimFile:
    own = _mapping(raw, "the file", (*_TEXTS, *_OTHERS))
    layout = own.get("circuits_claims")
    if isinstance(layout, bool) or layout != LAYOUT:
        raise ValueError(
            f"circuits_claims {clipped(repr(layout))}: expected {LAYOUT}, the layout of the file"
        )
    listed = own.get("claims")
    if not isinstance(listed, list) or not 1 <= len(listed) <= _MOST_CLAIMS:
        raise ValueError(
            f"claims {clipped(repr(listed))}: expected a list of 1 to {_MOST_CLAIMS} claims"
        )
    texts = {name: _text(own.get(name, ""), name) for name in _TEXTS}
    for name in ("name", "model", "model_hash"):
        if not texts[name]:
            raise ValueError(f"{name} is missing: expected a text")
    claims = tuple(_claim(c, f"claims[{i}]") for i, c in enumerate(listed, 1))
    names = [claim.name for claim in claims]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise ValueError(f"two claims are called {twice!r}: give each its own name")
    circuit = _circuit(own["circuit"], "circuit") if "circuit" in own else CircuitSpec()
    lacking = next(
        (c for c in claims if TESTS[c.test].circuit and not (c.circuit or circuit).given), None
    )
    if lacking is not None:
        raise ValueError(
            f"claim {lacking.name!r}: the test {lacking.test} is about a circuit, and `circuit` is missing"
        )
    ablation = own.get("ablation", "counterpart")
    if ablation not in ABLATIONS:
        raise ValueError(
            f"ablation {clipped(repr(ablation))}: expected one of {', '.join(ABLATIONS)}"
        )
    roles = _mapping(own.get("roles", {}), "roles")
    return ClaimFile(
        claims=claims, task=task_from_yaml(own.get("task")), circuit=circuit, ablation=ablation,
        shift=_number(own.get("shift", 0), "shift", -(2**31), 2**31, whole=True),
        roles={part: _text(role, f"roles.{part}") for part, role in roles.items()},
        seed=_number(own.get("seed", 0), "seed", 0, 2**32 - 1, whole=True),
        alpha=_number(own.get("alpha", ALPHA), "alpha", 1e-6, 0.5), **texts,
    )  # fmt: skip


_TEXTS = ("name", "model", "model_hash", "about", "weights")
_OTHERS = (
    "circuits_claims",
    "claims",
    "task",
    "circuit",
    "ablation",
    "shift",
    "roles",
    "seed",
    "alpha",
)


def _claim(raw: Any, where: str) -> Claim:
    own = _mapping(
        raw, where, ("name", "claim", "test", "with", "statement", "expect", "why", "circuit")
    )
    kind, name = own.get("claim"), own.get("test")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{where}.claim {clipped(repr(kind))}: expected one of {', '.join(KINDS)}")
    if name is None:
        raise ValueError(
            f"{where} ({kind}) has no test that could refute it: expected test: {' or '.join(KINDS[kind])}"
        )
    if not isinstance(name, str) or name not in KINDS[kind]:
        raise ValueError(
            f"{where}.test {clipped(repr(name))}: expected {' or '.join(KINDS[kind])} for a claim {kind}"
        )
    settings = TESTS[name].settings(_mapping(own.get("with", {}), f"{where}.with"), f"{where}.with")
    low, high = settings.get("least"), settings.get("most")
    if low is not None and high is not None and low > high:
        raise ValueError(f"{where}.with: least {low:g} is above most {high:g}")
    expect = own.get("expect", "holds")
    if expect not in get_args(Expected):
        raise ValueError(f"{where}.expect {clipped(repr(expect))}: expected holds or refuted")
    texts = {t: _text(own.get(t, ""), f"{where}.{t}") for t in ("name", "statement", "why")}
    if expect == "refuted" and not texts["why"]:
        raise ValueError(f"{where}: expect is refuted: say why the claim is here in `why`")
    texts["name"] = texts["name"] or f"{kind}: {name}"
    circuit = _circuit(own["circuit"], f"{where}.circuit") if "circuit" in own else None
    return Claim(kind=kind, test=name, settings=settings, expect=expect, circuit=circuit, **texts)


_TASK_TEXTS = (
    "spec", "metric", "data", "text", "labels", "counterparts", "one_class", "other_class",
)  # fmt: skip
_TAKES = tuple(way for way in get_args(How) if way != "given")


def task_from_yaml(raw: Any, where: str = "task") -> TaskSpec:
    """How a task is made, from what YAML or JSON holds: its name, or all that `TaskSpec.to_dict` gives.

    Args:
        raw: what it holds; None for the model's own task.
        where: what holds it, for messages.

    Raises:
        ValueError: if it is not of that form.
    """
    if raw is None or isinstance(raw, str):
        return TaskSpec(raw or "")
    own = _mapping(raw, where, tuple(f.name for f in fields(TaskSpec)))
    texts = {name: _text(own.get(name, ""), f"{where}.{name}") for name in _TASK_TEXTS}
    kind = own.get("counterpart")
    return TaskSpec(
        examples=_number(own.get("examples", 200), f"{where}.examples", 2, 10**6, whole=True),
        seed=_number(own.get("seed", 0), f"{where}.seed", 0, 2**32 - 1, whole=True),
        take=_choice(own.get("take", "spread"), f"{where}.take", _TAKES),
        counterpart=None if kind is None else _choice(kind, f"{where}.counterpart", get_args(Kind)),
        most_active=_number(own.get("most_active", 0), f"{where}.most_active", 0, 10**6, whole=True), **texts,
    )  # fmt: skip


def _choice(raw: Any, where: str, known: Sequence[str]) -> Any:
    if raw not in known:
        raise ValueError(f"{where} {clipped(repr(raw))}: expected one of {', '.join(known)}")
    return raw


_WAYS = ("saved", "file", "edges", "units")


def _circuit(raw: Any, where: str) -> CircuitSpec:
    own = _mapping(raw, where, tuple(f.name for f in fields(CircuitSpec)))
    given = [way for way in _WAYS if way in own]
    if len(given) != 1:
        said = " and ".join(given) or "none of them"
        raise ValueError(f"{where}: expected one of {', '.join(_WAYS)}; there is {said}")
    made = CircuitSpec(
        saved=_text(own.get("saved", ""), f"{where}.saved"), file=_text(own.get("file", ""), f"{where}.file"),
        edges=_texts(own.get("edges", []), f"{where}.edges"), units=_texts(own.get("units", []), f"{where}.units"),
        sites=_texts(own.get("sites", []), f"{where}.sites"), graph=_mapping(own.get("graph", {}), f"{where}.graph"),
    )  # fmt: skip
    if not made.given:
        raise ValueError(f"{where}.{given[0]} is empty")
    if made.sites and not made.units:
        raise ValueError(f"{where}.sites belongs to a circuit of units")
    if made.graph and not (made.edges or made.file):
        raise ValueError(f"{where}.graph belongs to a circuit of edges, or of a file of edges")
    return made


def _mapping(raw: Any, where: str, known: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ValueError(f"{where} {clipped(repr(raw))}: expected names with values")
    for name in raw:
        if not isinstance(name, str):
            raise ValueError(f"{where}: name {clipped(repr(name))} is no text")
        if known and name not in known:
            raise ValueError(unknown(f"field of {where}:", clipped(name), known).args[0])
    return raw


def _text(raw: Any, where: str) -> str:
    if not isinstance(raw, str):
        raise ValueError(f"{where} {clipped(repr(raw))}: expected a text")
    return raw.strip()


def _texts(raw: Any, where: str) -> tuple[str, ...]:
    listed = [raw] if isinstance(raw, str) else raw
    if not isinstance(listed, list):
        raise ValueError(f"{where} {clipped(repr(raw))}: expected a list of texts")
    return tuple(_text(item, f"{where}[{i}]") for i, item in enumerate(listed, 1))


def _number(raw: Any, where: str, low: float, high: float, whole: bool = False) -> Any:
    number = isinstance(raw, int | float) and not isinstance(raw, bool)
    if not number or not low <= raw <= high or (whole and raw != int(raw)):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{where} {clipped(repr(raw))}: expected {kind} from {low:g} to {high:g}")
    return int(raw) if whole else float(raw)


# --- to YAML -----------------------------------------------------------------------------------------


def to_yaml(file: ClaimFile) -> dict[str, Any]:
    """A claim file as YAML holds it, every setting written out."""
    made: dict[str, Any] = {"circuits_claims": LAYOUT}
    made |= {name: getattr(file, name) for name in _TEXTS if getattr(file, name)}
    made["task"] = file.task.to_dict()
    if file.circuit.given:
        made["circuit"] = _given(file.circuit)
        made["ablation"] = file.ablation
    made |= {"shift": file.shift} if file.shift else {}
    made |= {"roles": dict(file.roles)} if file.roles else {}
    made |= {"seed": file.seed, "alpha": file.alpha}
    made["claims"] = [_as_yaml(claim) for claim in file.claims]
    return made


def _given(spec: CircuitSpec) -> dict[str, Any]:
    found = {f.name: getattr(spec, f.name) for f in fields(spec)}
    return {name: _plain(value) for name, value in found.items() if value or value == 0}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _as_yaml(claim: Claim) -> dict[str, Any]:
    made: dict[str, Any] = {"name": claim.name, "claim": claim.kind}
    made |= {"statement": claim.statement} if claim.statement else {}
    made |= {} if claim.circuit is None else {"circuit": _given(claim.circuit)}
    made |= {"test": claim.test, "with": _plain(claim.settings), "expect": claim.expect}
    return made | ({"why": claim.why} if claim.why else {})


def write_claims(path: str | Path, file: ClaimFile) -> None:
    """Write a claim file; a file that is there is replaced."""
    text = yaml.safe_dump(to_yaml(file), sort_keys=False, allow_unicode=True, width=110)
    from_yaml(parse_yaml(text, "the claims"), "the claims")
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, "utf-8")


# --- the schema --------------------------------------------------------------------------------------


def claims_schema() -> dict[str, Any]:
    """The JSON schema of claim files."""
    text, some = {"type": "string"}, {"type": "string", "minLength": 1}
    seed = _whole(0, 2**32 - 1)
    task = {
        **dict.fromkeys(_TASK_TEXTS, text), "examples": _whole(2, 10**6), "seed": seed, "take": {"enum": list(_TAKES)},
        "counterpart": {"enum": list(get_args(Kind))}, "most_active": _whole(0, 10**6),
    }  # fmt: skip
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Claims about a model, with the tests that could refute them, as `circuits verify` reads them",
        "type": "object",
        "required": ["circuits_claims", "name", "model", "model_hash", "claims"],
        "additionalProperties": False,
        "properties": {
            "circuits_claims": {"const": LAYOUT}, "name": some, "model": some, "model_hash": some, "about": text,
            "weights": text, "task": {"anyOf": [text, _object(task)]},
            "circuit": _circuit_schema(),
            "ablation": {"enum": list(ABLATIONS)}, "shift": _whole(-(2**31), 2**31), "seed": seed,
            "alpha": {"type": "number", "minimum": 1e-6, "maximum": 0.5},
            "roles": {"type": "object", "additionalProperties": text},
            "claims": {
                "type": "array", "minItems": 1, "maxItems": _MOST_CLAIMS,
                "items": {"oneOf": [_claim_schema(name) for name in TESTS]},
            },
        },
    }  # fmt: skip


def _whole(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object", "additionalProperties": False, "properties": properties, "required": list(required),
    }  # fmt: skip


def _circuit_schema() -> dict[str, Any]:
    text, some = {"type": "string"}, {"type": "string", "minLength": 1}
    texts = {"anyOf": [text, {"type": "array", "items": text}]}
    circuit = {
        "saved": some, "file": some, "edges": texts, "units": texts, "sites": texts, "graph": {"type": "object"},
    }  # fmt: skip
    return _object(circuit) | {"oneOf": [{"required": [way]} for way in _WAYS]}


def _claim_schema(name: str) -> dict[str, Any]:
    test, text = TESTS[name], {"type": "string"}
    needed = [p.name for p in test.parameters if p.default is None]
    with_ = _object({p.name: p.schema() for p in test.parameters}, *needed)
    return _object({
        "name": text, "claim": {"enum": list(test.kinds)}, "test": {"const": name, "description": test.about},
        "with": with_, "circuit": _circuit_schema(), "statement": text, "why": text,
        "expect": {"enum": list(get_args(Expected))},
    }, "claim", "test", *(["with"] if needed else []))  # fmt: skip


def is_claim_file(path: Path) -> bool:
    """Whether a YAML file says that it is a claim file; its form is not checked."""
    try:
        with path.open(encoding="utf-8") as file:
            return any(
                line.startswith("circuits_claims:")
                for _, line in zip(range(200), file, strict=False)
            )
    except (OSError, UnicodeDecodeError):
        return False
