"""GGUF files as folders of the workspace that every loader of language models opens: converted once, then kept.

`transformers` unpacks the quantised numbers, undoes the order that llama.cpp gives the rows of queries and keys, and
makes the tokenizer. What it makes is written as float32 with its configuration, and `source.json`, which says what it
was made from. A folder is made under another name and renamed when it is whole: a process that is killed leaves nothing
that is taken for a model.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from circuits.environment import WORKSPACE
from circuits.files import write_json
from circuits.json_files import read_json
from circuits.locks import held
from circuits.memory import free_memory, in_bytes
from circuits.models.zoo.gguf_files import INSTALL, GGUFHeader, gguf_package, read_header
from circuits.models.zoo.packages import first_line, one_try, quiet
from circuits.models.zoo.weights_files import file_hash
from circuits.progress import Progress
from circuits.tensors import write_tensors
from circuits.workspace import DIGITS, Workspace

log = logging.getLogger(__name__)

SOURCE = "source.json"
"""The file of a converted folder that says what it was made from; it is there if the folder is whole."""

WEIGHTS = "model.safetensors"

COPIES = 2.2
"""How many floats of 4 bytes are in memory for each number of a file while it is converted (measured: SmolLM2)."""

RESERVE = 50_000_000
"""Bytes on disk that are kept free for the tokenizer and for whatever else is written."""

PATIENCE = 900.0
"""Seconds for which to wait for another process that converts the same file."""

_FAULTS = (
    OSError, ValueError, KeyError, TypeError, RuntimeError, IndexError, AttributeError, ArithmeticError, AssertionError,
    NotImplementedError,
)  # fmt: skip
"""What transformers and gguf raise for files that they cannot use."""


def memory_needed(n_numbers: int) -> int:
    """Bytes of memory that converting a file with that many numbers takes, about."""
    return round(4 * COPIES * n_numbers)


def disk_needed(n_numbers: int) -> int:
    """Bytes on disk that the converted folder takes, at most."""
    return 4 * n_numbers + RESERVE


def cost(header: GGUFHeader) -> str:
    """What converting a file takes, in words."""
    return (
        f"{in_bytes(memory_needed(header.n_numbers))} of memory while it is converted to float32, and "
        f"{in_bytes(disk_needed(header.n_numbers))} on disk"
    )


def gguf_folder(path: Path, place: Workspace) -> Path:
    """Where a GGUF file is converted to: named by the file's SHA-256, so that a copy elsewhere is the same model."""
    return place.converted_folder(f"gguf-{_remembered_hash(path, _notes(place))[:DIGITS]}")


def is_converted(folder: Path) -> bool:
    """Whether a folder holds a whole converted model."""
    return (folder / SOURCE).is_file()


def read_source(folder: Path, what: str, again: str) -> dict[str, Any]:
    """What a converted folder says it was made from, once its files are seen to be what they were.

    The weights are hashed again only if their size or time of change is another; folders that were made before hashes
    were noted are known by the sizes of their files alone.

    Args:
        folder: the folder.
        what: its name in error messages.
        again: what to do to have it made again, for messages.

    Raises:
        ValueError: if a file was changed, or is missing.
    """
    stated = read_json(folder / SOURCE)
    sizes = stated.get("files") if isinstance(stated, dict) else None
    if not isinstance(sizes, dict) or WEIGHTS not in sizes:
        raise ValueError(f"{what}: {str(folder / SOURCE)!r} is damaged: {again}")
    for name, expected in sizes.items():
        path = folder / Path(name).name
        found = path.stat().st_size if path.is_file() else None
        if found != expected:
            has = "is missing" if found is None else f"has {found} bytes, expected {expected}"
            raise ValueError(f"{what}: {str(path)!r} {has}: {again}")
    hashes = stated.get("sha256")
    for name, expected in hashes.items() if isinstance(hashes, dict) else ():
        path = folder / Path(name).name
        found = _remembered_hash(path, _beside(folder)) if name == WEIGHTS else file_hash(path)
        if found != expected:
            raise ValueError(f"{what}: {str(path)!r} was changed since it was written: {again}")
    return stated


