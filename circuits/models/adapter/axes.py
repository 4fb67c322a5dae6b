"""What the axes of a tensor mean: followed through the operations of a pass, from the input on.

Torch does not say which axis of a tensor holds the units: (2, 16, 64) may be 16 channels at 64 positions or 64 units at
16 positions. The operation that made it does. A convolution puts its channels second, a linear layer its units last;
what follows moves, merges, splits or drops axes in ways that can be read off its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from circuits.models.adapter.flow import spelled_einsum
from circuits.models.adapter.program import Operation, Program, Value

Labels = tuple[str, ...]
"""A name for each axis: `batch`, `unit`, `position`, `y`, `x`, `z`, or `?` where it is not known. An axis of units that
was split (into heads, say) leaves `unit/0`, `unit/1`, …"""

SPACE: Mapping[int, Labels] = {1: ("position",), 2: ("y", "x"), 3: ("z", "y", "x")}
UNKNOWN, UNIT = "?", "unit"

Found = Mapping[Value, Labels]
Rule = Callable[[Operation, Program, Found], Sequence[Labels | None]]


def follow_axes(program: Program, given: Labels) -> dict[Value, Labels]:
    """The labels of every value of a pass.

    Args:
        program: the pass.
        given: the labels of its input.
    """
    found: dict[Value, Labels] = {}
    for value, source in program.sources.items():
        rank = len(program.shapes[value])
        found[value] = given if source == "input" and rank == len(given) else (UNKNOWN,) * rank
    for op in program.operations:
        name = op.name.removesuffix(".__get__").rpartition(".")[2]
        rule = _RULES.get(name) or _RULES.get(name.removesuffix("_"), _elementwise)
        try:
            made = rule(op, program, found)
        except (TypeError, ValueError, LookupError):  # called in a way that the rule does not know
            made = []
        for place, value in enumerate(op.outputs):
            shape = program.shapes[value]
            labels = made[place] if place < len(made) else None
            if labels is None or len(labels) != len(shape):
                labels = (UNKNOWN,) * len(shape)
            found[value] = labels
    return found


def unit_axis(labels: Labels) -> int | None:
    """The axis of the units, or None if it is not known: there must be just one."""
    places = [i for i, label in enumerate(labels) if _of_units(label)]
    return places[0] if len(places) == 1 else None


def _of_units(label: str) -> bool:
    return label.partition("/")[0] == UNIT


# --- operations that keep the axes ---------------------------------------------------------------


def _elementwise(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    """The labels of the arguments that have the output's shape, or are broadcast to it.

    The earliest argument with labels counts first: a residual sum has the axes of the stream that it adds to.
    """
    return [_merged(op, program, found, program.shapes[value]) for value in op.outputs]


def _merged(op: Operation, program: Program, found: Found, shape: tuple[int, ...]) -> Labels | None:
    labels = [UNKNOWN] * len(shape)
    for value in sorted(set(op.inputs), key=lambda v: v.number):
        own, sizes = found[value], program.shapes[value]
        start = len(shape) - len(sizes)
        if start < 0 or any(
            n not in (1, m) for n, m in zip(sizes, shape[start:], strict=True)
        ):  # no operation one number at a time
            continue
        if _of_some_units(own) and _of_some_units(labels):
            own = tuple(UNKNOWN if _of_units(label) else label for label in own)
        for place, (label, size) in enumerate(zip(own, sizes, strict=True), start):
            if labels[place] == UNKNOWN and (size != 1 or shape[place] == 1):
                labels[place] = label
    return tuple(labels)


def _of_some_units(labels: Sequence[str]) -> bool:
    return any(map(_of_units, labels))


def _same(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    """As the first argument's, whatever becomes of the axes' lengths."""
    first = _first(op)
    return [None if first is None else found[first]] * len(op.outputs)


def _first(op: Operation) -> Value | None:
    """The tensor that an operation is about."""
    return next(iter(op.inputs), None)


def _normalised(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    """A normalisation keeps the axes; where units are not known yet, it says where they are."""
    first = op.inputs[0]
    labels = found[first]
    if _of_some_units(labels):
        return [labels]
    last = op.name.endswith(("layer_norm", "rms_norm"))
    return [_with(labels, len(labels) - 1 if last else 1, UNIT)]


def _with(labels: Labels, place: int, label: str) -> Labels:
    return tuple(label if i == place % len(labels) else old for i, old in enumerate(labels))


# --- layers: they say where their units are ------------------------------------------------------


def _convolved(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    rank = int(op.name.rpartition("conv")[2].removeprefix("_transpose")[0])
    batch = found[op.inputs[0]][: len(program.shapes[op.outputs[0]]) - rank - 1]
    return [(*(UNKNOWN if _of_units(label) else label for label in batch), UNIT, *SPACE[rank])]


def _linear(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    """Units come last. If the axis of units was another one (an MLP over positions), it counts as positions."""
    return [(*_without_units(found[op.inputs[0]][:-1]), UNIT)]


def _without_units(labels: Labels) -> Labels:
    return tuple("position" if _of_units(label) else label for label in labels)


def _embedded(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    # `F.embedding` takes the indices first; `torch.embedding` takes the table first.
    tokens = max(op.inputs, key=lambda v: "batch" in found[v])
    return [(*found[tokens], UNIT)]


def _one_hot(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    return [(*found[op.inputs[0]], UNIT)]


def _recurrent(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    return [(*_without_units(found[op.inputs[0]][:-1]), UNIT)]


def _attention(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    """Multi-head attention as one function: the output is laid out as the queries."""
    return _recurrent(op, program, found)


def _product(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    """Rows of the first factor, columns of the second; those of a matrix of weights are units."""
    pair = op.inputs[-2:] if op.name.endswith("addmm") else op.inputs[:2]
    if len(pair) < 2:
        return [None]
    first, second = pair if not op.name.endswith("__rmatmul__") else pair[::-1]
    left, right = found[first], found[second]
    if not left or not right or len(right) < 2:
        return [None]
    if set(left) == {UNKNOWN} and _of_units(
        right[-2]
    ):  # weights from the left mix the units of a map
        return [(*right[:-2], UNIT, right[-1])]
    columns = UNIT if set(right) == {UNKNOWN} else right[-1]
    rows = left[:-1] if len(left) >= len(right) else (*right[:-2], *left[-2:-1])
    if _of_units(columns):
        rows = _without_units(rows) if set(right) == {UNKNOWN} else rows
    return [(*rows, columns)]


def _scaled_attention(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    query, _, value = (found[v] for v in op.inputs[:3])
    return [(*query[:-1], value[-1])]


def _einsum(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    spelled = spelled_einsum(op, program.shapes)
    if spelled is None:
        return [None]
    given, made = spelled
    named: dict[str, str] = {}
    contracted: set[str] = set()
    weights = ""
    for letters, value in zip(given, op.inputs, strict=True):
        known = found[value]
        if set(known) == {UNKNOWN}:
            weights += letters
        for letter, label in zip(letters, known, strict=False):
            if label != UNKNOWN:
                named.setdefault(letter, label)
                if letter not in made:
                    contracted.add(label)
    labels = [named.get(letter, UNKNOWN) for letter in made]
    # What is summed over with a matrix of weights becomes the units of its other axis, unless it was positions.
    summed = any(a in weights and a not in made for a in weights) and "batch" in named.values()
    if summed and all(map(_of_units, contracted)) and labels.count(UNKNOWN) == 1:
        place = labels.index(UNKNOWN)
        if contracted or made[place] in weights:
            labels[place] = UNIT
    return [tuple(labels)]


# --- operations that move, merge and drop axes ---------------------------------------------------


def _integers(values: Any) -> list[int]:
    """The whole numbers among nested arguments."""
    if isinstance(values, int):
        return [values]
    if isinstance(values, tuple | list):
        return [n for item in values for n in _integers(item)]
    return []


def _permuted(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    labels = found[op.inputs[0]]
    order = _integers(op.args[1:]) or _integers(op.kwargs.get("dims", ()))
    return [tuple(labels[i] for i in order)] if len(order) == len(labels) else [None]


def _transposed(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    labels = list(found[op.inputs[0]])
    if op.name.endswith((".t", ".t_", "T.__get__", "H.__get__", ".adjoint")):
        one, other = (-2, -1) if len(labels) > 1 else (0, 0)
        if op.name.endswith(".T.__get__"):
            return [tuple(reversed(labels))]
    else:
        one, other = op.argument(1, "dim0"), op.argument(2, "dim1")
    labels[one], labels[other] = labels[other], labels[one]
    return [tuple(labels)]


def _moved(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    labels = found[op.inputs[0]]
    sources = _integers(op.argument(1, "source"))
    ends = _integers(op.argument(2, "destination"))
    n = len(labels)
    placed = {end % n: labels[source % n] for source, end in zip(sources, ends, strict=True)}
    rest = iter(label for i, label in enumerate(labels) if i not in {s % n for s in sources})
    return [tuple(placed[i] if i in placed else next(rest) for i in range(n))]


def _reshaped(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    first = op.inputs[0]
    return [regrouped(program.shapes[first], found[first], program.shapes[v]) for v in op.outputs]


def regrouped(before: Sequence[int], labels: Labels, after: Sequence[int]) -> Labels:
    """The labels after a reshape, which splits and merges neighbouring axes.

    The two shapes are cut into the smallest runs of axes with equal products; each run keeps, merges or splits.

    >>> regrouped((2, 16, 7, 7), ("batch", "unit", "y", "x"), (2, 16, 49))
    ('batch', 'unit', 'position')
    >>> regrouped((2, 9, 64), ("batch", "position", "unit"), (2, 9, 4, 16))
    ('batch', 'position', 'unit/0', 'unit/1')
    """
    if math.prod(before) != math.prod(after) or 0 in before:
        return (UNKNOWN,) * len(after)
    made: list[str] = []
    i = j = 0
    while j < len(after):
        if i < len(before) and before[i] == after[j]:
            made.append(labels[i])
            i, j = i + 1, j + 1
            continue
        if after[j] == 1:
            made.append(UNKNOWN)
            j += 1
            continue
        first, start = i, j
        left = right = 1
        while True:
            if left == right and left > 1:
                break
            if left <= right and i < len(before):
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        run = [label for label, n in zip(labels[first:i], before[first:i], strict=True) if n > 1]
        made += _split(run, j - start)
    return tuple(made)


def _split(run: Sequence[str], n: int) -> list[str]:
    """The labels of `n` axes that hold what those of `run` held."""
    if n == 1:
        return [_joined(run)]
    if list(run) == ["position"] and n in SPACE:
        return list(SPACE[n])  # tokens that are put back into a map
    if len(run) == 1 and run[0] != UNKNOWN:
        return [f"{run[0]}/{i}" for i in range(n)]
    return [UNKNOWN] * n


def _joined(run: Sequence[str]) -> str:
    """The label of one axis that runs over several."""
    kinds = [label.partition("/")[0] for label in run]
    if len(run) == 1:
        return run[0]
    if "batch" in kinds or UNKNOWN in kinds:
        return UNKNOWN
    if UNIT in run or kinds.count(UNIT) > 1:
        return UNIT
    # A part of the units beside positions, as in a shuffle of pixels: positions are what is made.
    places = [kind for kind in kinds if kind != UNIT]
    return places[0] if len(set(places)) == 1 else "position"


def _squeezed(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    first = op.inputs[0]
    labels, shape = found[first], program.shapes[first]
    asked = _integers(op.args[1:]) or _integers(op.argument(1, "dim", ()))
    dims = {d % len(shape) for d in asked} if asked else set(range(len(shape)))
    return [tuple(v for i, v in enumerate(labels) if i not in dims or shape[i] != 1)]


def _unsqueezed(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    labels = list(found[op.inputs[0]])
    place = op.argument(1, "dim")
    labels.insert(place % (len(labels) + 1), UNKNOWN)
    return [tuple(labels)]


def _reduced(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    first = op.inputs[0]
    labels = found[first]
    rank = len(program.shapes[op.outputs[0]])
    asked = op.argument(1, "dim")
    if rank == len(labels) and asked is None:
        return _elementwise(op, program, found)  # `torch.max(a, b)`
    dims = {d % len(labels) for d in _integers(asked)}
    if rank != len(labels):  # else `keepdim`
        labels = tuple(label for i, label in enumerate(labels) if i not in dims)
    return [labels] * len(op.outputs)


def _joined_tensors(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    rank = len(program.shapes[op.outputs[0]])
    made = [UNKNOWN] * rank
    for value in op.inputs:
        if len(found[value]) != rank:
            return [None]
        for place, label in enumerate(found[value]):
            if made[place] == UNKNOWN and (not _of_units(label) or not _of_some_units(made)):
                made[place] = label
    return [tuple(made)]


def _stacked(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    inner = _best_known(op, found)
    place = op.argument(1, "dim", 0)
    labels = list(inner)
    labels.insert(place % (len(labels) + 1), UNKNOWN)
    return [tuple(labels)]


def _best_known(op: Operation, found: Found) -> Labels:
    return max((found[v] for v in op.inputs), key=lambda labels: -labels.count(UNKNOWN))


def _selected(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    """`select`, `unbind`: one axis less."""
    labels = found[op.inputs[0]]
    place = op.argument(1, "dim", 0)
    made = tuple(label for i, label in enumerate(labels) if i != place % len(labels))
    return [made] * len(op.outputs)


def _indexed(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    """`x[...]`: whole numbers drop an axis, slices keep it, `None` adds one; index tensors stand for one axis.

    Weights that are indexed by tokens are an embedding.
    """
    labels = found[op.inputs[0]]
    index = op.args[1] if len(op.args) > 1 else ()
    if isinstance(index, Value) and len(labels) == 2 and set(labels) == {UNKNOWN}:
        return [(*found[index], UNIT if "batch" in found[index] else UNKNOWN)]
    items: list[Any] = list(index) if isinstance(index, tuple) else [index]
    taken = sum(item is not None and item is not ... for item in items)
    if not any(item is ... for item in items):
        items.append(...)
    made: list[str] = []
    place = 0
    for item in items:
        if item is None:
            made.append(UNKNOWN)
        elif item is ...:
            n = len(labels) - taken
            made += labels[place : place + n]
            place += n
        else:
            if isinstance(item, slice):
                made.append(labels[place])
            elif not isinstance(item, int):
                made += _index_tensor(item, labels[place], program)
            place += 1
    return [tuple(made)]


def _index_tensor(item: Any, label: str, program: Program) -> list[str]:
    rank = len(program.shapes[item]) if isinstance(item, Value) else 1
    return [label] if rank == 1 else [UNKNOWN] * rank


def _unfolded(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    if op.name.startswith("torch.Tensor."):  # windows of one axis, put last
        return [(*found[op.inputs[0]], UNKNOWN)]
    return [("batch", UNIT, "position")]


def _unknown(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    return []


def _folded(op: Operation, program: Program, found: Found) -> list[Labels | None]:
    return [("batch", UNIT, "y", "x")]


def _table() -> dict[str, Rule]:
    rules: dict[Rule, str] = {
        _same: "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
        "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
        "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices lp_pool1d lp_pool2d "
        "adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices fractional_max_pool2d max_unpool2d "
        "pad interpolate upsample grid_sample pixel_shuffle pixel_unshuffle channel_shuffle narrow "
        "chunk split tensor_split split_with_sizes index_select repeat tile expand expand_as roll flip gather "
        "take_along_dim topk sort glu repeat_interleave",
        _normalised: "batch_norm layer_norm group_norm instance_norm rms_norm",
        _convolved: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
        _linear: "linear",
        _embedded: "embedding",
        _one_hot: "one_hot",
        _recurrent: "lstm gru rnn_tanh rnn_relu",
        _attention: "multi_head_attention_forward",
        _product: "matmul bmm mm __matmul__ __rmatmul__ addmm",
        _scaled_attention: "scaled_dot_product_attention",
        _einsum: "einsum",
        _permuted: "permute",
        _transposed: "transpose swapaxes swapdims t T mT H mH adjoint",
        _moved: "movedim moveaxis",
        _reshaped: "view reshape flatten unflatten view_as reshape_as unsafe_view",
        _squeezed: "squeeze",
        _unsqueezed: "unsqueeze",
        _reduced: "mean sum amax amin max min prod var std norm logsumexp median argmax argmin nanmean any all",
        _joined_tensors: "cat concat concatenate",
        _stacked: "stack",
        _selected: "select unbind",
        _indexed: "__getitem__",
        _unfolded: "unfold",
        _folded: "fold",
        # These mix axes, whatever shapes say.
        _unknown: "cdist baddbmm addbmm addmv addr outer ger kron tensordot inner cross inverse solve pinverse",
    }  # fmt: skip
    return {name: rule for rule, names in rules.items() for name in names.split()}


_RULES = _table()
