"""Claim files: what is read, what is refused and in which words, and what is written."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from circuits.claims import TaskSpec, claims_schema, read_claims, write_claims
from circuits.claims.files import is_claim_file

SCHEMA = Path(__file__).parents[1] / "docs" / "schemas" / "claims.json"

GOOD: dict[str, Any] = {
    "circuits_claims": 1, "name": "a story", "model": "induction-by-hand", "model_hash": "ab" * 32,
    "task": {"examples": 20}, "circuit": {"edges": ["a -> b"]},
    "claims": [{"claim": "sufficient", "test": "faithfulness", "with": {"least": 0.8}}],
}  # fmt: skip


def written(folder: Path, raw: Any) -> Path:
    path = folder / "claims.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw), "utf-8")
    return path


def changed(**fields: Any) -> dict[str, Any]:
    return {**GOOD, **fields}


def claim(**fields: Any) -> dict[str, Any]:
    return changed(claims=[{"claim": "sufficient", "test": "faithfulness", **fields}])


def test_defaults_are_written_out(tmp_path: Path):
    file = read_claims(written(tmp_path, GOOD))
    assert dict(file.claims[0].settings) == {"least": 0.8, "most": 1.1, "directions": "both"}
    assert (file.claims[0].name, file.alpha, file.ablation) == (
        "sufficient: faithfulness",
        0.05,
        "counterpart",
    )
    write_claims(tmp_path / "again.yaml", file)
    assert read_claims(tmp_path / "again.yaml") == file
    jsonschema.validate(yaml.safe_load((tmp_path / "again.yaml").read_text()), claims_schema())
    assert is_claim_file(tmp_path / "again.yaml")
    assert not is_claim_file(SCHEMA)


WHOLE = TaskSpec(
    "classes", 40, 3, "mixed3b:1", "folder:x", "a text", "random", "labels.csv", "blurred", "folder:y", "cat", "dog", 5
)  # fmt: skip
"""A task in which nothing is as by default, whether or not it goes together."""


def test_a_task_is_kept_whole(tmp_path: Path):
    usual = TaskSpec()
    assert all(getattr(WHOLE, f.name) != getattr(usual, f.name) for f in fields(WHOLE))
    file = replace(read_claims(written(tmp_path, GOOD)), task=WHOLE)
    write_claims(tmp_path / "again.yaml", file)
    assert read_claims(tmp_path / "again.yaml").task == WHOLE
    jsonschema.validate(yaml.safe_load((tmp_path / "again.yaml").read_text()), claims_schema())
    assert TaskSpec("repeats").to_dict() == {"spec": "repeats", "examples": 200, "seed": 0}


def test_the_published_schema_is_the_codes():
    assert json.loads(SCHEMA.read_text()) == claims_schema()


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"

TWICE = changed(claims=[{**GOOD["claims"][0], "with": {}} for _ in range(2)])

BAD: list[tuple[Any, str]] = [
    ([1, 2], "the file [1, 2]: expected names with values"),
    (changed(circuits_claims=2), "circuits_claims 2: expected 1, the layout of the file"),
    (changed(circuits_claims=True), "circuits_claims True: expected 1"),
    (changed(model_hash=""), "model_hash is missing: expected a text"),
    (changed(modle="x"), "unknown field of the file: 'modle': did you mean model"),
    (changed(claims=[]), "claims []: expected a list of 1 to 500 claims"),
    (claim(claim="good"), "claims[1].claim 'good': expected one of sufficient, equivalent"),
    (claim(test=None), "claims[1] (sufficient) has no test that could refute it: expected test: faithfulness or"),
    (claim(test="knockout"), "claims[1].test 'knockout': expected faithfulness or accuracy"),
    (claim(**{"with": {"leest": 1}}), "setting of the test faithfulness in claims[1].with: 'leest': did you mean"),
    (claim(**{"with": {"least": 99}}), "claims[1].with.least 99: expected a number from -10 to 10"),
    (claim(**{"with": {"least": True}}), "claims[1].with.least True: expected a number from -10 to 10"),
    (claim(**{"with": {"least": float("nan")}}), "claims[1].with.least nan: expected a number from -10 to 10"),
    (claim(**{"with": {"least": 1.2}}), "claims[1].with: least 1.2 is above most 1.1"),
    (claim(**{"with": {"directions": "up"}}), "claims[1].with.directions 'up': expected one of both, noising"),
    (claim(expect="maybe"), "claims[1].expect 'maybe': expected holds or refuted"),
    (claim(expect="refuted"), "claims[1]: expect is refuted: say why the claim is here in `why`"),
    (TWICE, "two claims are called 'sufficient: faithfulness'"),
    (changed(circuit={}), "circuit: expected one of saved, file, edges, units; there is none of them"),
    (changed(circuit={"edges": ["a -> b"], "units": ["x"]}), "units; there is edges and units"),
    ({k: v for k, v in GOOD.items() if k != "circuit"}, "is about a circuit, and `circuit` is missing"),
    (changed(ablation="optimal"), "ablation 'optimal': expected one of counterpart, resample"),
    (changed(alpha=2), "alpha 2: expected a number from 1e-06 to 0.5"),
    (changed(seed=-1), "seed -1: expected a whole number from 0 to"),
    (changed(task={"examples": 1}), "task.examples 1: expected a whole number from 2"),
    (changed(task={"take": "given"}), "task.take 'given': expected one of spread, first, random"),
    (changed(task={"counterpart": "x"}), "task.counterpart 'x': expected one of another, blurred"),
    (changed(task={"counterpart": []}), "task.counterpart []: expected one of another, blurred"),
    (changed(task={"most_active": -1}), "task.most_active -1: expected a whole number from 0"),
    (changed(task={"one_class": 3}), "task.one_class 3: expected a text"),
    (changed(task={"clas": "x"}), "unknown field of task: 'clas'"),
    ("circuits_claims: 1\ncircuits_claims: 1\n", "line 2: 'circuits_claims' stands twice"),
    (BOMB, "line 1: anchors and aliases (& and *) are not taken: write it out"),
    ("a: !!python/object/apply:os.system [ls]\n", "tags such as"),
    ("a: !x b\n", "tags such as !x are not taken"),
    ("a: 1\n---\nb: 2\n", "2 documents: expected one"),
    ("1: 2\n", "line 1: key 1 is no text"),
    ("a: [" * 30, "nested more than 20 deep"),
    ("a: b: c", "is no YAML: line 1: mapping values are not allowed here"),
    ("\0", "is no YAML:"),
    ("", "0 documents: expected one"),
    ("x" * 2**21, "has more than 1048576 bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "said"), BAD, ids=range(len(BAD)))
def test_bad_files_are_refused_in_one_line(tmp_path: Path, raw: Any, said: str):
    path = written(tmp_path, raw)
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        read_claims(path)
    message = str(error.value)
    assert message.startswith(f"claim file {str(path)!r}")
    assert "\n" not in message


_NOT_IN_SCHEMA = ("least 1.2", "called", "refuted", "about a circuit", "nan")
"""What no JSON schema can say."""


def test_what_is_refused_the_schema_refuses():
    for raw, said in BAD:
        if isinstance(raw, dict) and not any(words in said for words in _NOT_IN_SCHEMA):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(raw, claims_schema())
