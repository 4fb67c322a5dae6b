"""Items of tasks: templates, token tasks, pairs of images, task files and tables."""

from __future__ import annotations

import csv
import itertools
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import networkx as nx
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from circuits.models.adapter.inputs import TokenInput
from circuits.models.adapter.tokenizing import by_words
from circuits.models.zoo.loading import load_model
from circuits.stimuli.drawing import curves
from circuits.stimuli.repeats import BOS, draw_repeats
from circuits.stimuli.shapes import CLASSES
from circuits.tasks.builtin import load_task
from circuits.tasks.files import Header, read_items, write_items
from circuits.tasks.generated import Generated, check_choice
from circuits.tasks.generators import GENERATORS, addition, balanced_sequence, brackets, repeats
from circuits.tasks.images import (
    IMAGE_PAIRS,
    ImagePairs,
    blurred,
    curve_pairs,
    grey,
    pairs_of,
    shape_pairs,
    turned,
    with_patch,
)
from circuits.tasks.items import Item
from circuits.tasks.schema import HEADER, ITEM, task_schema
from circuits.tasks.tables import read_table
from circuits.tasks.task import Task
from circuits.tasks.templates import (
    TEMPLATES,
    capital_country,
    docstring,
    gendered_pronouns,
    greater_than,
    indirect_object,
    indirect_objects,
    subject_verb_agreement,
    words,
)
from circuits.tasks.templates.words import CAPITALS, FEMALE_NAMES, MALE_NAMES, NAMES

Encode = Callable[[str], list[int]]


# --- tokenizers --------------------------------------------------------------------------------


def by_pattern(pattern: str) -> Encode:
    """Every match of a pattern is a token."""
    known: dict[str, int] = {}

    def encode(text: str) -> list[int]:
        pieces = re.findall(pattern, text, re.DOTALL)
        assert "".join(pieces) == text
        return [known.setdefault(piece, len(known)) for piece in pieces]

    return encode


WORDS = r" ?[A-Za-z]+|"
REST = r"|."


def by_word() -> Encode:
    """A word with the space in front of it is a token, and so is a number of any length."""
    return by_pattern(WORDS + r" ?\d+" + REST)


def by_digit() -> Encode:
    """Digits are tokens, and none has a space."""
    return by_pattern(WORDS + r"\d" + REST)


def by_two_digits() -> Encode:
    """As in GPT-2: centuries and years are tokens, but a century's first year is a token as a whole."""
    return by_pattern(WORDS + r" \d\d00| ?\d\d" + REST)


def by_pairs_of_bytes() -> Encode:
    """A byte-level BPE that has seen half of the names, so that it splits the others."""
    seen = [
        *FEMALE_NAMES[::2],
        *MALE_NAMES[::2],
        *words.PARAMETERS[::2],
        *(c for _, c in CAPITALS[::2]),
    ]
    common = (
        "she he is are was were has have gave it to because the city of when capital The :param"
    )
    corpus = [
        f"{w} {w}" for w in (*seen, *common.split(), *(p for pair in words.PEOPLE for p in pair))
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)  # type: ignore[call-arg]
    tokenizer.train_from_iterator(corpus * 3, trainer)
    return lambda text: tokenizer.encode(text).ids


TOKENIZERS = {f.__name__: f for f in (by_word, by_digit, by_two_digits, by_pairs_of_bytes)}
REFUSED = {("greater-than", "by_word")}
"""Tokenizers that take no item of a template: with numbers as tokens there is no next digit."""

TAKEN = [pair for pair in itertools.product(TEMPLATES, TOKENIZERS) if pair not in REFUSED]


# --- what holds of every template --------------------------------------------------------------


@pytest.mark.parametrize(("name", "tokenizer"), TAKEN)
def test_pairs_have_equal_length_and_answers_are_one_token_behind_the_text(
    name: str, tokenizer: str
) -> None:
    encode = TOKENIZERS[tokenizer]()
    made = TEMPLATES[name](40, 0, encode)
    assert len(made) == 40
    for item in made.items:
        assert isinstance(item.clean, str)
        assert isinstance(item.corrupted, str)
        assert item.corrupted != item.clean
        clean = encode(item.clean)
        assert len(encode(item.corrupted)) == len(clean)
        ids = []
        for word in (*item.answers, *item.against):
            whole = encode(item.clean + word) if isinstance(word, str) else [*clean, *word]
            assert whole[: len(clean)] == clean
            assert len(whole) == len(clean) + 1
            ids.append(whole[-1])
        assert len(set(ids)) == len(ids), "no answer is also what it is against"
        assert item.answers
        assert item.against


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_halves_of_a_split_can_be_the_pools_of_words(name: str) -> None:
    made = TEMPLATES[name](120, 0)
    ties: nx.Graph = nx.Graph()
    for i, item in enumerate(made.items):
        ties.add_edges_from((i, key) for key in (f"group {item.group}", *item.fillers))
    sizes = [sum(isinstance(n, int) for n in part) for part in nx.connected_components(ties)]
    assert max(sizes) <= 72, "no word and no template instance ties the halves together"
    for item in made.items:
        for text in (item.clean, item.corrupted):
            words = set(re.findall(r"[A-Za-z]+", str(text)))
            said = words & ({*NAMES} | {w for pair in CAPITALS for w in pair})
            assert said <= set(item.fillers), "all names of both texts are accounted for"


@pytest.mark.parametrize("name", [*TEMPLATES, "addition", "brackets"])
def test_a_seed_gives_the_same_items_and_another_seed_others(name: str) -> None:
    make = EVERY[name]
    first, again, other = (make(30, seed) for seed in (3, 3, 4))
    assert first == again
    assert first.items != other.items
    assert len({(i.clean, i.corrupted) for i in first.items}) == 30, "none is there twice"
    assert make(10, 3).items == first.items[:10], "asking for more changes none of the first ones"


EVERY: dict[str, Callable[..., Generated]] = {**TEMPLATES, **GENERATORS}


@pytest.mark.parametrize("name", EVERY)
def test_no_items_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="n 0 must be at least 1"):
        EVERY[name](0)


def test_no_text_starts_with_a_name_or_has_one_behind_a_quote() -> None:
    for name in TEMPLATES:
        for item in TEMPLATES[name](60, 1).items:
            for text in (item.clean, item.corrupted):
                assert not str(text).startswith(NAMES)
                assert not re.search(rf"[\"'“‘(]({'|'.join(NAMES)})", str(text))


