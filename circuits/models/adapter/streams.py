"""The residual stream of a transformer that is no bridge, found among the operations of a pass.

What a layer's heads put out is added to a tensor from which their queries come: that is the stream before the layer
(Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"). From the sum on, the next addition of
something that is computed from it is the MLP's. Norms and scales on the way are left to be measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from circuits.hooks import ByExample, OfAll, Tap, Trace
from circuits.models.adapter.affine import ADDS, Affine, Products
from circuits.models.adapter.attention import Batches
from circuits.models.adapter.flow import ORDERS, Flow, moves, short_name
from circuits.models.adapter.head_sites import Head, Points, Rearranged, reads_one
from circuits.models.adapter.head_weights import HeadWeights
from circuits.models.adapter.program import Operation, Value
from circuits.units import Site, SiteKind

_SCALES = {
    "mul",
    "__mul__",
    "__rmul__",
    "mul_",
    "__imul__",
    "div",
    "__truediv__",
    "div_",
    "__itruediv__",
}
_SAME = {
    "dropout", "dropout1d", "dropout_", "feature_dropout", "alpha_dropout", "to", "float", "contiguous", "view",
    "reshape", "view_as", "reshape_as", "expand", "clone",
}  # fmt: skip
"""Functions that change nothing in evaluation mode, if the shape stays the same."""


@dataclass(frozen=True, eq=False)
class TracedLayer:
    """The values of a layer; None where it has no such thing.

    Attributes:
        weights: those of its heads.
        output: the product of what heads read with the output weights.
        before: the stream before the layer.
        between: the stream between attention and MLP, where the MLP reads it.
        after: the stream after the layer.
        attention: what attention adds to the stream.
        attention_given: what queries, keys and values are made of, laid out as the stream.
        mlp_added: what the MLP adds to it.
        mlp: the product with the MLP's output weights.
        neurons: what that product is given.
        inputs: the products that make neurons of what the MLP reads: one, or two where one gates the other.
        mlp_given: what the MLP reads.
        mlp_input: what it takes first, with a row for each example: what it reads or, where its code joins examples
            and positions before it normalises them (OPT), the stream. None if there is no such tensor.
    """

    weights: HeadWeights
    output: Affine
    before: Value
    between: Value | None
    after: Value
    attention: Value
    attention_given: Value
    mlp_added: Value | None = None
    mlp: Affine | None = None
    neurons: Value | None = None
    inputs: tuple[Affine, ...] = ()
    mlp_given: Value | None = None
    mlp_input: Value | None = None

    @property
    def head(self) -> Head:
        """Its attention."""
        return self.weights.head


@dataclass(frozen=True, eq=False)
class TracedStream:
    """The residual stream of a model.

    Attributes:
        flow: the operations of a pass.
        layers: in order.
        embed: the embedding of tokens.
        position: that of positions, which is added to it and does not depend on the tokens.
        last: the stream after the last layer.
        unembed: the product with the unembedding.
        search: what found it.
        head: the first product of a readout that has several in a row (of masked language models); None otherwise.
    """

    flow: Flow
    layers: tuple[TracedLayer, ...]
    embed: Value | None
    position: Value | None
    last: Value
    unembed: Affine | None
    search: Search
    head: Affine | None = None

    def same(self, value: Value) -> Value:
        """The value that this one is, before functions that change nothing."""
        return self.search.same(value)

    def affine(self, i: int) -> Affine | None:
        """An operation as a product with weights."""
        return self.search.affine(i)

    def linear_input(self, layer: int) -> int:
        """Which of the two products of a gated MLP is not the gate: its result reaches the neurons unchanged."""
        at = self.layers[layer]
        assert at.neurons is not None, "it has inputs"
        steps = [len(self.flow.between(affine.made, at.neurons)) for affine in at.inputs]
        return steps.index(min(steps))

    def reads_stream(self, affine: Affine) -> bool:
        """Whether a product is given the last stream itself, with no norm between."""
        return self.same(affine.given) == self.same(self.last)

    def scales(self, start: Value, end: Value) -> bool:
        """Whether all that happens between two values is that they are multiplied by numbers."""
        ops = [self.flow.program.operations[i] for i in self.flow.between(start, end)]
        return all(
            self.search.keeps(op) or (short_name(op) in (*_SCALES, *ORDERS) and len(op.inputs) == 1)
            for op in ops
        )

    def reads_alone(self, at: TracedLayer) -> bool:
        """Whether nothing but the MLP reads what it is given, so that a change there changes the MLP alone."""
        if at.mlp_input is None or at.mlp_added is None:
            return False
        first = self.same(at.mlp_input)
        waiting, inside = [first], set(self.flow.between(first, at.mlp_added))
        while waiting:
            for i in self.flow.taken_by.get(waiting.pop(), ()):
                if i not in inside:
                    return False
                op = self.flow.program.operations[i]
                waiting += op.outputs if self.search.keeps(op) else ()
        return True

    def mlp_reads(self, at: TracedLayer) -> list[int]:
        """The operations by which the MLP takes its input."""
        if at.mlp_input is None or at.mlp_added is None:
            return []
        ops = self.flow.program.operations
        steps = self.flow.between(at.mlp_input, at.mlp_added)
        found, inside = [i for i in steps if at.mlp_input in ops[i].inputs], set(steps)
        # What only moves numbers may be read by others behind it: a change there would reach them, too.
        waiting = [i for i in found if moves(ops[i])]
        while waiting:
            takers = [i for v in ops[waiting.pop()].outputs for i in self.flow.taken_by.get(v, ())]
            if not inside.issuperset(takers):
                return []
            waiting += [i for i in takers if moves(ops[i])]
        return found

    @property
    def table(self) -> Value | None:
        """The table of the embedding."""
        op = None if self.embed is None else self.flow.operation(self.embed)
        if op is None or short_name(op) not in ("embedding", "__getitem__"):
            return None
        rows = [v for v in op.inputs if v not in self.flow.dependent]
        return rows[0] if len(rows) == 1 else None

    @property
    def renormalised(self) -> bool:
        """Whether the stream itself is normalised within layers or between them (BERT): it is no sum then."""
        ends = [v for at in self.layers for v in (at.between, at.after) if v is not None]
        return any(not self._is_sum(v) for v in ends)

    def _is_sum(self, value: Value) -> bool:
        """Whether a value is the outcome of an addition."""
        while (op := self.flow.operation(self.same(value))) is not None:
            if len(op.inputs) != 1 or short_name(op) not in ORDERS:
                return short_name(op) in ADDS
            value = op.inputs[0]
        return True

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP of a layer read the same stream, as in GPT-J."""
        return any(at.between is None and at.mlp_added is not None for at in self.layers)


