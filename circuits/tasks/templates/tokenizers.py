"""Whether an item fits a tokenizer: words of one token, texts of equal length, answers that start a new token."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from circuits.models.adapter.inputs import TokenInput
from circuits.tasks.items import Item, Words

Tokenizer = Callable[[str], list[int]] | TokenInput | None
"""What turns text into tokens (`model.input`, or its `encode`); None accepts every text."""

UNKNOWN = "texts that the tokenizer cannot encode"
UNEQUAL = "texts whose counterpart has another number of tokens"
JOINED = "texts whose answers are joined to their end"
LONG = "texts with answers of several tokens"
SAME = "texts whose answers are the same token as what they are against"


class Reader:
    """How a tokenizer reads texts; without a tokenizer every text is accepted.

    Args:
        tokenizer: a model's input, its `encode`, or None.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = tokenizer.encode if isinstance(tokenizer, TokenInput) else tokenizer
        self._known: dict[str, tuple[int, ...] | None] = {}

    @property
    def blind(self) -> bool:
        """Whether there is no tokenizer."""
        return self._encode is None

    def tokens(self, text: str) -> tuple[int, ...] | None:
        """The tokens of a text; None if it cannot be encoded."""
        assert self._encode is not None, "there is a tokenizer"
        if text not in self._known:
            try:
                self._known[text] = tuple(self._encode(text))
            except ValueError:  # the vocabulary lacks a word
                self._known[text] = None
        return self._known[text]

    def after(self, prompt: str, word: str) -> tuple[int, ...] | None:
        """The tokens that a word adds to a prompt; None if it cannot be encoded or is joined to the prompt's end."""
        # Encoding the word alone is not enough: BPE merges depend on what stands before it, and a merge across the
        # border would change the prompt's own last token.
        own, whole = self.tokens(prompt), self.tokens(prompt + word)
        if own is None or whole is None or whole[: len(own)] != own:
            return None
        return whole[len(own) :]

    def single(self, prompt: str, word: str) -> bool:
        """Whether a word is one token after a prompt (or alone, if the vocabulary lacks the prompt's words)."""
        if self.blind:
            return True
        before = prompt if self.tokens(prompt) is not None else ""
        return len(self.after(before, word) or ()) == 1

    def singles(self, prompt: str, words: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The words that are one token after a prompt and a space, and the words that are not."""
        words = tuple(words)
        good = tuple(word for word in words if self.single(prompt, f" {word}"))
        return good, tuple(word for word in words if word not in good)

    def reason_unusable(self, item: Item, one_token: bool = True) -> str | None:
        """Why an item does not fit the tokenizer; None if it fits.

        Args:
            item: an item of text; its answers are texts that follow the clean one, or tokens.
            one_token: whether each answer has to be a single token.
        """
        if self.blind:
            return None
        assert isinstance(item.clean, str), "a tokenizer is for texts"
        own = self.tokens(item.clean)
        other = self.tokens(item.corrupted) if isinstance(item.corrupted, str) else own
        if own is None or other is None:
            return UNKNOWN
        if len(own) != len(other):
            return UNEQUAL
        answers, against = (self._each(item.clean, some) for some in (item.answers, item.against))
        every = [*answers, *against]
        if any(tokens is None for tokens in every):
            return JOINED
        if one_token and any(len(tokens or ()) != 1 for tokens in every):
            return LONG
        return SAME if set(answers) & set(against) else None

    def _each(self, prompt: str, words: Iterable[Words]) -> list[tuple[int, ...] | None]:
        return [self.after(prompt, word) if isinstance(word, str) else word for word in words]