def test_there_are_enough_words_and_no_two_lists_of_a_template_share_one() -> None:
    assert len(NAMES) >= 60
    assert len(indirect_objects.SENTENCES) >= 15
    assert len(CAPITALS) >= 40
    for lists in (
        (NAMES, words.PLACES, words.THINGS),
        (words.PARAMETERS, words.FUNCTIONS, words.DESCRIPTIONS),
        ([c for c, _ in CAPITALS], [c for _, c in CAPITALS]),
        ([w for p in words.PEOPLE for w in p], [w for p in words.OBJECTS for w in p]),
        (words.PERIODS,),
    ):
        every = list(itertools.chain(*lists))
        assert len(set(every)) == len(every)
    assert not [w for w in words.THINGS if w[0] in "aeiou"], "texts have `a`"


def test_what_is_left_out_is_accounted_for_in_full() -> None:
    encode = by_pairs_of_bytes()
    single = {name for name in NAMES if len(encode(f"to {name}")) == len(encode("to")) + 1}
    made = indirect_object(60, 0, encode)
    left = made.left_out["names that are not one token"]
    assert set(left) == set(NAMES) - single
    assert 10 < len(left) < len(NAMES) - 10
    assert {w for item in made.items for w in item.fillers if w in NAMES} <= single
    assert made.left_out_text().startswith(f"{len(left)} names that are not one token ('")
    assert indirect_object(60, 0, None).left_out_text() == ""


def test_texts_with_a_word_that_a_vocabulary_lacks_are_left_out() -> None:
    texts = indirect_object(600, 0, corruption="swap").items
    known = {w for item in texts for w in f"{item.clean} {item.corrupted}".split()} - {"Although"}
    made = indirect_object(60, 0, by_words(sorted(known | set(NAMES))), corruption="swap")
    assert len(made) == 60
    left = made.left_out["texts that the tokenizer cannot encode"]
    assert left
    assert all("Although" in text or set(text.split()) - known for text in left)
    assert not any("Although" in str(item.clean) for item in made.items)


