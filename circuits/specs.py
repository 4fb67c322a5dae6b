"""How people name models and data, and the one form in which names are compared; imports nothing of the package.

A name may hold a path, and a path may hold the characters that separate the parts of a name (`:` and `+`): whatever
exists as a whole is not taken apart.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

IMAGE_COLUMNS = ("image", "img", "images", "pixel_values", "x", "x_test", "x_train", "data")
TEXT_COLUMNS = ("input_ids", "tokens", "text", "texts", "content", "sentence")
"""What arrays and columns of images and texts are usually called, the likeliest first."""


def usual_column(names: Sequence[str]) -> str:
    """Which of some arrays or columns is meant if none is named; empty if that is not clear.

    >>> usual_column(["labels", "images"]), usual_column(["only"]), usual_column(["a", "b"])
    ('images', 'only', '')
    """
    if len(names) == 1:
        return names[0]
    return next((c for c in (*IMAGE_COLUMNS, *TEXT_COLUMNS) if c in names), "")


def split_key(text: str) -> tuple[str, str]:
    """The path and the key of `PATH[:KEY]`; the key is empty if there is none, or if the whole is a path.

    >>> split_key("/no/such/a:b.npz:images")
    ('/no/such/a:b.npz', 'images')
    """
    cuts = [i for i in range(len(text) - 1, 0, -1) if text[i] == ":"]
    if not cuts or _exists(text):
        return text, ""
    there = next((i for i in cuts if _exists(text[:i])), None)
    # A key of a file that is not there has no folders: what follows a colon and has one belongs to the path.
    if there is None and "/" in text[cuts[0] :]:
        return text, ""
    cut = cuts[0] if there is None else there
    return text[:cut], text[cut + 1 :]


def python_spec(text: str) -> str:
    """`python:FILE.py:FUNCTION` of what may be written without `python:`, with the file's whole path.

    Anything else, such as `python:MODULE:FACTORY`, is returned as it is.

    >>> python_spec("/tmp/net.py:make")
    'python:/tmp/net.py:make'
    >>> python_spec("python:package.module:make")
    'python:package.module:make'
    """
    file, function = split_key(text.removeprefix("python:"))
    if not file.endswith(".py"):
        return text
    place = str(Path(file).expanduser().resolve())
    return ":".join(["python", place, *([function] if function else [])])


def runs_code(text: str) -> bool:
    """Whether loading a model or data of this name runs code of the person who wrote it.

    >>> runs_code("net.py:make"), runs_code("shapes")
    (True, False)
    """
    return any(python_spec(part).startswith("python:") for part in (text, *split_attached(text)))


def normal_data(text: str) -> str:
    """The one form of a name of data: paths are whole, and links in them are followed.

    >>> normal_data("tokens:/tmp/../tmp/stories.txt")
    'tokens:/tmp/stories.txt'
    >>> normal_data("photos")
    'photos'
    """
    scheme, _, rest = text.partition(":")
    if rest and scheme in ("folder", "tokens"):
        return f"{scheme}:{Path(rest).expanduser().resolve()}"
    if rest and scheme in ("npz", "hf"):
        path, key = split_key(rest)
        if scheme == "npz" and key and key == _usual_array(path):
            key = ""
        return ":".join([scheme, str(Path(path).expanduser().resolve()), *([key] if key else [])])
    return python_spec(text)


def _usual_array(path: str) -> str:
    """The array of an `.npz` file that is taken if none is named; empty if there is none, or no such file."""
    try:
        with zipfile.ZipFile(os.path.expanduser(path)) as file:
            return usual_column([name.removesuffix(".npy") for name in file.namelist()])
    except (OSError, zipfile.BadZipFile):
        return ""


def split_attached(text: str) -> list[str]:
    """The parts of `MODEL+AUTOENCODER+…`; a path that exists keeps the `+` in it.

    >>> split_attached("shapes+sae/one+sae/two")
    ['shapes', 'sae/one', 'sae/two']
    """
    words = text.split("+")
    found = []
    while words:
        n = next((n for n in range(len(words), 1, -1) if _is_path("+".join(words[:n]))), 1)
        found.append("+".join(words[:n]))
        words = words[n:]
    return found


def _is_path(text: str) -> bool:
    """Whether a text, or what is left of it without its scheme and key, is a path that exists."""
    paths = [text, text.partition(":")[2]]
    # A `+` in what follows the path (`own.py:net+sae/one`) is none of the path's.
    cuts = [path.rpartition(":") for path in paths]
    paths += [path for path, _, key in cuts if "+" not in key]
    return any(path and _exists(path) for path in paths)


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))  # of a `Path`, a name that is too long raises
