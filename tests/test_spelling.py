"""Tokens as people read them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from circuits.stimuli.spelling import in_bytes, marked, word_of, words_of


def of_bytes() -> tuple[str, ...]:
    """A vocabulary of all bytes in GPT-2's letters, as `tokenizers` writes them, and tokens that no text has."""
    split = ByteLevel(add_prefix_space=False, use_regex=False)

    def letters(text: str) -> str:
        return "".join(part for part, _ in split.pre_tokenize_str(text))

    texts = [
        chr(i)
        for i in (
            *range(0x800),
            *range(0x1000, 0xD000, 0x1000),
            0xE000,
            0xF000,
            *range(0x10000, 0x110000, 0x40000),
        )
    ]
    by_byte = {b: x for text in texts for b, x in zip(text.encode(), letters(text), strict=True)}
    words = [by_byte.get(b, chr(b)) for b in range(256)]  # the others are in no text
    words += [letters(" John’s")]
    return (*(w.replace("Ġ", " ").replace("Ċ", "\n") for w in words), "<|im_start|>", "<日>")


BYTES = of_bytes()
WORDS = ("é", "Ġ", " a", "日")


@given(st.text(max_size=12))
def test_a_text_in_bytes_is_read_as_it_was_written(text: str) -> None:
    words = words_of(BYTES, list(text.encode()))
    assert "".join(w for w in words if w != "▯") == text.replace("▯", "")
    assert len(words) == len(text.encode()), "one a token"


def test_a_token_by_itself() -> None:
    assert in_bytes(BYTES)
    assert not in_bytes(WORDS)
    assert word_of(BYTES, 256) == " John’s"
    assert word_of(BYTES, 0xE2) == "⟨E2⟩", "a part of a character"
    assert word_of(BYTES, 257) == "<|im_start|>"
    assert word_of(BYTES, 258) == "<日>", "what no byte stands for is left as it is"
    assert [word_of(WORDS, i) for i in range(4)] == list(WORDS)
    assert word_of((), 7) == "7"


def test_a_character_is_at_the_token_that_completes_it() -> None:
    assert words_of(BYTES, [*"a’".encode(), 257, 0xE2, 0x61]) == [
        "a",
        "▯",
        "▯",
        "’",
        "<|im_start|>",
        "▯",
        "�a",
    ]


def test_blanks_are_marked() -> None:
    assert marked(" a b\n\t") == "·a·b↵⇥"
