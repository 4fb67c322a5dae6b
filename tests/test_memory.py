"""How much memory is free, and what a search takes: made-up files of the kernel, and sums worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from circuits import HookedModel, TokenInput, load_model, memory
from circuits.discovery import edge_graph, memory_plan, planning, score_edges
from circuits.discovery.planning import example_size
from circuits.experiments.running import MEMORY
from circuits.memory import free_memory
from circuits.tasks.spec import TaskSpec


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 MB free."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 16000 kB\nMemAvailable: 8000 kB\n")
    return tmp_path


def _group(folder: Path, **files: int | str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(str(value))


def test_the_machine_says_what_is_free(kernel: Path) -> None:
    assert free_memory() == 8000 * 1024
    (kernel / "proc" / "meminfo").unlink()
    assert free_memory() is None


def test_a_group_of_the_second_version_and_the_one_above_it(kernel: Path) -> None:
    (kernel / "proc" / "self" / "cgroup").write_text("0::/box/inner\n")
    _group(kernel / "groups" / "box" / "inner", memory__max="max", memory__current=10)
    assert free_memory() == 8000 * 1024
    stat = "anon 500\ninactive_file 300\n"
    _group(kernel / "groups" / "box", memory__max=5000, memory__current=1200, memory__stat=stat)
    assert free_memory() == 5000 - 1200 + 300


def test_a_group_of_the_first_version(kernel: Path) -> None:
    (kernel / "proc" / "self" / "cgroup").write_text("5:devices:/box\n4:cpu,memory:/box\n0::/box\n")
    _group(
        kernel / "groups" / "memory" / "box",
        memory__limit_in_bytes=7000, memory__usage_in_bytes=6500, memory__stat="total_inactive_file 100\n",
    )  # fmt: skip
    assert free_memory() == 7000 - 6500 + 100


def test_a_group_that_is_over_its_limit_has_nothing_free(kernel: Path) -> None:
    (kernel / "proc" / "self" / "cgroup").write_text("0::/\n")
    _group(kernel / "groups", memory__max=100, memory__current=150)
    assert free_memory() == 0


class _Tokens(nn.Module):
    """Token -> 3 numbers -> 5 logits: 8 numbers a token are made, and one more a token by the doubling."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.embed(x) * 2)


def test_the_size_of_an_example_is_what_operations_make() -> None:
    model = HookedModel(_Tokens(), TokenInput(5, 8), "tokens")
    task = TaskSpec("repeats", 4, 0).compile(load_model("induction"))
    length = max(len(task.examples.tokens(i)) for i in range(len(task)))
    assert example_size(model, task) == 4 * length * (3 + 3 + 5)


def test_a_plan_takes_fewer_examples_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_model("induction")
    graph, task = edge_graph(model), TaskSpec("repeats", 8, 0).compile(model)
    plan = memory_plan(graph, task)
    assert plan.batch == plan.asked == 32
    assert plan.weights == sum(p.nbytes for p in model.module.parameters()) + sum(
        b.nbytes for b in model.module.buffers()
    )
    assert plan.total == plan.weights + plan.other + 32 * plan.example
    assert plan.other == MEMORY + 110 * len(graph)
    room = (plan.other + 3.5 * plan.example) / 0.9
    monkeypatch.setattr(planning, "free_memory", lambda _: int(room))
    short = memory_plan(graph, task)
    assert short.batch == 3
    assert "3 examples (of 32: more do not fit)" in str(short)
    monkeypatch.setattr(planning, "free_memory", lambda _: plan.other)
    with pytest.raises(OSError, match=r"takes .* an example and .* are free: end other programs"):
        memory_plan(graph, task)


def test_scores_do_not_depend_on_the_batch() -> None:
    model = load_model("induction")
    graph, task = edge_graph(model), TaskSpec("repeats", 8, 0).compile(model)
    one, other = (score_edges(graph, task, "eap-ig", steps=2, batch=n).mean for n in (8, 3))
    assert abs(one - other).max() < 1e-5 * abs(one).max()