def test_fewer_items_than_asked_for_are_said() -> None:
    made = brackets(100, pairs=2)
    # (()) and ()(), in each of which one of four brackets can be turned round; both forms of each
    assert len(made) == 2 * 4 * 2
    assert made.left_out_text() == "84 of 100 items, as no more can be drawn"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: greater_than(5, 0, by_word()), "no single token for one or two digits of a year"),
        (lambda: greater_than(5, 0, by_digit(), digits="two"), "no single token for two digits of a year"),
        (lambda: greater_than(5, 0, by_word(), digits="one"), "no single token for one digit of a year"),
        (lambda: check_choice("corruption", "x", ("abc", "swap")), "corruption 'x': expected one of abc, swap"),
        (lambda: repeats(5, n_vocab=2), "n_vocab 2 must be at least 3"),
        (lambda: repeats(5, length=9), "do not fit sequences of 9 tokens"),
        (lambda: addition(12770), "n 12770: expected p of at least 3, and n of at most p squared"),
        (lambda: brackets(5, pairs=0), "pairs 0 must be at least 1"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(make: Callable[[], object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as raised:
        make()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["indirect-object", "docstring", "capitals"])
def test_a_tokenizer_of_characters_is_refused_with_what_was_left_out(name: str) -> None:
    with pytest.raises(
        ValueError, match=r"tokenizer leaves 0 .*left out|; \d+ \w+ that are not one token"
    ):
        TEMPLATES[name](5, 0, by_pattern("."))


# --- indirect objects --------------------------------------------------------------------------


def names_in(text: object) -> list[str]:
    return [word for word in re.findall(r"[A-Za-z]+", str(text)) if word in NAMES]


def without_names(text: object) -> str:
    return re.sub("|".join(NAMES), "_", str(text))


@pytest.mark.parametrize("order", ["ABBA", "BABA"])
def test_the_counterparts_of_indirect_objects(order: Any) -> None:
    for kind in ("abc", "third_name", "swap", "flip", "random_names"):
        for item in indirect_object(30, 0, templates=order, corruption=kind).items:
            first, second, giver = names_in(item.clean)
            io, s = (first, second) if order == "ABBA" else (second, first)
            assert (giver, item.template) == (s, order)
            assert (item.answers, item.against) == ((f" {io}",), (f" {s}",))
            assert without_names(item.clean) == without_names(item.corrupted)
            x, y, z = names_in(item.corrupted)
            if kind == "abc":
                assert len({x, y, z, io, s}) == 5
            elif kind == "third_name":
                assert (x, y) == (first, second)
                assert z not in (io, s)
            elif kind == "swap":
                assert (x, y, z) == (first, second, io)
            elif kind == "flip":
                assert (x, y, z) == (second, first, s)
            else:
                assert len({x, y, io, s}) == 4
                assert z == (y if order == "ABBA" else x)
            said = {name: str(item.clean)[slice(*span)] for name, span in item.spans.items()}
            assert (said["io"], said["s1"], said["s2"]) == (io, s, s)
            assert item.spans["s2"] > item.spans["s1"]
            assert {said["place"], said["thing"]} <= set(item.fillers)


def test_each_name_has_each_role_equally_often_in_both_orders() -> None:
    rounds, in_a_pool = 3, len(NAMES) // 2
    made = indirect_object(2 * 2 * rounds * in_a_pool, 0, corruption="abc")
    for order in ("ABBA", "BABA"):
        items = [item for item in made.items if item.template == order]
        roles = [
            Counter(column) for column in zip(*(item.fillers[:5] for item in items), strict=True)
        ]
        assert all(role == dict.fromkeys(NAMES, rounds) for role in roles)
        assert all(item.fillers[0] == item.answers[0].strip() for item in items)  # type: ignore[union-attr]
    # both orders of a template instance are one group
    groups = Counter(item.group for item in made.items)
    assert set(groups.values()) == {2}
    uneven = indirect_object(101, 0)
    spread = Counter(item.answers for item in uneven.items)
    assert max(spread.values()) - min(spread.values()) <= 2


def by_words_with_a_space() -> Encode:
    """As in SmolLM2: a word is one token only with the space in front of it; else, as after a quote, it is letters."""
    return by_pattern(r" [A-Za-z]+|^[A-Z][a-z]+(?= )|\d" + REST)


@pytest.mark.parametrize("kind", ["abc", "third_name", "swap", "flip", "random_names"])
def test_names_are_single_tokens_of_the_same_places_in_both_texts(kind: Any) -> None:
    """Where a name is one token only behind a space, no sentence may start with one or put one after a quote."""
    encode = by_words_with_a_space()
    made = indirect_object(64, 0, encode, corruption=kind)
    assert len(made) == 64
    token = {encode(f"of {name}")[-1] for name in NAMES}
    for item in made.items:
        clean, other = (encode(str(text)) for text in (item.clean, item.corrupted))
        places = [[t in token for t in tokens] for tokens in (clean, other)]
        assert places[0] == places[1]
        assert sum(places[0]) == 3


# --- years -------------------------------------------------------------------------------------


def test_the_years_that_come_after_another() -> None:
    for item in greater_than(60, 0).items:
        noun, year, end = re.fullmatch(
            r"The (\w+) lasted from the year (\d{4}) to the year (\d\d)", str(item.clean)
        ).groups()  # type: ignore[union-attr]
        assert year[:2] == end
        assert item.corrupted == str(item.clean).replace(year, f"{end}01")
        assert item.answers == tuple(f"{y:02d}" for y in range(100) if y > int(year[2:]))
        assert item.against == tuple(f"{y:02d}" for y in range(100) if y <= int(year[2:]))
        assert item.fillers == (noun,)
        assert str(item.clean)[slice(*item.spans["year"])] == year[2:]


def test_a_century_whose_first_year_is_one_token_has_its_answers_as_tokens() -> None:
    encode = by_two_digits()
    token = {f"{y:02d}": (encode(f"{y:02d}")[0],) for y in range(100)}
    made = greater_than(60, 0, encode)
    for item in made.items:
        year = int(re.findall(r"\d{4}", str(item.clean))[0][2:])
        assert item.answers == tuple(token[f"{y:02d}"] for y in range(year + 1, 100))
        assert item.against == tuple(token[f"{y:02d}"] for y in range(year + 1))
        assert (encode(str(item.clean))[-5],) == token[f"{year:02d}"], (
            "the year is a token of its own"
        )
    assert made.left_out_text() == ""
    # where 1701 to 1749 are joined, these years cannot be named, and 1701 is no counterpart
    joined = by_pattern(WORDS + r" 17[0-4]\d| ?\d\d" + REST)
    centuries = {
        re.findall(r"\d{4}", str(i.clean))[0][:2] for i in greater_than(60, 0, joined).items
    }
    assert centuries == {"11", "12", "13", "14", "15", "16"}


def test_single_digits_are_asked_for_one_by_one() -> None:
    for item in greater_than(60, 0, by_digit()).items:
        year = re.findall(r"\d{4}", str(item.clean))[0]
        decade = int(year[2])
        assert item.answers == tuple(str(d) for d in range(decade + 1, 10))
        assert item.against == tuple(str(d) for d in range(decade))
        assert item.template == "next digit"
        assert f"{year[:2]}01 to" in str(item.corrupted)


def test_the_next_digit_leaves_out_the_equal_one_and_the_counterpart_is_decade_0() -> None:
    made = greater_than(60, 0, by_digit())
    for item in made.items:
        year = str(item.clean)[slice(*item.spans["year"])]
        assert str(item.corrupted)[slice(*item.spans["year"])] == "01"
        assert {int(str(d)) for d in item.answers} == {*range(int(year[0]) + 1, 10)}
        assert {int(str(d)) for d in item.against} == {*range(int(year[0]))}


# --- docstrings --------------------------------------------------------------------------------


def parsed(text: object) -> tuple[list[str], list[str]]:
    """The parameters of a definition, and those that its docstring describes."""
    defined, described = (
        re.findall(r"\(self, (.*)\):", str(text))[0],
        re.findall(r":param (\w+):", str(text)),
    )
    return defined.split(", "), described


@pytest.mark.parametrize("kind", ["both", "definition", "described", "answer"])
def test_the_next_parameter_of_a_docstring(kind: Any) -> None:
    for item in docstring(30, 0, corruption=kind).items:
        (_, _, a, b, c, _), described = parsed(item.clean)
        defined, _ = parsed(item.clean)
        assert described == [a, b]
        assert item.answers == (f" {c}",)
        other, other_described = parsed(item.corrupted)
        changed = [i for i in range(6) if other[i] != defined[i]]
        assert (
            changed
            == {"both": [2, 3, 4], "definition": [2, 3, 4], "described": [], "answer": [4]}[kind]
        )
        fresh = {other[i] for i in changed} | (set(other_described) - set(described))
        assert not fresh & set(defined)
        if kind in ("both", "described"):
            assert not set(other_described) & {*defined, *other}
        else:
            assert other_described == described
        assert set(item.against) == {f" {w}" for w in {*defined, *fresh} - {c}}
        assert str(item.clean).endswith("\n    :param")
        assert str(item.clean)[slice(*item.spans["c_def"])] == c


# --- agreement, pronouns, capitals -------------------------------------------------------------


def test_verbs_agree_with_the_subject_and_not_with_the_noun_between() -> None:
    several = {p[1] for p in (*words.PEOPLE, *words.OBJECTS)}
    made = subject_verb_agreement(240, 0)
    between: Counter[tuple[str, bool, bool]] = Counter()
    for item in made.items:
        said = {name: str(item.clean)[slice(*span)] for name, span in item.spans.items()}
        number = said["subject"] in several
        assert item.answers == tuple(pair[number] for pair in words.BEING)
        assert item.against == tuple(pair[not number] for pair in words.BEING)
        for name in ("other", "person"):
            if name in said:
                between[item.template, number, said[name] in several] += 1
        if "verb" in said:
            assert (said["verb"][-1] == "s") != (said["person"] in several)
    assert set(Counter(item.template for item in made.items)) == {
        "simple",
        "prepositional",
        "relative",
    }
    for first, second in itertools.pairwise(made.items[::1]):
        if first.group == second.group:
            assert (first.clean, first.corrupted) == (second.corrupted, second.clean)
    singular = sum(n for (_, _, other), n in between.items() if not other)
    assert abs(singular / between.total() - 0.5) < 0.15
    only = subject_verb_agreement(20, 0, structure="relative")
    assert {item.template for item in only.items} == {"relative"}


def test_pronouns_go_with_names_and_both_are_as_frequent() -> None:
    made = gendered_pronouns(4 * len(FEMALE_NAMES), 0)
    for item in made.items:
        (name,), (other,) = names_in(item.clean), names_in(item.corrupted)
        assert item.answers == ((" she",) if name in FEMALE_NAMES else (" he",))
        assert item.against == ((" he",) if name in FEMALE_NAMES else (" she",))
        assert (name in FEMALE_NAMES) != (other in FEMALE_NAMES)
        assert without_names(item.clean) == without_names(item.corrupted)
    assert Counter(item.answers for item in made.items) == {(" she",): 86, (" he",): 86}
    times = Counter(names_in(item.clean)[0] for item in made.items)
    assert set(times) == set(NAMES)
    assert max(times.values()) - min(times.values()) <= 2


@pytest.mark.parametrize("tokenizer", ["by_word", "by_pairs_of_bytes"])
def test_names_of_one_number_of_tokens_go_together(tokenizer: str) -> None:
    encode = TOKENIZERS[tokenizer]()
    made = gendered_pronouns(100, 0, encode)
    for item in made.items:
        lengths = {len(encode(f"when {name}")) for name in item.fillers}
        assert len(lengths) == 1
    lone = made.left_out.get("names without one of the other gender of equally many tokens", ())
    assert not set(lone) & {name for item in made.items for name in item.fillers}


def test_capitals_are_those_of_their_countries() -> None:
    capital = dict(CAPITALS)
    made = capital_country(80, 0)
    for item in made.items:
        (country,) = [w for w in re.findall(r"\w+", str(item.clean)) if w in capital]
        (other,) = [w for w in re.findall(r"\w+", str(item.corrupted)) if w in capital]
        assert item.answers == (f" {capital[country]}",)
        assert item.against == (f" {capital[other]}",)
        assert str(item.corrupted) == str(item.clean).replace(country, other)
    assert set(Counter(item.group for item in made.items).values()) == {2}
    encode = by_pairs_of_bytes()
    several = capital_country(40, 0, encode, several=True)
    longest = max(
        len(encode(f"of{a}")) - len(encode("of")) for i in several.items for a in i.answers
    )
    assert longest > 1
    assert several.metric == "log_probability_difference"
    assert not any("capitals" in reason for reason in several.left_out)


# --- a real tokenizer --------------------------------------------------------------------------


def test_what_a_vocabulary_of_512_tokens_can_take(assets: Path) -> None:
    spec = load_model("stories260k").input
    assert isinstance(spec, TokenInput)
    made = gendered_pronouns(12, 0, spec)
    assert len(made) == 12
    for item in made.items:
        assert len(spec.encode(str(item.clean))) == len(spec.encode(str(item.corrupted)))
        assert len(spec.encode(str(item.clean) + str(item.answers[0]))) == 1 + len(
            spec.encode(str(item.clean))
        )
    assert greater_than(4, 0, spec, digits="one").items[0].template == "next digit"
    with pytest.raises(
        ValueError, match=r"indirect-object: the tokenizer leaves 2 names, .*84 names that are not"
    ):
        indirect_object(10, 0, spec)


# --- copying, addition, brackets ---------------------------------------------------------------


def test_counted_positions_are_those_whose_next_token_can_be_copied() -> None:
    made = repeats(20, 7)
    tokens, copied = draw_repeats(20, torch.Generator().manual_seed(7))
    for item, row, mask in zip(made.items, tokens.tolist(), copied.tolist(), strict=True):
        assert item.clean == tuple(row)
        assert item.labels is not None
        assert isinstance(item.positions, tuple)
        assert len(item.positions) == len(item.labels) == sum(mask)
        # by hand: there is a period such that the counted token, and all since the round before, come again
        start = item.positions[0]
        periods = [p for p in range(6, 25) if row[start:] == row[start - p : len(row) - p]]
        assert periods
        for at, label in zip(item.positions, item.labels, strict=True):
            assert label == row[at + 1] == row[at + 1 - periods[0]]
            assert mask[at + 1]


def test_a_model_that_copies_is_right_at_the_counted_positions_and_not_without_a_first_round() -> (
    None
):
    model = load_model("induction")

    def loss(items: tuple[Item, ...], rounds: int | None, which: str) -> float:
        found = []
        for item in items:
            assert item.labels is not None
            log_p = model.logits(torch.tensor([getattr(item, which)])).log_softmax(-1)[0]
            at = torch.tensor(item.positions)[:rounds]
            found.append(-log_p[at, torch.tensor(item.labels)[:rounds]].mean())
        return float(torch.stack(found).mean())

    items = repeats(30, 0, corruption="first_round").items
    assert loss(items, None, "clean") < 0.1
    assert loss(items, 5, "clean") < 0.3
    # the first 5 counted positions are in the second round, which has nothing to copy any more
    assert loss(items, 5, "corrupted") > 4


def test_the_counterparts_of_sequences_that_repeat() -> None:
    for item in repeats(20, 0, corruption="rolled").items:
        clean, other = list(item.clean), list(item.corrupted or ())
        assert other == [BOS, clean[-1], *clean[1:-1]]
    for item in repeats(20, 0, corruption="other").items:
        assert item.corrupted is not None
        assert item.corrupted[0] == BOS
        assert sum(a == b for a, b in zip(item.clean, item.corrupted, strict=True)) < 12
    for item in repeats(20, 0, corruption="first_round").items:
        changed = [a != b for a, b in zip(item.clean, item.corrupted or (), strict=True)]
        assert isinstance(item.positions, tuple)
        start = changed.index(True)
        assert changed == [start <= i < item.positions[0] for i in range(64)]
        assert item.clean[start:][: 64 - item.positions[0]] == item.clean[item.positions[0] :][:64]  # type: ignore[index]
        assert BOS not in (item.corrupted or ())[1:]


@pytest.mark.parametrize("kind", ["first", "second", "both"])
def test_sums_and_their_counterparts(kind: Any) -> None:
    made = addition(200, 0, corruption=kind)
    assert len({item.clean for item in made.items}) == 200
    for item in made.items:
        (a, b, equals), (c, d, same) = item.clean, item.corrupted or ()
        assert equals == same == 113
        assert item.answers == (((a + b) % 113,),)
        assert (a != c, b != d) == {
            "first": (True, False),
            "second": (False, True),
            "both": (True, True),
        }[kind]
        assert (a + b - c - d) % 113 != 0
    logits = load_model("addition-by-hand").logits(
        torch.tensor([item.clean for item in made.items])
    )
    assert logits[:, -1].argmax(-1).tolist() == [
        answer[0] for i in made.items for answer in i.answers
    ]
    assert {item.clean[:2] for item in addition(9, 0, p=3).items} == set(
        itertools.product(range(3), repeat=2)
    )


def is_balanced(tokens: tuple[int, ...]) -> bool:
    """By crossing out pairs."""
    text = "".join({1: "(", 2: ")"}.get(t, "") for t in tokens)
    while "()" in text:
        text = text.replace("()", "")
    return not text


@pytest.mark.parametrize("kind", ["flip", "order"])
def test_brackets_are_balanced_or_not(kind: Any) -> None:
    made = brackets(100, 0, corruption=kind)
    for item in made.items:
        clean, other = item.clean, item.corrupted
        assert isinstance(clean, tuple)
        assert isinstance(other, tuple)
        assert (clean[0], clean[-1], len(clean)) == (0, 3, 18)
        good = is_balanced(clean)
        assert (item.answers, item.against) == ((((4,),), ((5,),)) if good else (((5,),), ((4,),)))
        assert is_balanced(other) != good
        differ = [i for i in range(18) if clean[i] != other[i]]
        assert len(differ) == {"flip": 1, "order": 2}[kind]
        assert (Counter(clean) == Counter(other)) == (kind == "order")
    assert Counter(item.template for item in made.items) == {"balanced": 50, "unbalanced": 50}


def test_balanced_sequences_are_drawn_uniformly() -> None:
    random = Random(0)
    counts = Counter(tuple(balanced_sequence(4, random)) for _ in range(2800))
    assert len(counts) == 14  # the fourth Catalan number
    assert scipy.stats.chisquare(list(counts.values())).pvalue > 0.001


def test_labels_are_one_for_each_counted_position() -> None:
    Item((1, 2, 3), labels=(2, 3), positions=(0, 1))
    Item((1, 2, 3), labels=(2,))
    for changed, expected in (
        (
            {"labels": (2, 3), "positions": (0,)},
            r"labels of \(1, 2, 3\): there are 2 for 1 counted positions",
        ),
        ({"labels": (2, 3)}, "2 for 1 counted positions"),
        ({"labels": (2,), "answers": ((1,),)}, "labels and answers of .*: expected one of the two"),
    ):
        with pytest.raises(ValueError, match=expected):
            Item((1, 2, 3), **changed)  # type: ignore[arg-type]


# --- images ------------------------------------------------------------------------------------


def test_a_curve_turned_round_is_the_curve_of_the_opposite_orientation() -> None:
    made = curve_pairs(12, 0, size=48)
    assert made.kind == "turned"
    for i, name in enumerate(made.names):
        tone, angle, radius = re.fullmatch(
            r"(dark|light) curve (\d+)°, radius (\d+)", name
        ).groups()  # type: ignore[union-attr]
        ink = 0.0 if tone == "dark" else 1.0
        drawn = [
            curves(
                torch.tensor([float(a)]),
                torch.tensor([float(radius)]),
                48,
                1.875,
                foreground=ink,
                background=1 - ink,
            )
            for a in (int(angle), int(angle) + 180)
        ]  # names are rounded, so up to a degree and half a pixel
        assert (made.clean[i] - drawn[0][0]).abs().mean() < 0.01
        assert (made.corrupted[i] - drawn[1][0]).abs().mean() < 0.01
    torch.testing.assert_close(made.corrupted, made.clean.flip(2, 3), rtol=0, atol=0)


def test_turning_is_counter_clockwise_and_a_quarter_is_exact() -> None:
    images = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(turned(images, 90), torch.rot90(images, 1, (2, 3)))
    assert torch.equal(turned(images, -90), torch.rot90(images, -1, (2, 3)))
    assert torch.equal(turned(images, 360), images)
    angles, radius = torch.tensor([20.0]), torch.tensor([12.0])
    by_30 = turned(curves(angles, radius, 48), 30)
    assert (by_30 - curves(angles + 30, radius, 48)).abs().mean() < 0.01
    assert (by_30 - curves(angles - 30, radius, 48)).abs().mean() > 0.03


def test_blur_is_a_gaussian() -> None:
    images = torch.rand(1, 3, 15, 17, generator=torch.Generator().manual_seed(0))
    x = torch.arange(-6, 7).double()
    kernel = (-x.square() / (2 * 1.5**2)).exp()
    kernel = kernel / kernel.sum()  # cut off after 4 sigma
    padded = F.pad(images.double(), (6, 6, 6, 6), mode="replicate")
    rows = F.conv2d(padded.flatten(0, 1)[:, None], kernel.view(1, 1, -1, 1))
    wanted = F.conv2d(rows, kernel.view(1, 1, 1, -1)).view(images.shape)
    torch.testing.assert_close(blurred(images, 1.5), wanted.float(), rtol=1e-5, atol=1e-6)


def test_grey_is_luminance_and_a_patch_is_the_next_images_middle() -> None:
    images = torch.rand(3, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    wanted = 0.2125 * images[:, 0] + 0.7154 * images[:, 1] + 0.0721 * images[:, 2]
    torch.testing.assert_close(grey(images), wanted[:, None].expand(-1, 3, -1, -1))
    made = with_patch(images, 0.5)
    inside = torch.zeros(8, 12, dtype=torch.bool)
    inside[2:6, 3:9] = True
    for i in range(3):
        assert torch.equal(made[i][:, inside], images[(i + 1) % 3][:, inside])
        assert torch.equal(made[i][:, ~inside], images[i][:, ~inside])


def test_one_class_of_drawings_against_another() -> None:
    made = shape_pairs(24, 0, first="circle", second="line 90°")
    both = CLASSES.index("circle"), CLASSES.index("line 90°")
    assert made.classes == both * 12
    assert made.against == both[::-1] * 12
    model = load_model("shapes")
    for images, right, wrong in (
        (made.clean, made.classes, made.against),
        (made.corrupted, made.against, made.classes),
    ):
        logits = model.logits(model.input.normalize(images))  # type: ignore[union-attr]
        rows = torch.arange(24)
        more = logits[rows, torch.tensor(right)] > logits[rows, torch.tensor(wrong)]
        assert more.float().mean() > 0.9
    same = shape_pairs(24, 0, first="circle", second="line 90°", kind="grey")
    assert torch.equal(same.clean, made.clean)
    assert torch.equal(same.corrupted, grey(made.clean))
    assert same.against == made.against
    softer = made.with_counterparts("blurred", sigma=2.0)
    assert (softer.kind, len(softer)) == ("blurred, sigma 2", 24)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=20), st.integers(0, 5))
@settings(deadline=None, max_examples=50)
def test_another_image_is_of_another_class_and_two_are_each_others(
    classes: list[int], seed: int
) -> None:
    images = torch.arange(len(classes)).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2) / 20
    names = tuple(map(str, range(len(classes))))
    if 2 * max(Counter(classes).values()) > len(classes):
        with pytest.raises(ValueError, match="are of one class, expected at most half"):
            pairs_of(images, tuple(classes), names, seed)
        return
    made = pairs_of(images, tuple(classes), names, seed)
    order = [round(float(v) * 20) for v in made.corrupted[:, 0, 0, 0]]
    # Of an odd number one image joins two.
    assert sum(order[j] != i for i, j in enumerate(order)) == len(classes) % 2
    assert all(classes[i] != classes[j] for i, j in enumerate(order))
    assert made.against == tuple(classes[j] for j in order)