class NoStreamError(Exception):
    """Heads do not write to a stream that they read."""


@dataclass(frozen=True)
class Search(Products):
    """What finds the stream among the products of a pass."""

    # --- steps ---------------------------------------------------------------------------------

    def same(self, value: Value) -> Value:
        """The value that this one is, before functions that change nothing."""
        while (op := self.flow.operation(value)) is not None and self.keeps(op):
            value = op.inputs[0]
        return value

    def keeps(self, op: Operation) -> bool:
        """Whether an operation returns what it is given."""
        if not op.inputs or self.flow.shape(op.inputs[0]) != self.flow.shape(op.outputs[0]):
            return False
        if short_name(op) == "__getitem__":  # `x[:, -n:]` with all of x
            index = op.args[1] if len(op.args) > 1 else None
            return all(
                isinstance(i, slice) for i in (index if isinstance(index, tuple) else (index,))
            )
        return short_name(op) in _SAME

    def last_same(self, value: Value) -> Value:
        """The value at the end of the functions that change nothing, if nothing else takes it on the way."""
        return self.chain(value)[-1]

    def chain(self, value: Value) -> list[Value]:
        """A value and what functions that change nothing make of it, as long as nothing else takes it on the way."""
        found = [value]
        while len(takers := self.flow.taken_by.get(value, [])) == 1:
            op = self.flow.program.operations[takers[0]]
            if not self.keeps(op):
                break
            value = op.outputs[0]
            found.append(value)
        return found

    def names(self, start: Value, end: Value) -> list[str]:
        """The functions between two values."""
        return [short_name(self.flow.program.operations[i]) for i in self.flow.between(start, end)]

    def follow(self, start: Value, names: Sequence[str]) -> Value:
        """The value that some functions make of another, one after the other; the other if they do not follow it."""
        value, following, left = start, {start}, list(names)
        for op in self.flow.program.operations[self.flow.made_by.get(start, -1) + 1 :]:
            if left and not following.isdisjoint(op.inputs):
                if short_name(op) != left.pop(0):
                    return start
                value = op.outputs[0]
                following.update(op.outputs)
        return start if left else value

    def ancestors(self, value: Value) -> set[Value]:
        """What a value is made of without any product between, with itself."""
        found = {value}
        for i in self.flow.before(value, self.is_product):
            op = self.flow.program.operations[i]
            found.update(op.outputs)
            if not self.is_product(i):
                found.update(v for v in op.inputs if v in self.flow.dependent)
        return found

    def added(self, value: Value, stop: int) -> Iterator[tuple[Value, Value, Value]]:
        """The additions that a value goes into without any product before: what is added, to what, and the sum.

        What is added is the value itself, or the value normalised or scaled. Not past the operation `stop`.
        """
        waiting, seen = [value], set()
        while waiting:
            here = waiting.pop(0)
            for i in self.flow.taken_by.get(here, ()):
                if i in seen or i >= stop or self.is_product(i):
                    continue
                seen.add(i)
                op = self.flow.program.operations[i]
                others = [
                    v for v in dict.fromkeys(op.inputs) if v != here and v in self.flow.dependent
                ]
                if short_name(op) in ADDS and len(others) == 1:
                    yield here, others[0], op.outputs[0]
                waiting += op.outputs

    # --- layers --------------------------------------------------------------------------------

    def layer(self, weights: HeadWeights, stop: int) -> TracedLayer:
        """The layer of an attention, given the weights of its heads.

        Raises:
            NoStreamError: if its heads do not write to a stream that they read.
        """
        head, output = weights.head, weights.output
        query = head.projections.get("q")
        if query is None:
            raise NoStreamError(f"what the queries of {head.name} are made of was not found")
        assert head.attention.z.value is not None, "a product has a value"
        if isinstance(output, str):
            raise NoStreamError(output)
        reads = {self.same(v) for v in self.ancestors(query.given)}
        parallel: list[tuple[Value, Value]] = []
        from_heads = self._following(head.attention.z.value)
        for what, to, total in self.added(output.affine.made, stop):
            if self.same(to) in reads:
                first = parallel[0][0] if parallel else what
                others = [other for _, other in parallel]
                return self._with_mlp(weights, output.affine, to, total, first, others, stop)
            if to in from_heads and to not in self._following(output.affine.made):
                raise NoStreamError(
                    f"what {head.name} reads goes to the stream in two ways (an adapter of its output weights)"
                )
            parallel.append((what, to))
        raise NoStreamError(
            f"what {head.name} puts out is added to nothing that its queries are made of"
        )

    def _with_mlp(
        self,
        weights: HeadWeights,
        output: Affine,
        before: Value,
        total: Value,
        attention: Value,
        parallel: Sequence[Value],
        stop: int,
    ) -> TracedLayer:
        """A layer with its MLP, which reads the stream before it (in parallel) or after attention."""
        end = self.batches.apart(total, forward=True)
        given = self._laid_out_as(before, weights.head.projections["q"].given)
        own = TracedLayer(weights, output, self.same(before), None, end, attention, given)
        from_heads = self._following(output.made)
        if (
            parallel
        ):  # the MLP's output was added to attention's before both were added to the stream
            return self._mlp(own, parallel[0], total, None)
        for what, to, after in self.added(total, stop):
            if to in self._following(total):
                middle = self.same(self.batches.apart(what, forward=False))
                return self._mlp(own, to, after, middle)
            if to not in from_heads and self.same(what) == self.same(total):
                return self._mlp(own, to, after, None)
        return own

    def _laid_out_as(self, stream: Value, value: Value) -> Value:
        """What a value was before its axes were moved, where they were those of the stream."""
        here, shape = value, self.flow.shape(stream)
        while self.flow.shape(here) != shape:
            op = self.flow.operation(here)
            if op is None or not moves(op) or len(op.inputs) != 1:
                return value
            here = op.inputs[0]
        return here

    def _following(self, value: Value) -> set[Value]:
        found = {value}
        for op in self.flow.program.operations[self.flow.made_by.get(value, -1) + 1 :]:
            if not found.isdisjoint(op.inputs):
                found.update(op.outputs)
        return found

    def _mlp(
        self, own: TracedLayer, added: Value, after: Value, between: Value | None
    ) -> TracedLayer:
        entry = self._entry(own.before if between is None else between, added)
        own = replace(own, mlp_input=entry)
        last = self.affines_before(added)
        if len(last) != 1:  # experts, for example
            return replace(own, between=between, after=after, mlp_added=added)
        mlp, after = last[0], self.batches.apart(after, forward=True)
        neurons = self.batches.apart(mlp.given, forward=False)
        inputs = self.affines_before(neurons)
        given = {self.batches.apart(a.given, forward=False) for a in inputs}
        known = len(inputs) in (1, 2) and len(given) == 1
        own = replace(own, between=between, after=after, mlp_added=added, mlp=mlp)
        if not known:
            return own
        read = given.pop()
        if math.prod(self.flow.shape(read)) == math.prod(self.flow.shape(own.before)):
            entry = read
        return replace(own, neurons=neurons, inputs=tuple(inputs), mlp_given=read, mlp_input=entry)

    def _entry(self, stream: Value, added: Value) -> Value | None:
        """The last value, laid out as the stream, through which all goes that an MLP makes of the stream, before any
        product: what it reads, normalised, whatever follows (experts and their router).
        """
        steps = self.flow.between(stream, added)
        earlier, found = {stream}, stream
        for at, i in enumerate(steps):
            if self.is_product(i):
                break
            made = self.flow.program.operations[i].outputs
            rest = {v for j in steps[at + 1 :] for v in self.flow.program.operations[j].inputs}
            if len(made) == 1 and earlier.isdisjoint(rest):
                found = made[0] if self.flow.shape(made[0]) == self.flow.shape(stream) else found
            earlier.update(made)
        return found if steps else None


