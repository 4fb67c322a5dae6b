"""Causal abstraction on networks whose algorithm is known: interventions, places, and what is refused."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from circuits.claims import TESTS, TaskSpec, read_claims, verify
from circuits.claims.abstraction.algorithms import (
    ALGORITHMS,
    Algorithm,
    addition_by_waves,
    load_algorithm,
)
from circuits.claims.abstraction.interchange import Interchange, exchanged
from circuits.claims.abstraction.pairs import Deck, Pair, asked
from circuits.claims.abstraction.places import Intervention, Mixing, Place
from circuits.claims.report import page
from circuits.claims.subject import Subject, load_claims_task
from circuits.claims.verdicts import Level, Measured
from circuits.cleanroom.addition import FREQUENCIES
from circuits.environment import TRUST_PYTHON
from circuits.models.zoo.loading import load_model
from circuits.workspace import Workspace

P = 113
SUMS = [
    f"wave {k} @ blocks.0.hook_resid_mid:{10 + 2 * i},{11 + 2 * i} @ -1"
    for i, k in enumerate(FREQUENCIES)
]
ANSWERS = [
    f"answer wave {k} @ blocks.0.hook_mlp_out:{20 + 2 * i},{21 + 2 * i} @ 2"
    for i, k in enumerate(FREQUENCIES)
]


def subject_of(name: str, examples: int) -> Subject:
    model = load_model(name)
    return Subject(model, load_claims_task(model, TaskSpec(examples=examples)))


@pytest.fixture(scope="module")
def addition() -> Subject:
    return subject_of("addition-by-hand", 160)


def measured(subject: Subject, test: str, **given: Any) -> Measured:
    made = TESTS[test].run(subject, TESTS[test].settings(given, test), Level(0.05, 1))
    assert Measured.from_dict(made.to_dict()).verdict(0.05) == made.verdict(0.05)
    return made


# --- algorithms --------------------------------------------------------------------------------------


def test_every_wave_of_a_source_together_gives_the_sources_answer():
    algorithm = Algorithm("waves", addition_by_waves)
    assert [algorithm.answer([a, b, P]) for a, b in ((3, 4), (100, 20), (0, 0))] == [7, 7, 0]
    given = {k: v for k, v in algorithm.variables([100, 5, P]).items() if k.startswith("wave")}
    assert len(given) == 5
    assert algorithm.answer([1, 1, P], given=given) == 105


def test_induction_counts_what_followed():
    algorithm = Algorithm("induction", ALGORITHMS["induction"])
    # 1 is followed by 2, 3 and 3; with the tokens before of another text, by what stands where 1 was before there.
    assert algorithm.answer([1, 2, 1, 3, 1, 3, 1]) == 3
    assert algorithm.answer([1, 2, 1, 3, 1, 3, 1], given={"previous": (0, 1, 0, 0, 0, 0, 0)}) == 2
    assert algorithm.variables([5, 6, 5])["copied"] == {5: 0.5, 6: 0.5}


def test_what_a_function_does_wrong_is_one_line():
    def bad(inputs: Any, let: Any) -> Any:
        let("a", 1)
        if inputs[0] == 0:
            let("a", 2)
        return "x" if inputs[0] == 1 else 1 // (inputs[0] - 2)

    algorithm = Algorithm("bad", bad)
    with pytest.raises(
        ValueError, match=r"algorithm 'bad': it raised ValueError: let\('a', …\): the variable was"
    ):
        algorithm.answer([0])
    with pytest.raises(ValueError, match="algorithm 'bad' returns 'x': expected a whole number"):
        algorithm.answer([1])
    with pytest.raises(
        ValueError, match=r"it raised ZeroDivisionError: .*test_claim_abstraction.py, line [0-9]+"
    ):
        algorithm.answer([2])
    with pytest.raises(KeyError, match="variable of algorithm 'bad' 'b'"):
        algorithm.answer([3], given={"b": 1})


def test_an_algorithm_in_a_file_runs_only_where_files_are_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "mine.py").write_text("def f(inputs, let):\n    return let('x', len(inputs))\n")
    monkeypatch.delenv(TRUST_PYTHON, raising=False)
    with pytest.raises(
        ValueError, match=r"a claim file names algorithm 'mine\.py:f', which would run its own code"
    ):
        load_algorithm("mine.py:f", tmp_path)
    monkeypatch.setenv(TRUST_PYTHON, "1")
    assert load_algorithm("mine.py:f", tmp_path).answer([4, 4]) == 2
    with pytest.raises(KeyError, match="'g'"):
        load_algorithm("mine.py:g", tmp_path)
    with pytest.raises(ImportError, match="there is no file"):
        load_algorithm("other.py:f", tmp_path)
    with pytest.raises(ValueError, match=r"expected FILE\.py:FUNCTION or one of addition"):
        load_algorithm("os:system", tmp_path)
    with pytest.raises(KeyError, match="did you mean addition"):
        load_algorithm("adition", tmp_path)


# --- places ------------------------------------------------------------------------------------------

BAD = [
    ("wave 3", "variable 'wave 3': expected VARIABLE @ SITE[:UNITS] [@ POSITION]"),
    ("a @ b:1 @ 2 @ 3", "place 'b:1 @ 2 @ 3': expected VARIABLE @"),
    ("a @ b:1; a @ b:2", "variable 'a' stands twice"),
    ("a @ b:x", "units 'b:x' are not of the form"),
]


@pytest.mark.parametrize(("text", "said"), BAD)
def test_a_bad_intervention_is_refused(text: str, said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        Intervention.parse(text)


def test_an_intervention_is_read_back_as_it_is_written():
    for text in (*SUMS, "; ".join(ANSWERS), "x @ y@1", "x @ y:3 @ subject"):
        assert Intervention.parse(str(Intervention.parse(text))) == Intervention.parse(text)
    assert Intervention.parse("x @ y@1").places["x"] == Place.parse("y@1")


def test_positions_count_from_either_end_or_are_a_span():
    spans = {"subject": (1, 3)}
    found = [Place.parse(f"s @ {at}").positions(5, spans, "t") for at in ("0", "-1", "subject")]
    assert found == [(0,), (4,), (1, 2)]
    with pytest.raises(ValueError, match="place s @ 5: 't' has 5 tokens"):
        Place.parse("s @ 5").positions(5, spans, "t")
    with pytest.raises(KeyError, match="span of 't' 'object'"):
        Place.parse("s @ object").positions(5, spans, "t")


def test_along_a_basis_only_its_part_is_taken_over(addition: Subject):
    site = addition.model.site("blocks.0.hook_resid_mid")
    value, other = torch.randn(2, 3, 43), torch.randn(2, 3, 43)
    basis = torch.tensor([[0.6], [0.8]])
    mixing = Mixing(site, torch.tensor([4, 7]), basis)
    made = mixing.mixed(
        value, other, torch.tensor([[0, 1], [1, 2], [1, 1]]), torch.tensor([[0, 0], [1, 0], [1, 2]])
    )
    expected = value.clone()
    # Rows may have different numbers of positions, as spans do.
    for row, at, source in ((0, 1, 0), (1, 2, 0), (1, 1, 2)):
        step = 0.6 * (other[row, source, 4] - value[row, at, 4]) + 0.8 * (
            other[row, source, 7] - value[row, at, 7]
        )
        expected[row, at, 4] += 0.6 * step
        expected[row, at, 7] += 0.8 * step
    torch.testing.assert_close(made, expected)


# --- interchange -------------------------------------------------------------------------------------


def test_no_example_is_in_pairs_of_two_clusters(addition: Subject):
    pairs = Deck(addition.test).deal(3)
    owner: dict[int, int] = {}
    for pair in pairs:
        for index in (pair.base.index, pair.source.index):
            assert owner.setdefault(index, pair.cluster) == pair.cluster
    assert len(pairs) == 2 * len({p.cluster for p in pairs}) == len(addition.test)
    for pair, other in zip(pairs, exchanged(pairs), strict=True):
        assert other is not None
        assert other.source.index not in (pair.base.index, pair.source.index)


def test_the_right_algorithm_is_right_on_every_pair(addition: Subject):
    texts = [*SUMS, "; ".join(SUMS), ANSWERS[0], "; ".join(ANSWERS)]
    made = measured(
        addition, "interchange", algorithm="addition-by-waves", variables=texts, least=0.5
    )
    assert [q.value for q in made.quantities] == [1.0] * 8
    assert made.verdict(0.05)[0] == "holds"
    assert made.notes[0].endswith("on 100.0% of the bases")
    assert all(q.null[0] < 0.5 for q in made.quantities)
    assert made.quantities[5].null[0] < 0.05


def test_a_place_that_does_not_hold_the_variable_is_refuted(addition: Subject):
    wrong = [
        "; ".join(SUMS).replace("hook_resid_mid", "hook_resid_post"),
        SUMS[0].replace("10-11", "12-13"),
    ]
    made = measured(addition, "interchange", algorithm="addition-by-waves", variables=wrong[:1])
    assert (made.quantities[0].value, made.verdict(0.05)[0]) == (0.0, "refuted")


def test_a_rival_is_as_right_as_it_agrees(
    addition: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(TRUST_PYTHON, "1")
    (tmp_path / "rival.py").write_text(
        "def f(inputs, let):\n    a, b, p = inputs\n    s = let('sum', (a + b) % p)\n"
        "    return s if s % 2 else (s + 1) % p\n"
    )
    own = replace(addition, folder=tmp_path)
    made = measured(
        own, "interchange", algorithm="addition", variables=["sum @ blocks.0.hook_mlp_out @ -1"], rival="rival.py:f",
        least=0.5,
    )  # fmt: skip
    found = re.search(
        r"accuracy of ([0-9.]+)% on these pairs, the algorithm 100.0%; .* alike on ([0-9.]+)%",
        made.notes[1],
    )
    assert found is not None
    assert found[1] == found[2]
    assert 25 < float(found[1]) < 75


def test_plain_hooks_count_the_same(addition: Subject):
    """The same by the model's own hooks: each pair alone, with the first choice of the changed run."""
    algorithm = load_algorithm("addition-by-waves")
    # A place that holds only half of the variable, so that the share is neither 0 nor 1.
    text = "; ".join([*SUMS[:4], "wave 52 @ blocks.0.hook_resid_mid:18 @ -1"])
    deck, intervention = Deck(addition.test), Intervention.parse(text)
    made = asked(deck, algorithm, intervention, deck.deal(0)).differing
    ours = Interchange(deck, tuple(intervention.places.values())).outcomes(
        made.pairs, made.counterfactual
    )
    module: Any = addition.model.module
    name, right = "blocks.0.hook_resid_mid", []
    for pair, answer in zip(made.pairs, made.counterfactual, strict=True):
        base, source = (torch.tensor([deck.inputs(e)]) for e in (pair.base, pair.source))
        kept: dict[str, Tensor] = {}

        def note(value: Tensor, hook: Any, kept: dict[str, Tensor] = kept) -> None:
            kept["value"] = value.clone()

        def put(value: Tensor, hook: Any, kept: dict[str, Tensor] = kept) -> Tensor:
            value = value.clone()
            value[:, -1, 10:19] = kept["value"][:, -1, 10:19]
            return value

        with torch.no_grad():
            module.run_with_hooks(source, fwd_hooks=[(name, note)])
            logits = module.run_with_hooks(base, fwd_hooks=[(name, put)])
        right.append(int(logits[0, -1].argmax()) == answer)
    assert 0 < np.mean(right) < 1
    assert abs(np.mean(right) - ours.mean()) < 1e-5


