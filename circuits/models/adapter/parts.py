"""What a transformer is made of: its norms and weights by layer and head, whichever way the model keeps them.

A TransformerLens bridge names them. In any other model they follow from the operations of a pass: weights are what
queries, keys, values and outputs are multiplied with, and norms are what lies between the stream and what reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from circuits.models.adapter.affine import Constants
from circuits.models.adapter.flow import ORDERS, short_name, substituted
from circuits.models.adapter.head_weights import WEIGHTS, Letter, Matrices
from circuits.models.adapter.program import Value
from circuits.models.adapter.streams import TracedLayer, TracedStream

NormName = Literal[
    "ln1", "ln2", "mlp_input", "ln1_post", "ln2_post", "q_norm", "k_norm", "ln_final"
]
"""The norms before attention and the MLP, those after them, those of queries and keys, and the last.

`mlp_input` is what lies between the stream and the site `mlp.hook_in`: the norm before the MLP, unless the model shows
its input with a row for each example before that norm alone.
"""


@runtime_checkable
class Parts(Protocol):
    """The norms and weights of a transformer."""

    n_layers: int
    parallel: bool
    adds_positions: bool
    """Whether an embedding of positions that is no site is added to that of the tokens."""
    renormalised: bool
    """Whether the stream itself is normalised within layers or between them, as in BERT."""
    scaled: bool
    """Whether what attention is seen to add to the stream is its output times a number, as in Granite."""

    def norm(self, name: NormName, layer: int = 0) -> nn.Module | None:
        """A norm; None if there is none."""

    def has_mlp(self, layer: int) -> bool:
        """Whether a layer has anything besides attention."""
        ...

    def attention(self, name: Matrices, layer: int) -> Tensor | None:
        """W_Q, W_K, W_V (head x d_model x d_head), W_O (head x d_head x d_model), or a bias; None if there is none."""

    def group(self, letter: Letter, layer: int, head: int) -> int:
        """The number of the matrix W_Q, W_K or W_V that a head has: groups of heads may share one."""
        ...

    def mixes(self, layer: int) -> bool:
        """Whether weights mix a layer's heads after the softmax (talking heads)."""
        ...

    def neurons(
        self, layer: int
    ) -> tuple[Float[Tensor, "d_model neuron"], Float[Tensor, "neuron d_model"]] | None:
        """W_in and W_out of a layer's MLP; None if it has none, or several."""

    def neuron_inputs(self, layer: int) -> tuple[Float[Tensor, "d_model neuron"], ...]:
        """The matrices by which a layer's neurons read: W_in, or W_gate and W_in of a gated MLP; none if it has none.

        The first makes the site `hook_pre`, the second `hook_pre_linear`.
        """
        ...

    def mlp(self, layer: int) -> nn.Module | None:
        """A layer's MLP, from the site `mlp.hook_in` on, without the norm after it; None if it has none."""

    def unembedding(self) -> tuple[Float[Tensor, "d_model token"], Float[Tensor, " token"]]:
        """W_U and b_U."""
        ...

    def positions(self) -> Float[Tensor, "position d_model"]:
        """The table of the embedding of positions, for models in which it is a site."""
        ...

    def embedding(self) -> Float[Tensor, "token d_model"]:
        """W_E."""
        ...


class BridgeParts:
    """The parts of a TransformerLens bridge.

    Args:
        bridge: the bridge.
    """

    def __init__(self, bridge: Any) -> None:
        self.bridge = bridge
        self.parallel = bool(getattr(bridge.cfg, "parallel_attn_mlp", False))
        self.n_layers: int = getattr(bridge.cfg, "n_layers", 0)
        self.adds_positions = self.renormalised = self.scaled = False

    def norm(self, name: NormName, layer: int = 0) -> nn.Module | None:
        if name == "ln_final":
            return _children(self.bridge).get(name)
        block, name = self.bridge.blocks[layer], "ln2" if name == "mlp_input" else name
        owner = block.attn if name in ("q_norm", "k_norm") else block
        return _children(owner).get(name)

    def has_mlp(self, layer: int) -> bool:
        return self.mlp(layer) is not None

    def mlp(self, layer: int) -> nn.Module | None:
        return _children(self.bridge.blocks[layer]).get("mlp")

    def positions(self) -> Tensor:
        return self.bridge.W_pos.detach()

    def attention(self, name: Matrices, layer: int) -> Tensor | None:
        try:
            return getattr(self.bridge.blocks[layer].attn, name)
        except (
            AttributeError,
            NotImplementedError,
            ValueError,
        ):  # each kind of attention refuses in its own way
            return None

    def group(self, letter: Letter, layer: int, head: int) -> int:
        own, heads = (self.attention(name, layer) for name in (WEIGHTS[letter], "W_Q"))
        return head if own is None or heads is None else head // (len(heads) // len(own))

    def mixes(self, layer: int) -> bool:
        return False

    def neurons(self, layer: int) -> tuple[Tensor, Tensor] | None:
        mlp = self.mlp(layer)
        if mlp is None or not isinstance(getattr(mlp, "W_out", None), Tensor):
            return None
        return mlp.W_in.detach(), mlp.W_out.detach()  # type: ignore[union-attr, operator]

    def neuron_inputs(self, layer: int) -> tuple[Tensor, ...]:
        found = self.neurons(layer)
        if found is None:
            return ()
        gate = getattr(self.mlp(layer), "W_gate", None)
        return (gate.detach(), found[0]) if isinstance(gate, Tensor) else found[:1]

    def unembedding(self) -> tuple[Tensor, Tensor]:
        return self.bridge.W_U.detach(), self.bridge.b_U.detach()

    def embedding(self) -> Tensor:
        return self.bridge.W_E.detach()


