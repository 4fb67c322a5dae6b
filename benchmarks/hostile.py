"""Thousands of hostile inputs to every command, file and page: does anything run, break, leak or lie?

Each input is a command line that works, with one or two of its words replaced (by numbers beyond any meaning, markup,
paths that lead elsewhere, names of code), or with one of its files damaged (cut, flipped, filled with other values, of
another kind), or the URL of a page of the app, or an upload. All are drawn from a seed, so that `--only N` repeats one.

What counts as a failure:

- a traceback, an exit code other than 0, 1 and 2, or more than a minute of work;
- a refusal (code 2) that is not one line of at most 600 characters, or that leaves the workspace changed;
- a number that is no number (`nan`) in what a successful command prints;
- code that runs although only a file named it (canaries write a file), a process that is started;
- anything written, renamed or deleted outside of the workspace and the output that was asked for;
- a connection to anywhere.

The last three are watched by an audit hook, which sees what Python does whichever library asks for it.

    python benchmarks/hostile.py --n 2000 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LONGEST = 600
"""Characters of a refusal."""

SECONDS = 60
"""After which an input counts as a hang."""

MEMORY = 12 * 2**30
"""Bytes of addresses that the process may have: what asks for more gets a MemoryError."""

CODE = "open({ran!r}, 'a').write(__file__ + chr(10))\ndef f():\n    return None\n"


# --- a workspace in which everything works ---------------------------------------------------------

LINES = """
models
sites cleanroom
harvest cleanroom --data npz:{I}/images.npz --sites line
harvest induction --data tokens:{I}/texts.txt --sites blocks.1.attn.hook_z
visualize cleanroom line:3 --steps 3 --size 24
examples cleanroom line:3
tune cleanroom line:3 --step 60
weights cleanroom curve:3
expand cleanroom gabor curve:3
families cleanroom line --size 20 --permutations 9 --least 2
families cleanroom --list
heads induction --texts 2 --length 12
attention induction blocks.1.attn.hook_z:1 --text {T}
ablate cleanroom line:3 --data npz:{I}/images.npz --limit 4 --random 2
ablate induction blocks.1.attn.hook_z:1 --text {T} --random 2
attribute cleanroom line --data npz:{I}/images.npz --limit 3 --target curve:3
saliency cleanroom --data npz:{I}/images.npz --limit 1 --target curve:3 --method gradient
saliency cleanroom --image {I}/a.png --target curve:3
sanity cleanroom --data npz:{I}/images.npz --limit 2 --target curve:3 --method gradient
patch induction --sites resid_post --limit 4 --random 2
paths induction --heads all --limit 4 --random 2
keep induction blocks.1.attn.hook_z:1 --limit 4 --random 2
lens induction --limit 4
probe induction --labels pair --limit 16 --random 2
edit operators
edit new cleanroom {O}/r.json 'scale units=line:3 factor=0.5'
edit measure cleanroom {I}/recipe.json --data npz:{I}/images.npz --limit 4 --random 2 --target curve:3
edit measure cleanroom 'scale units=line:3 factor=0.5' --data npz:{I}/images.npz --limit 4 --random 2 --target curve:3
edit diff main second --model cleanroom
edit bake cleanroom {O}/w.safetensors {I}/recipe.json
edit apply cleanroom {I}/recipe2.json --branch second
edit branch cleanroom third
edit undo cleanroom
edit redo cleanroom
edit log cleanroom
edit replay cleanroom
edit verify
sites cleanroom --weights {I}/w.safetensors
generate induction --text {T} --tokens 3
sae ls
sae eval small --limit 4 --rows 200
sae compare small small2
sae name small --labels {I}/labels.json
sae bottleneck small --labels {I}/labels.json
sae export small {O}/exported
sae import {I}/foreign --name f --model cleanroom --site line
store ls
store info {S}
store verify {S}
store export {S} --site line --out {O}/x.npz
store rm {S} --yes
graph build cleanroom
graph show cleanroom line:3
graph export cleanroom {O}/c.json line:3
graph import cleanroom {I}/circuit.json --name c2
graph import cleanroom {I}/circuit.graphml --name c3
graph ls cleanroom
graph diff cleanroom c 1
jobs ls
harvest cleanroom+{W}/saes/small --data npz:{I}/images.npz --sites sae/small
attribute induction blocks.1.attn.hook_z --text {T}
"""


def prepare(folder: Path) -> None:
    """Make the workspace and the files that the lines name; each line of `LINES` then works."""
    import numpy as np
    import torch
    from PIL import Image

    from circuits.autoencoders import About, save_autoencoder
    from circuits.cli.main import run
    from circuits.models.zoo.loading import load_model
    from tests.test_attaching import code_of

    made, place, out = folder / "in", folder / "ws", folder / "out"
    for each in (made, place, out, folder / "elsewhere"):
        each.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (16, 64, 64, 3), dtype=np.uint8)
    np.savez(made / "images.npz", images=pictures)
    Image.fromarray(pictures[0]).save(made / "a.png")
    Image.fromarray(pictures[1]).save(made / "a.jpg")
    (made / "photos").mkdir()
    for i in range(4):
        Image.fromarray(pictures[i]).save(made / "photos" / f"{i}.png")
    (made / "labels.json").write_text(json.dumps(["circle, radius 20", "circle, radius 26"] * 8))
    (made / "texts.txt").write_text("1 2 3 4 5 1 2 3\n9 8 7 9 8 7 9 8\n" * 4)
    (made / "elsewhere.txt").write_text("nobody asked for this\n")
    recipes = {
        "recipe": "scale_weights into=line:3 factor=0.5",
        "recipe2": "scale units=line:4 factor=0",
    }
    os.environ["CIRCUITS_WORKSPACE"] = str(place)
    model = load_model("cleanroom")
    torch.manual_seed(0)
    for name in ("small", "small2"):
        code = code_of(model, "line", n=12)
        data = f"npz:{made / 'images.npz'}"
        code.about = About(name, "line", "line", "cleanroom", model.hash, data, "topk")
        save_autoencoder(code, place / "saes" / name)
    lines = [
        *(f"edit new cleanroom {made / name}.json '{words}'" for name, words in recipes.items()),
        f"edit bake cleanroom {made / 'w.safetensors'} {made / 'recipe.json'}",
        f"edit apply cleanroom {made / 'recipe.json'}",
        f"edit apply cleanroom {made / 'recipe2.json'}",
        "edit undo cleanroom",
        "edit branch cleanroom second",
        f"harvest cleanroom --data npz:{made / 'images.npz'} --sites line,curve --full line",
        f"harvest induction --data tokens:{made / 'texts.txt'} --sites blocks.1.attn.hook_z",
        "graph build cleanroom",
        "graph show cleanroom line:3 --save c",
        f"graph export cleanroom {made / 'circuit.json'} line:3",
        f"graph export cleanroom {made / 'circuit.graphml'} line:3",
        f"sae export small {made / 'foreign'}",
    ]
    for line in lines:
        if run(words_of(line)):
            raise SystemExit(f"this line has to work: {line}")


def words_of(line: str) -> list[str]:
    """The words of a line, as a shell splits them."""
    return shlex.split(line)


def lines_of(folder: Path) -> list[list[str]]:
    """The lines with their files in `folder`."""
    places = {
        "{I}": str(folder / "in"), "{W}": str(folder / "ws"), "{O}": str(folder / "out"),
        "{T}": "1 2 3 4 1 2 3",
        "{S}": next(str(p.parent.relative_to(folder / "ws")) for p in sorted(folder.rglob("provenance.json"))),
    }  # fmt: skip
    found = []
    for line in LINES.strip().splitlines():
        words = words_of(line)
        for mark, text in places.items():
            words = [w.replace(mark, text) for w in words]
        found.append(words)
    return found


# --- what is hostile -------------------------------------------------------------------------------

NUMBERS = (
    "-1", "0", "1e308", "-1e308", "nan", "inf", "-inf", "1e39", "1e-320", "10000000000000000000000", "2147483648",
    "-9223372036854775809", "0x10", "1_0", "٣", "+3", "1e", "3.5", "", " ", "--", "1,2", "True", "1/0",
)  # fmt: skip
TEXTS = (
    "", " ", "\n", "a\nb", "\x1b[31mred", "‮evil", "é" * 300, "x" * 4000, "../../elsewhere", "/dev/zero", "/dev/stdin",
    "/proc/self/mem", "/etc/passwd", "~", "$HOME", "`id`", "$(id)", "; rm -rf /", "%s%n", "{0}", "{__class__}",
    "[red]x", "<script>alert(1)</script>", "<a href=//h.example>x</a>", "![p](https://h.example/a.png)", "[a](x:0)",
    ":smile:", "'; DROP TABLE entries; --", "\\", "*", "**", "?", "line:*", "line:3,3", "line:-1", "line:1_0", "line:٣",
    "line:99999999999999999999", "line:+1", "line:", ":", "line:3->curve:3", "curve:3->line:3", "input", "logits:0",
    "python:os:getcwd", "python:", "CON", "a" * 300 + ".json", "folder:/", "npz:/dev/zero", "tokens:/dev/zero",
    "hf:", "tl:", "torchvision:", "timm:", "sae/small:1", "cleanroom+", "cleanroom+nothing", "+", "--help", "--", "-",
)  # fmt: skip
WEIGHTY = (
    "steps",
    "size",
    "random",
    "texts",
    "length",
    "n",
    "limit",
    "workers",
    "permutations",
    "batch",
    "tokens",
)
"""Options whose large values may be asked for honestly: more work is no fault, so that they are given small ones."""


@dataclass
class Input:
    """Something hostile: a command line, and files that were changed for it.

    Attributes:
        number: by which `--only` finds it again.
        words: of the command line; empty for an upload or a page.
        kind: `words`, `file`, `upload` or `page`.
        about: what was done to it.
        call: what is run instead of a command line.
    """

    number: int
    words: list[str]
    kind: str
    about: str
    call: Callable[[], object] | None = None


def replaced(draw: random.Random, words: list[str], number: int) -> Input:
    """A line in which one or two words are others, or that has an option more."""
    from circuits.cli.commands import ENTRIES

    entry: Any = ENTRIES[words[0]].load()
    command = entry.commands[words[1]] if hasattr(entry, "commands") else entry
    words, said = list(words), []
    for _ in range(draw.choice((1, 1, 2))):
        if draw.random() < 0.4 or len(words) == 1:
            options = [p for p in command.params if p.param_type_name == "option"]
            option = draw.choice(options)
            if option.is_flag:
                words.append(option.opts[0])
            else:
                large = option.name in WEIGHTY
                values = ("-1", "0", "nan", "", "x", "3.5", "1_0") if large else (*NUMBERS, *TEXTS)
                words += [option.opts[0], draw.choice(values)]
            said.append(f"with {' '.join(words[-2:])!r:.80}")
            continue
        at = draw.randrange(1, len(words))
        large = words[at - 1].lstrip("-") in WEIGHTY
        pool = ("-1", "0", "nan", "", "x") if large else draw.choice((NUMBERS, TEXTS))
        said.append(f"word {at} replaced")
        words[at] = draw.choice(pool)
    return Input(number, words, "words", "; ".join(said))


def damaged(draw: random.Random, data: bytes, text: bool) -> tuple[bytes, str]:
    """Other bytes instead of a file's, and what was done."""
    how = draw.choice(
        ("cut", "empty", "flip", "insert", "repeat", "other", "value", "value", "value", "deep")
    )
    at = draw.randrange(len(data) + 1)
    if how == "value" and text:
        found = list(re.finditer(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?', data))
        if found:
            one = draw.choice(found)
            new = draw.choice((
                b"NaN", b"1e999", b"-1", b"null", b"[]", b"{}", b'""', b"true", b'"<b>x</b>"', b"1e308", b'"../../x"',
                b'"python:EVIL:f"', b"99999999999999999999", b'"' + b"x" * 5000 + b'"', b'"\\ud800"', b'"\\u0000"',
            ))  # fmt: skip
            return data[: one.start()] + new + data[
                one.end() :
            ], f"{one.group()[:40]!r} is {new[:40]!r}"
    if how == "deep":
        return b"[" * 100_000, "100,000 brackets"
    if how == "cut":
        return data[:at], f"cut at {at}"
    if how == "empty":
        return b"", "empty"
    if how == "insert":
        return data[:at] + draw.randbytes(9) + data[at:], f"nine bytes at {at}"
    if how == "repeat":
        return data + data, "twice"
    if how == "other":
        others = (
            b"\x89PNG\r\n\x1a\n" + bytes(40),
            b"PK\x03\x04" + bytes(30),
            b"\x89HDF\r\n\x1a\n",
            b"%!PS-Adobe",
            b"\xff" * 99,
        )
        return draw.choice(others), "another kind of file"
    flipped = bytearray(data or b"\0")
    for _ in range(draw.choice((1, 4, 64))):
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
    return bytes(flipped), "bits flipped"


def damage(draw: random.Random, folder: Path, number: int, lines: list[list[str]]) -> Input:
    """A line of which a file, of the workspace or its own, is damaged."""
    among = [p for p in (*(folder / "in").rglob("*"), *(folder / "ws").rglob("*")) if p.is_file()]
    path = draw.choice(sorted(among))
    text = path.suffix in (".json", ".jsonl", ".txt", ".graphml")
    data, how = damaged(draw, path.read_bytes(), text)
    path.write_bytes(data.replace(b"EVIL", str(folder / "evil.py").encode()))
    words = draw.choice(readers(path, lines))
    return Input(number, list(words), "file", f"{path.relative_to(folder)}: {how}")


READERS = {
    "workspace.db": (
        "edit log", "edit replay", "edit undo", "edit verify", "edit apply", "edit diff", "graph ls", "graph diff",
    ),
    "graph": ("graph show", "graph export", "graph build"),
    "saes": ("sae ls", "sae eval", "sae compare", "sae export", "sae name", "harvest cleanroom+"),
    "model.json": ("store ls", "edit log", "sae eval", "harvest cleanroom --data"),
    "": ("store ls", "store info", "store verify", "store export", "store rm", "examples", "harvest cleanroom --data"),
}  # fmt: skip
"""Which lines read what is in a workspace, by a part of its path."""


def readers(path: Path, lines: list[list[str]]) -> list[list[str]]:
    """The lines that read a file."""
    named = [words for words in lines if any(str(path) in w for w in words)]
    if named:
        return named
    beginnings = next(found for part, found in READERS.items() if part in str(path))
    return [w for w in lines if " ".join(w).startswith(beginnings)]


def upload(draw: random.Random, folder: Path, number: int) -> Input:
    """A file that a browser hands to the app."""
    from apps import drawing, editing
    from circuits.stimuli import uploads

    path = draw.choice(sorted(p for p in (folder / "in").rglob("*") if p.is_file()))
    data, how = damaged(draw, path.read_bytes(), path.suffix == ".json")
    read: dict[str, Callable[[], object]] = {
        "image": lambda: uploads.decode_image(data),
        "recipe": lambda: editing.read_recipe(data),
        "drawing": lambda: drawing._read(data.decode("utf-8", "replace")),
    }
    kind = draw.choice(list(read))
    return Input(number, [], "upload", f"{kind}: {path.name}, {how}", read[kind])


def page(draw: random.Random, number: int) -> Input:
    """A page of the app, by a URL with hostile parameters."""
    from apps.address import TITLES

    names = (
        "model",
        "site",
        "unit",
        "on",
        "circuit",
        "version",
        "sae",
        "other",
        "do",
        "data",
        "latent",
    )
    view = draw.choice(list(TITLES))
    asked = {n: draw.choice((*TEXTS, *NUMBERS)) for n in draw.sample(names, draw.choice((1, 2, 3)))}
    if draw.random() < 0.6:
        asked["model"] = "cleanroom"

    def call() -> None:
        from streamlit.testing.v1 import AppTest

        test = AppTest.from_function(_show, default_timeout=SECONDS, kwargs={"name": view})
        for name, value in asked.items():
            test.query_params[name] = value
        test.run()
        if test.exception:
            raise AssertionError(f"the page shows an error of Python's: {test.exception[0].value}")

    return Input(number, [], "page", f"{view}?{asked!r:.200}", call)


def _show(name: str) -> None:
    from importlib import import_module

    from apps.address import guarded

    guarded(import_module(f"apps.views.{name}").page)()


# --- watching --------------------------------------------------------------------------------------


@dataclass
class Watcher:
    """What Python was asked to do while an input ran: writes outside of `allowed`, connections, processes."""

    allowed: tuple[str, ...]
    on: bool = False
    seen: list[str] = field(default_factory=list)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        self.on = False  # what this function does itself is not what is watched
        try:
            found = self._fault(event, args)
        finally:
            self.on = True
        if found and len(self.seen) < 20:
            self.seen.append(found)

    def _fault(self, event: str, args: tuple[Any, ...]) -> str:
        if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
            return (
                f"{event} {args[1:]!r:.100}"
                if event == "socket.connect"
                else f"{event} {args!r:.100}"
            )
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn"):
            return f"{event} {args[:2]!r:.200}"
        writes = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2,
                  "os.chmod": 1, "os.truncate": 1, "shutil.rmtree": 1}  # fmt: skip
        paths = list(args[: writes.get(event, 0)])
        if (
            event == "open"
            and isinstance(args[2], int)
            and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            paths = [args[0]]
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)):
                full = os.path.realpath(os.fsdecode(path))
                if not full.startswith(self.allowed):
                    return f"{event} {full}"
        return ""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Stop what takes longer."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def state(folder: Path) -> dict[str, bytes | None]:
    """What is in a workspace, but for locks, caches of what was computed, and journals of the database."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.endswith((".lock", "-wal", "-shm", "lock")):
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


# --- running ---------------------------------------------------------------------------------------


def faults(one: Input, folder: Path, watcher: Watcher) -> tuple[int, list[str]]:
    """Run an input; its exit code (0 for what is no command), and what is wrong."""
    from circuits.cli.main import run

    out, err = io.StringIO(), io.StringIO()
    before = state(folder / "ws")
    found: list[str] = []
    code = 0
    watcher.seen.clear()
    watcher.on = True
    try:
        with limited(SECONDS), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if one.call is not None:
                try:
                    one.call()
                except (ValueError, KeyError, OSError) as refused:  # as the app's pages expect it
                    code = 2
                    err.write(f"circuits: {refused.args[0] if refused.args else refused!s}\n")
            else:
                code = run(one.words)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is a fault
        found.append(f"{type(error).__name__}: {error}"[:300])
    finally:
        watcher.on = False
    found += watcher.seen
    printed, said = out.getvalue(), err.getvalue()
    lines = [x for x in said.splitlines() if x.strip()]
    if code not in (0, 1, 2) or (one.kind == "line" and code):
        found.append(f"exit code {code}: {said[-300:]!r}")
    if "Traceback (most recent call last)" in printed + said:
        found.append("a traceback")
    if code == 2:
        told = [x for x in lines if x.startswith(("circuits: ", "Usage", "Try"))]
        if not told:
            found.append(f"no line of its own: {said[-200:]!r}")
        if max(map(len, lines), default=0) > LONGEST:
            found.append(f"a line of {max(map(len, lines))} characters")
        if one.kind == "words" and state(folder / "ws") != before:
            after = state(folder / "ws")
            changed = [k for k in before.keys() | after.keys() if before.get(k) != after.get(k)]
            found.append(f"refused, but changed: {changed[:4]}")
    if code == 0 and re.search(
        r"\bnan\b", re.sub(r"'[^']*'|\S*[:=/]\S*", "", printed), re.IGNORECASE
    ):
        found.append(
            "prints nan: "
            + next(x for x in printed.splitlines() if re.search(r"\bnan\b", x, re.IGNORECASE))[:200]
        )
    if (folder / "ran").exists():
        found.append(f"code ran: {(folder / 'ran').read_text()[:100]}")
    return code, found


def inputs(seed: int, number: int, folder: Path, lines: list[list[str]]) -> Input:
    """The input of a number: the same each time."""
    draw = random.Random(f"{seed} {number}")
    kind = draw.choices(("words", "file", "upload", "page"), (55, 33, 8, 4))[0]
    if kind == "words":
        return replaced(draw, draw.choice(lines), number)
    if kind == "file":
        return damage(draw, folder, number, lines)
    return upload(draw, folder, number) if kind == "upload" else page(draw, number)


def main() -> None:
    """Run them, print what is wrong, and one JSON line at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=2000, help="how many inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of the one input to run")
    parser.add_argument("--begin", type=int, default=0, help="the first number")
    parser.add_argument(
        "--check", action="store_true", help="run the lines as they are: each must work"
    )
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    logging.disable()  # Streamlit's, about pages without a browser
    with tempfile.TemporaryDirectory(prefix="hostile-") as temporary:
        folder = Path(os.path.realpath(temporary)) / "place"
        whole = folder.with_name("whole")
        with contextlib.redirect_stdout(io.StringIO()):
            prepare(folder)
        (folder / "evil.py").write_text(CODE.format(ran=str(folder / "ran")))
        lines = lines_of(folder)
        folder.rename(whole)
        own = [str(folder / "ws"), str(folder / "out"), str(Path.home() / ".cache")]
        watcher = Watcher((*own, tempfile.gettempdir() + "/tmp", "/dev/null", "/dev/tty"))
        sys.addaudithook(watcher)
        began, kinds, wrong = time.monotonic(), Counter[str](), 0
        numbers = [args.only] if args.only is not None else range(args.begin, args.begin + args.n)
        for number in range(len(lines)) if args.check else numbers:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder, symlinks=True)
            os.chdir(folder / "out")
            one = (
                Input(number, lines[number], "line", "as it is")
                if args.check
                else inputs(args.seed, number, folder, lines)
            )
            code, found = faults(one, folder, watcher)
            kinds[f"{one.kind} {code}"] += 1
            if found or args.only is not None:
                wrong += bool(found)
                print(
                    f"{number} {one.kind}: {' '.join(one.words)!r:.300} ({one.about})",
                    *found,
                    sep="\n    ",
                    flush=True,
                )
            if sum(kinds.values()) % 100 == 0:
                print(f"{sum(kinds.values())} done", file=sys.stderr)
        told = {
            "seed": args.seed,
            "inputs": sum(kinds.values()),
            "wrong": wrong,
            "codes": dict(sorted(kinds.items())),
        }
        print(json.dumps(told | {"seconds": round(time.monotonic() - began)}))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