def find_stream(
    flow: Flow, batches: Batches, weights: Sequence[HeadWeights], final: Value | None
) -> TracedStream:
    """The residual stream that a model's heads write to and read from.

    Args:
        flow: the operations of a pass.
        batches: which axes follow the batch.
        weights: those of the heads of each of the model's attentions.
        final: the model's output.

    Raises:
        NoStreamError: if there is none, or several (an encoder and a decoder).
    """
    heads = [own.head for own in weights]
    search = Search(flow, batches)
    apart = [head for head in heads if not head.name.startswith("blocks.")]
    for head in apart:
        if _keys_of_several_layers(search, head):
            raise NoStreamError(
                f"the keys of {head.name} are made of what its queries read by several layers in a row, which are not "
                "followed"
            )
    if apart:
        raise NoStreamError("it has an encoder and a decoder")
    ends = [head.attention.first for head in heads[1:]] + [len(flow.program.operations)]
    layers = [search.layer(own, end) for own, end in zip(weights, ends, strict=True)]
    layers = _joined(search, layers)
    for one, then in itertools.pairwise(layers):
        if search.same(one.after) != then.before:
            raise NoStreamError(
                f"the stream after {one.head.name} is not the one before {then.head.name}"
            )
    shapes = list(dict.fromkeys(flow.shape(v) for at in layers for v in (at.before, at.after)))
    if len(shapes) > 1:
        raise NoStreamError(
            f"its stream changes its shape, from {shapes[0][1:]} to {shapes[1][1:]}"
        )
    embed, position = _embeddings(search, layers[0].before)
    found = search.affines_before(final) if final is not None else []
    unembed = found[0] if len(found) == 1 else None
    last = layers[-1].after
    if unembed is not None and search.same(last) not in {
        search.same(v) for v in search.ancestors(unembed.given)
    }:
        unembed = None
    head = None if unembed is not None or final is None else _head(search, last, final)
    return TracedStream(
        flow, tuple(layers), embed, position, search.last_same(last), unembed, search, head
    )


