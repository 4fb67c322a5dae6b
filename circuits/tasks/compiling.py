"""Compiles items, as people write them, into a task for a model: texts become tokens, spans become positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from circuits.checks import clipped
from circuits.examples import Examples, encoded, whole
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.tasks.items import Item, Words
from circuits.tasks.metrics import Metric, as_metric
from circuits.tasks.task import Feeding, Question, Task, default_metric

SHOWN = 60


@dataclass(frozen=True)
class _TokenItem:
    """One item as the model's tokens."""

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
    """Compile items into a task for a model.

    Args:
        model: a model that takes tokens.
        items: at least one.
        name: the task's name.
        metric: what is measured. By default the logit difference if there are wrong answers, else the cross-entropy.
        feeding: how answers are read; by default `one` if every answer has one token, else `fed`.
        seed: seed of the split into halves.
        about: one sentence on what the model does.
        left_out: what the items' generator left out, by reason.

    Raises:
        ValueError: if an item cannot be encoded, its counterpart has another length, the tokenizer joins an answer to
            the end of the prompt, or positions or spans lie outside the text.
    """
    spec = model.input
    if not isinstance(spec, TokenInput):
        raise ValueError(f"model {model.name} takes images: items of text need a token model")
    if not items:
        raise ValueError(f"task {name} has no items: expected at least one")
    tokenized = [_tokenized(spec, item) for item in items]
    longest = max(
        (len(a) for q in tokenized for a in (*q.question.answers, *q.question.against)), default=1
    )
    if feeding is None:
        feeding = "one" if longest == 1 else "fed"
    if feeding == "one" and longest > 1:
        raise ValueError(
            f"task {name} has an answer of {longest} tokens: expected feeding 'fed' (all of its tokens) or 'first' "
            "(the first token that differs)"
        )
    if feeding == "first":
        tokenized = [_cut_to_first_token(q, item) for q, item in zip(tokenized, items, strict=True)]
    if feeding == "fed":
        _check_fed(tokenized, items, name)
    paired = [q.corrupted is not None for q in tokenized]
    if any(paired) and not all(paired):
        lacking = items[paired.index(False)]
        raise ValueError(
            f"item {_shown(lacking.clean)} of task {name} has no counterpart: expected one for every item or for none"
        )
    questions = tuple(q.question for q in tokenized)
    names = tuple(_shown(item.clean) for item in items)
    clean = Examples.texts(model, [q.clean for q in tokenized], names)
    other = (
        Examples.texts(model, [q.corrupted or () for q in tokenized], names)
        if all(paired)
        else None
    )
    return Task(
        name, clean, questions, default_metric(questions, feeding) if metric is None else as_metric(metric), other,
        "one" if feeding == "first" else feeding, seed, about=about, left_out=left_out or {},
    )  # fmt: skip


