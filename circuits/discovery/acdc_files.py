"""The edges that ACDC keeps, from the files that it writes, in the names of `formats`.

ACDC's graph has more edges than the paths from part to part: inside a head from the input of its queries to its
queries, and inside an MLP from its input to its output. A path is kept if it leads into an input whose inner edge is
kept too.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from circuits.files import check_packed
from circuits.json_files import read_bytes

_Node = tuple[str, int | None]
"""A hook point of TransformerLens, and the head."""

_INNER = re.compile(r"blocks\.[0-9]+\.(attn\.hook_[qkv]|attn\.hook_result|hook_mlp_out)")
"""What no path leads into: the ends of edges inside a part."""

_WRITES = {"attn.hook_result": "a{layer}.h{head}", "hook_mlp_out": "m{layer}"}
_READS = {f"hook_{x}_input": "a{layer}.h{head}<" + x + ">" for x in "qkv"}
_READS |= {"hook_resid_mid": "m{layer}", "hook_mlp_in": "m{layer}"}
_EMBEDDINGS = {
    "blocks.0.hook_resid_pre": "input",
    "hook_embed": "token",
    "hook_pos_embed": "position",
}


def read_plain(path: Path) -> Any:
    """What a file of `torch.save` holds, if that is plain data.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or would run code.
    """
    if not path.is_file():
        raise FileNotFoundError(f"file {str(path)!r} does not exist or is not a file")
    check_packed(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # they are about old pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError, IndexError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError,
        AttributeError, TypeError,
    ) as error:  # fmt: skip
        raise ValueError(
            f"file {str(path)!r} is not a complete file of plain data ({type(error).__name__}): expected one that "
            "torch.save wrote, without objects of other classes"
        ) from error


def read_subgraph(path: Path, n_layers: int) -> tuple[dict[str, float], list[str]]:
    """The scores of edges, if the file has any, and the edges of its circuit.

    Args:
        path: `.pth`, whether each edge is there (`save_subgraph`); or `.pkl`, the edges that are, with the effect of
            each (`save_edges`): edges that are not in it have no score, so none are returned.
        n_layers: the model's number of layers.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or holds anything else.
    """
    what = f"file {str(path)!r}"
    if path.suffix == ".pth":
        found = read_plain(path)
        if not isinstance(found, Mapping) or not all(isinstance(v, bool) for v in found.values()):
            raise ValueError(f"{what}: expected a dictionary from edges to true or false")
        edges = [edge for edge, there in found.items() if there]
    else:
        edges = list(_pickled(path, what))
    return {}, list(dict.fromkeys(_paths(edges, n_layers, what)))


def _paths(edges: Iterable[Any], n_layers: int, what: str) -> Iterator[str]:
    """The names of the paths among ACDC's edges; `token` and `position` where it has them apart."""
    read = [_ends(edge, what) for edge in edges]
    computed = {sender for receiver, sender in read if _INNER.fullmatch(receiver[0])}
    for receiver, sender in read:
        if _INNER.fullmatch(receiver[0]):
            continue
        target = _target(receiver, n_layers, what)
        # A file without edges inside parts says nothing of them.
        if target == "logits" or not computed or receiver in computed:
            yield f"{_source(sender, what)}->{target}"


def _ends(edge: Any, what: str) -> tuple[_Node, _Node]:
    """The receiver and the sender of an edge."""
    if (
        not isinstance(edge, tuple | list)
        or len(edge) != 4
        or not all(isinstance(edge[i], str) for i in (0, 2))
    ):
        raise ValueError(f"{what}: edge {edge!r} is no receiver, its index, sender and its index")
    return (edge[0], _head(edge[1], what)), (edge[2], _head(edge[3], what))


def _head(index: Any, what: str) -> int | None:
    """The head of an index `[:, :, head]`; None of `[:]`."""
    index = index.hashable_tuple if isinstance(index, _Index) else index
    match tuple(index) if isinstance(index, tuple | list) else index:
        case (None,):
            return None
        case (None, None, int(head)):
            return head
    raise ValueError(
        f"{what}: index {index!r} is neither [:] nor [:, :, head] (no edges by position are read)"
    )


def _source(node: _Node, what: str) -> str:
    return _EMBEDDINGS.get(node[0]) or _placed(node, _WRITES, what)


def _target(node: _Node, n_layers: int, what: str) -> str:
    if node[0] == f"blocks.{n_layers - 1}.hook_resid_post":
        return "logits"
    return _placed(node, _READS, what)


def _placed(node: _Node, names: Mapping[str, str], what: str) -> str:
    """A part's name."""
    match = re.fullmatch(r"blocks\.([0-9]+)\.(.*)", node[0])
    form = None if match is None else names.get(match[2])
    if match is None or form is None or ("{head}" in form) != (node[1] is not None):
        raise ValueError(f"{what}: no part of a transformer is at {node[0]} (head {node[1]})")
    return form.format(layer=match[1], head=node[1])


# --- pickles -----------------------------------------------------------------------------------------


class _Index:
    """An index of ACDC's, as pickled; a copy without methods."""

    hashable_tuple: Any = None


class _Names(pickle.Unpickler):
    """Reads plain data, and ACDC's indices without their class: nothing of a file is run."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("acdc.") and name == "TorchIndex":
            return _Index
        if (module, name) == ("builtins", "slice"):
            return slice
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def _pickled(path: Path, what: str) -> Iterator[Any]:
    """The edges of a pickled list of edges, each with its effect."""
    try:
        found = _Names(io.BytesIO(read_bytes(path, what))).load()
    except (
        pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError, TypeError,
        UnicodeDecodeError, ImportError, MemoryError, OverflowError,
    ) as error:  # fmt: skip
        if isinstance(error, ValueError) and str(error).startswith(what):
            raise
        raise ValueError(
            f"{what} is no complete list of ACDC's edges ({type(error).__name__}: {error}): expected edges with their "
            "effects, and nothing else"
        ) from error
    if not isinstance(found, list) or not all(isinstance(e, tuple) and len(e) == 2 for e in found):
        raise ValueError(f"{what}: expected a list of edges, each with its effect")
    return (edge for edge, _ in found)