def _head(search: Search, last: Value, final: Value) -> Affine | None:
    """The first product of a readout with several; None if the readout takes more than what this is given."""
    found, flow = search.affine_after(last), search.flow
    if found is None or flow.shape(found.given) != flow.shape(last):
        return None
    behind = set(flow.between(found.given, final))
    steps = {*flow.between(last, found.given), *behind}
    return found if behind and steps == set(flow.between(last, final)) else None


def _keys_of_several_layers(search: Search, head: Head) -> bool:
    """Whether keys are made of what queries read by one product with weights after another (a narrow layer)."""
    query, key = (head.projections.get(letter) for letter in ("q", "k"))
    if query is None or key is None:
        return False
    value = key.given
    while len(before := search.affines_before(value)) == 1:
        value = before[0].given
    return value != key.given and reads_one(search.flow, query.given, value)


def _joined(search: Search, layers: Sequence[TracedLayer]) -> list[TracedLayer]:
    """Layers that end with what the next one begins with, where the stream is normalised after each (as in BERT)."""
    made = list(layers)
    steps: list[str] = []
    for n, (one, then) in enumerate(itertools.pairwise(layers)):
        between = search.flow.between(one.after, then.before)
        if (
            search.same(one.after) != then.before
            and between
            and not any(map(search.is_product, between))
        ):
            made[n] = replace(one, after=then.before)
            steps = search.names(one.after, then.before)
    if steps:
        made[-1] = replace(layers[-1], after=search.follow(layers[-1].after, steps))
    return made