def test_bad_pairs_of_images_are_named() -> None:
    image = torch.rand(2, 3, 4, 4)
    for make, expected in (
        (lambda: shape_pairs(4, first="circel"), "unknown class 'circel': did you mean circle"),
        (lambda: shape_pairs(4, second="curve 90°"), "second 'curve 90°' is also the first class"),
        (lambda: shape_pairs(0), "n 0 must be at least 1"),
        (lambda: shape_pairs(4, sigma=2.0), "unknown setting of another 'sigma'"),
        (lambda: curve_pairs(4, radii=(0.3, 0.1)), r"radii \(0.3, 0.1\) must be positive"),
        (lambda: curve_pairs(4, kind="another"), "unknown counterpart 'another'"),
        (lambda: blurred(image, 0), "sigma 0 must be positive"),
        (lambda: with_patch(image, 1.5), "size 1.5 must be above 0 and at most 1"),
        (lambda: with_patch(image[:1]), "with 1 images there is no next one"),
        (lambda: ImagePairs("a", image, image, ("x",), ""), "names of a: there are 1 for 2 pairs"),
    ):
        with pytest.raises((ValueError, KeyError), match=expected):
            make()
    assert set(IMAGE_PAIRS) == {"curves", "shapes"}


# --- task files --------------------------------------------------------------------------------