def convert(
    path: Path, folder: Path, what: str, about: Mapping[str, Any], progress: Progress | None = None
) -> bool:
    """Convert a GGUF file into a folder, unless that is done.

    Args:
        path: the file.
        folder: where to; its parent may hold a hidden lock and a hidden folder of the same name while it is made.
        what: its name in error messages.
        about: what else `source.json` is to say, such as the package that the file came in.
        progress: called with how many tensors are unpacked, and how many there are.

    Returns:
        Whether it was converted now; another process may have been faster.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if the package gguf is not installed.
        ValueError: if it is no whole GGUF file, of an architecture or quantisation that is not known, or lacks weights.
        OSError: if there is not enough free memory or space, or the workspace cannot be written.
        BlockingIOError: if another process has been converting it for longer than `PATIENCE`.
    """
    header = read_header(path, what)
    gguf_package(what)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.parent / f".{folder.name}.lock"
    with held(lock, f"{what} is being converted by another process", PATIENCE):
        if is_converted(folder):
            return False
        check_room(header.n_numbers, folder.parent, what)
        made = folder.parent / f".{folder.name}.tmp"
        remove(made)  # what is left of a process that was killed: whoever lives has the lock
        made.mkdir()
        try:
            stated = _write(path, header, made, what, progress)
            files = sorted(made.iterdir())
            contents = {
                "files": {p.name: p.stat().st_size for p in files}, "sha256": {p.name: file_hash(p) for p in files},
            }  # fmt: skip
            write_json(made / SOURCE, {**about, **stated, **contents})
            _flush(made)
            remove(folder)  # damaged: it has no source.json
            made.rename(folder)
            _remember(folder / WEIGHTS, contents["sha256"][WEIGHTS], _beside(folder))
        finally:
            remove(made)
    return True


def convert_gguf(
    spec: str,
    progress: Progress | None = None,
    begin: Callable[[str], object] | None = None,
) -> Path:
    """Convert the file of a model `gguf:PATH` into the workspace, unless that is done; loading it does so too.

    Args:
        spec: the model's name.
        progress: called with how many of the file's tensors are unpacked, and how many there are.
        begin: called with what converting takes, in words, if it is to be done now.

    Returns:
        The folder in the workspace.

    Raises:
        FileNotFoundError, ValueError, ImportError, OSError: as `convert`.
    """
    what, path = f"model {spec!r}", Path(spec.removeprefix("gguf:")).expanduser()
    if not path.is_file() or not is_converted(gguf_folder(path, Workspace.default())):
        header = read_header(path, what)
        if begin:
            begin(f"{what} is converted once: {cost(header)}")
        folder = gguf_folder(path, Workspace.default())
        convert(path, folder, what, {"path": str(path.resolve())}, progress)
    return gguf_folder(path, Workspace.default())


def check_room(n_numbers: int, folder: Path, what: str, more: int = 0) -> None:
    """Raise unless there is memory to convert a file, and space in a folder for the result.

    Args:
        n_numbers: how many numbers the file has.
        folder: where the result goes.
        what: the model's name in error messages.
        more: bytes on disk that are needed besides, such as for the file itself.

    Raises:
        OSError: if there is too little space, or too little free memory, as far as the machine says how much there is.
    """
    free = free_memory()
    if free is not None and free < memory_needed(n_numbers):
        # No MemoryError: of one, people are told to take fewer inputs.
        raise OSError(
            f"{what} needs {in_bytes(memory_needed(n_numbers))} of memory to be converted ({n_numbers} numbers), and "
            f"{in_bytes(free)} are free: end other programs, or convert it on a larger machine"
        )
    there = next(p for p in (folder, *folder.parents) if p.exists())
    needed = disk_needed(n_numbers) + more
    if (space := shutil.disk_usage(there).free) < needed:
        raise OSError(
            f"{what} needs {in_bytes(needed)} in {str(folder)!r}, and {in_bytes(space)} are free: name "
            f"another workspace with --workspace or {WORKSPACE}"
        )