def _embeddings(search: Search, first: Value) -> tuple[Value | None, Value | None]:
    """The embedding of tokens and that of positions, whose sum enters the first layer."""
    op = search.flow.operation(first)
    found: list[Value] = []
    constant: list[Value] = []
    waiting = [first]
    while waiting:
        value = search.same(waiting.pop(0))
        op = search.flow.operation(value)
        if op is not None and short_name(op) in ADDS:
            waiting += [v for v in op.inputs if v in search.flow.dependent]
            constant += [v for v in op.inputs if v not in search.flow.dependent]
        else:
            found.append(value)
    embed = found[0] if len(found) == 1 else None
    return embed, constant[0] if embed is not None and len(constant) == 1 else None


def stream_values(stream: TracedStream) -> Mapping[str, Value]:
    """The values of a stream that are sites, by the names that bridges have for them."""
    found: dict[str, Value | None] = {"hook_embed": stream.embed}
    for n, at in enumerate(stream.layers):
        layer = f"blocks.{n}"
        found |= {
            f"{layer}.hook_resid_pre": at.before,
            f"{layer}.hook_resid_mid": at.between,
            f"{layer}.hook_resid_post": at.after,
            f"{layer}.hook_attn_out": at.attention,
            f"{layer}.attn.hook_out": at.output.made,
            f"{layer}.hook_mlp_out": at.mlp_added,
            f"{layer}.mlp.hook_out": at.mlp.made if at.mlp else None,
            f"{layer}.mlp.hook_post": at.neurons,
            f"{layer}.mlp.hook_in": at.mlp_input if stream.reads_alone(at) else None,
        }
        if at.neurons is not None and len(at.inputs) in (1, 2):
            linear = stream.linear_input(n) if len(at.inputs) == 2 else -1
            found |= {
                f"{layer}.mlp.hook_pre{'_linear' if i == linear else ''}": affine.made
                for i, affine in enumerate(at.inputs)
            }
    if stream.unembed is not None:
        unembed = stream.unembed
        found["hook_unembed"] = unembed.made
        if not stream.reads_stream(unembed):
            found["unembed.hook_in"] = unembed.given
    elif stream.head is not None and not stream.reads_stream(stream.head):
        found["head.hook_in"] = stream.head.given
    return {name: value for name, value in found.items() if value is not None}