def test_texts_of_several_questions_are_cut(induction: Subject):
    deck = Deck(induction.test)
    pairs = deck.deal(0)
    assert len({p.base.stop for p in pairs}) > 3
    for pair in pairs:
        assert pair.base.stop == pair.source.stop
        assert pair.base.stop in (induction.test.questions[pair.base.index].positions or ())
    # `before` are units 128 to 191 of the stream; the tokens of the pattern's rounds are the base's own.
    texts = [
        "previous @ blocks.1.hook_resid_pre:128-191",
        "copied @ blocks.1.hook_resid_post:192-255 @ -1",
    ]
    algorithm = load_algorithm("induction")
    for intervention in map(Intervention.parse, texts):
        made = asked(deck, algorithm, intervention, pairs).differing
        # Where two tokens have followed equally often there is no one answer.
        clear = made.subset(
            [i for i, pair in enumerate(made.pairs) if _clear(deck, pair, intervention)]
        )
        one = Interchange(deck, tuple(intervention.places.values()))
        assert len(clear.pairs) > 15
        assert one.outcomes(clear.pairs, clear.counterfactual).tolist() == [1.0] * len(clear.pairs)


def _clear(deck: Deck, pair: Pair, intervention: Intervention) -> bool:
    base, source = (list(deck.inputs(e)) for e in (pair.base, pair.source))  # type: ignore[arg-type]
    own = base if "previous" in intervention.variables else source
    before = [source[0], *source[:-1]]
    counts = Counter([t for t, p in zip(own, before, strict=True) if p == own[-1]] or own)
    most = counts.most_common(2)
    return len(most) == 1 or most[0][1] > most[1][1]