TEXT = st.text(max_size=20)
SOME_WORDS = st.text(min_size=1, max_size=20) | st.lists(
    st.integers(0, 2**31 - 1), min_size=1, max_size=4
).map(tuple)


@st.composite
def fields_of_items(draw: st.DrawFn) -> dict[str, Any]:
    number = st.integers(0, 99)
    spans = draw(st.dictionaries(TEXT.filter(bool), st.tuples(number, number), max_size=2))
    numbers = st.lists(st.integers(-99, 99), min_size=1, max_size=4).map(tuple)
    positions = draw(st.sampled_from(["last", "all", *spans]) | numbers)
    counted = len(positions) if isinstance(positions, tuple) else 1
    labels = draw(st.none() | st.lists(number, min_size=counted, max_size=counted).map(tuple))
    sets = st.lists(SOME_WORDS, max_size=3).map(tuple)
    return {
        "clean": draw(SOME_WORDS), "answers": () if labels else draw(sets), "against": draw(sets),
        "corrupted": draw(st.none() | SOME_WORDS), "labels": labels, "positions": positions, "group": draw(TEXT),
        "fillers": draw(st.lists(TEXT, max_size=3).map(tuple)), "spans": spans, "template": draw(TEXT),
    }  # fmt: skip


FIELDS_OF_HEADERS = st.fixed_dictionaries({
    "name": TEXT.filter(bool), "about": TEXT, "metric": st.none() | TEXT, "tokenizer": TEXT,
    "reading": st.sampled_from([None, "one", "fed", "first"]), "seed": st.integers(0, 2**31 - 1),
})  # fmt: skip


