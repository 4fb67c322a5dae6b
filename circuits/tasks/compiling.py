"""From items, as people write them, to a task for a particular model: texts become tokens, spans become positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from circuits.examples import Examples, encoded, whole
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.tasks.items import Item, Words
from circuits.tasks.metrics import Metric, as_metric
from circuits.tasks.task import Feeding, Question, Task, default_metric

SHOWN = 60


@dataclass(frozen=True)
class _Asked:
    """One item in tokens."""

    clean: tuple[int, ...]
    corrupted: tuple[int, ...] | None
    question: Question


def compile_task(
    model: HookedModel,
    items: Sequence[Item],
    *,
    name: str = "task",
    metric: str | Metric | Callable[[Tensor], Tensor] | None = None,
    feeding: Feeding | None = None,
    seed: int = 0,
    about: str = "",
    left_out: dict[str, tuple[str, ...]] | None = None,
) -> Task:
    """A task for a model from items.

    Args:
        model: a model of tokens.
        items: at least one.
        name: of the task.
        metric: what is measured; a logit difference where answers are compared with something, else the
            cross-entropy, if not given.
        feeding: `one` if every answer has one token (the default then), else `fed` (the default then) or `first`.
        seed: of the split into halves.
        about: one sentence on what the model does.
        left_out: what a generator left out already, by reason.

    Raises:
        ValueError: if an item cannot be encoded, its counterpart has another length, an answer begins inside a token
            of the prompt, or positions or spans lie outside the text.
    """
    spec = model.input
    if not isinstance(spec, TokenInput):
        raise ValueError(f"model {model.name} takes images: items of text need a model of tokens")
    if not items:
        raise ValueError(f"task {name} has no item: expected at least one")
    asked = [_asked(spec, item) for item in items]
    longest = max(
        (len(a) for q in asked for a in (*q.question.answers, *q.question.against)), default=1
    )
    if feeding is None:
        feeding = "one" if longest == 1 else "fed"
    if feeding == "one" and longest > 1:
        raise ValueError(
            f"task {name} has an answer of {longest} tokens: expected feeding 'fed' (all of its tokens) or 'first' "
            "(the first token that differs)"
        )
    if feeding == "first":
        asked = [_first_token(q, item) for q, item in zip(asked, items, strict=True)]
    if feeding == "fed":
        _check_fed(asked, items, name)
    paired = [q.corrupted is not None for q in asked]
    if any(paired) and not all(paired):
        lacking = items[paired.index(False)]
        raise ValueError(
            f"item {_shown(lacking.clean)} of task {name} has no counterpart, but others do"
        )
    questions = tuple(q.question for q in asked)
    names = tuple(_shown(item.clean) for item in items)
    clean = Examples.texts(model, [q.clean for q in asked], names)
    other = (
        Examples.texts(model, [q.corrupted or () for q in asked], names) if all(paired) else None
    )
    return Task(
        name, clean, questions, default_metric(questions, feeding) if metric is None else as_metric(metric), other,
        "one" if feeding == "first" else feeding, seed, about=about, left_out=left_out or {},
    )  # fmt: skip


def _asked(spec: TokenInput, item: Item) -> _Asked:
    clean = _tokens(spec, item.clean)
    corrupted = None if item.corrupted is None else _tokens(spec, item.corrupted)
    if corrupted is not None and len(corrupted) != len(clean):
        raise ValueError(
            f"counterpart {_shown(item.corrupted or ())} has {len(corrupted)} tokens, {_shown(item.clean)} has "
            f"{len(clean)}: expected as many"
        )
    if corrupted == clean:
        raise ValueError(f"counterpart of {_shown(item.clean)} is the same: expected another text")
    spans = {name: _span(spec, item, name, clean) for name in item.spans}
    positions = _positions(item, spans, len(clean))
    answers, against = (
        tuple(_answer(spec, item.clean, clean, word) for word in words)
        for words in (item.answers, item.against)
    )
    _check_distinct(item, answers, against)
    if item.labels is not None:
        far = [token for token in item.labels if not 0 <= token < spec.n_vocab]
        if far:
            raise ValueError(
                f"label {far[0]} of {_shown(item.clean)} is no token: expected 0 to {spec.n_vocab - 1}"
            )
    return _Asked(
        clean, corrupted,
        Question(
            positions, answers, against, item.labels, item.group, item.fillers, spans, item.template
        ),
    )  # fmt: skip


def _tokens(spec: TokenInput, words: Words) -> tuple[int, ...]:
    if not words or (isinstance(words, str) and not words.strip()):
        raise ValueError("text is empty: expected at least one token")
    try:
        found = whole(spec, words)
        spec.check(_row(found[: spec.n_ctx]))
    except ValueError as error:
        raise ValueError(f"text {_shown(words)}: {error}") from None
    if len(found) > spec.n_ctx:
        raise ValueError(
            f"text {_shown(words)} has {len(found)} tokens: the model takes at most {spec.n_ctx}"
        )
    return tuple(found)


def _answer(
    spec: TokenInput, prompt: Words, clean: tuple[int, ...], word: Words
) -> tuple[int, ...]:
    """The tokens of an answer as they follow the prompt.

    Raises:
        ValueError: if the tokenizer does not take it, or joins its beginning to the end of the prompt.
    """
    if not isinstance(word, str):
        found = tuple(word)
    elif isinstance(prompt, str) and spec.encoder is not None:
        both = tuple(whole(spec, prompt + word))
        if both[: len(clean)] != clean:
            raise ValueError(
                f"answer {word!r} is joined to the end of {_shown(prompt)} by the tokenizer: expected the prompt's "
                "own tokens first (a space belongs in front of the answer, not at the end of the prompt)"
            )
        found = both[len(clean) :]
    else:
        found = tuple(spec.encode(word))
    if not found:
        raise ValueError(f"answer {word!r} to {_shown(prompt)} has no token")
    if len(clean) + len(found) - 1 > spec.n_ctx:
        raise ValueError(
            f"answer {word!r} to {_shown(prompt)} ends past the {spec.n_ctx} tokens that the model takes"
        )
    spec.check(_row(found))
    return found


def _check_distinct(
    item: Item, answers: Sequence[tuple[int, ...]], against: Sequence[tuple[int, ...]]
) -> None:
    """Raise ValueError if an answer counts twice, or both as right and as wrong."""
    every = [*answers, *against]
    words = [*item.answers, *item.against]
    for i, tokens in enumerate(every):
        first = every.index(tokens)
        if first < i:
            both = first < len(answers) <= i
            what = "is also what the answers are compared with" if both else "is there twice"
            raise ValueError(f"answer {words[i]!r} to {_shown(item.clean)} {what}")


def _row(tokens: Sequence[int]):

    return torch.tensor([list(tokens)], dtype=torch.int64)


def _positions(item: Item, spans: dict[str, tuple[int, int]], n: int) -> tuple[int, ...]:
    if isinstance(item.positions, str):
        if item.positions == "all":
            return tuple(range(n))
        return (n - 1,) if item.positions == "last" else (spans[item.positions][1] - 1,)
    far = [p for p in item.positions if not -n <= p < n]
    if far:
        raise ValueError(
            f"position {far[0]} is outside of {_shown(item.clean)}: expected {-n} to {n - 1}"
        )
    made = tuple(p % n for p in item.positions)
    if len(set(made)) != len(made):
        raise ValueError(
            f"positions {list(item.positions)} of {_shown(item.clean)} count one twice"
        )
    return made


def _span(spec: TokenInput, item: Item, name: str, clean: tuple[int, ...]) -> tuple[int, int]:
    """A span in tokens: of text, the tokens that hold some of its characters."""
    start, stop = item.spans[name]
    if not 0 <= start < stop <= len(item.clean):
        raise ValueError(
            f"span {name!r} of {_shown(item.clean)} is {start} to {stop}: expected a part of 0 to {len(item.clean)}"
        )
    if not isinstance(item.clean, str):
        return start, stop
    # what stands before a character has as many tokens as the text up to it has in common with the whole
    before, upto = (_common(spec, item.clean[:at], clean) for at in (start, stop))
    return min(before, len(clean) - 1), max(upto, before + 1)


def _common(spec: TokenInput, text: str, clean: tuple[int, ...]) -> int:
    if not text:
        return int(spec.bos is not None and clean[:1] == (spec.bos,))
    own = (
        encoded(spec, text).tolist() if text.strip() else [spec.bos] if spec.bos is not None else []
    )
    return len(shared_beginning([own, list(clean)]))


def _first_token(asked: _Asked, item: Item) -> _Asked:
    """The prompt with what all answers share, and of each answer the next token."""
    question = asked.question
    every = [list(a) for a in (*question.answers, *question.against)]
    shared = shared_beginning(every) if len(every) > 1 else []
    if any(len(a) == len(shared) for a in every):
        raise ValueError(
            f"answers to {_shown(item.clean)} do not differ in one token: one is the beginning of all others"
        )
    if question.positions != (len(asked.clean) - 1,):
        raise ValueError(
            f"answers to {_shown(item.clean)} are read at {question.positions}: the first token that differs is read "
            "after the last"
        )
    n = len(shared)
    answers, against = (
        tuple((a[n],) for a in some) for some in (question.answers, question.against)
    )
    both = {a for a in answers if a in against}
    if both:
        raise ValueError(
            f"answers to {_shown(item.clean)} begin with the same token as what they are against: feed them in whole "
            "(feeding 'fed')"
        )
    made = replace(
        question, positions=(len(asked.clean) - 1 + n,), answers=answers, against=against
    )
    other = None if asked.corrupted is None else (*asked.corrupted, *shared)
    return _Asked((*asked.clean, *shared), other, made)


def _check_fed(asked: Sequence[_Asked], items: Sequence[Item], name: str) -> None:
    for q, item in zip(asked, items, strict=True):
        if q.question.positions is None or len(q.question.positions) != 1 or not q.question.answers:
            raise ValueError(
                f"item {_shown(item.clean)} of task {name}: answers of several tokens are read at one position, and "
                "there must be one"
            )


def shared_beginning(every: Sequence[Sequence[int]]) -> list[int]:
    """What all of some sequences begin with.

    >>> shared_beginning([[1, 2, 3], [1, 2, 4]])
    [1, 2]
    """
    found = []
    for column in zip(*every, strict=False):
        if len(set(column)) > 1:
            break
        found.append(column[0])
    return found


def _shown(words: Words) -> str:
    text = words if isinstance(words, str) else " ".join(map(str, words))
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…")