def _write(
    path: Path, header: GGUFHeader, made: Path, what: str, progress: Progress | None
) -> dict[str, Any]:
    """Write weights, configuration and tokenizer into a folder; returns what is to be noted of it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # A folder of its own: transformers looks next to the file for other files, which are none of the model's.
    alone = made / "gguf"
    alone.mkdir()
    name = "model.gguf"
    (alone / name).symlink_to(path.resolve())
    try:
        with _by_transformers(what, header), _counted(progress):
            config: Any = AutoConfig.from_pretrained(
                alone, gguf_file=name, trust_remote_code=False, local_files_only=True
            )
            _check_size(config, header, what)
            tokenizer: Any = AutoTokenizer.from_pretrained(
                alone, gguf_file=name, trust_remote_code=False, local_files_only=True
            )
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                alone, gguf_file=name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False,
                local_files_only=True,
            )  # fmt: skip
            module, found = loaded
        if lacking := sorted(map(str, found["missing_keys"])):
            raise ValueError(
                f"{what}: {str(path)!r} lacks {len(lacking)} weights of {type(module).__name__}, the first of them "
                f"{lacking[0]!r}"
            )
        weights = _untied(module)
        if broken := next((k for k, v in weights.items() if not v.isfinite().all()), ""):
            raise ValueError(
                f"{what}: {str(path)!r} is damaged: numbers of {broken!r} are infinite or no numbers"
            )
        write_tensors(made / WEIGHTS, weights, {"format": "pt"})
        settings = module.config.to_dict()
        for passing in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            settings.pop(passing, None)
        settings["architectures"] = [type(module).__name__]
        write_json(made / "config.json", settings)
        tokenizer.save_pretrained(made)
    finally:
        remove(alone)
    return {
        "file": {"bytes": header.size, "sha256": file_hash(path)},
        "architecture": header.architecture,
        "kinds": header.kinds,
        "begins_texts": header.begins_texts,
        "made_by": {package: version(package) for package in ("gguf", "transformers", "torch")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _check_size(config: Any, header: GGUFHeader, what: str) -> None:
    """Raise ValueError if the model that a file describes has far more weights than the file, before it is made."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    wanted = sum(p.numel() for p in module.parameters())
    if wanted > 1.01 * header.n_numbers:
        raise ValueError(
            f"{what}: its file describes a {type(module).__name__} of {wanted} weights and holds {header.n_numbers} "
            "numbers: expected a file with all weights of the model"
        )


def _untied(module: Any) -> dict[str, Any]:
    """The weights of a module by name, each once: a tied one has its first name."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    kept = {}
    for name, tensor in module.state_dict().items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if place not in seen:
            kept[name] = tensor
        seen.add(place)
    return kept


@contextmanager
def _by_transformers(what: str, header: GGUFHeader) -> Iterator[None]:
    """Say in one line what transformers makes of a file; nothing is looked for on the hub."""
    import transformers

    try:
        with one_try(local=True), quiet(expected=True):
            yield
    except ImportError as error:
        raise ImportError(f"{what} needs a package ({first_line(error)}): {INSTALL}") from error
    except _FAULTS as error:
        if isinstance(error, ValueError) and what in str(error):
            raise  # it is our own
        raise ValueError(
            f"{what} of architecture {header.architecture!r} cannot be converted by transformers "
            f"{transformers.__version__}: {first_line(error)}"
        ) from error


@contextmanager
def _counted(progress: Progress | None) -> Iterator[None]:
    """Report the tensors that transformers unpacks, in the place of its own bar on stderr."""
    unpacking: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    before = unpacking.tqdm

    def counted(items: Any, *_: Any, **__: Any) -> Iterator[Any]:
        total = len(items)
        for done, item in enumerate(items):
            if progress:
                progress(done, total)
            yield item
        if progress:
            progress(total, total)

    unpacking.tqdm = counted
    try:
        yield
    finally:
        unpacking.tqdm = before


def _flush(folder: Path) -> None:
    """Have the files of a folder on the disk before the folder has its name."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Delete a file, a link (never what it leads to) or a folder of this module's, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def _notes(place: Workspace) -> Path:
    """The folder in which hashes of files are remembered."""
    return _beside(place.converted_folder("any"))


def _beside(folder: Path) -> Path:
    """The same, by the folder of a converted model."""
    return folder.parent / "hashes"


def _remembered_hash(path: Path, notes: Path) -> str:
    """SHA-256 of a file, which is computed again only if the file's size or time of change is another."""
    note, facts = _facts(path, notes)
    try:
        noted = read_json(note)
        if {key: noted[key] for key in facts} == facts and len(noted["sha256"]) == 64:
            return noted["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not hashed before, or by a process that was stopped
    found = file_hash(path)
    _remember(path, found, notes)
    return found


def _remember(path: Path, sha256: str, notes: Path) -> None:
    note, facts = _facts(path, notes)
    try:
        write_json(note, {**facts, "sha256": sha256})
    except OSError as error:  # a workspace that cannot be written may still be read
        log.debug("the hash of %s is not kept: %s", path, error)


def _facts(path: Path, notes: Path) -> tuple[Path, dict[str, Any]]:
    """Where a file's hash is noted, and what tells whether the file is still the same."""
    whole = path.resolve()
    stat = whole.stat()
    known = hashlib.sha256(str(whole).encode()).hexdigest()[:DIGITS]
    facts = {"path": str(whole), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return notes / f"{known}.json", facts