@given(FIELDS_OF_HEADERS, st.lists(fields_of_items(), min_size=1, max_size=4))
@settings(deadline=None, max_examples=40)
def test_a_task_file_gives_back_what_was_written(
    stated: dict[str, Any], fields: list[dict[str, Any]]
) -> None:
    header, some = Header(**stated), tuple(Item(**each) for each in fields)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.jsonl"
        write_items(path, header, some)
        assert read_items(path) == (header, some)
        assert [p.name for p in Path(folder).iterdir()] == ["task.jsonl"]
        validator = jsonschema.Draft202012Validator(task_schema())
        for line in path.read_bytes().split(b"\n")[:-1]:
            validator.validate(json.loads(line))


@pytest.mark.parametrize("name", EVERY)
def test_what_generators_make_can_be_written_and_read(name: str, tmp_path: Path) -> None:
    made = EVERY[name](20)
    header = Header(made.name, made.about, made.metric)
    write_items(tmp_path / "x.jsonl", header, made.items)
    assert read_items(tmp_path / "x.jsonl") == (header, made.items)


def test_the_published_schema_is_that_of_the_reader() -> None:
    path = Path(__file__).parents[1] / "docs" / "schemas" / "task.json"
    assert json.loads(path.read_text()) == task_schema(), (
        "write it again: python -c 'import json; from circuits.tasks.schema import task_schema; "
        "print(json.dumps(task_schema(), indent=1))' > docs/schemas/task.json"
    )
    jsonschema.Draft202012Validator.check_schema(task_schema())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.sampled_from([2**31, "", "a", "one"]),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.sampled_from(["a", "b"]), part, max_size=2),
    max_leaves=6,
)  # fmt: skip


@given(JSON)
@settings(deadline=None, max_examples=150)
def test_each_field_is_checked_as_the_schema_says(value: Any) -> None:
    for field in (*HEADER.values(), *ITEM.values()):
        known = jsonschema.Draft202012Validator(field.form.schema)
        assert field.form.fits(value) == known.is_valid(value), (field.expected, value)


