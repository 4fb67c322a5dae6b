"""Parameters as matrices from units to units: what an edit of weights changes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuits.hooks import Tap, record
from circuits.models.adapter.sites import evaluating
from circuits.models.adapter.topology import WeightLayer
from circuits.units import Site


@dataclass(frozen=True, eq=False)
class End:
    """What one end of a matrix has to do with a site.

    Attributes:
        site: the site's name.
        owner: for each row (or column) of the matrix the site's unit that it belongs to, -1 for none. A
            head owns as many as it has dimensions.
        factor: what lies between multiplies each by (batch norm, signs).
        depth: how many operations lie between; 0 is next to the matrix.
        direct: for what is read: nothing with units of its own lies between.
    """

    site: str
    owner: Int[Tensor, " row"]
    factor: Float[Tensor, " row"]
    depth: int = 0
    direct: bool = True

    def of(self, units: Sequence[int] | None) -> Int[Tensor, " row"]:
        """The rows of some units, unit by unit; of all units if None."""
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
        name: of the layer, e.g. `mixed3b_5x5` or `blocks.0.mlp.out`.
        weight: the parameter's name in the state dict.
        bias: the name of its bias, or None.
        shape: rows, columns (of all groups), and the axes of the kernel.
        groups: of a grouped convolution: a row has the columns of its own group only.
        transposed: the parameter is stored columns first.
        tied: other names of the same parameter, and layers that share it: an edit changes them too.
        reads: sites whose units are its columns, nearest first.
        writes: sites whose units are its rows, nearest first.
    """

    name: str
    weight: str
    bias: str | None
    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    reads: tuple[End, ...] = ()
    writes: tuple[End, ...] = ()
    tied: tuple[str, ...] = ()

    def end(self, site: str, side: str) -> End | None:
        """The end at a site, on the side `reads` or `writes`; None if there is none."""
        ends = self.reads if side == "reads" else self.writes
        return next((end for end in ends if end.site == site), None)

    def view(self, parameter: Tensor) -> Float[Tensor, "row column *kernel"]:
        """The parameter as row x column (of its group) x kernel; shares its memory."""
        return parameter.transpose(0, 1) if self.transposed else parameter

    def block(
        self, parameter: Tensor, rows: Tensor, columns: Tensor
    ) -> Float[Tensor, "row column *kernel"]:
        """A copy of some rows and columns; zero where a grouped convolution has none."""
        view = self.view(parameter)
        if self.groups == 1:
            return view[rows[:, None], columns[None, :]]
        local, there = self._grouped(rows, columns)
        found = view[rows[:, None], local]
        return found * there.reshape(*there.shape, *(1,) * (found.ndim - 2)).to(found)

    def put(self, parameter: Tensor, rows: Tensor, columns: Tensor, block: Tensor) -> None:
        """Write some rows and columns in place; what a grouped convolution has not is left out."""
        view, block = self.view(parameter), block.to(parameter)
        if self.groups == 1:
            view[rows[:, None], columns[None, :]] = block
            return
        local, there = self._grouped(rows, columns)
        view[rows[:, None].expand_as(there)[there], local[there]] = block[there]

    def there(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Which of these weights exist: row x column of booleans."""
        if self.groups == 1:
            return torch.ones(len(rows), len(columns), dtype=torch.bool)
        return self._grouped(rows, columns)[1]

    def _grouped(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        per_row, per_column = self.shape[0] // self.groups, self.shape[1] // self.groups
        there = rows[:, None] // per_row == columns[None, :] // per_column
        return (columns % per_column)[None, :].expand_as(there), there


def parameter_names(module: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by their names in the state dict; a tied one under its first name."""
    own = {
        (p.data_ptr(), tuple(p.shape)): p for p in module.parameters() if p.numel()
    }  # a bridge's modules have other names than its state dict
    found: dict[str, nn.Parameter] = {}
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        parameter = own.pop((tensor.data_ptr(), tuple(tensor.shape)), None)
        if parameter is not None:
            found[name] = parameter
    return found


def matrices_of_layers(module: nn.Module, layers: Sequence[WeightLayer]) -> list[WeightMatrix]:
    """The matrices of layers whose connections are known."""
    names = parameter_names(module)
    by_parameter = {id(p): name for name, p in names.items()}
    found: dict[str, WeightMatrix] = {}
    for layer in layers:
        own = module.get_submodule(layer.name)
        weight = own.weight
        name = by_parameter.get(id(weight))
        if name is None or not isinstance(weight, nn.Parameter):
            continue  # computed from others (weight norm), or tied to one that has its matrix
        bias = own.bias if isinstance(own.bias, nn.Parameter) else None
        groups = _groups(own)
        shape = (weight.shape[0], weight.shape[1] * groups, *weight.shape[2:])
        reads = [End(k.site, k.index.cpu(), k.factor.cpu(), k.depth, k.direct) for k in layer.reads]
        writes = [_inverted(k.site, k.index, k.factor, k.depth, shape[0]) for k in layer.writes]
        before = found.get(layer.name)
        found[layer.name] = WeightMatrix(
            layer.name, name, None if bias is None else by_parameter.get(id(bias)), shape, groups, False,
            _joined(before.reads if before else (), reads), _joined(before.writes if before else (), writes),
        )  # fmt: skip
    shared = {
        m.weight: [o.name for o in found.values() if o.weight == m.weight] for m in found.values()
    }
    return [
        replace(m, tied=tuple(name for name in shared[m.weight] if name != m.name))
        for m in found.values()
    ]


def _groups(layer: nn.Module) -> int:
    groups = getattr(layer, "groups", 1)
    assert isinstance(groups, int), f"groups {groups!r}"
    return groups


def _joined(ends: Sequence[End], more: Sequence[End]) -> tuple[End, ...]:
    """The ends of several calls of one layer; the nearest of each site."""
    nearest: dict[str, End] = {}
    for end in sorted([*ends, *more], key=lambda e: e.depth):
        nearest.setdefault(end.site, end)
    return tuple(nearest.values())


def _inverted(site: str, index: Tensor, factor: Tensor, depth: int, n_rows: int) -> End:
    """From each unit's row to each row's unit."""
    owner, scale = torch.full((n_rows,), -1), torch.ones(n_rows)
    units = (index >= 0).nonzero().flatten()
    owner[index[units].cpu()] = units.cpu()
    scale[index[units].cpu()] = factor[units].float().cpu()
    return End(site, owner, scale, depth)


@dataclass
class _Seen:
    """What went through a linear module in one pass."""

    given: Tensor
    output: Tensor


@dataclass(frozen=True)
class _Kind:
    """How a linear module keeps its weights."""

    transposed: bool
    seen: list[_Seen] = field(default_factory=list)


def matrices_of_sites(
    module: nn.Module,
    forward: Callable[[], object],
    sites: Sequence[Site],
    taps: Mapping[str, Tap],
) -> list[WeightMatrix]:
    """The matrices of linear modules whose input or output is, number for number, what a site holds.

    For transformers: what lies between sites there (normalisation, attention) is not followed. Numbers are
    compared while all parameters are random, so that none agree by being zero, say.

    Args:
        module: the model.
        forward: runs it once, on random tokens.
        sites: the model's sites.
        taps: how to reach them.
    """
    names = parameter_names(module)
    by_parameter = {id(p): name for name, p in names.items()}
    linear: dict[nn.Module, _Kind] = {}
    for m in module.modules():
        weight = vars(m).get("_parameters", {}).get("weight")
        if isinstance(weight, nn.Parameter) and weight.ndim == 2 and id(weight) in by_parameter:
            if isinstance(m, nn.Linear):
                linear[m] = _Kind(transposed=False)
            elif type(m).__name__ == "Conv1D":  # GPT-2's: columns first
                linear[m] = _Kind(transposed=True)

    def note(m: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            linear[m].seen.append(_Seen(args[0].detach(), output.detach()))

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
    made = []
    for m, kind in linear.items():
        weight, bias = m.weight, m.bias
        assert isinstance(weight, nn.Parameter)
        shape = tuple(weight.shape[::-1] if kind.transposed else weight.shape)
        reads = [
            e for s in sites for e in _same(s, found.get(s.name), [c.given for c in kind.seen])
        ]
        writes = [
            e for s in sites for e in _same(s, found.get(s.name), [c.output for c in kind.seen])
        ]
        name = by_parameter[id(weight)]
        own, tied = _names_of(module, m, weight)
        made.append(
            WeightMatrix(
                own, name, by_parameter.get(id(bias)) if isinstance(bias, nn.Parameter) else None,
                shape, 1, kind.transposed, tuple(reversed(reads)), tuple(writes), tied,
            )
        )  # fmt: skip
    order = {name: i for i, name in enumerate(names)}
    made.sort(key=lambda matrix: order[matrix.weight])
    return [_without_foreign(matrix, [m.name for m in made]) for matrix in made]


def _without_foreign(matrix: WeightMatrix, names: Sequence[str]) -> WeightMatrix:
    """A matrix without the sites that are inside another layer: those hold what that one alone gets."""

    def own(end: End) -> bool:
        inside = [name for name in names if end.site.startswith(f"{name}.")]
        return not inside or matrix.name in inside

    reads, writes = (tuple(filter(own, ends)) for ends in (matrix.reads, matrix.writes))
    return replace(matrix, reads=reads, writes=writes)


@contextmanager
def _random_weights(module: nn.Module) -> Iterator[None]:
    """All parameters random inside the block; the own ones are not written to."""
    generator = torch.Generator().manual_seed(0)
    own = list(module.parameters())
    before = [p.data for p in own]
    try:
        for p in own:
            if p.is_floating_point():
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
    """A layer's name in the state dict, and the names of others that share its weight."""
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


def _same(site: Site, value: Tensor | None, seen: Sequence[Tensor]) -> list[End]:
    """The end at a site that holds what went through, if it does."""
    if value is None or site.kind == "pattern" or not site.units_last:
        return []
    flat = site.rows(value)
    for tensor in seen:
        if tensor.shape == flat.shape and torch.equal(tensor, flat):
            return [End(site.name, site.row_units, torch.ones(site.width))]
    return []