def _tokenized(spec: TokenInput, item: Item) -> _TokenItem:
    clean = _tokens(spec, item.clean)
    corrupted = None if item.corrupted is None else _tokens(spec, item.corrupted)
    if corrupted is not None and len(corrupted) != len(clean):
        raise ValueError(
            f"counterpart {_shown(item.corrupted or ())} has {len(corrupted)} tokens: expected {len(clean)}, as many "
            f"as {_shown(item.clean)} has"
        )
    if corrupted == clean:
        raise ValueError(
            f"counterpart of {_shown(item.clean)} is the same text: expected a different one"
        )
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
                f"label {far[0]} of {_shown(item.clean)} is not a token: expected 0 to {spec.n_vocab - 1}"
            )
    return _TokenItem(
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
        ValueError: if the tokenizer cannot encode the answer, or joins its beginning to the end of the prompt.
    """
    # Prompt and answer are encoded together: a tokenizer may split a word differently after a text than alone.
    if not isinstance(word, str):
        found = tuple(word)
    elif isinstance(prompt, str) and spec.encoder is not None:
        both = tuple(whole(spec, prompt + word))
        if both[: len(clean)] != clean:
            raise ValueError(
                f"answer {word!r} is joined to the end of {_shown(prompt)} by the tokenizer: expected an answer that "
                "starts a new token (put the space in front of the answer, not at the end of the prompt)"
            )
        found = both[len(clean) :]
    else:
        found = tuple(spec.encode(word))
    if not found:
        raise ValueError(
            f"answer {word!r} to {_shown(prompt)} has no tokens: expected at least one"
        )
    if len(clean) + len(found) - 1 > spec.n_ctx:
        raise ValueError(
            f"answer {word!r} to {_shown(prompt)} needs {len(clean) + len(found) - 1} tokens: the model takes at most "
            f"{spec.n_ctx}"
        )
    spec.check(_row(found))
    return found


def _check_distinct(
    item: Item, answers: Sequence[tuple[int, ...]], against: Sequence[tuple[int, ...]]
) -> None:
    """Raise ValueError if two answers have the same tokens: it would count twice, or both as right and as wrong."""
    every = [*answers, *against]
    words = [*item.answers, *item.against]
    for i, tokens in enumerate(every):
        first = every.index(tokens)
        if first < i:
            both = first < len(answers) <= i
            what = "is both a right and a wrong answer" if both else "is given twice"
            raise ValueError(f"answer {words[i]!r} to {_shown(item.clean)} {what}")


def _row(tokens: Sequence[int]) -> Tensor:
    return torch.tensor([list(tokens)], dtype=torch.int64)


def _positions(item: Item, spans: dict[str, tuple[int, int]], n: int) -> tuple[int, ...]:
    if isinstance(item.positions, str):
        if item.positions == "all":
            return tuple(range(n))
        return (n - 1,) if item.positions == "last" else (spans[item.positions][1] - 1,)
    far = [p for p in item.positions if not -n <= p < n]
    if far:
        raise ValueError(
            f"position {far[0]} is outside {_shown(item.clean)}: expected {-n} to {n - 1}"
        )
    made = tuple(p % n for p in item.positions)
    if len(set(made)) != len(made):
        raise ValueError(
            f"positions {list(item.positions)} of {_shown(item.clean)} are not distinct: expected each once"
        )
    return made


def _span(spec: TokenInput, item: Item, name: str, clean: tuple[int, ...]) -> tuple[int, int]:
    """A span in tokens: from the token that holds its first character to the last that ends within it, at least one."""
    start, stop = item.spans[name]
    if not 0 <= start < stop <= len(item.clean):
        raise ValueError(
            f"span {name!r} of {_shown(item.clean)} is {start} to {stop}: expected a range within 0 to "
            f"{len(item.clean)}"
        )
    if not isinstance(item.clean, str):
        return start, stop
    # The text before a character accounts for as many tokens as its own encoding has in common with the whole text's.
    # A token that crosses the start of the span is not among those, so the span includes it.
    before, upto = (_tokens_before(spec, item.clean[:at], clean) for at in (start, stop))
    return min(before, len(clean) - 1), max(upto, before + 1)


def _tokens_before(spec: TokenInput, text: str, clean: tuple[int, ...]) -> int:
    """How many tokens of the whole text the beginning `text` accounts for."""
    # The empty text still accounts for a beginning-of-text token; `encoded` refuses texts without a word.
    if not text:
        return int(spec.bos is not None and clean[:1] == (spec.bos,))
    own = (
        encoded(spec, text).tolist() if text.strip() else [spec.bos] if spec.bos is not None else []
    )
    return len(shared_beginning([own, list(clean)]))


def _cut_to_first_token(tokenized: _TokenItem, item: Item) -> _TokenItem:
    """The item with the tokens that all answers share moved into the prompt, and each answer cut to its next token."""
    question = tokenized.question
    every = [list(a) for a in (*question.answers, *question.against)]
    shared = shared_beginning(every) if len(every) > 1 else []
    if any(len(a) == len(shared) for a in every):
        raise ValueError(
            f"answers to {_shown(item.clean)}: one is the beginning of all others, so no first token tells them apart"
        )
    if question.positions != (len(tokenized.clean) - 1,):
        raise ValueError(
            f"answers to {_shown(item.clean)} are read at {question.positions}: feeding 'first' reads at the last "
            "position only"
        )
    n = len(shared)
    answers, against = (
        tuple((a[n],) for a in some) for some in (question.answers, question.against)
    )
    both = {a for a in answers if a in against}
    if both:
        raise ValueError(
            f"answers to {_shown(item.clean)} begin with the same token as a wrong answer: compare whole answers "
            "(feeding 'fed')"
        )
    made = replace(
        question, positions=(len(tokenized.clean) - 1 + n,), answers=answers, against=against
    )
    other = None if tokenized.corrupted is None else (*tokenized.corrupted, *shared)
    return _TokenItem((*tokenized.clean, *shared), other, made)


def _check_fed(tokenized: Sequence[_TokenItem], items: Sequence[Item], name: str) -> None:
    for q, item in zip(tokenized, items, strict=True):
        if q.question.positions is None or len(q.question.positions) != 1 or not q.question.answers:
            raise ValueError(
                f"item {_shown(item.clean)} of task {name}: with answers of several tokens, expected one counted "
                "position and at least one answer"
            )


def shared_beginning(every: Sequence[Sequence[int]]) -> list[int]:
    """The longest beginning that all sequences share.

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
    return repr(clipped(text, SHOWN))
