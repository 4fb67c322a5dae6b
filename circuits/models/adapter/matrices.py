"""Parameters as matrices from units to units, which is what an edit of weights changes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuits.hooks import Tap, record
from circuits.models.adapter.head_sites import Picked
from circuits.models.adapter.sites import evaluating
from circuits.models.adapter.topology import WeightLayer
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
    """The weights of a convolution or linear layer, as rows (outputs) by columns (inputs).

    Attributes:
        name: the layer's name, e.g. `mixed3b_5x5` or `blocks.0.mlp.out`.
        weight: the parameter's name in the state dict.
        bias: the name of its bias, or None.
        shape: the number of rows, of columns (of all groups), and the lengths of the kernel's axes.
        groups: groups of a convolution; a row has weights only in the columns of its group.
        transposed: whether the parameter is stored columns first.
        tied: other names of the same parameter, and layers that share it: an edit changes them too.
        reads: sites whose units are its columns, nearest first.
        writes: sites whose units are its rows, nearest first.
        calls: how often the layer runs in one pass; an edit changes all of them.
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
    calls: int = 1

    def end(self, site: str, side: str) -> MatrixEnd | None:
        """The rows (`side` is `writes`) or columns (`reads`) as units of a site; None if they are not its units."""
        ends = self.reads if side == "reads" else self.writes
        return next((end for end in ends if end.site == site), None)

    def view(self, parameter: Tensor) -> Float[Tensor, "row column *kernel"]:
        """The parameter as row x column (of the row's group) x kernel; shares the parameter's memory."""
        return parameter.transpose(0, 1) if self.transposed else parameter

    def block(
        self, parameter: Tensor, rows: Tensor, columns: Tensor
    ) -> Float[Tensor, "row column *kernel"]:
        """Copy some rows and columns; zero where a grouped convolution has no weight."""
        view = self.view(parameter)
        if self.groups == 1:
            return view[rows[:, None], columns[None, :]]
        local, there = self._grouped(rows, columns)
        found = view[rows[:, None], local]
        return found * there.reshape(*there.shape, *(1,) * (found.ndim - 2)).to(found)

    def put(self, parameter: Tensor, rows: Tensor, columns: Tensor, block: Tensor) -> None:
        """Write some rows and columns in place; entries that a grouped convolution does not have are skipped."""
        view, block = self.view(parameter), block.to(parameter)
        if self.groups == 1:
            view[rows[:, None], columns[None, :]] = block
            return
        local, there = self._grouped(rows, columns)
        view[rows[:, None].expand_as(there)[there], local[there]] = block[there]

    def there(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Which of these weights exist, row x column."""
        if self.groups == 1:
            return torch.ones(len(rows), len(columns), dtype=torch.bool)
        return self._grouped(rows, columns)[1]

    def _grouped(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """For each row and column, the column's place inside its group, and whether both are of one group."""
        per_row, per_column = self.shape[0] // self.groups, self.shape[1] // self.groups
        there = rows[:, None] // per_row == columns[None, :] // per_column
        return (columns % per_column)[None, :].expand_as(there), there


def parameter_names(module: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by their names in the state dict; a tied parameter has its first name."""
    # Matched by memory, since a bridge's state dict has other names than its modules. An empty tensor has no memory;
    # the shape tells a parameter from a view that begins at the same address.
    own = {(p.data_ptr(), tuple(p.shape)): p for p in module.parameters() if p.numel()}
    found: dict[str, nn.Parameter] = {}
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        parameter = own.pop((tensor.data_ptr(), tuple(tensor.shape)), None)
        if parameter is not None:
            found[name] = parameter
    return found


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
    found = _random_pass(module, forward, linear, taps)
    made = []
    for m, known in linear.items():
        weight, bias = m.weight, m.bias
        assert isinstance(weight, nn.Parameter)
        reads, writes = (
            [e for s in sites for e in _same(s, found.get(s.name), tensors, taps[s.name])]
            for tensors in ([c.given for c in known.calls], [c.output for c in known.calls])
        )
        own, tied = _names_of(module, m, weight)
        made.append(
            WeightMatrix(
                own, by_parameter[id(weight)],
                by_parameter.get(id(bias)) if isinstance(bias, nn.Parameter) else None,
                tuple(weight.shape[::-1] if known.transposed else weight.shape), 1, known.transposed,
                tuple(reversed(reads)), tuple(writes), tied, len(known.calls),
            )
        )  # fmt: skip
    order = {name: i for i, name in enumerate(names)}
    made.sort(key=lambda matrix: order[matrix.weight])
    return [_without_foreign(matrix, [m.name for m in made]) for matrix in made]


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


def _random_pass(
    module: nn.Module,
    forward: Callable[[], object],
    linear: Mapping[nn.Module, _LinearModule],
    taps: Mapping[str, Tap],
) -> dict[str, Tensor]:
    """Run once with random parameters, noting the calls of linear modules; return the tensors of all sites."""

    def note(m: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            linear[m].calls.append(_LinearCall(args[0].detach(), output.detach()))

    handles = [m.register_forward_hook(note) for m in linear]
    try:
        with (
            _random_weights(module),
            evaluating(module),
            torch.no_grad(),
            record(module, taps) as found,
        ):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found


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


def _same(site: Site, value: Tensor | None, seen: Sequence[Tensor], tap: Tap) -> list[MatrixEnd]:
    """The columns (or rows) as units of a site, in a list, if the site's tensor equals one of those seen.

    One of a projection that queries, keys and values share has rows of other sites, too.
    """
    if value is None or site.kind == "pattern" or not site.units_last:
        return []
    flat = site.rows(value)
    index = tap.layout.index.flatten() if isinstance(tap.layout, Picked) else None
    for tensor in seen:
        if tensor.shape == flat.shape and torch.equal(tensor, flat):
            return [MatrixEnd(site.name, site.row_units, torch.ones(site.width))]
        if (
            index is None
            or tensor.shape[:-1] != flat.shape[:-1]
            or tensor.shape[-1] <= int(index.max())
        ):
            continue
        if torch.equal(tensor[..., index], flat):
            owner = torch.full((tensor.shape[-1],), -1)
            owner[index] = site.row_units
            return [MatrixEnd(site.name, owner, torch.ones(len(owner)))]
    return []