def _children(module: nn.Module) -> dict[str, nn.Module]:
    """A module's parts by name. (Not `getattr`, which bridges pass on to the module that they wrap.)"""
    return dict(module.named_children())


class Replayed(nn.Module):
    """A part of a pass between two values, as a module: a norm that is written as a function.

    Args:
        constants: the values that do not depend on the input.
        start: what it is given.
        end: what it returns.
    """

    def __init__(self, constants: Constants, start: Value, end: Value) -> None:
        super().__init__()
        self._flow, self._ends = constants.flow, (start, end)
        self._steps = constants.flow.between(start, end)
        inside = {start} | {v for i in self._steps for v in self._operation(i).outputs}
        needed = {v for i in self._steps for v in self._operation(i).inputs} - inside
        self._names = {value: f"tensor{value.number}" for value in needed}
        for value, name in self._names.items():
            self.register_buffer(name, constants.of(value))

    def _operation(self, i: int) -> Any:
        return self._flow.program.operations[i]

    def _keeps_vectors(self, op: Any) -> bool:
        """Whether an operation only moves whole vectors, or picks some of them (the class token's)."""
        if len(op.inputs) != 1:
            return False
        shapes = self._flow.program.shapes
        before, after = shapes[op.inputs[0]], shapes[op.outputs[0]]
        if short_name(op) == "__getitem__":
            index = op.args[1] if isinstance(op.args[1], tuple) else (op.args[1],)
            whole = len(index) < len(before) and all(isinstance(i, int | slice) for i in index)
            return whole and len(after) < len(before)
        if short_name(op) not in ORDERS:
            return False
        return before[-1:] == after[-1:] and math.prod(before) == math.prod(after)

    def forward(self, x: Tensor) -> Tensor:
        # Positions are the last axis but one, and what mixes them sees those of one example.
        if x.ndim > 3:
            return self(x.flatten(0, -3)).unflatten(0, x.shape[:-2])
        try:
            return self._replay(x)
        except (RuntimeError, TypeError, IndexError, LookupError) as error:
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"what lies between the stream and what reads it does not take {tuple(x.shape)}: {first}"
            ) from error

    def _replay(self, x: Tensor) -> Tensor:
        held = {value: getattr(self, name) for value, name in self._names.items()}
        held[self._ends[0]] = x
        for i in self._steps:
            op = self._operation(i)
            if self._keeps_vectors(op):
                held[op.outputs[0]] = held[op.inputs[0]]
                continue
            args, kwargs = (substituted(given, held) for given in (op.args, op.kwargs))
            made = op.function(*args, **kwargs)
            held.update(zip(op.outputs, [made] if len(op.outputs) == 1 else made, strict=True))
        return held[self._ends[1]]


