"""What memory the search for a circuit takes, before it starts, and how many examples fit into one pass.

Estimated from the traced pass of the model: a pass with gradients keeps at most every tensor that its operations make.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from circuits.discovery.graphs import EdgeGraph
from circuits.discovery.stored import EDGE
from circuits.examples import BATCH
from circuits.experiments.running import MEMORY
from circuits.memory import free_memory, in_bytes
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.tasks.task import Task

_SPARE = 0.1
"""The share of free memory that a plan leaves alone: allocators do not give everything back at once."""


@dataclass(frozen=True)
class MemoryPlan:
    """What scoring edges with gradients takes, in bytes.

    Attributes:
        weights: the model's weights, which are there already.
        example: one example of the task, the longest, in a pass with gradients.
        other: what does not depend on the batch: the runs that are kept, and tables of edges.
        batch: how many examples a pass takes: as many as were asked for, or as many as fit.
        asked: how many were asked for.
        free: how much memory was free on the model's device; None if nothing says so.
    """

    weights: int
    example: int
    other: int
    batch: int
    asked: int
    free: int | None

    @property
    def total(self) -> int:
        """The most that all of it takes, weights included."""
        return self.weights + self.other + self.batch * self.example

    def __str__(self) -> str:
        less = f" (of {self.asked}: more do not fit)" if self.batch < self.asked else ""
        free = "" if self.free is None else f"; {in_bytes(self.free)} are free"
        return (
            f"memory: {in_bytes(self.weights)} of weights, {in_bytes(self.batch * self.example)} for passes of "
            f"{self.batch} examples{less}, {in_bytes(self.other)} for what is kept{free}"
        )


def memory_plan(graph: EdgeGraph, task: Task, batch: int = BATCH) -> MemoryPlan:
    """How much memory it takes to score the edges of a graph, and how many examples fit into a pass.

    An upper estimate: what a pass makes and drops at once is counted as if it were kept.

    Args:
        graph: the edges.
        task: the examples.
        batch: how many examples a pass should take.

    Raises:
        OSError: if there is not enough memory for one example.
    """
    model = graph.model
    tensors = {
        t.data_ptr(): t.nbytes for t in (*model.module.parameters(), *model.module.buffers())
    }
    example, other = example_size(model, task), int(MEMORY + EDGE * len(graph))
    free = free_memory(model.device)
    plan = MemoryPlan(sum(tensors.values()), example, other, batch, batch, free)
    if free is None:
        return plan
    fitting = int((free * (1 - _SPARE) - other) // example)
    if fitting < 1:
        # No MemoryError: of one, people are told to take fewer inputs.
        raise OSError(
            f"scoring {len(graph)} edges of {model.name} takes {in_bytes(example)} an example and {in_bytes(other)} "
            f"for what is kept, and {in_bytes(free)} of memory are free: end other programs, take shorter "
            "texts, load the model in bfloat16 (--dtype), or take a larger machine"
        )
    return MemoryPlan(plan.weights, example, other, min(batch, fitting), batch, free)


def example_size(model: HookedModel, task: Task) -> int:
    """The bytes of all that a pass makes of one example, the task's longest.

    Tensors that hold positions twice, such as attention patterns, grow with the square of a text's length.
    """
    program = model.program
    given = next(
        program.shapes[value] for value, name in program.sources.items() if name == "input"
    )
    made = [program.shapes[value] for op in program.operations for value in op.outputs]
    size = (model.dtype or model.input.example(1).dtype).itemsize
    if not isinstance(model.input, TokenInput):
        return size * sum(map(prod, made)) // given[0]
    longest, traced = max(map(len, map(task.examples.tokens, range(len(task))))), given[1]
    longer = longest / traced
    numbers = sum(prod(shape) * longer ** max(1, shape[1:].count(traced)) for shape in made)
    return int(size * numbers / given[0])
