"""What errors mean, in one line of bounded length, for whoever shows them: the command line, the app, other errors.

Errors that this library raises say what is wrong already. Those of Python and of other libraries speak of codecs and
archives; what they mean to a person is said here, once for all.
"""

from __future__ import annotations

import errno
import linecache
import os
import pickle
import re
import sqlite3
import struct
import sysconfig
import traceback
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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
    (
        re.compile(r"allow_pickle|pickled \(object\)|interpret file .* as a pickle"),
        "it holds Python objects, or is not an array file",
    ),
    (re.compile("(?i)not a zip file|No data left in file"), "it is damaged, or not an array file"),
    (re.compile("embedded null (byte|character)"), "a path holds a NUL character"),
    (re.compile("maximum recursion depth"), "it is nested too deeply"),
    (re.compile(r"Exceeds the limit \([0-9]+ digits\)"), "a number has more than 4300 digits"),
    (re.compile("Symlink loop"), "a symbolic link leads to itself"),
)


def line(error: BaseException) -> str:
    """What an error says, in one line of at most `LONGEST` characters.

    >>> line(UnicodeDecodeError("utf-8", b"caf\\xe9", 3, 4, "unexpected end of data"))
    'it is not text in UTF-8 (byte 0xe9 at position 3)'
    >>> line(KeyError("unknown site 'a'"))
    "unknown site 'a'"
    """
    said = _meaning(error)
    if said is None:
        said = f"{type(error).__name__}: {error} (CIRCUITS_DEBUG=1 shows where)"
    return shortened(said)


def shortened(text: str) -> str:
    """A message in one line of at most `LONGEST` characters, in which each long value is cut in its middle.

    >>> shortened("unknown site '" + "a" * 4000 + "': there is none")[-26:]
    "aaaaaaaaaa': there is none"
    """
    made = _LONG.sub(lambda found: _cut(found[0], 80, 40), " ".join(text.split()))
    return _cut(made, LONGEST - 180, 179) if len(made) > LONGEST else made


def _cut(text: str, first: int, last: int) -> str:
    return f"{text[:first]}…{text[-last:]}"


def _meaning(error: BaseException) -> str | None:
    """What a known error says; None for one that is not known to say it in words."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"it is not text in UTF-8 (byte {byte:#04x} at position {error.start})"
    if isinstance(error, UnicodeEncodeError):
        return f"text {error.object!r} holds characters that {error.encoding} cannot write"
    if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
        asked = re.search("allocate ([0-9.]+ [A-Za-z]+)", text)
        size = f" for {asked[1]}" if asked else ""
        return f"not enough memory{size}: fewer or smaller inputs, or a smaller --batch, take less"
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
    return None


def _reason(error: OSError) -> str:
    known = {
        errno.EACCES: "there is no permission to read or write it",
        errno.EPERM: "there is no permission to read or write it",
        errno.ENOSPC: "the disk is full",
        errno.ENAMETOOLONG: "the name is too long",
        errno.ELOOP: "a symbolic link leads to itself",
    }
    return known.get(error.errno or 0) or (error.strerror or type(error).__name__).lower()


# --- whose code failed ----------------------------------------------------------------------------

_NOT_THEIRS = (
    str(Path(__file__).parent) + os.sep,
    *(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    "<",
)
"""Where code is that no person who names a model or dataset of their own has written."""


@contextmanager
def their_code(what: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    """Let whatever a person's own code raises inside the block be said to be theirs, with its file and line.

    That is also true of `sys.exit()`, and of a KeyboardInterrupt that they raise; Ctrl-C stays what it is.

    Args:
        what: the subject of the sentence: `data 'python:a.py:f': f()`.
        kind: of the error that is raised instead.
    """
    try:
        yield
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) and not raises_interrupt(error):
            raise
        raise kind(f"{what} {raised(error)}") from error


def raised(error: BaseException) -> str:
    """What a person's own code did, with the file and line of that code where they are known."""
    where = raised_at(error)
    return f"{_deed(error)} ({where})" if where else _deed(error)


def _deed(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"called sys.exit({error.code!r})"
    if isinstance(error, KeyboardInterrupt):
        return "raised KeyboardInterrupt"
    if isinstance(error, SyntaxError):
        text = "it is not text in UTF-8" if "codec" in error.msg else error.msg.partition(" (")[0]
        return f"is not Python: {text}"
    # A key is quoted as Python quotes it: in words of its own it could be taken for a sentence.
    said = (
        str(error)
        if isinstance(error, LookupError)
        else str(error) and (_meaning(error) or str(error))
    )
    return f"raised {type(error).__name__}{f': {shortened(said)}' if said else ''}"


def raised_at(error: BaseException) -> str:
    """The file and line of a person's own code at which an error was raised; empty if no such code took part."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}" if error.lineno else error.filename
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_theirs(frame.filename):
            return f"{frame.filename}, line {frame.lineno}"
    return ""


def is_theirs(file: str) -> bool:
    """Whether a file of code is none of this package, of Python and of installed packages."""
    return not file.startswith(_NOT_THEIRS)


def raises_interrupt(error: KeyboardInterrupt) -> bool:
    """Whether the code itself raised what otherwise is Ctrl-C."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return "KeyboardInterrupt" in linecache.getline(last.filename, last.lineno or 0)