GOOD = b'{"circuits_task": 1, "name": "a"}\n'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", r"line 1 is not a header: expected \{\"circuits_task\": 1, \"name\": …\} first"),
        (b'{"clean": "x"}', "line 1 is not a header"),
        (b"\xef\xbb\xbf" + GOOD, "line 1 starts with a byte-order mark: expected UTF-8 without one"),
        (b'{"circuits_task": 2, "name": "a"}', r"line 1 has layout 2 \(a newer version of circuits wrote it\)"),
        (b'{"circuits_task": true, "name": "a"}', "line 1 has layout True: expected 1"),
        (b'{"circuits_task": 1}', "line 1 lacks the field 'name'"),
        (b'{"circuits_task": 1, "name": ""}', "line 1: name is '': expected a text, not empty"),
        (b'{"circuits_task": 1, "name": "a", "seed": 1.5}', "line 1: seed is 1.5: expected a whole number from 0"),
        (b'{"circuits_task": 1, "name": "a", "reading": "x"}', "reading is 'x': expected one of one, fed, first"),
        (GOOD, "has a header but no item: expected one item a line"),
        (GOOD + b"\n" + b'{"clean": 5}', "line 3: clean is 5: expected a text or a list of tokens, not empty"),
        (GOOD + b'{"clean": ""}', "line 2: clean is '': expected a text or a list of tokens, not empty"),
        (GOOD + b'{"clean": [1, true]}', r"line 2: clean is \[1, True\]: expected a text or a list of tokens"),
        (GOOD + b'{"clean": [-1]}', r"line 2: clean is \[-1\]: expected a text or a list of tokens"),
        (GOOD + b'{"answers": ["x"]}', "line 2 lacks the field 'clean'"),
        (GOOD + b'{"clean": "x", "answers": " a"}', "line 2: answers is ' a': expected a list of texts"),
        (GOOD + b'{"clean": "x", "answers": [""]}', r"line 2: answers is \[''\]: expected a list of texts"),
        (GOOD + b'{"clean": "x", "anwsers": []}', "line 2: unknown field 'anwsers': did you mean answers"),
        (GOOD + b'{"clean": "x", "clean": "y"}', "line 2: field 'clean' is repeated"),
        (GOOD + b'{"clean": "x", "positions": "io"}', "line 2: positions 'io': expected last, all, or whole numbers"),
        (GOOD + b'{"clean": "x", "positions": [NaN]}', "line 2: NaN is not a number that JSON has"),
        (GOOD + b'{"clean": "x", "positions": [' + b"9" * 5000 + b"]}", "line 2: 9999999999999999999… has 5000 digits"),
        (GOOD + b'{"clean": "x", "spans": {"a": [1]}}', r"spans is \{'a': \[1\]\}: expected names, each with a list"),
        (GOOD + b'{"clean": "\\ud800"}', "line 2: clean holds half of a surrogate pair"),
        (GOOD + b'{"clean": "\xff"}', "line 2 is not UTF-8: byte 11 is 0xff"),
        (GOOD + b'{"clean": "x", ', "line 2 is not JSON: .* at character"),
        (GOOD + b'"x"', r"line 2 is 'x': expected an item, \{\"clean\": …\}"),
        (GOOD + b"[" * 200_000, "line 2 is not JSON that can be read: nested too deeply"),
        (GOOD + b'{"clean": "x", "answers": ' + b"[" * 90 + b"]" * 90 + b"}", "answers is .*: expected a list"),
        (GOOD + b'{"clean": "' + b"x" * (1 << 20) + b'"}', "line 2 has more than 1048576 bytes: expected one"),
        (b"\x00\x01\x02", "line 1 is not JSON"),
    ],
)  # fmt: skip
def test_a_bad_task_file_is_refused_by_one_line(
    content: bytes, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=expected) as raised:
        read_items(path)
    said = str(raised.value)
    assert "\n" not in said
    assert len(said) < len(str(path)) + 200
    assert str(path) in said


def test_what_cannot_be_read_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write_items(path, Header("a"), [Item("x")])
    before = path.read_bytes()
    for header, some, expected in (
        (Header("a"), [], "task 'a' has no item: expected at least one"),
        (Header(""), [Item("x")], "header: name is ''"),
        (Header("a", seed=-1), [Item("x")], "header: seed is -1"),
        (Header("a"), [Item("x"), Item("\ud800")], "item 2: clean holds half of a surrogate pair"),
        (Header("a"), [Item((-1,))], r"item 1: clean is \[-1\]"),
        (
            Header("a"),
            [Item("x" * (1 << 20))],
            "item 1 has 1048590 bytes: expected at most 1048576",
        ),
    ):
        with pytest.raises(ValueError, match=expected):
            write_items(path, header, some)
    assert path.read_bytes() == before
    with pytest.raises(FileNotFoundError, match="does not exist or is not a file"):
        read_items(tmp_path)


# --- tables ------------------------------------------------------------------------------------