_STREAM = (
    "hook_embed",
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
)


def stream_sites(
    stream: TracedStream,
    batches: Batches,
    found: Mapping[str, tuple[Site, Tap]],
    traces: Sequence[Trace],
    points: Points,
) -> tuple[dict[str, tuple[Site, Tap]], list[tuple[Site, Tap]]]:
    """The sites of modules with what bridges call them, and sites for what no module returns.

    Args:
        stream: the residual stream.
        batches: which axes follow the batch.
        found: the sites of modules, by name.
        traces: what modules returned.
        points: where functions are watched.
    """
    made = dict(found)
    more: list[tuple[Site, Tap]] = []
    paths = {id(module): path for path, module in points.root.named_modules()}
    returned: dict[Value, dict[str, str]] = {}
    for t in traces:
        if t.name in found and t.notes[1] is not None:
            returned.setdefault(t.notes[1], {})[paths.get(id(t.tap.module), "")] = t.name
    names: dict[Value, list[str]] = {}
    for name, value in stream_values(stream).items():
        names.setdefault(stream.same(value), []).append(name)
    for value, own in names.items():
        kind = _kind(own)
        owner = _owner(stream, value, returned)
        if owner is not None:
            site, tap = made[owner]
            kind = site.kind if kind == "neuron" or site.kind == "logit" else kind
            made[owner] = replace(site, kind=kind, aliases=(*site.aliases, *own)), tap
            continue
        last = stream.search.last_same(value)
        address = stream.flow.address_of(last)
        if address is None:
            continue
        if _by_rows(stream, batches, last):
            tap = points.tap(address, ByExample())
            shape = (batches.of(last, 0), stream.flow.shape(last)[1])
        elif (layout := _stream_layout(batches, last)) is not None:
            tap = points.tap(address, layout if layout.held != layout.shown else None)
            shape = tuple(layout.read(torch.zeros(stream.flow.shape(last))).shape[1:])
        else:
            continue
        site = Site(
            own[0], kind, ("batch", "position", "unit"), 2, shape, tuple(own[1:]), "HookPoint"
        )
        more.append((site, tap))
    for name, value, steps in _shared_inputs(stream):
        if (own := _input_site(stream, batches, name, value, steps, points)) is not None:
            more.append(own)
    if (own := _position_site(stream, batches, points)) is not None:
        more.append(own)
    return made, more


def _owner(
    stream: TracedStream, value: Value, returned: Mapping[Value, Mapping[str, str]]
) -> str | None:
    """The site of the innermost module that computes a value and returns it: whatever reads the value reads it there.

    Not of a module that only passes it on, such as an identity on the way to attention.

    Args:
        stream: the residual stream.
        value: the value.
        returned: for each value the modules that returned it, with the names of their sites.
    """
    for same in reversed(stream.search.chain(value)):
        op = stream.flow.operation(same)
        for path, _ in reversed(op.running if op is not None else ()):
            if path in returned.get(same, {}):
                return returned[same][path]
    return None


