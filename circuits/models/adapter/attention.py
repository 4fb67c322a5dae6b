"""Attention in any model, found among the operations of a pass.

Attention is a softmax over one axis between two products: scores are a product of queries and keys, and what a head
reads (z) is the product of its pattern, the softmax of the scores along the keys, and values (Vaswani et al. 2017,
section 3.2.1). It may also be one call of `scaled_dot_product_attention`, which is both products and the softmax at
once. What lies between (scales, masks, biases of positions, dropout, mixing of heads) may be anything that mixes
neither queries nor keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from circuits.call_points import Address
from circuits.models.adapter.declaring import CALL, Declared
from circuits.models.adapter.flow import Flow, Product, moves, short_name
from circuits.models.adapter.program import Operation, Program, Value
from circuits.units import unknown

Axes = tuple[tuple[str, ...], ...]
"""For each axis of a tensor, what it runs over, outermost first; empty for an axis of length 1 that means nothing."""


@dataclass(frozen=True)
class Place:
    """A tensor of an attention: where it is in the pass, and what its axes run over.

    Attributes:
        value: the value.
        address: where it can be read and changed.
        shape: its shape as traced, with a batch of three.
        axes: each axis as the product of `batch`, `window`, `head` (or `head0`, `head1`), `position`, `query`, `key`
            and `d_head`.
        sizes: the lengths of those that are the same in every pass.
    """

    value: Value | None
    address: Address
    axes: Axes
    shape: tuple[int, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def heads(self) -> int:
        """The number of heads."""
        return math.prod(size for name, size in self.sizes.items() if name.startswith("head"))


@dataclass(frozen=True)
class Attention:
    """One attention of a pass.

    Attributes:
        module: the path of the innermost module in which the pattern is computed, and which of its calls it is.
        query, key, value: the factors of the products, after any rotation by positions.
        scores: what the softmax is taken of, scaled and masked; None if a person declares a pattern of no scores.
        pattern: the probabilities.
        z: what each head reads, before the output weights.
        first: the number of the operation that multiplies queries and keys.
        last: that of the operation that multiplies the pattern and the values.
        fused: whether one call computes all of it.
        declared: the name that a person has given it; empty if it was found.
        mixed: whether weights mix heads between the pattern and the values (talking heads).
    """

    module: tuple[str, int]
    query: Place
    key: Place
    value: Place
    scores: Place | None
    pattern: Place
    z: Place
    first: int
    last: int
    fused: bool
    declared: str = ""
    mixed: bool = False

    @property
    def n_heads(self) -> int:
        """The number of heads."""
        return self.z.heads


@dataclass(frozen=True)
class Found:
    """What was found in a pass.

    Attributes:
        attentions: in order of execution.
        refused: why a candidate for a pattern was rejected, by the call that puts it out.
    """

    attentions: tuple[Attention, ...]
    refused: Mapping[str, str]


@dataclass(frozen=True)
class Batches:
    """Which axes of the values of a pass follow the number of examples.

    Attributes:
        flow: the operations of a pass with three examples.
        other: those of a pass with two.
    """

    flow: Flow
    other: Program

    def of(self, value: Value, axis: int) -> int:
        """How many entries of an axis belong to one example; 0 if the axis is as long for every batch."""
        one, two = self.flow.shape(value)[axis], self.other.shapes[value][axis]
        return one // 3 if one % 3 == 0 and two * 3 == one * 2 else 0

    def apart(self, value: Value, forward: bool) -> Value:
        """The value with examples as an axis of their own, if a view joins them with positions before or after it."""
        while self.flow.shape(value) and self.of(value, 0) > 1:
            if forward:
                takers = self.flow.taken_by.get(value, [])
                op = self.flow.program.operations[takers[0]] if len(takers) == 1 else None
                found = op.outputs[0] if op is not None else value
            else:
                op = self.flow.operation(value)
                found = op.inputs[0] if op is not None and op.inputs else value
            if op is None or short_name(op) not in _VIEWS:
                break
            value = found
        return value


_VIEWS = {"view", "reshape", "flatten", "unflatten", "unsafe_view", "view_as", "reshape_as"}


_DIVISIONS = {"div", "divide", "true_divide", "__truediv__", "div_", "__itruediv__"}
_MULTIPLICATIONS = {"mul", "multiply", "__mul__", "mul_", "__imul__", "__rmul__"}
_INVERSES = {"reciprocal", "__rtruediv__", "__rdiv__"}
_MASKS = {
    *_MULTIPLICATIONS,
    "masked_fill",
    "masked_fill_",
    "where",
    "tril",
    "triu",
    "tril_",
    "triu_",
    "dropout",
}
_KEPT = {
    "unsqueeze", "__getitem__", "view", "reshape", "add", "__add__", "__radd__", "add_", "clamp", "clamp_min", "clamp_",
    "expand",
}  # fmt: skip
"""What a sum may go through before something is divided by it."""


_KEEPS = {"dropout", "to", "contiguous", "type_as", "float", "half", "double", "clone", "detach"}
"""What a pattern may go through and stay as it is."""


class _UnclearError(Exception):
    """What looks like attention is not of the form that is known."""


_LOOKED_FOR = (
    "no heads here: expected a softmax over keys between a product of queries and keys and one with values. If "
    "it weighs values all the same, say HookedModel(…, attention={'blocks.0.attn': {'pattern': CALL}})"
)


def find_attention(
    program: Program, other: Program, declarations: Sequence[Declared] = ()
) -> Found:
    """The attentions of a pass.

    Args:
        program: the operations of a pass.
        other: those of a pass with another number of examples, 2 for every 3 of the first.
        declarations: what a person says of them.

    Raises:
        KeyError: if a declaration names a call that there is not.
        ValueError: if what it names is no attention.
    """
    if len(program.operations) != len(other.operations):
        if declarations:
            raise ValueError(
                f"attention: {declarations[0].name} cannot be followed: the model calls other functions for another "
                "number of examples"
            )
        return Found((), {})
    search = _Search(Flow(program), other)
    found = {own.last: own for own in map(search.declared, declarations)}
    used = {i for own in found.values() for i in (own.first, own.last)}
    refused: dict[str, str] = {}
    several: set[int] = set()
    within = {i for own in found.values() for i in search.within(own)}
    for i in search.candidates():
        if i in within:
            continue
        try:
            made = search.attention(i)
        except _UnclearError as error:
            refused[search.flow.called(i)] = f"{error}; {_LOOKED_FOR}"
            continue
        if made is not None and made.last in used:
            several.add(made.last)
        elif made is not None:
            found[made.last] = made
            used |= {made.first, made.last}
    for last in several:
        del found[last]
        refused[search.flow.called(last)] = (
            f"several softmaxes weigh the same values; {_LOOKED_FOR}"
        )
    refused = search.without_softmax(used, refused)
    return Found(tuple(found[i] for i in sorted(found)), refused)


@dataclass(frozen=True)
class _Softmax:
    """A softmax: of which value, which value it gives, and along which axis."""

    scores: Value
    pattern: Value
    axis: int
    operations: tuple[int, ...]


@dataclass(frozen=True)
class _Search:
    flow: Flow
    other: Program

    # --- softmax -------------------------------------------------------------------------------

    def candidates(self) -> Iterator[int]:
        """The operations that are a softmax, or attention as one call."""
        for i, op in enumerate(self.flow.program.operations):
            if not op.counted or self.flow.dependent.isdisjoint(op.inputs):
                continue
            if short_name(op) == "scaled_dot_product_attention" or self._softmax(i):
                yield i

    def _softmax(self, i: int) -> _Softmax | None:
        """The softmax that an operation ends."""
        op = self.flow.program.operations[i]
        name = short_name(op)
        if not op.inputs:
            return None
        made, given = op.outputs[0], op.inputs[0]
        rank = len(self.flow.shape(made))
        if name in ("softmax", "_softmax", "softmax_"):
            axis = op.argument(1, "dim")
            return None if axis is None else _Softmax(given, made, axis % rank, (i,))
        if name in _DIVISIONS and len(op.inputs) == 2:
            return self._quotient(i, *op.inputs)
        if name in _MULTIPLICATIONS and len(op.inputs) == 2:
            for top, factor in (op.inputs, op.inputs[::-1]):
                inverse = self.flow.operation(factor)
                if inverse is not None and short_name(inverse) in _INVERSES:
                    return self._quotient(i, top, inverse.inputs[0])
            return None
        if name in ("exp", "exp_"):
            return self._exponential(i, op)
        return None

    def _quotient(self, i: int, top: Value, bottom: Value) -> _Softmax | None:
        """exp(x) / sum(exp(x)), with anything that is the same along the axis taken from x, and zeros for masks."""
        shape = self.flow.shape(top)
        axis = self._summed_axis(bottom, top)
        if axis is None or self.flow.shape(bottom) != (*shape[:axis], 1, *shape[axis + 1 :]):
            return None
        power = self._power(top)
        if power is None:
            return None
        scores = self._before_shift(power.inputs[0], axis)
        made = self.flow.program.operations[i].outputs[0]
        return _Softmax(scores, made, axis, (i,))

    def _power(self, value: Value) -> Operation | None:
        """The exponential that a value is, but for a mask by which it is multiplied, or that is filled in."""
        op = self.flow.operation(value)
        if op is None or short_name(op) in ("exp", "exp_", "exp2"):
            return op
        if short_name(op) not in _MASKS:
            return None
        same = [v for v in dict.fromkeys(op.inputs) if self.flow.shape(v) == self.flow.shape(value)]
        found = [p for v in same if v in self.flow.dependent and (p := self._power(v)) is not None]
        return found[0] if len(found) == 1 else None

    def _same_power(self, one: Value, other: Value) -> bool:
        """Whether two values are one, or the same exponential, computed twice."""
        if one == other:
            return True
        ops = self.flow.operation(one), self.flow.operation(other)
        names = {None if op is None else short_name(op) for op in ops}
        return names <= {"exp", "exp2"} and len(names) == 1 and ops[0].inputs == ops[1].inputs  # type: ignore[union-attr]

    def _summed_axis(self, value: Value, top: Value) -> int | None:
        """The axis along which a value is the sum of another, ignoring clamps and epsilons."""
        rank = len(self.flow.shape(top))
        while (op := self.flow.operation(value)) is not None:
            if op.inputs and self._same_power(op.inputs[0], top):
                if short_name(op) == "einsum" and len(op.inputs) == 1:
                    given, _, made = str(op.args[0]).replace(" ", "").partition("->")
                    gone = [n for n, letter in enumerate(given) if letter not in made]
                    return gone[0] if len(gone) == 1 and "." not in given else None
                axis = _one_axis(op.argument(1, "dim")) if short_name(op) == "sum" else None
                return None if axis is None else axis % rank
            if short_name(op) not in _KEPT or len(op.inputs) != 1:
                return None
            value = op.inputs[0]
        return None

    def _exponential(self, i: int, op: Operation) -> _Softmax | None:
        """exp(x - logsumexp(x)), or the exponential of a `log_softmax`."""
        before = self.flow.operation(op.inputs[0])
        if before is None:
            return None
        rank = len(self.flow.shape(op.outputs[0]))
        if short_name(before) == "log_softmax":
            axis = before.argument(1, "dim")
            return (
                None
                if axis is None
                else _Softmax(before.inputs[0], op.outputs[0], axis % rank, (i,))
            )
        if short_name(before) in ("sub", "__sub__") and len(before.inputs) == 2:
            total = self.flow.operation(before.inputs[1])
            if total is not None and short_name(total) == "logsumexp":
                axis = _one_axis(total.argument(1, "dim"))
                if axis is not None and total.inputs[0] == before.inputs[0]:
                    return _Softmax(before.inputs[0], op.outputs[0], axis % rank, (i,))
        return None

    def _before_shift(self, value: Value, axis: int) -> Value:
        """The value from which a maximum along an axis was taken off, for safety's sake; else itself."""
        op = self.flow.operation(value)
        if (
            op is None
            or short_name(op) not in ("sub", "__sub__", "sub_", "__isub__")
            or len(op.inputs) != 2
        ):
            return value
        shifted, by = op.inputs
        own = self.flow.shape(by)
        flat = len(own) == len(self.flow.shape(value)) and own[axis] == 1
        return shifted if flat else value

    def _without_sinks(self, softmax: _Softmax) -> _Softmax:
        """The softmax with its scores and pattern along keys alone, where the softmax also ran over learned sinks.

        A sink is a score of no key, which takes a part of each query's attention and is dropped after the softmax.
        """
        joined = self._before_shift(softmax.scores, softmax.axis)
        op = self.flow.operation(joined)
        if op is None or short_name(op) not in ("cat", "concat", "concatenate"):
            return softmax
        given = [v for v in op.inputs if v in self.flow.dependent]
        axis = _one_axis(op.argument(1, "dim", 0))
        if len(given) != 1 or axis is None or axis % len(self.flow.shape(joined)) != softmax.axis:
            return softmax
        for i in self.flow.taken_by.get(softmax.pattern, ()):
            taker = self.flow.program.operations[i]
            same = self.flow.shape(taker.outputs[0]) == self.flow.shape(given[0])
            if same and short_name(taker) in ("__getitem__", "narrow"):
                return _Softmax(given[0], taker.outputs[0], softmax.axis, (i,))
        return softmax

    # --- from the softmax to both products -----------------------------------------------------

    def attention(self, i: int) -> Attention | None:
        """The attention of a softmax or of a fused call; None if it is another softmax."""
        op = self.flow.program.operations[i]
        if short_name(op) == "scaled_dot_product_attention":
            return self._fused(i, op)
        softmax = self._softmax(i)
        assert softmax is not None, "it is a candidate"
        softmax = self._without_sinks(softmax)
        first = self._score_product(softmax)
        if first is None:
            return None
        self._sides(softmax, first)
        return self._assembled(softmax, first, *self._value_product(softmax))

    def _sides(self, softmax: _Softmax, first: int) -> tuple[str, Value, Value]:
        """The letter of the keys in the product of queries and keys, the queries and the keys."""
        scores = self.flow.product(first)
        assert scores is not None, "it was found as a product"
        # The letter of the scores' product that becomes the softmax's axis.
        made = self.flow.program.operations[first].outputs[0]
        steps = self.flow.step(made, softmax.scores)
        if steps is None or steps[softmax.axis] < 0:
            raise _UnclearError("the axis of its softmax is not that of the keys")
        letter = scores.made_axes[steps[softmax.axis]]
        key = scores.left if letter in scores.left_axes else scores.right
        query = scores.right if key == scores.left else scores.left
        if letter in scores.axes_of(query):
            raise _UnclearError(
                "its softmax runs over an axis that queries and keys share (such as heads), not over keys"
            )
        return letter, query, key

    def _score_product(self, softmax: _Softmax) -> int | None:
        """The product of queries and keys that leads to a softmax; None if there is none."""

        def stop(i: int) -> bool:
            product = self.flow.product(i)
            if product is None:
                return False
            if {product.left, product.right} <= self.flow.dependent:
                return True
            # Weights may mix heads on the way (talking heads), never make the axis of the softmax.
            made = self.flow.program.operations[i].outputs[0]
            steps = self.flow.step(made, softmax.scores)
            if steps is None or steps[softmax.axis] < 0:
                return True
            letter = product.made_axes[steps[softmax.axis]]
            weights = product.left if product.right in self.flow.dependent else product.right
            # What is mixed has an axis of queries besides; else it is no score but what scores are made of.
            others = [
                n
                for n, a in enumerate(product.made_axes)
                if a != letter and a not in product.axes_of(weights) and not self._batches(made, n)
            ]
            queries = any(self.flow.shape(made)[n] > 1 for n in others)
            return letter in product.axes_of(weights) or not queries

        ways = self.flow.before(softmax.scores, stop)
        found = [
            i
            for i in ways
            if (product := self.flow.product(i)) is not None
            and {product.left, product.right} <= self.flow.dependent
        ]
        if len(found) > 1:
            raise _UnclearError(
                f"its softmax is taken of {len(found)} products of tensors that depend on the input"
            )
        return found[0] if found else None

    def _value_product(self, softmax: _Softmax) -> tuple[int, Value]:
        """The product of a pattern with values, and the pattern as it enters it."""
        waiting, seen = [softmax.pattern], set()
        while waiting:
            value = waiting.pop(0)
            for i in self.flow.taken_by.get(value, ()):
                if i in seen:
                    continue
                seen.add(i)
                op, product = self.flow.program.operations[i], self.flow.product(i)
                if product is None:
                    same = math.prod(self.flow.shape(op.outputs[0])) == math.prod(
                        self.flow.shape(value)
                    )
                    waiting += [v for v in op.outputs if same]
                    continue
                steps = self.flow.step(softmax.pattern, value)
                if steps is None or softmax.axis not in steps:
                    continue
                letter = product.axes_of(value)[steps.index(softmax.axis)]
                other = product.right if product.left == value else product.left
                if letter in product.summed and other in self.flow.dependent:
                    return i, value
                if letter in product.made_axes:
                    waiting += op.outputs  # heads that are mixed
        raise _UnclearError(
            "its pattern is multiplied with no values along the axis of the softmax"
        )

    # --- what the axes run over ----------------------------------------------------------------

    def _batches(self, value: Value, axis: int) -> int:
        return Batches(self.flow, self.other).of(value, axis)

    def _fused(self, i: int, op: Operation) -> Attention:
        query, key, value = (
            op.argument(n, name) for n, name in enumerate(("query", "key", "value"))
        )
        n = len(self.flow.shape(query))
        if value not in self.flow.dependent or key not in self.flow.dependent:
            raise _UnclearError("its keys and values do not depend on the input")
        lead = "abcdefg"[: n - 2]
        # Keys and values may have fewer heads (`enable_gqa`), which a letter cannot say: each has its own sizes.
        scores = Product(query, key, f"{lead}qd", f"{lead}kd", f"{lead}qk")
        values = Product(query, value, f"{lead}qk", f"{lead}ke", f"{lead}qe")
        roles = self._roles(query, lead, "q", "k", (self._windows(scores, query) or set()))
        where = op.running[-1] if op.running else ("", 0)
        inside = [self._at(i, part=part) for part in ("scores", "pattern")]
        shape = (*self.flow.shape(query)[:-1], self.flow.shape(key)[-2])
        axes = tuple(roles[a] for a in scores.made_axes)
        shown = [Place(None, at, axes, shape, _sizes(axes, shape)) for at in inside]
        return Attention(
            where,
            self._operand(i, scores, query, roles | {"d": ("d_head",), "q": ("position",)}),
            self._operand(i, scores, key, roles | {"d": ("d_head",), "k": ("position",)}),
            self._operand(i, values, value, roles | {"e": ("d_head",), "k": ("position",)}),
            shown[0], shown[1],
            self._laid(
                op.outputs[0], self._at(i), values.made_axes, roles | {"e": ("d_head",), "q": ("position",)}
            ),
            i, i, True,
        )  # fmt: skip

    def _assembled(self, softmax: _Softmax, first: int, last: int, taken: Value) -> Attention:
        operations = self.flow.program.operations
        scores, values = self.flow.product(first), self.flow.product(last)
        assert scores is not None, "it was found as a product"
        assert values is not None, "it was found as a product"
        key_letter, query, key = self._sides(softmax, first)
        free = [
            a
            for a in scores.axes_of(query)
            if a in scores.made_axes and a not in scores.axes_of(key)
        ]
        query_letter = self._query_letter(free, scores, query)
        windows = self._shared_windows(scores, query, key)
        of_scores = self._roles(
            operations[first].outputs[0], scores.made_axes, query_letter, key_letter, windows
        )
        inner = dict.fromkeys(scores.summed, ("d_head",))
        if len(inner) != 1:
            raise _UnclearError("queries and keys are multiplied along several axes")
        shown = self._roles_like(softmax, first, scores, of_scores, (query_letter, key_letter))
        z, z_roles, value = self._z(softmax, last, values, taken, shown)
        where = operations[softmax.operations[-1]].running
        return Attention(
            where[-1] if where else ("", 0),
            self._operand(first, scores, query, of_scores | inner | {query_letter: ("position",)}),
            self._operand(first, scores, key, of_scores | inner | {key_letter: ("position",)}),
            self._operand(last, values, value, _of_values(z_roles)),
            self._taken(softmax, shown), self._weighing(softmax, shown, last, taken, z_roles), z, first, last, False,
            mixed=self._mixes(softmax, taken),
        )  # fmt: skip

    def _query_letter(self, free: Sequence[str], product: Product, query: Value) -> str:
        if len(free) == 1:
            return free[0]
        if not free:
            raise _UnclearError("its queries have no axis of their own")
        # Groups of heads that share keys are as free as queries are; queries are as many as the input has positions.
        n_keys = max(self.flow.shape(product.right if query == product.left else product.left))
        sizes = dict(zip(product.axes_of(query), self.flow.shape(query), strict=True))
        fits = [a for a in free if sizes[a] == n_keys] or list(free)
        if len(fits) > 1:
            fits = [a for a in fits if sizes[a] == max(sizes[b] for b in fits)]
        if len(fits) != 1:
            raise _UnclearError(
                f"it is not clear which of the axes {', '.join(free)} runs over queries"
            )
        return fits[0]

    def _shared_windows(self, product: Product, query: Value, key: Value) -> set[str]:
        """The letters of axes that run over parts of the text or image in queries and in keys.

        Keys that are repeated for all heads do not differ along those, either, but queries do.
        """
        known = [w for v in (query, key) if (w := self._windows(product, v)) is not None]
        return set.intersection(*known) if known else set()

    def _windows(self, product: Product, query: Value) -> set[str] | None:
        """The letters of axes of queries (or keys) that run over parts of the text or image, not over features.

        None if what they are made of is not known.
        """

        def stop(i: int) -> bool:
            return self.flow.product(i) is not None

        ways = [i for i in self.flow.before(query, stop) if stop(i)]
        projection = self.flow.product(ways[0]) if len(ways) == 1 else None
        if projection is None:
            return None
        made = self.flow.program.operations[ways[0]].outputs[0]
        moved = self.flow.moved(made, query)
        if moved is None:
            return None
        given = projection.left if projection.left in self.flow.dependent else projection.right
        shape = self.flow.shape(made)
        features = [
            moved // math.prod(shape[n + 1 :]) % shape[n]
            for n, letter in enumerate(projection.made_axes)
            if letter not in self._long_axes(projection, given)
        ]
        return {
            letter
            for n, letter in enumerate(product.axes_of(query))
            if moved.shape[n] > 1 and all(bool((f == f.narrow(n, 0, 1)).all()) for f in features)
        }

    def _long_axes(self, product: Product, value: Value) -> set[str]:
        """The letters of a factor's axes, without those that are broadcast."""
        pairs = zip(product.axes_of(value), self.flow.shape(value), strict=True)
        return {letter for letter, size in pairs if size > 1}

    def _roles(
        self, value: Value, letters: str, query: str, key: str, windows: Container[str] = ()
    ) -> dict[str, tuple[str, ...]]:
        """What each axis of a product runs over, by its letter; the leading ones are the batch, windows and heads."""
        found: dict[str, tuple[str, ...]] = {query: ("query",), key: ("key",)}
        lead = [(n, a) for n, a in enumerate(letters) if a not in (query, key)]
        batch = [(a, m) for n, a in lead if (m := self._batches(value, n))]
        if len(batch) != 1:
            raise _UnclearError("it is not clear which of its axes is the batch")
        letter, m = batch[0]
        apart = [a for _, a in lead if a != letter and a in windows and m == 1]
        heads = [(n, a) for n, a in lead if a != letter and a not in apart]
        if len(heads) > 1:  # axes of length 1 mean nothing
            heads = [(n, a) for n, a in heads if self.flow.shape(value)[n] > 1] or heads[:1]
        if len(heads) > 2:
            raise _UnclearError(f"{len(heads)} axes may be heads")
        if len(apart) > 1:
            raise _UnclearError(f"{len(apart)} axes run over windows")
        found |= {a: () for _, a in lead if a != letter} | dict.fromkeys(apart, ("window",))
        names = ["head"] if len(heads) == 1 else ["head0", "head1"]
        found |= {a: (name,) for (_, a), name in zip(heads, names, strict=False)}
        inner = ("window",) if heads else ("head",)
        found[letter] = ("batch", *inner) if m > 1 else ("batch",)
        return found

    def _laid(
        self, value: Value, address: Address, letters: str, roles: Mapping[str, tuple[str, ...]]
    ) -> Place:
        return self._placed(value, address, tuple(roles[a] for a in letters))

    def _placed(self, value: Value, address: Address, axes: Axes) -> Place:
        return placed(value, address, axes, self.flow.shape(value))

    def _at(self, i: int, **part: object) -> Address:
        return self.flow.address(i, len(self.flow.program.operations[i].running), **part)

    def _operand(
        self, i: int, product: Product, value: Value, roles: Mapping[str, tuple[str, ...]]
    ) -> Place:
        """A factor of a product, where it enters it."""
        letters = product.axes_of(value)
        if product.left == product.right:
            raise _UnclearError("queries and keys are the same tensor")
        axes = tuple(roles[a] for a in letters)
        shape = self.flow.shape(value)
        # One head of keys or values for all.
        shared = {
            n
            for n, names in enumerate(axes)
            if names[:1] and names[0].startswith("head") and shape[n] == 1
        }
        if shared and sum(names[:1] != () and names[0].startswith("head") for names in axes) > 1:
            axes = tuple(() if n in shared else names for n, names in enumerate(axes))
        address = self.flow.argument_address(i, value)
        if address is None:
            raise _UnclearError("its factors are no arguments of their own")
        return self._placed(value, address, axes)

    def _roles_like(
        self,
        softmax: _Softmax,
        first: int,
        product: Product,
        roles: Mapping[str, tuple[str, ...]],
        own: tuple[str, str],
    ) -> Axes:
        """What the axes of the softmax run over."""
        made = self.flow.program.operations[first].outputs[0]
        shape = self.flow.shape(softmax.pattern)
        steps = self.flow.step(made, softmax.scores) or []
        query = product.made_axes.index(own[0])
        if len(steps) == len(self.flow.shape(made)) and steps == list(range(len(steps))):
            return tuple(roles[a] for a in product.made_axes)
        at = next((n for n, step in enumerate(steps) if step == query), None)
        if at is None:
            raise _UnclearError("the queries of its softmax are not those of its scores")
        letters = "abcdefgh"[: len(shape)]
        found = self._roles(softmax.pattern, letters, letters[at], letters[softmax.axis])
        return tuple(found[a] for a in letters)

    def _taken(self, softmax: _Softmax, axes: Axes) -> Place:
        """The scores, where the softmax takes them."""
        start = self.flow.made_by.get(softmax.scores, -1)
        taker = next(i for i in self.flow.taken_by[softmax.scores] if i > start)
        op = self.flow.program.operations[taker]
        if taker == softmax.operations[-1]:
            place = next((n for n, given in enumerate(op.args) if given == softmax.scores), None)
            if place is None:
                key = next(k for k, given in op.kwargs.items() if given == softmax.scores)
                address = self._at(taker, part="argument", key=key)
            else:
                address = self._at(taker, part="argument", place=place)
        else:  # a softmax that is written out takes its scores several times
            found = self.flow.address_of(softmax.scores)
            if found is None:
                raise _UnclearError("its scores are written into part of another tensor")
            address = found
        return self._placed(softmax.scores, address, axes)

    def _mixes(self, softmax: _Softmax, taken: Value) -> bool:
        """Whether weights mix heads after the softmax."""
        ways = self.flow.between(softmax.pattern, taken)
        return any(self.flow.product(i) is not None for i in ways)

    def _weighing(
        self,
        softmax: _Softmax,
        axes: Axes,
        last: int,
        taken: Value,
        roles: Mapping[str, tuple[str, ...]],
    ) -> Place:
        """The pattern: what the softmax gives, or what is made of it (renormalised, gated) before it weighs values."""
        ways = [self.flow.program.operations[i] for i in self.flow.between(softmax.pattern, taken)]
        kept = all(moves(op) or short_name(op) in _KEEPS for op in ways)
        product = self.flow.product(last)
        if kept or self._mixes(softmax, taken) or product is None:
            return self._given(softmax, axes)
        return self._operand(last, product, taken, roles)

    def _given(self, softmax: _Softmax, axes: Axes) -> Place:
        address = self.flow.address_of(softmax.pattern)
        assert address is not None, "a softmax makes a tensor of its own"
        return self._placed(softmax.pattern, address, axes)

    def _z(
        self, softmax: _Softmax, last: int, product: Product, taken: Value, axes: Axes
    ) -> tuple[Place, dict[str, tuple[str, ...]], Value]:
        """What heads read, the roles of the letters of its product, and the values."""
        value = product.right if product.left == taken else product.left
        steps = self.flow.step(softmax.pattern, taken)
        assert steps is not None, "the product was found by them"
        letters = product.axes_of(taken)
        roles: dict[str, tuple[str, ...]]
        if steps == list(range(len(axes))):
            roles = dict(zip(letters, axes, strict=True))
        else:
            query = next(n for n, role in enumerate(axes) if role == ("query",))
            if query not in steps:
                raise _UnclearError(
                    "the queries of its pattern are not those of its values' product"
                )
            at = letters[steps.index(query)], letters[steps.index(softmax.axis)]
            roles = self._roles(taken, letters, *at)
        inner = [a for a in product.axes_of(value) if a in product.made_axes and a not in letters]
        if len(inner) != 1:
            raise _UnclearError("its values have no axis of their own")
        roles = roles | {inner[0]: ("d_head",)}
        out = {a: ("position",) if role == ("query",) else role for a, role in roles.items()}
        made = self.flow.program.operations[last].outputs[0]
        return self._laid(made, self._at(last), product.made_axes, out), roles, value

    # --- what a person declares ----------------------------------------------------------------

    def declared(self, own: Declared) -> Attention:
        """The attention that a person declares."""
        try:
            found = self._of_pattern(own)
        except _UnclearError as error:
            raise ValueError(f"attention: {own.name} with {own.pattern}: {error}") from None
        return replace(found, declared=own.name)

    def within(self, own: Attention) -> list[int]:
        """The operations of an attention from the product of queries and keys to that of values."""
        operations = self.flow.program.operations
        start, end = (operations[i].outputs[0] for i in (own.first, own.last))
        return [own.first, *self.flow.between(start, end)]

    def _value_at(self, call: str) -> Value:
        match = CALL.fullmatch(call)
        assert match is not None, "checked when it was read"
        name, place = match["call"], int(match["place"] or 0)
        if name not in self.flow.calls:
            raise unknown("call", name, self.flow.calls)
        outputs = self.flow.program.operations[self.flow.calls[name]].outputs
        if place >= len(outputs):
            raise _UnclearError(f"{name} puts out {len(outputs)} tensors, no [{place}]")
        if outputs[place] not in self.flow.dependent:
            raise _UnclearError(f"{call} does not depend on the input")
        return outputs[place]

    def _of_pattern(self, own: Declared) -> Attention:
        pattern = self._value_at(own.pattern)
        shape, i = self.flow.shape(pattern), self.flow.made_by[pattern]
        if not -len(shape) <= own.keys < len(shape):
            raise _UnclearError(f"it has {len(shape)} axes, no axis {own.keys}")
        axis = own.keys % len(shape)
        first = self._score_product(_Softmax(pattern, pattern, axis, (i,)))
        if first is None:
            return self._of_no_product(own, pattern, axis)
        made = self.flow.program.operations[first].outputs[0]
        self._sides(_Softmax(pattern, pattern, axis, (i,)), first)
        scores = self._value_at(own.scores) if own.scores else made
        if self.flow.step(scores, pattern) != list(range(len(shape))):
            raise _UnclearError(
                f"its axes are not those of {self.flow.called(self.flow.made_by[scores])}, which it is made of: say "
                "what its scores are"
            )
        softmax = _Softmax(scores, pattern, axis, (i,))
        found = self._assembled(softmax, first, *self._value_product(softmax))
        query, key = self._operand_at(own.q, found.query), self._operand_at(own.k, found.key)
        return replace(found, query=query, key=key)

    def _operand_at(self, call: str, operand: Place) -> Place:
        """Queries or keys where a person says that they are, in place of the factor of the product."""
        if not call:
            return operand
        value = self._value_at(call)
        assert operand.value is not None, "an operand is a value"
        steps = self.flow.step(value, operand.value)
        shape = self.flow.shape(value)
        if steps is None or {n for n in steps if n >= 0} != set(range(len(shape))):
            raise _UnclearError(f"the axes of {call} cannot be followed to the product")
        axes = tuple(operand.axes[steps.index(n)] for n in range(len(shape)))
        return self._named(value, axes)

    def _named(self, value: Value, axes: Axes) -> Place:
        address = self.flow.address_of(value)
        if address is None:
            raise _UnclearError("a tensor is written into part of another")
        return self._placed(value, address, axes)

    def _of_no_product(self, own: Declared, pattern: Value, axis: int) -> Attention:
        """A pattern that is made otherwise than of a product: everything but z must be said."""
        if not (own.q and own.k and own.q_axes and own.k_axes):
            raise _UnclearError(
                "it comes from no product of two tensors that depend on the input: say which are q and k, with q_axes "
                "and k_axes"
            )
        shape = self.flow.shape(pattern)
        letters = "abcdefgh"[: len(shape)]
        query = len(shape) - 2 if axis == len(shape) - 1 else len(shape) - 1
        roles = self._roles(pattern, letters, letters[query], letters[axis])
        axes = tuple(roles[a] for a in letters)
        i = self.flow.made_by[pattern]
        softmax = _Softmax(pattern, pattern, axis, (i,))
        last, taken = self._value_product(softmax)
        values = self.flow.product(last)
        assert values is not None, "it was found as a product"
        z, z_roles, value = self._z(softmax, last, values, taken, axes)
        made = self._operand(last, values, value, _of_values(z_roles))
        n_heads = max(z.heads, 1)
        scores = self._named(self._value_at(own.scores), axes) if own.scores else None
        where = self.flow.program.operations[i].running
        return Attention(
            where[-1] if where else ("", 0), self._said(own.q, own.q_axes, n_heads),
            self._said(own.k, own.k_axes, n_heads), made, scores, self._given(softmax, axes), z, i, last, False,
        )  # fmt: skip

    def _said(self, call: str, axes: str, n_heads: int) -> Place:
        """Queries or keys with the axes that a person gives them."""
        value = self._value_at(call)
        words = tuple(
            tuple(word.strip("()").split()) for word in re.findall(r"\([^)]*\)|\S+", axes)
        )
        shape = self.flow.shape(value)
        names = [name for axis in words for name in axis]
        if len(words) != len(shape) or {*names} != {"batch", "head", "position", "d_head"}:
            raise _UnclearError(
                f"{call} has the shape {shape}, for which {axes!r} are no axes: expected batch, head, position and "
                "d_head, in parentheses those that are one axis"
            )
        place = self._named(value, words)
        together = next((n for n, axis in enumerate(words) if axis == ("head", "d_head")), None)
        if together is None:
            return place
        return replace(place, sizes={"head": n_heads, "d_head": shape[together] // n_heads})

    # --- what is no attention ------------------------------------------------------------------

    def without_softmax(self, used: set[int], refused: Mapping[str, str]) -> dict[str, str]:
        """Why what weighs values is no pattern, by the call that puts it out.

        Args:
            used: the products of the attentions that were found.
            refused: why a softmax is none of attention, by its call.
        """
        found, told = {}, set()
        products = self._products(used)
        for last in products:
            product = self.flow.product(last)
            assert product is not None, "it is one of the products"
            for taken in (product.left, product.right):
                way = list(self.flow.before(taken, lambda i: self.flow.product(i) is not None))
                if not set(way).intersection(products):
                    continue
                known = {self.flow.called(i) for i in way} & refused.keys()
                told |= known
                call = self.flow.called(way[0])
                found[call] = refused[known.pop()] if known else self._why(product, taken)
        return {call: why for call, why in refused.items() if call not in told} | found

    def _products(self, used: set[int]) -> list[int]:
        """The products of two tensors that depend on the input, apart from some and from squares."""
        return [
            i
            for i, op in enumerate(self.flow.program.operations)
            if i not in used
            and op.counted
            and (product := self.flow.product(i)) is not None
            and {product.left, product.right} <= self.flow.dependent
            and product.left != product.right
        ]

    def _why(self, product: Product, taken: Value) -> str:
        """Why a tensor that is made of one product and taken by another is no pattern."""
        texts = [
            self.flow.shape(v)[1]
            for v, name in self.flow.program.sources.items()
            if name == "input" and len(self.flow.shape(v)) == 2
        ]
        summed = [
            size
            for letter, size in zip(product.axes_of(taken), self.flow.shape(taken), strict=True)
            if letter in product.summed
        ]
        if texts and texts[0] not in summed:
            return (
                "keys and values are multiplied before queries (linear attention), so that no tensor says how much "
                "each query takes of each key; " + _LOOKED_FOR
            )
        return (
            f"it is made of a product and weighs values, without a softmax between; {_LOOKED_FOR}"
        )


def _of_values(roles: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The roles of the axes of values, from those of the product with them."""
    return {
        a: ("position",) if role == ("key",) else role
        for a, role in roles.items()
        if role != ("query",)
    }


def placed(value: Value, address: Address, axes: Axes, shape: tuple[int, ...]) -> Place:
    """A value at an address, with its axes and its shape as traced."""
    return Place(value, address, axes, shape, _sizes(axes, shape))


def _sizes(axes: Axes, shape: Sequence[int]) -> dict[str, int]:
    """The lengths of what is as long in every pass, from a shape with a batch of three."""
    sizes = {}
    for names, size in zip(axes, shape, strict=True):
        if len(names) == 2:  # a batch of windows or heads
            sizes[names[1]] = size // 3
        elif names and names[0].startswith(("head", "d_head")):
            sizes[names[0]] = size
    return sizes


def _one_axis(dim: object) -> int | None:
    if isinstance(dim, int):
        return dim
    if isinstance(dim, tuple | list) and len(dim) == 1 and isinstance(dim[0], int):
        return dim[0]
    return None