def table(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def test_token_numbers_as_eap_ig_has_them(tmp_path: Path) -> None:
    path = table(
        tmp_path, "ioi.csv",
        ",clean,corrupted,corrupted_hard,correct_idx,incorrect_idx\n"
        '7,"Ann and Bo left, Bo gave it to","Ann and Bo left, Cy gave it to","Ann and Bo left, Ann gave it to",5,6\n',
    )  # fmt: skip
    made = read_table(path)
    assert made.items == (
        Item("Ann and Bo left, Bo gave it to", ((5,),), ((6,),), "Ann and Bo left, Cy gave it to"),
    )
    assert (made.metric, made.name) == ("logit_difference", "ioi")
    hard = read_table(path, counterpart="corrupted_hard").items[0]
    assert hard.corrupted == "Ann and Bo left, Ann gave it to"
    with pytest.raises(KeyError, match="unknown counterpart 'hard': did you mean corrupted_hard"):
        read_table(path, counterpart="hard")
    several = table(
        tmp_path, "kinds.csv",
        "clean,corrupted,answers_idx,corrupted_answers_idx\na,b,\"[3, 4]\",\"[5]\"\n",
    )  # fmt: skip
    assert read_table(several).items == (Item("a", ((3,), (4,)), ((5,),), "b"),)


def test_years_as_eap_ig_has_them(tmp_path: Path) -> None:
    line = "The war lasted from the year 17{} to the year 17"
    for column, value in (("correct_idx", "97"), ("label", "97"), ("year", "1797")):
        path = table(
            tmp_path, "years.csv",
            f"clean,corrupted,{column}\n{line.format(97)},{line.format('01')},{value}\n",
        )  # fmt: skip
        (item,) = read_table(path).items
        assert item.answers == ("98", "99")
        assert item.against == tuple(f"{y:02d}" for y in range(98))
        encode = by_two_digits()
        (item,) = read_table(path, tokenizer=encode).items
        assert item.answers == ((encode("98")[0],), (encode("99")[0],))
    with pytest.raises(ValueError, match="row 1: year '00' is not one token of this tokenizer"):
        read_table(path, tokenizer=by_digit())
    path = table(tmp_path, "years.csv", "clean,corrupted,label\nThe war,The war,5\n")
    with pytest.raises(ValueError, match=r"row 1: label '5': expected the two digits of a year"):
        read_table(path)


def test_the_number_of_a_subject_as_eap_ig_has_it(tmp_path: Path) -> None:
    path = table(
        tmp_path, "sva.tsv", "clean\tcorrupted\tgroup\tplural\nThe cats\tThe cat\tsimple\t1\n"
    )
    singular, plural = zip(*words.BEING, strict=True)
    assert read_table(path).items == (
        Item("The cats", plural, singular, "The cat", template="simple"),
    )


def test_choices_as_mib_has_them(tmp_path: Path) -> None:
    other = {"prompt": "Ann and Bo left, Ann gave it to", "choices": ["Ann", "Bo"], "answerKey": 1}
    rows = [
        {
            "prompt": "Ann and Bo left, Bo gave it to", "choices": ["Ann", "Bo"], "answerKey": 0,
            "metadata": {"subject": "Bo", "indirect_object": "Ann", "place": "zoo"},
            "s2_io_flip_counterfactual": other,
            "random_names_counterfactual": {**other, "prompt": "Cy and Di left, Di gave it to"},
        }
    ]  # fmt: skip
    path = table(tmp_path, "ioi.json", json.dumps(rows))
    item = Item(
        "Ann and Bo left, Bo gave it to", (" Ann",), (" Bo",), "Ann and Bo left, Ann gave it to", fillers=("Bo", "Ann")
    )  # fmt: skip
    assert read_table(path).items == (item,)
    random = read_table(path, counterpart="random_names_counterfactual").items[0]
    assert random.corrupted == "Cy and Di left, Di gave it to"
    # a table that writes lists and records into its cells
    cells = {k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in rows[0].items()}
    with (tmp_path / "ioi.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(cells))
        writer.writeheader()
        writer.writerow(cells)
    assert read_table(tmp_path / "ioi.csv").items == (item,)

    letters = {"label": ["A", "B"], "text": ["red", "blue"]}
    lines = [
        {"prompt": "A. red B. blue Answer:", "choices": letters, "answerKey": 1,
         "symbol_counterfactual": {"prompt": "X. red Y. blue Answer:", "choices": {"label": ["X"]}, "answerKey": 0}},
        {"prompt": "A. red B. blue Answer:", "choices": letters, "answerKey": 0, "symbol_counterfactual": None},
    ]  # fmt: skip
    path = table(tmp_path, "mcqa.jsonl", "\n".join(map(json.dumps, lines)))
    made = read_table(path)
    assert made.items == (Item("A. red B. blue Answer:", ("B",), ("X",), "X. red Y. blue Answer:"),)
    assert (
        made.left_out_text()
        == "1 of 2 items, as no more can be drawn; 1 rows without a counterpart ('row 2')"
    )
    sums = [{"prompt": "1+2=", "label": 3, "random_counterfactual": {"prompt": "2+2=", "label": 4}}]
    assert read_table(table(tmp_path, "sums.json", json.dumps(sums))).items == (
        Item("1+2=", ("3",), ("4",), "2+2="),
    )


def test_prompts_as_acdc_has_them(tmp_path: Path) -> None:
    rows = [{
        "clean_prompt": "def f(a, b):", "corrupt_prompt": {"random": "def f(c, d):", "doc": "def f(a, d):"},
        "correct_answers": [" a"], "wrong_answers": [" b", " c"],
    }]  # fmt: skip
    path = table(tmp_path, "doc.json", json.dumps(rows))
    (item,) = read_table(path, counterpart="doc").items
    assert item == Item("def f(a, b):", (" a",), (" b", " c"), "def f(a, d):")
    with pytest.raises(
        ValueError,
        match="row 1: counterpart None: corrupt_prompt has random, doc, expected one of these",
    ):
        read_table(path)
    for content in (
        {"prompts": [{"clean": "x", "corrupt": "y", "answers": [" a"], "wrong_answers": [" b"]}]},
        [{"clean_prefix": "x", "patch_prefix": "y", "clean_answer": " a", "patch_answer": " b"}],
        [{"clean_prompt": "x", "patch_prompt": "y", "correct_answer": " a", "wrong_answer": " b"}],
    ):
        made = read_table(table(tmp_path, "x.json", json.dumps(content)))
        assert made.items == (Item("x", (" a",), (" b",), "y"),)
    lone = read_table(table(tmp_path, "x.csv", "clean,answer\nx, a\n"))
    assert lone.items == (Item("x", (" a",)),)
    assert lone.metric == "log_probability"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "country,capital\nPeru,Lima\n", r"the columns country, capital: expected mib: prompt, .*eap-ig: "),
        ("a.csv", "", "has no rows: expected at least one"),
        ("a.csv", "clean,answer\n", "has no rows: expected at least one"),
        ("a.csv", "clean,answer\nx\n", "row 1 has 1 cells: expected 2"),
        ("a.csv", "clean,clean,answer\nx,y,z\n", "has the columns clean, clean, answer: expected each once"),
        ("a.csv", "clean,answer\n,z\n", "row 1: clean is '': expected a text"),
        ("a.csv", 'clean,answer\n"x,y\n', "cannot be read: unexpected end of data"),
        ("a.csv", "clean,answer\nx," + "y" * 200_000, "cannot be read: field larger than field limit"),
        ("a.csv", "clean,corrupted,correct_idx,incorrect_idx\nx,y,1,-2\n", "row 1: incorrect_idx is '-2'"),
        ("a.csv", "clean,corrupted,correct_idx,incorrect_idx\nx,,1,2\n", "has no rows with a counterpart"),
        ("a.csv", "clean,corrupted,plural\nx,y,2\n", "row 1: plural '2': expected 0 or 1"),
        ("a.json", "{}", "is not a list of rows: expected a list, or one under `prompts` or `data`"),
        ("a.json", "[1]", "row 1 is 1: expected an object with fields"),
        ("a.json", '[{"clean": NaN}]', "NaN is not a number that JSON has"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.jsonl", '{"clean": 1}\n{', "line 2 is not JSON"),
        ("a.json", '[{"prompt": "x", "choices": ["a"], "answerKey": 3, "x_counterfactual": {"prompt": "y"}}]',
         "row 1: answerKey '3': expected the index of one of the choices, from 0"),
        ("a.json", '[{"prompt": "x", "label": "a", "x_counterfactual": {}, "y_counterfactual": {}}]',
         "row 1: counterpart: the table has x_counterfactual, y_counterfactual, name one of them"),
        ("a.parquet", "x", "ends in '.parquet': expected .csv, .tsv, .json, .jsonl"),
    ],
)  # fmt: skip
def test_a_table_of_another_form_is_refused_by_one_line(
    name: str, content: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=expected) as raised:
        read_table(table(tmp_path, name, content))
    assert "\n" not in str(raised.value)
    with pytest.raises(KeyError, match="unknown format 'x'"):
        read_table(table(tmp_path, "b.csv", "clean,answer\nx,y\n"), "x")
    with pytest.raises(
        ValueError, match="has the columns clean, answer: expected prompt, answerKey"
    ):
        read_table(tmp_path / "b.csv", "mib")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_table(tmp_path / "none.csv")


def test_halves_of_addition_share_no_sum_and_no_counterpart() -> None:
    task = load_task(load_model("addition-by-hand"), n=2000)

    def seen(half: Task) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
        sides = (half.examples, half.counterparts)
        clean, other = (
            {tuple(sorted(e.tokens(i)[:2])) for i in range(len(e))} for e in sides if e is not None
        )
        return clean, other

    find, test = seen(task.find), seen(task.test)
    assert min(len(task.find), len(task.test)) > 700
    assert not (find[0] | find[1]) & (test[0] | test[1])
