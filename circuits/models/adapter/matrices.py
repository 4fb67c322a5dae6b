"""Parameters as matrices from units to units, which is what an edit of weights changes."""

from __future__ import annotations

import itertools
import math
import operator
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from circuits.hooks import Tap, record
from circuits.models.adapter.affine import (
    Cells,
    Parameters,
    Use,
    WeightProduct,
    other_uses,
    weight_products,
)
from circuits.models.adapter.flow import Flow, short_name
from circuits.models.adapter.head_sites import Picked, Points
from circuits.models.adapter.program import Program, Value, own_tensors
from circuits.models.adapter.sites import evaluating
from circuits.models.adapter.topology import LAYERS, WeightLayer
from circuits.units import Site


@dataclass(frozen=True, eq=False)
class MatrixEnd:
    """One side of a matrix, its rows or its columns, as the units of a site.

    Attributes:
        site: the site's name.
        owner: for each row (or column) of the matrix the site's unit that it belongs to, -1 for none. A
            head owns as many as it has dimensions.
        factor: what the operations between matrix and site multiply each row by (batch norm, signs).
        depth: the number of operations between them; 0 is next to the matrix.
        direct: for columns: no site with units of its own lies between.
    """

    site: str
    owner: Int[Tensor, " row"]
    factor: Float[Tensor, " row"]
    depth: int = 0
    direct: bool = True

    def of(self, units: Sequence[int] | None) -> Int[Tensor, " row"]:
        """The rows that belong to some units, unit by unit; to any unit if None."""
        if units is None:
            return (self.owner >= 0).nonzero().flatten()
        if len(units) == 1:
            return (self.owner == units[0]).nonzero().flatten()
        found = [(self.owner == unit).nonzero().flatten() for unit in units]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class WeightMatrix:
    """The weights of a convolution or linear layer, as rows (outputs) by columns (inputs); or a parameter, or a part of
    one, that a function multiplies an activation with.

    Attributes:
        name: the layer's name, e.g. `mixed3b_5x5` or `blocks.0.mlp.out`; without a layer the parameter's, with the part
            of it in brackets (`attn.in_proj_weight[0:16]`).
        weight: the parameter's name in the state dict.
        bias: the name of its bias, or None.
        shape: the number of rows, of columns (of all groups), and the lengths of the kernel's axes.
        groups: groups of a convolution; a row has weights only in the columns of its group.
        transposed: whether the parameter is stored columns first.
        tied: other names of the same parameter, and what else uses its weights (layers, biases, calls of functions): an
            edit changes them too.
        bias_tied: what else uses its biases: an edit of them changes that too.
        aliases: for its parameters, by their names, other tensors of the model in the same memory; an edit would change
            one of them only, so that it is refused.
        reads: sites whose units are its columns, nearest first.
        writes: sites whose units are its rows, nearest first.
        calls: how often the layer runs in one pass; an edit changes all of them.
        cells: where in the parameters the numbers lie, if rows and columns are not the first two axes of the weights,
            or biases not those of the rows in order.
    """

    name: str
    weight: str
    bias: str | None
    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    reads: tuple[MatrixEnd, ...] = ()
    writes: tuple[MatrixEnd, ...] = ()
    tied: tuple[str, ...] = ()
    bias_tied: tuple[str, ...] = ()
    aliases: Mapping[str, Sequence[str]] = field(default_factory=dict)
    calls: int = 1
    cells: Cells | None = None

    def end(self, site: str, side: str) -> MatrixEnd | None:
        """The rows (`side` is `writes`) or columns (`reads`) as units of a site; None if they are not its units."""
        ends = self.reads if side == "reads" else self.writes
        return next((end for end in ends if end.site == site), None)

    def whole(self, parameter: Tensor) -> Shaped[Tensor, "row column *kernel"]:
        """The parameter as row x column (of the row's group) x kernel; it may share the parameter's memory."""
        if self.cells is not None:
            return _taken(parameter, self.cells.rows[:, None] + self.cells.columns)
        return parameter.transpose(0, 1) if self.transposed else parameter

    def fill(self, parameter: Tensor, values: Shaped[Tensor, "row column *kernel"]) -> None:
        """Write all weights in place, laid out as `whole` returns them."""
        if self.cells is not None:
            _put(parameter, self.cells.rows[:, None] + self.cells.columns, values.to(parameter))
        else:
            self.whole(parameter).copy_(values)

    def block(
        self, parameter: Tensor, rows: Tensor, columns: Tensor
    ) -> Shaped[Tensor, "row column *kernel"]:
        """Copy some rows and columns; zero where a grouped convolution has no weight."""
        local, there = self._grouped(rows, columns)
        if self.cells is None:
            found = self.whole(parameter)[rows[:, None], local]
        else:
            found = _taken(parameter, self._places(rows[:, None], local))
        if self.groups == 1:
            return found
        return found * there.reshape(*there.shape, *(1,) * (found.ndim - 2)).to(found)

    def put(self, parameter: Tensor, rows: Tensor, columns: Tensor, block: Tensor) -> None:
        """Write some rows and columns in place; entries that a grouped convolution does not have are skipped."""
        block = block.to(parameter)
        local, there = self._grouped(rows, columns)
        at: tuple[Tensor, Tensor] = rows[:, None], local
        if self.groups != 1:
            at, block = (rows[:, None].expand_as(there)[there], local[there]), block[there]
        if self.cells is None:
            self.whole(parameter)[at] = block
        else:
            _put(parameter, self._places(*at), block)

    def bias_index(self, bias: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """The index of some rows' biases in the parameter that holds them, for reading and writing."""
        own = None if self.cells is None else self.cells.bias
        places = rows if own is None else own[rows]
        return torch.unravel_index(places.to(bias.device), bias.shape)

    def _places(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The places of weights in the flattened parameter; columns are counted inside their group."""
        assert self.cells is not None
        return self.cells.rows[rows] + self.cells.columns[columns]

    def there(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Which of these weights exist, row x column."""
        return self._grouped(rows, columns)[1]

    def _grouped(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """For each row and column, the column's place inside its group, and whether both are of one group."""
        if self.groups == 1:
            return columns[None, :], torch.ones(len(rows), len(columns), dtype=torch.bool)
        per_row, per_column = self.shape[0] // self.groups, self.shape[1] // self.groups
        there = rows[:, None] // per_row == columns[None, :] // per_column
        return (columns % per_column)[None, :].expand_as(there), there


def _taken(parameter: Tensor, places: Tensor) -> Tensor:
    """The numbers at some places of a flattened parameter."""
    return parameter.flatten()[places.to(parameter.device)]


def _put(parameter: Tensor, places: Tensor, values: Tensor) -> None:
    """Write numbers to some places of a flattened parameter."""
    flat = parameter.flatten()
    flat[places.to(parameter.device)] = values
    if not parameter.is_contiguous():  # else `flatten` gave its own memory
        parameter.copy_(flat.view(parameter.shape))


def parameter_names(module: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by their names in the state dict; a tied parameter has its first name."""
    # Matched by memory where the state dict does not hold the parameter itself, since a bridge's has other names than
    # its modules. An empty tensor has no memory; the shape tells a parameter from a view that begins at the same
    # address.
    own = {id(p): p for p in module.parameters() if p.numel()}
    by_memory = {(p.data_ptr(), tuple(p.shape)): id(p) for p in own.values()}
    found: dict[str, nn.Parameter] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue
        key = id(tensor)
        if not isinstance(tensor, nn.Parameter):
            key = by_memory.get((tensor.data_ptr(), tuple(tensor.shape)), key)
        parameter = own.pop(key, None)
        if parameter is not None:
            found[name] = parameter
    return found


def with_aliases(
    module: nn.Module, program: Program, matrices: Sequence[WeightMatrix]
) -> list[WeightMatrix]:
    """Matrices with the other tensors that lie in the memory of their parameters: those that are kept with the weights,
    or that the pass takes.
    """
    names = parameter_names(module)
    kept = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    taken = {source.partition(" ")[0] for source in program.sources.values()}
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in own_tensors(module).items():
        if id(tensor) not in kept and name not in taken:
            continue
        if tensor.numel() and tensor.layout == torch.strided:
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))

    def found(name: str) -> list[str]:
        own = names[name]
        near = by_storage.get(own.untyped_storage().data_ptr(), [])
        return [n for n, tensor in near if tensor is not own and _share_memory(own, tensor)]

    made = []
    for m in matrices:
        others = {name: found(name) for name in (m.weight, m.bias) if name is not None}
        made.append(replace(m, aliases={name: each for name, each in others.items() if each}))
    return made


def _share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage have numbers in common."""
    spans = [
        (first := t.storage_offset() * t.element_size(), first + (_reach(t) + 1) * t.element_size())
        for t in (one, other)
    ]
    (start, end), (first, last) = spans
    if end <= first or last <= start:
        return False
    if one.element_size() != other.element_size():
        return True
    taken = torch.zeros(max(end, last) // one.element_size(), dtype=torch.bool)
    taken[_offsets(one)] = True
    return bool(taken[_offsets(other)].any())


def _reach(tensor: Tensor) -> int:
    """How far from a tensor's first number its last one lies in the storage."""
    return sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def _offsets(tensor: Tensor) -> Tensor:
    """Where in the storage each of a tensor's numbers lies."""
    found = torch.tensor(tensor.storage_offset())
    for n, step in zip(tensor.shape, tensor.stride(), strict=True):
        found = found[..., None] + torch.arange(n) * step
    return found.flatten()


def matrices_of_layers(module: nn.Module, layers: Sequence[WeightLayer]) -> list[WeightMatrix]:
    """The matrices of layers whose connections to sites are known."""
    names = parameter_names(module)
    by_parameter = {id(p): name for name, p in names.items()}
    found: dict[str, WeightMatrix] = {}
    for layer in layers:
        stored = layer.stored
        name = None if stored is None else by_parameter.get(id(stored.weight))
        if stored is None or name is None:
            # Computed from other parameters (weight norm), or a parameter that shares the memory of one which has
            # its matrix already.
            continue
        weight, bias, groups = stored.weight, stored.bias, stored.groups
        first, second = weight.shape[:2][::-1] if stored.transposed else weight.shape[:2]
        shape = (first, second * groups, *weight.shape[2:])
        reads = [
            MatrixEnd(k.site, k.index.cpu(), k.factor.cpu(), k.depth, k.direct) for k in layer.reads
        ]
        writes = [_inverted(k.site, k.index, k.factor, k.depth, shape[0]) for k in layer.writes]
        # A module that is called several times has a `WeightLayer` for each call, but one matrix.
        before = found.get(layer.name)
        found[layer.name] = WeightMatrix(
            layer.name, name, None if bias is None else by_parameter.get(id(bias)), shape, groups, stored.transposed,
            _joined(before.reads if before else (), reads), _joined(before.writes if before else (), writes),
            calls=before.calls + 1 if before else 1,
        )  # fmt: skip
    shared = {
        m.weight: [o.name for o in found.values() if o.weight == m.weight] for m in found.values()
    }
    return [
        replace(m, tied=tuple(name for name in shared[m.weight] if name != m.name))
        for m in found.values()
    ]


def _joined(ends: Sequence[MatrixEnd], more: Sequence[MatrixEnd]) -> tuple[MatrixEnd, ...]:
    """The sites of several calls of one layer; of each site the nearest occurrence."""
    nearest: dict[str, MatrixEnd] = {}
    for end in sorted([*ends, *more], key=lambda e: e.depth):
        nearest.setdefault(end.site, end)
    return tuple(nearest.values())


def _inverted(site: str, index: Tensor, factor: Tensor, depth: int, n_rows: int) -> MatrixEnd:
    """Turn the row that each unit comes from into the unit that each row belongs to."""
    owner, scale = torch.full((n_rows,), -1), torch.ones(n_rows)
    units = (index >= 0).nonzero().flatten()
    owner[index[units].cpu()] = units.cpu()
    scale[index[units].cpu()] = factor[units].float().cpu()
    return MatrixEnd(site, owner, scale, depth)


@dataclass
class _LinearCall:
    """What a linear module was given, and what it returned, in one call."""

    given: Tensor
    output: Tensor


@dataclass(frozen=True)
class _LinearModule:
    """A linear module: whether it stores its weights columns first, and its calls in one pass."""

    transposed: bool
    calls: list[_LinearCall] = field(default_factory=list)


def matrices_of_sites(
    module: nn.Module,
    forward: Callable[[], object],
    sites: Sequence[Site],
    taps: Mapping[str, Tap],
) -> list[WeightMatrix]:
    """The matrices of linear modules whose input or output equals, number for number, the tensor of a site.

    For transformers, where the walk of `topology` does not apply: tokens have no gradient to walk along, and
    attention mixes positions. All parameters are random during the pass, so that tensors do not agree by accident,
    as they do when a bias or a whole layer is zero.

    Args:
        module: the model.
        forward: runs the model once, on random tokens.
        sites: the model's sites.
        taps: how to reach them.
    """
    names = parameter_names(module)
    by_parameter = {id(p): name for name, p in names.items()}
    linear = _linear_modules(module, by_parameter)
    if not linear:
        return []
    with _noting(linear), _random_pass(module, forward, taps) as found:
        pass
    made = []
    for m, known in linear.items():
        weight, bias = m.weight, m.bias
        assert isinstance(weight, nn.Parameter)
        reads, writes = (
            _ends(sites, found, tensors, taps)
            for tensors in ([c.given for c in known.calls], [c.output for c in known.calls])
        )
        own, tied = _names_of(module, m, weight)
        made.append(
            WeightMatrix(
                own, by_parameter[id(weight)],
                by_parameter.get(id(bias)) if isinstance(bias, nn.Parameter) else None,
                tuple(weight.shape[::-1] if known.transposed else weight.shape), 1, known.transposed,
                tuple(reversed(reads)), tuple(writes), tied, calls=len(known.calls),
            )
        )  # fmt: skip
    return _tied(_in_order(made, names), (), names, {})


def _in_order(matrices: Sequence[WeightMatrix], names: Iterable[str]) -> list[WeightMatrix]:
    """Matrices in the order of their parameters, each without the sites inside another."""
    order = {name: i for i, name in enumerate(names)}
    found = sorted(matrices, key=lambda matrix: order[matrix.weight])
    return [_without_foreign(matrix, [m.name for m in found]) for matrix in found]


def _linear_modules(
    module: nn.Module, by_parameter: Mapping[int, str]
) -> dict[nn.Module, _LinearModule]:
    """A model's linear modules, of torch or of Hugging Face, whose weights are parameters of it."""
    linear: dict[nn.Module, _LinearModule] = {}
    for m in module.modules():
        # Not `m.weight`: a bridge's component hands attributes on to the module that it wraps.
        weight = vars(m).get("_parameters", {}).get("weight")
        if isinstance(weight, nn.Parameter) and weight.ndim == 2 and id(weight) in by_parameter:
            if isinstance(m, nn.Linear):
                linear[m] = _LinearModule(transposed=False)
            elif type(m).__name__ == "Conv1D":  # GPT-2's linear layer, which stores columns first
                linear[m] = _LinearModule(transposed=True)
    return linear


@contextmanager
def _noting(linear: Mapping[nn.Module, _LinearModule]) -> Iterator[None]:
    """Note the calls of linear modules inside the block."""

    def note(m: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            linear[m].calls.append(_LinearCall(args[0].detach(), output.detach()))

    handles = [m.register_forward_hook(note) for m in linear]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _random_pass(
    module: nn.Module, forward: Callable[[], object], taps: Mapping[str, Tap]
) -> Iterator[dict[str, Tensor]]:
    """Run once with random parameters, which stay so inside the block; yields the tensors of all taps."""
    with _random_weights(module):
        with evaluating(module), torch.no_grad(), record(module, taps) as found:
            forward()
        yield found


def _without_foreign(matrix: WeightMatrix, names: Sequence[str]) -> WeightMatrix:
    """A matrix without the sites that lie inside another layer (`….q.hook_in`).

    They hold the same numbers as the matrix reads, but a change there reaches that other layer alone.
    """

    def own(end: MatrixEnd) -> bool:
        inside = [name for name in names if end.site.startswith(f"{name}.")]
        return not inside or matrix.name in inside

    reads, writes = (tuple(filter(own, ends)) for ends in (matrix.reads, matrix.writes))
    return replace(matrix, reads=reads, writes=writes)


@contextmanager
def _random_weights(module: nn.Module) -> Iterator[None]:
    """Replace all parameters by random ones inside the block; the model's own tensors are not written to."""
    generator = torch.Generator().manual_seed(0)
    own = list(module.parameters())
    before = [p.data for p in own]
    try:
        for p in own:
            if p.is_floating_point():
                # Divided by the square root of the inputs, so that activations neither vanish nor overflow.
                drawn = (
                    torch.randn(p.shape, generator=generator)
                    / max(1, p.shape[-1] if p.ndim else 1) ** 0.5
                )
                p.data = drawn.to(p.data)
        yield
    finally:
        for p, data in zip(own, before, strict=True):
            p.data = data


def _names_of(root: nn.Module, layer: nn.Module, weight: Tensor) -> tuple[str, tuple[str, ...]]:
    """A layer's name in the state dict, and the names of other layers that share its weight."""
    names = [
        name.removesuffix(".weight")
        for name, tensor in root.state_dict().items()
        if isinstance(tensor, Tensor)
        and (tensor.data_ptr(), tensor.shape) == (weight.data_ptr(), weight.shape)
    ]
    for name in names:
        try:
            part = operator.attrgetter(name)(root)
        except AttributeError:
            continue
        if isinstance(part, nn.Module) and layer in part.modules():
            return name, tuple(n for n in names if n != name)
    return names[0], tuple(names[1:])


def _ends(
    sites: Sequence[Site],
    found: Mapping[str, Tensor],
    tensors: Sequence[Tensor],
    taps: Mapping[str, Tap],
) -> list[MatrixEnd]:
    """The sites that hold what a matrix was given, or what it has put out, in the order of the sites.

    Args:
        sites: the model's sites.
        found: their tensors.
        tensors: what the matrix was given, or has put out, in each of its calls: its columns or rows are the last axis.
        taps: how to reach the sites.
    """
    lines = [torch.atleast_2d(tensor).flatten(0, -2) for tensor in tensors]
    return [
        end for site in sites for end in _same(site, found.get(site.name), lines, taps[site.name])
    ]


def _same(site: Site, value: Tensor | None, seen: Sequence[Tensor], tap: Tap) -> list[MatrixEnd]:
    """The columns (or rows) as units of a site, in a list, if the site's tensor equals one of those seen.

    One of a projection that queries, keys and values share has rows of other sites, too.
    """
    if value is None or site.kind == "pattern" or not site.units_last:
        return []
    flat = site.rows(value).flatten(0, -2)
    index = tap.layout.index.flatten() if isinstance(tap.layout, Picked) else None
    for tensor in seen:
        if tensor.shape == flat.shape and torch.equal(tensor, flat):
            return [MatrixEnd(site.name, site.row_units, torch.ones(site.width))]
        if index is None or len(tensor) != len(flat) or tensor.shape[-1] <= int(index.max()):
            continue
        if torch.equal(tensor[..., index], flat):
            owner = torch.full((tensor.shape[-1],), -1)
            owner[index] = site.row_units
            return [MatrixEnd(site.name, owner, torch.ones(len(owner)))]
    return []


# --- parameters that functions multiply with ---------------------------------------------------


def with_products(
    module: nn.Module,
    program: Program,
    forward: Callable[[], object],
    sites: Sequence[Site],
    taps: Mapping[str, Tap],
    known: Sequence[WeightMatrix],
    traced: bool,
) -> list[WeightMatrix]:
    """The known matrices, and those of other products with parameters, as in a person's own code.

    A known one that functions multiply with as well gets the sites that they read and write.

    Args:
        module: the model.
        program: the operations of a pass.
        forward: runs the model once, on random inputs.
        sites: the model's sites.
        taps: how to reach them.
        known: the matrices of layers.
        traced: whether those were found by calls of functions and not of modules (`matrices_of_layers`): calls of
            functions are counted already then, but the sites of heads are still to be found.
    """
    names = parameter_names(module)
    by_parameter = {id(p): name for name, p in names.items()}
    own = own_tensors(module).items()
    parameters = {n: (by_parameter[id(t)], t) for n, t in own if id(t) in by_parameter}
    flow = Flow(program)
    heads = traced and any(site.kind == "head" for site in sites)
    inside = _inside_layers(module, program, {m.weight for m in known if m.calls}, by_parameter)
    among = [i for i in range(len(program.operations)) if heads or i not in inside]
    products = weight_products(flow, parameters, among)
    matrices, of = _matched(products, known, names)
    new = {m.name for m in matrices[len(known) :]}
    looked = [(p, m) for p in products if (m := of[p.first]).name in new or heads or not traced]
    ends: Mapping[int, _Ends] = {}
    if looked:
        ends = _ends_of_products(module, forward, looked, names, sites, taps)
    found: dict[str, list[_Ends]] = {m.name: [] for m in matrices}
    for p, m in looked:
        found[m.name].append(ends[p.first])
    counts = Counter(m.name for m in of.values())
    made = [_completed(m, found[m.name]) for m in matrices]
    made = [
        replace(m, calls=max(m.calls, counts[m.name]) if traced else m.calls + counts[m.name])
        for m in made
    ]
    own_names = inside | _of_convolutions(program, parameters, known)
    uses = other_uses(flow, parameters, own_names, _taken_by(products, of))
    made = _tied(made, new, names, uses)
    return made if traced or not new else _in_order(made, names)


def _inside_layers(
    module: nn.Module, program: Program, weights: set[str], by_parameter: Mapping[int, str]
) -> dict[int, set[str]]:
    """The operations that a layer with a known matrix calls to multiply with its own weight, each with the names of
    the layer's own weight and bias.
    """
    own: dict[str, list[str | None]] = {
        path: [by_parameter.get(id(m._parameters.get(name))) for name in ("weight", "bias")]
        for path, m in module.named_modules()
        if isinstance(m, LAYERS) or type(m).__name__ == "Conv1D"
    }
    return {
        i: {name for name in own[op.module] if name is not None}
        for i, op in enumerate(program.operations)
        if op.module in own and own[op.module][0] in weights
    }


def _of_convolutions(
    program: Program, parameters: Parameters, known: Sequence[WeightMatrix]
) -> dict[int, set[str]]:
    """The calls of convolutions with the parameters of known matrices, as `_inside_layers` returns those of layers."""
    biases = {m.weight: m.bias for m in known}
    found = {}
    for i, op in enumerate(program.operations):
        given = op.argument(1, "weight") if short_name(op).startswith("conv") else None
        source = program.sources.get(given) if isinstance(given, Value) else None
        if source is None or source not in parameters:
            continue
        name = parameters[source][0]
        if name in biases:
            found[i] = {n for n in (name, biases[name]) if n is not None}
    return found


def _taken_by(
    products: Sequence[WeightProduct], of: Mapping[int, WeightMatrix]
) -> set[tuple[int, Value]]:
    """The values that products take as weights and biases of their matrices; a bias may be that of another product with
    the same weights.
    """
    found: set[tuple[int, Value]] = set()
    for p in products:
        weights, *bias = p.takes
        found.add(weights)
        m = of[p.first]
        if bias and m.bias == p.bias and torch.equal(_bias_places(m), _bias_places(p)):
            found.update(bias)
    return found


def _bias_places(owner: WeightMatrix | WeightProduct) -> Tensor:
    """The place of each row's bias in the flattened parameter that holds them."""
    own = None if owner.cells is None else owner.cells.bias
    return torch.arange(owner.shape[0]) if own is None else own


def _matched(
    products: Sequence[WeightProduct],
    known: Sequence[WeightMatrix],
    names: Mapping[str, nn.Parameter],
) -> tuple[list[WeightMatrix], dict[int, WeightMatrix]]:
    """The known matrices followed by those of products that no known one stands for; and the matrix of each product, by
    the number of its operation.
    """
    found, of = list(known), {}
    for p in products:
        own = (m for m in found if m.weight == p.weight and m.groups == p.groups)
        same = next((m for m in own if (c := _cells_of(m)) and c.same(p.cells)), None)
        if same is None:
            same = _matrix_of(p, {m.name for m in found}, names)
            found.append(same)
        of[p.first] = same
    return found, of


def _cells_of(matrix: WeightMatrix) -> Cells | None:
    """Where the numbers of a matrix lie in its parameter; None for kernels and groups of a layer."""
    if matrix.cells is not None:
        return matrix.cells
    if matrix.groups != 1 or math.prod(matrix.shape[2:]) != 1:
        return None
    rows, columns = (torch.arange(n) for n in matrix.shape[:2])
    if matrix.transposed:
        return Cells(rows, columns * matrix.shape[0])
    return Cells(rows * matrix.shape[1], columns)


def _matrix_of(
    product: WeightProduct, taken: Container[str], names: Mapping[str, nn.Parameter]
) -> WeightMatrix:
    """The matrix of a product, without sites, under a name that is free."""
    weight, bias = product.weight, product.bias
    plain = weight.removesuffix(".weight") + product.part
    numbered = (f"{plain}@{n}" if n else plain for n in itertools.count())
    name = next(name for name in numbered if name not in taken)
    made = WeightMatrix(name, weight, bias, product.shape, product.groups, calls=0)
    ordered = product.cells.bias is None or torch.equal(
        product.cells.bias, torch.arange(product.shape[0])
    )
    flat = bias is None or names[bias].shape == (product.shape[0],)
    if ordered and flat and not product.part and names[weight].ndim == 2:
        for own in (made, replace(made, transposed=True)):
            cells = _cells_of(own)
            if cells is not None and cells.same(product.cells):
                return own
    return replace(made, cells=product.cells)


_Ends = Mapping[str, Sequence[MatrixEnd]]
"""The sites that a matrix `reads` and `writes`."""


def _completed(matrix: WeightMatrix, products: Sequence[_Ends]) -> WeightMatrix:
    """A matrix with the sites of its products that it is not known to read or write."""
    reads, writes = (
        _joined(
            getattr(matrix, side),
            [end for ends in products for end in ends[side] if matrix.end(end.site, side) is None],
        )
        for side in ("reads", "writes")
    )
    return replace(matrix, reads=reads, writes=writes)


def _ends_of_products(
    module: nn.Module,
    forward: Callable[[], object],
    products: Sequence[tuple[WeightProduct, WeightMatrix]],
    names: Mapping[str, nn.Parameter],
    sites: Sequence[Site],
    taps: Mapping[str, Tap],
) -> dict[int, _Ends]:
    """The sites that products read and write, by the numbers of their operations, given each with its matrix."""
    points = Points(module)
    # No site can have such a name.
    places = {f"{what} {p.first}": lines for p, _ in products for what, lines in p.lines.items()}
    more = {
        name: replace(points.tap(lines.address), overwritten=lines.overwritten)
        for name, lines in places.items()
    }
    ends: dict[int, _Ends] = {}
    with _random_pass(module, forward, {**taps, **more}) as found:
        for p, matrix in products:
            seen = {
                what: lines.read(found[name])
                for what, lines in p.lines.items()
                if (name := f"{what} {p.first}") in found
            }
            # Which functions are called may depend on the numbers: another product may have taken this one's place.
            own = matrix.whole(names[p.weight].detach()).reshape(1, -1)
            same = "weights" in seen and torch.equal(seen["weights"][:1], own.to(seen["weights"]))
            reads, writes = (
                _ends(sites, found, [seen[side]] if same and side in seen else [], taps)
                for side in ("reads", "writes")
            )
            ends[p.first] = {"reads": reads[::-1], "writes": writes}
    return ends


def _tied(
    matrices: Sequence[WeightMatrix],
    new: Container[str],
    names: Mapping[str, nn.Parameter],
    uses: Mapping[str, Sequence[Use]],
) -> list[WeightMatrix]:
    """Matrices with what else an edit of their weights or of their biases changes.

    Args:
        matrices: all of the model's.
        new: the names of those that no layer holds; layers that share a parameter name each other already.
        names: the parameters.
        uses: other calls that take them.
    """
    return [
        replace(
            m,
            tied=_weights_tied(m, matrices, new, names, uses.get(m.weight, ())),
            bias_tied=_bias_tied(m, matrices, names, uses),
        )
        for m in matrices
    ]


def _weights_tied(
    matrix: WeightMatrix,
    matrices: Sequence[WeightMatrix],
    new: Container[str],
    names: Mapping[str, nn.Parameter],
    uses: Sequence[Use],
) -> tuple[str, ...]:
    """What else an edit of a matrix's weights changes (see `_tied`)."""
    parameter = names[matrix.weight]
    others = [
        o.name
        for o in matrices
        if o is not matrix and o.weight == matrix.weight and (o.name in new or matrix.name in new)
        and _overlap(matrix, o, parameter)
    ]  # fmt: skip
    others += [
        f"the biases of {o.name}"
        for o in matrices
        if o.bias == matrix.weight and _holds(matrix, parameter, _bias_places(o))
    ]
    others += [
        use.called
        for use in uses
        # A layer that looks numbers up (an embedding) is named already.
        if use.module not in matrix.tied and _holds(matrix, parameter, use.places)
    ]
    return tuple(dict.fromkeys([*matrix.tied, *others]))


def _bias_tied(
    matrix: WeightMatrix,
    matrices: Sequence[WeightMatrix],
    names: Mapping[str, nn.Parameter],
    uses: Mapping[str, Sequence[Use]],
) -> tuple[str, ...]:
    """What else an edit of a matrix's biases changes (see `_tied`)."""
    name = matrix.bias
    if name is None:
        return ()
    own = _bias_places(matrix)
    others = [
        o.name
        for o in matrices
        if o is not matrix and o.bias == name and bool(torch.isin(own, _bias_places(o)).any())
    ]
    others += [
        f"the weights of {o.name}"
        for o in matrices
        if o.weight == name and _holds(o, names[name], own)
    ]
    others += [
        use.called
        for use in uses.get(name, ())
        if use.places is None or bool(torch.isin(own, use.places).any())
    ]
    return tuple(dict.fromkeys(others))


def _holds(matrix: WeightMatrix, parameter: Tensor, places: Tensor | None) -> bool:
    """Whether some places of a flattened parameter, all if None, hold a weight of a matrix."""
    return places is None or bool(_mask(matrix, parameter).flatten()[places].any())


def _mask(matrix: WeightMatrix, parameter: Tensor) -> Tensor:
    """Which numbers of a parameter are weights of a matrix."""
    mask = torch.zeros(parameter.shape, dtype=torch.bool)
    matrix.fill(mask, torch.ones_like(matrix.whole(mask)))
    return mask


def _overlap(one: WeightMatrix, other: WeightMatrix, parameter: Tensor) -> bool:
    """Whether two matrices of a parameter have weights in common."""
    (first, last), (start, end) = (_span(m, parameter.numel()) for m in (one, other))
    if last < start or end < first:
        return False
    return bool((_mask(one, parameter) & _mask(other, parameter)).any())


def _span(matrix: WeightMatrix, n: int) -> tuple[int, int]:
    """The first and the last place of a matrix in its flattened parameter of n numbers."""
    cells = _cells_of(matrix)
    if cells is None:
        return 0, n - 1
    both = cells.rows, cells.columns
    return sum(int(c.min()) for c in both), sum(int(c.max()) for c in both)