class TracedParts:
    """The parts of a transformer whose stream was found among the operations of a pass.

    Args:
        stream: the stream.
        constants: the values of the pass that do not depend on the input.
        norms: the modules of the model by what they were given and what they returned.
    """

    def __init__(
        self,
        stream: TracedStream,
        constants: Constants,
        norms: Mapping[tuple[Value, Value], nn.Module],
    ) -> None:
        self.stream, self.parallel = stream, stream.parallel
        self.n_layers = len(stream.layers)
        self.adds_positions = stream.position is not None
        self.renormalised = stream.renormalised
        self.scaled = any(
            stream.same(at.output.made) != stream.same(at.attention)
            and stream.scales(stream.same(at.output.made), stream.same(at.attention))
            for at in stream.layers
        )
        self._constants = constants
        self._modules = norms

    def norm(self, name: NormName, layer: int = 0) -> nn.Module | None:
        ends = self._ends(name, layer)
        if ends is None:
            return None
        start, end = (self.stream.same(v) for v in ends)
        if start == end or self.stream.scales(start, end):
            return None
        module = self._modules.get((start, end))
        if module is not None:
            return module
        try:
            return Replayed(self._constants, start, end)
        except LookupError as error:
            raise ValueError(
                f"what lies between the stream and what reads it ({name} of layer {layer}) depends on more than that"
            ) from error

    def _ends(self, name: NormName, layer: int) -> tuple[Value, Value] | None:
        at = self.stream.layers[layer]
        mlp = at.mlp
        if name == "ln_final":
            unembed = self.stream.unembed or self.stream.head
            return None if unembed is None else (self.stream.last, unembed.given)
        if name == "ln1":
            return at.before, at.attention_given
        if name == "ln1_post":
            return at.output.made, at.attention
        if name in ("q_norm", "k_norm"):
            return self._of_heads(at, name)
        read = at.between or at.before
        if name == "mlp_input":
            return None if at.mlp_input is None else (read, at.mlp_input)
        if mlp is None or at.mlp_added is None:
            return None
        if name == "ln2":
            return None if at.mlp_given is None else (read, at.mlp_given)
        return mlp.made, at.mlp_added

    def _of_heads(self, at: TracedLayer, name: NormName) -> tuple[Value, Value] | None:
        """What the norm of queries or keys is given and returns: the only module between that is one."""
        letter = name[0]
        projection = at.head.projections.get(letter)
        place = at.head.attention.query if letter == "q" else at.head.attention.key
        if projection is None or place.value is None:
            return None
        values = {
            v
            for i in self.stream.flow.between(projection.made, place.value)
            for v in (*self._op(i).inputs, *self._op(i).outputs)
        }
        inside = [
            ends for ends in self._modules if set(ends) <= {self.stream.same(v) for v in values}
        ]
        return inside[0] if inside and inside[0][0] != inside[0][1] else None

    def _op(self, i: int) -> Any:
        return self.stream.flow.program.operations[i]

    def has_mlp(self, layer: int) -> bool:
        return self.stream.layers[layer].mlp_added is not None

    def mlp(self, layer: int) -> nn.Module | None:
        at = self.stream.layers[layer]
        if at.mlp is None or at.mlp_input is None:
            return None
        start, end = self.stream.same(at.mlp_input), self.stream.same(at.mlp.made)
        module = self._modules.get((start, end))
        return Replayed(self._constants, start, end) if module is None else module

    def positions(self) -> Tensor:
        if self.stream.position is None:
            raise ValueError("positions: the model adds nothing to its tokens for positions")
        made = self._constants.of(self.stream.position)
        return made.reshape(-1, *made.shape[-2:])[0]

    def attention(self, name: Matrices, layer: int) -> Tensor | None:
        return self.stream.layers[layer].weights.matrix(name)

    def group(self, letter: Letter, layer: int, head: int) -> int:
        return self.stream.layers[layer].weights.group(letter, head)

    def mixes(self, layer: int) -> bool:
        return self.stream.layers[layer].head.attention.mixed

    def given(self, layer: int, module: nn.Module, inputs: Tensor) -> Mapping[Letter, Tensor]:
        """What a layer's projections of queries, keys and values are given in a pass.

        Args:
            layer: the layer.
            module: the model, in evaluation mode.
            inputs: as many examples as the pass was traced with.
        """
        return self.stream.layers[layer].weights.seen(module, inputs).read

    def neurons(self, layer: int) -> tuple[Tensor, Tensor] | None:
        at = self.stream.layers[layer]
        if at.mlp is None or at.neurons is None or not at.inputs:
            return None
        out, _ = self._constants.matrix(at.mlp)
        matrices = [self._constants.matrix(affine)[0] for affine in at.inputs]
        # Where one product gates the other (SwiGLU), the one that goes through the activation function is the gate.
        inner = matrices[0] if len(matrices) == 1 else matrices[self.stream.linear_input(layer)]
        return (inner, out) if inner.shape[1] == len(out) else None

    def neuron_inputs(self, layer: int) -> tuple[Tensor, ...]:
        if self.neurons(layer) is None:
            return ()
        inputs = self.stream.layers[layer].inputs
        matrices = [self._constants.matrix(affine)[0] for affine in inputs]
        if len(inputs) == 2 and self.stream.linear_input(layer) == 0:
            matrices.reverse()
        return tuple(matrices)

    def unembedding(self) -> tuple[Tensor, Tensor]:
        if self.stream.unembed is None:
            raise ValueError("the model's output is not a product of its last stream with weights")
        return self._constants.matrix(self.stream.unembed)

    def embedding(self) -> Tensor:
        table = self.stream.table
        if table is None:
            raise ValueError("the model's tokens are not looked up in one table")
        return self._constants.of(table)
