"""What errors mean, in one line of bounded length, for whoever shows them: the command line, the app, other errors.

Errors that this library raises say what is wrong already. Those of Python and of other libraries speak of codecs and
archives; what they mean to a person is said here, once for all.
"""

from __future__ import annotations

import errno
import pickle
import re
import sqlite3
import struct
import zlib
from tokenize import TokenError
from zipfile import BadZipFile

LONGEST = 480
"""How many characters the line of an error has at most."""

DAMAGED = (BadZipFile, EOFError, TokenError, zlib.error, struct.error, pickle.UnpicklingError)
"""What libraries raise, besides ValueError and OSError, for files that are cut off or of another kind."""

UNREADABLE = (*DAMAGED, OSError, ValueError, KeyError, SyntaxError, RecursionError, MemoryError)
"""What reading a damaged file can raise."""

_LONG = re.compile(r"'[^']{160,}'|\S{160,}")
_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|Unable to allocate", re.I
)
_HINTS = (
    (re.compile("pickle"), "it holds Python objects, or is not an array file"),
    (re.compile("(?i)not a zip file|No data left in file"), "it is damaged, or not an array file"),
    (re.compile("embedded null (byte|character)"), "a path holds a NUL character"),
    (re.compile("maximum recursion depth"), "it is nested too deeply"),
    (re.compile("Exceeds the limit"), "a number has more than 4300 digits"),
    (re.compile("Symlink loop"), "a symbolic link leads to itself"),
)


def line(error: BaseException) -> str:
    """What an error says, in one line of at most `LONGEST` characters.

    >>> line(UnicodeDecodeError("utf-8", b"caf\\xe9", 3, 4, "unexpected end of data"))
    'it is not text in UTF-8 (byte 0xe9 at position 3)'
    >>> line(KeyError("unknown site 'a'"))
    "unknown site 'a'"
    """
    return shortened(_meaning(error))


def shortened(text: str) -> str:
    """A message in one line of at most `LONGEST` characters, in which each long value is cut in its middle.

    >>> shortened("unknown site '" + "a" * 4000 + "': there is none")[-26:]
    "aaaaaaaaaa': there is none"
    """
    made = _LONG.sub(lambda found: _cut(found[0], 80, 40), " ".join(text.split()))
    return _cut(made, LONGEST - 180, 179) if len(made) > LONGEST else made


def _cut(text: str, first: int, last: int) -> str:
    return f"{text[:first]}…{text[-last:]}"


def _meaning(error: BaseException) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"it is not text in UTF-8 (byte {byte:#04x} at position {error.start})"
    if isinstance(error, UnicodeEncodeError):
        return f"text {error.object!r} holds characters that {error.encoding} cannot write"
    if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
        first = text.splitlines()[0] if text else "more was asked for than there is"
        return (
            f"not enough memory: {first} (fewer or smaller inputs, or a smaller --batch, take less)"
        )
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{str(error.filename)!r}: {_reason(error)}"
    if hint := next((said for known, said in _HINTS if known.search(text)), None):
        return hint
    if isinstance(error, DAMAGED):
        return f"a file is damaged or of another kind ({text or type(error).__name__})"
    if isinstance(error, sqlite3.Error):
        return f"a database cannot be read or written: {text}"
    if isinstance(error, ValueError | LookupError | TypeError | OSError | ImportError):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text} (CIRCUITS_DEBUG=1 shows where)"


def _reason(error: OSError) -> str:
    known = {
        errno.EACCES: "there is no permission to read or write it",
        errno.EPERM: "there is no permission to read or write it",
        errno.ENOSPC: "the disk is full",
        errno.ENAMETOOLONG: "the name is too long",
        errno.ELOOP: "a symbolic link leads to itself",
    }
    return known.get(error.errno or 0) or (error.strerror or type(error).__name__).lower()
