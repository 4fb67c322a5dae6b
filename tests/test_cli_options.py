"""Groups of options, what the help says of them, and that nothing which is printed is interpreted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
import typer
from rich.progress import Progress

from circuits.cli import options, output
from circuits.cli.commands import ENTRIES
from circuits.cli.main import run
from circuits.cli.output import progress_bar, say, show_table, warn
from circuits.cli.signatures import Within, argument, command, option
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.tables import Table
from circuits.tasks import Task

ODD = "mixed4a:100: [red]bold[/red] :smile: [/]"
"""What rich would make emoji and styles of."""


@dataclass(frozen=True)
class Size:
    """A group with an argument and an option."""

    heading = "Size"

    width: Annotated[int, argument("How wide.")]
    height: Annotated[int, option("How high.")] = 2

    @property
    def area(self) -> int:
        """Of both."""
        return self.width * self.height


def test_a_group_is_flattened_for_typer_and_built_for_the_command(capsys) -> None:
    app, seen = typer.Typer(), []

    @command(app)
    def draw(size: Size, colour: Annotated[str, option("Which.")] = "red") -> None:
        """Draw."""
        seen.append((size.area, colour))

    app(["3", "--height", "4"], standalone_mode=False)
    app(["5", "--colour", "blue"], standalone_mode=False)
    assert seen == [(12, "red"), (10, "blue")]
    app(["--help"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "Size" in shown
    assert "How high." in shown


def commands() -> Iterator[tuple[str, Any]]:
    for name, entry in ENTRIES.items():
        loaded = entry.load()
        if entry.group:
            yield from ((f"{name} {n}", c) for n, c in loaded.commands.items())
        else:
            yield name, loaded


def test_every_number_that_is_typed_has_a_range() -> None:
    """Whatever libraries below make of it: not a number, infinity and what overflows are refused by name."""
    checked = 0
    for name, found in commands():
        for one in found.params:
            kind = one.type_descriptor.annotation
            if not {int, float} & {kind, *get_args(kind)}:
                continue
            check = one.type_descriptor.parameter_info.callback
            assert isinstance(check, Within), f"{name} {one.opts[0]} has no range"
            for far in (check.low - 1, float("nan"), float("inf"), float("-inf"), 1e308, 10**30):
                with pytest.raises(typer.BadParameter, match="must be"):
                    check([far])
            assert check(one.default) == one.default
            checked += 1
    assert checked > 100


def test_every_command_and_option_says_what_it_is_in_whole_phrases() -> None:
    for name, found in commands():
        assert (found.help or "").strip(), name
        for one in found.params:
            if one.name == "help":
                continue
            words = getattr(one, "help", None) or ""
            assert len(words.split()) >= 3, (name, one.name, words)
            assert words[0].isupper(), (name, one.name, words)
            assert words.endswith("."), (name, one.name, words)


def test_an_option_is_the_same_everywhere() -> None:
    found: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
    for _, one in commands():
        for p in one.params:
            for flag in p.opts:
                found[flag].add((p.default, getattr(p, "help", None)))
    for flag in (
        "--seed",
        "--top",
        "--json",
        "--figure",
        "--workspace",
        "--take",
        "--metric",
        "--note",
    ):
        assert len(found[flag]) == 1, (flag, found[flag])
    assert {default for default, _ in found["--limit"]} == {32, None}
    assert {default for default, _ in found["--random"]} == {99, 1}


def test_nothing_that_is_printed_is_interpreted(capsys, monkeypatch) -> None:
    show_table(Table((ODD, "n"), [(ODD, 1.5)], title=ODD, note=ODD))
    say(ODD)
    assert capsys.readouterr().out.count(ODD) == 5
    warn(ODD)
    assert run(["sites", ODD]) == 2
    error = capsys.readouterr().err
    assert error.count(ODD) == 2
    bars: list[Progress] = []
    monkeypatch.setattr(
        output, "Progress", lambda *a, **k: bars.append(Progress(*a, **k)) or bars[0]
    )
    with progress_bar(ODD):
        (task,) = bars[0].tasks
        assert bars[0].columns[0].render(task).plain == ODD


def test_what_is_printed_cannot_steer_the_terminal(capsys) -> None:
    evil = "a\x1b]0;pwn\x07\u202e\r\u200db"
    shown = "a�]0;pwn���" + "�b"
    output.show_table(Table((evil,), [(f"{evil}\nc",)], title=evil, note=f"{evil}\nc\td\udcff"))
    output.tell(evil)
    said = capsys.readouterr()
    assert said.out.count(shown) == 4
    assert f"{shown}�c" in said.out, "a cell is one line"
    assert said.out.endswith(f"{shown}\nc       d\\udcff\n")
    assert said.err == f"{shown}\n"


def test_tables_show_numbers_in_four_digits(capsys) -> None:
    show_table(Table(("a", "b"), [("x", 1 / 3), ("y", 2)]))
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["a", "b"], ["x", "0.3333"], ["y", "2"],
    ]  # fmt: skip


def test_examples_are_what_the_options_say() -> None:
    model = load_model("induction")
    assert options.Dataset().choose(model, 0).data == "repeats"
    assert len(options.Inputs(text="1 2 3").choose(model, 0)) == 1
    with pytest.raises(ValueError, match="takes tokens: use --text or --data"):
        options.Images(image=[Path("a.png")]).choose(model, 0)
    with pytest.raises(ValueError, match="does not go with --image or --text"):
        options.Inputs(data="repeats", text="1").choose(model, 0)


def test_a_task_is_what_the_options_say(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    model = load_model("induction")
    task = options.load_task(model, "repeats", n=4)

    def load_task(_: HookedModel, spec: str, **given: Any) -> Task:
        seen.update(given, task=spec)
        return task

    monkeypatch.setattr(options, "load_task", load_task)
    options.PairsTask(task="repeats", metric="accuracy", limit=4).compile(model, 3)
    assert seen == {
        "task": "repeats", "n": 4, "seed": 3, "how": "spread", "data": "", "texts": (), "metric": "accuracy"
    }  # fmt: skip
    asked = options.LabelledTask(text="1 2", positions="last", answer="2", against="1")
    asked.compile(model, 0)
    assert seen["texts"] == ["1 2"]
    assert (seen["positions"], seen["answer"], seen["against"], seen["labels"]) == (
        "last",
        "2",
        "1",
        None,
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "weights shapes line:1 --top nan",
            "Invalid value for '--top': 'nan' is not a whole number",
        ),
        ("generate induction --temperature warm", "'--temperature': 'warm' is not a number"),
        ("ablate shapes line:1 --how nothing", "'--how': 'nothing' is not one of 'zero', 'mean'"),
        ("ablate shapes line:1 --random -3", "'--random': -3 must be 0 or more"),
        ("probe induction --steer nan", "'--steer': nan must be -1000000 to 1000000"),
        ("generate induction --tokens -1", "'--tokens': -1 must be 1 or more"),
        ("saliency shapes --area 1e308", "'--area': 1e+308 must be 0.001 to 0.999"),
        ("tune shapes line:1 --radius inf", "'--radius': inf must be 0.1 to 1e+06"),
        ("examples shapes line:1 --each -1", "'--each': -1 must be 0 or more"),
        (
            f"weights shapes line:1 --top {10**40}",
            "'--top': 10000000000000000000000000000000000000000 must be 1 to",
        ),
        ("nosuch", "No such command 'nosuch' (`circuits --help` lists the commands)"),
        ("store nosuch", "No such command 'nosuch' (`circuits store --help` lists the commands)"),
        (
            "sites shapes --xyz",
            "No such option: --xyz (`circuits sites --help` lists the options)",
        ),
        ("edit apply shapes missing.json", "recipe 'missing.json' does not exist or is not a file"),
        ("store rm nosuch --yes", "unknown store 'nosuch': there is none"),
    ],
)
def test_what_is_typed_wrongly_is_named_with_its_value(
    words: str, said: str, capsys, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CIRCUITS_WORKSPACE", str(tmp_path))
    assert run(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


class _Clock:
    """A clock that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    made = _Clock()
    monkeypatch.setattr(output, "monotonic", made)
    monkeypatch.delenv("CIRCUITS_PROGRESS", raising=False)
    output.begin()
    return made