@pytest.fixture(scope="module")
def induction() -> Subject:
    return subject_of("induction-by-hand", 80)


def test_a_span_of_embeddings_is_that_span_of_tokens(induction: Subject):
    """Interchange of embeddings is a run on the base with the source's tokens in the span."""
    test = induction.test
    spans = [{"words": (1 + i % 3, 3 + i % 3 + (i // 3) % 2)} for i in range(len(test))]
    questions = tuple(replace(q, spans=own) for q, own in zip(test.questions, spans, strict=True))
    deck = Deck(replace(test, questions=questions))
    intervention = Intervention.parse("previous @ hook_embed @ words")
    made = asked(deck, load_algorithm("induction"), intervention, deck.deal(0))
    sizes = [spans[p.base.index]["words"][1] - spans[p.base.index]["words"][0] for p in made.pairs]
    assert set(sizes) == {2, 3}
    answers = []
    for pair in made.pairs:
        tokens, source = (list(deck.inputs(e)) for e in (pair.base, pair.source))  # type: ignore[arg-type]
        own, theirs = (slice(*spans[e.index]["words"]) for e in (pair.base, pair.source))
        tokens[own] = source[theirs]
        answers.append(int(induction.model.run(torch.tensor([tokens])).output[0, -1].argmax()))
    found = Interchange(deck, tuple(intervention.places.values())).outcomes(made.pairs, answers)
    assert found.min() > 0  # 1, or 1/n where n first choices are tied
    assert (found == 1).mean() > 0.7


def test_too_few_pairs_are_not_tested(addition: Subject):
    few = replace(addition, task=addition.task.subset(range(6)))
    made = measured(
        few, "interchange", algorithm="addition", variables=["sum @ blocks.0.hook_mlp_out"]
    )
    assert made.verdict(0.05)[0] == "could not be tested"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"variables": ["sum @ blocks.7.x"]}, "unknown site"),
        ({"variables": ["sum @ blocks.0.hook_mlp_out:99"]}, "has units 0 to 42"),
        ({"variables": ["total @ blocks.0.hook_mlp_out"]}, "variable of algorithm 'addition' 'total'"),
        ({"variables": ["sum @ blocks.0.attn.hook_pattern @ 1"]}, "has no positions of a text"),
        ({"variables": ["sum @ blocks.0.hook_mlp_out @ 7"]}, "has 3 tokens"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(addition: Subject, given: dict[str, Any], said: str):
    with pytest.raises((KeyError, ValueError), match=re.escape(said)):
        measured(addition, "interchange", algorithm="addition", **given)


def test_the_class_of_an_image_is_a_variable_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(TRUST_PYTHON, "1")
    (tmp_path / "image.py").write_text("def f(inputs, let):\n    return let('class', inputs)\n")
    shapes = replace(subject_of("shapes", 60), folder=tmp_path)
    made = measured(
        shapes, "interchange", algorithm="image.py:f", variables=["class @ avgpool"], least=0.5
    )
    # All later layers read the place, so that the model is as right about the source as it is about the source alone.
    deck, found = Deck(shapes.test), made.quantities[0]
    pairs = [p for p in deck.deal(0) if deck.inputs(p.base) != deck.inputs(p.source)]
    images = torch.stack([shapes.test.examples.batch([p.source.index]).inputs[0] for p in pairs])
    first = shapes.model.run(images).output.argmax(1).tolist()
    assert found.n == len(pairs)
    right = [f == deck.inputs(p.source) for f, p in zip(first, pairs, strict=True)]
    assert abs(np.mean(right) - found.value) < 1e-6
    with pytest.raises(ValueError, match="has no positions of a text"):
        measured(shapes, "interchange", algorithm="image.py:f", variables=["class @ avgpool @ 0"])


def test_a_file_of_such_claims_is_verified(addition: Subject, tmp_path: Path):
    (tmp_path / "claims.yaml").write_text(
        f"""
circuits_claims: 1
name: addition
model: addition-by-hand
model_hash: {addition.model.hash}
task: {{examples: 160}}
claims:
  - claim: algorithm
    test: interchange
    with: {{algorithm: addition, variables: [sum @ blocks.0.hook_mlp_out @ -1], least: 0.8}}
  - {{claim: algorithm, test: specification, with: {{algorithm: addition, tokens: ["1-3", "0-112", "113"]}}}}
"""
    )
    file = read_claims(tmp_path / "claims.yaml")
    report = verify(file, Workspace(tmp_path / "place"), folder=tmp_path, model=addition.model)
    assert [j.verdict for j in report.judged] == ["holds", "holds"]
    assert report.exit_code == 0
    assert "proved on all 339 inputs, not sampled" in page(report)
