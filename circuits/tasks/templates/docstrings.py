"""Docstrings: which parameter is described next (Heimersheim and Janiak 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Literal, get_args

from circuits.tasks.generated import Generated, check_choice
from circuits.tasks.items import Item
from circuits.tasks.templates.filling import LeftOut, alternate, draw, fill, rotate_roles, two_pools
from circuits.tasks.templates.tokenizers import Reader, Tokenizer
from circuits.tasks.templates.words import DESCRIPTIONS, FUNCTIONS, PARAMETERS

NAME = "docstring"

Corruption = Literal["both", "definition", "described", "answer"]
"""Which parameter names the counterpart replaces: the three in the `definition` that matter, those that are
`described`, `both` (by different names), or only the `answer` in the definition."""

TEMPLATE = '''def {function}(self, {before}, {also}, {a_def}, {b_def}, {c_def}, {after}):
    """{summary}

    :param {a_doc}: {a_about}
    :param {b_doc}: {b_about}
    :param'''
"""The docstring describes three of six parameters in their order, and stops where the third one's name comes next."""

_MATCHED = ("a_def", "b_def", "c_def")
_DESCRIBED = ("a_doc", "b_doc")
_PARAMETERS = 6
_OTHERS = 5
"""The most names that a counterpart needs: three in the definition and two in the description."""
_WORDS = 7


def docstring(
    n: int, seed: int = 0, tokenizer: Tokenizer = None, *, corruption: Corruption = "both"
) -> Generated:
    """Items whose answer is the parameter that is described next, against all other parameters.

    Args:
        n: number of items.
        seed: seed of everything that is drawn.
        tokenizer: a model's input or its `encode`; parameters of several tokens are left out.
        corruption: which names the counterpart replaces.

    Raises:
        ValueError: if too few names fit the tokenizer, or `corruption` is unknown.
    """
    check_choice("corruption", corruption, get_args(Corruption))
    random, reader, left_out = Random(seed), Reader(tokenizer), LeftOut()
    names = left_out.keep_single_tokens(reader, "    :param", PARAMETERS, "parameters")
    left_out.require(NAME, names, 2 * (_PARAMETERS + _OTHERS), "parameters")
    dealt = zip(
        *(two_pools(some, random) for some in (names, DESCRIPTIONS, FUNCTIONS)), strict=True
    )
    first, second = (
        _instances(pool, f"{NAME} {side}", corruption, random) for side, pool in enumerate(dealt)
    )
    return draw(
        NAME, n, alternate(first, second), reader, left_out,
        about="The parameter of a function that its docstring describes next.", metric="logit_difference",
    )  # fmt: skip


def _instances(
    pool: tuple[list[str], ...], group: str, corruption: Corruption, random: Random
) -> Iterator[list[Item]]:
    """Endless template instances of one item each, all words from one pool."""
    drawn = zip(
        rotate_roles(pool[0], _PARAMETERS + _OTHERS, random), rotate_roles(pool[1], _WORDS, random),
        rotate_roles(pool[2], 1, random),
        strict=True,
    )  # fmt: skip
    for k, (names, words, (function,)) in enumerate(drawn):
        yield [_item(function, names, words, corruption, f"{group}.{k}")]


def _item(
    function: str,
    names: tuple[str, ...],
    words: tuple[str, ...],
    corruption: Corruption,
    group: str,
) -> Item:
    before, also, *matched, after = names[:_PARAMETERS]
    others = names[_PARAMETERS:]
    filled = {
        "function": function, "before": before, "also": also, "after": after,
        **dict(zip(_MATCHED, matched, strict=True)), **dict(zip(_DESCRIBED, matched, strict=False)),
        "summary": " ".join(words[:3]), "a_about": " ".join(words[3:5]), "b_about": " ".join(words[5:]),
    }  # fmt: skip
    changed = {
        "both": dict(zip((*_MATCHED, *_DESCRIBED), others, strict=True)),
        "definition": dict(zip(_MATCHED, others, strict=False)),
        "described": dict(zip(_DESCRIBED, others, strict=False)),
        "answer": {"c_def": others[0]},
    }[corruption]
    clean, spans = fill(TEMPLATE, filled)
    corrupted, _ = fill(TEMPLATE, {**filled, **changed})
    answer = filled["c_def"]
    wrong = dict.fromkeys([before, also, *matched, after, *changed.values()])
    fillers = dict.fromkeys([function, *wrong, *words])
    return Item(
        clean, (f" {answer}",), tuple(f" {word}" for word in wrong if word != answer), corrupted, group=group,
        fillers=tuple(fillers), spans={name: spans[name] for name in (*_MATCHED, *_DESCRIBED)}, template="docstring",
    )  # fmt: skip
