"""Docstrings: the next parameter to be described (Heimersheim and Janiak 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Literal, get_args

from circuits.tasks.generated import Generated, check_choice
from circuits.tasks.items import Item
from circuits.tasks.templates.filling import Account, draw, fill, pools, taking_turns, turns
from circuits.tasks.templates.tokenizers import Reader, Tokenizer
from circuits.tasks.templates.words import DESCRIPTIONS, FUNCTIONS, PARAMETERS

NAME = "docstring"

Corruption = Literal["both", "definition", "described", "answer"]
"""Which names the counterpart replaces by others: those of the three parameters in the `definition`, those that are
`described`, `both` (by different ones), or that of the `answer` alone, in the definition."""

TEMPLATE = '''def {function}(self, {before}, {also}, {a_def}, {b_def}, {c_def}, {after}):
    """{summary}

    :param {a_doc}: {a_about}
    :param {b_doc}: {b_about}
    :param'''
"""Three of six parameters are described in their order; the third one's name comes next."""

_MATCHED = ("a_def", "b_def", "c_def")
_DESCRIBED = ("a_doc", "b_doc")
_PARAMETERS = 6
_OTHERS = 5
"""Names that a counterpart may need: three in the definition and two in the description."""
_WORDS = 7


def docstring(
    n: int, seed: int = 0, tokenizer: Tokenizer = None, *, corruption: Corruption = "both"
) -> Generated:
    """Items whose answer is the parameter to be described next, against all other parameters.

    Args:
        n: how many items.
        seed: of all that is drawn.
        tokenizer: a model's input or its `encode`; parameters that it splits are left out.
        corruption: the counterpart.

    Raises:
        ValueError: if the tokenizer takes too few names, or `corruption` is none of its values.
    """
    check_choice("corruption", corruption, get_args(Corruption))
    random, reader, account = Random(seed), Reader(tokenizer), Account()
    names = account.usable(reader, "    :param", PARAMETERS, "parameters")
    account.need(NAME, names, 2 * (_PARAMETERS + _OTHERS), "parameters")
    dealt = zip(*(pools(some, random) for some in (names, DESCRIPTIONS, FUNCTIONS)), strict=True)
    first, second = (
        _instances(pool, f"{NAME} {side}", corruption, random) for side, pool in enumerate(dealt)
    )
    return draw(
        NAME, n, taking_turns(first, second), reader, account,
        about="The parameter of a function that its docstring describes next.", metric="logit_difference",
    )  # fmt: skip


def _instances(
    pool: tuple[list[str], ...], group: str, corruption: Corruption, random: Random
) -> Iterator[list[Item]]:
    """One item after another, each a template instance of its own, all words from one pool."""
    drawn = zip(
        turns(pool[0], _PARAMETERS + _OTHERS, random), turns(pool[1], _WORDS, random), turns(pool[2], 1, random),
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