def _shared_inputs(stream: TracedStream) -> Iterator[tuple[str, Value, list[int]]]:
    """What is read by others, too: the name of the site of what some operations read alone, the value, and these."""
    for n, at in enumerate(stream.layers):
        if at.mlp_input is not None and not stream.reads_alone(at):
            yield f"blocks.{n}.mlp.hook_in", at.mlp_input, stream.mlp_reads(at)
    if stream.unembed is not None and stream.reads_stream(stream.unembed):
        yield "unembed.hook_in", stream.unembed.given, [stream.unembed.first]
    if stream.head is not None and stream.reads_stream(stream.head):
        yield "head.hook_in", stream.head.given, [stream.head.first]


def _input_site(
    stream: TracedStream,
    batches: Batches,
    name: str,
    value: Value,
    steps: Sequence[int],
    points: Points,
) -> tuple[Site, Tap] | None:
    """The site of what some operations take, where they take it; None if its axes are not batch, position and unit."""
    shape, ops = stream.flow.shape(value), stream.flow.program.operations
    taken = [stream.flow.argument_address(i, value) for i in steps]
    once = all(ops[i].inputs.count(value) == 1 and ops[i].counted for i in steps)
    if not once or not taken or len(shape) != 3 or batches.of(value, 0) != 1:
        return None
    # Counted in the innermost module that encloses them all.
    around = zip(*(ops[i].running for i in steps), strict=False)
    depth = sum(1 for _ in itertools.takewhile(lambda modules: len(set(modules)) == 1, around))
    first, *also = [
        stream.flow.address(i, depth, part="argument", place=a.place, key=a.key, item=a.item)
        for i, a in zip(steps, taken, strict=True)
        if a is not None
    ]
    axes = ("batch", "position", "unit")
    site = Site(name, "neuron", axes, 2, shape[1:], (), "HookPoint")
    return site, points.tap(first, also=also)


def _position_site(
    stream: TracedStream, batches: Batches, points: Points
) -> tuple[Site, Tap] | None:
    """The site of what is added to the tokens' embedding for positions; None unless that is one vector for each."""
    if stream.position is None:
        return None
    flow, first = stream.flow, stream.layers[0].before
    shape, wanted = flow.shape(stream.position), flow.shape(first)
    each = len(shape) == 3 and batches.of(stream.position, 0) == 1
    same = shape[-2:] == wanted[1:] and (each or math.prod(shape[:-2]) == 1)
    if batches.of(first, 0) != 1 or not same:
        return None
    leading = set(flow.before(first, lambda _: False))
    taking = [i for i in flow.taken_by[stream.position] if i in leading]
    address = flow.argument_address(taking[0], stream.position) if len(taking) == 1 else None
    if address is None:
        return None
    axes = ("batch", "position", "unit")
    site = Site("hook_pos_embed", "residual", axes, 2, tuple(wanted[1:]), (), "HookPoint")
    return site, points.tap(address, None if each else OfAll())


def _kind(names: Sequence[str]) -> SiteKind:
    if "hook_unembed" in names:
        return "logit"
    return "residual" if any(name.endswith(_STREAM) for name in names) else "neuron"


def _by_rows(stream: TracedStream, batches: Batches, value: Value) -> bool:
    """Whether a value has a row for each position of each example in turn, and a stream with examples first."""
    n, first = batches.of(value, 0), stream.layers[0].before
    rows = len(stream.flow.shape(value)) == 2 and n == stream.flow.shape(first)[1]
    return rows and n > 1 and batches.of(first, 0) == 1


def _stream_layout(batches: Batches, value: Value) -> Rearranged | None:
    """The layout of batch x position x unit; None for tensors of other axes."""
    if len(batches.flow.shape(value)) != 3:
        return None
    shown = "batch position unit"
    for held in (shown, "position batch unit"):
        if batches.of(value, held.split().index("batch")) == 1:
            return Rearranged(held, shown, {})
    return None