@pytest.mark.parametrize("quiet", [False, True])
def test_long_work_that_nobody_sees_says_a_line_a_minute(
    quiet: bool, clock: _Clock, capsys
) -> None:
    with progress_bar("count", quiet) as move:
        for done in range(300, 1001):  # 300 were there; 2 seconds each
            move(done, 1000)
            clock.now += 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1400 // 60
    # 60 s after the first call 30 more are done: of 700, 670 are left, 2 s each.
    assert lines[0] == "circuits: count: 330 of 1000 (33 %), 22 min left"
    assert lines[1] == "circuits: count: 360 of 1000 (36 %), 21 min left"
    assert lines[-1] == "circuits: count: 990 of 1000 (99 %), 20 s left"


def test_work_of_less_than_a_minute_says_nothing(clock: _Clock, capsys) -> None:
    with progress_bar("count") as move:
        for done in range(60):
            move(done, 60)
            clock.now += 1
    assert not capsys.readouterr().err


def test_several_short_works_of_a_command_count_together(clock: _Clock, capsys) -> None:
    for name in ("one", "two", "three"):
        with progress_bar(name) as move:
            move(0, 2)
            clock.now += 25
            move(1, 2)
    assert capsys.readouterr().err == "circuits: three: 1 of 2 (50 %), 25 s left\n"


def test_what_is_said_otherwise_is_not_said_again(clock: _Clock, capsys, monkeypatch) -> None:
    with progress_bar("count") as move:
        for done in range(4):  # 45 seconds each, and a line of its own each
            clock.now += 45
            output.tell(f"line {done}")
            move(done, 4)
    assert capsys.readouterr().err == "line 0\nline 1\nline 2\nline 3\n"
    for name, value in (("CIRCUITS_PROGRESS", "/proc/nowhere"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        with progress_bar("count") as move:
            for done in range(4):
                clock.now += 100
                move(done, 4)
        monkeypatch.delenv(name)
    assert not capsys.readouterr().err
