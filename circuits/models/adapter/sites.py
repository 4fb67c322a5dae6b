"""Finding the sites of a model: a forward pass is traced and each tensor described."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from circuits.hooks import ByExample, Tap, Trace, entry, is_record, trace
from circuits.models.adapter.affine import Constants, Products
from circuits.models.adapter.attaching import HookPoint, autoencoders, hook_points
from circuits.models.adapter.attention import Batches, Found, find_attention
from circuits.models.adapter.axes import UNIT, UNKNOWN, Labels, follow_axes, unit_axis
from circuits.models.adapter.calling import naming_model
from circuits.models.adapter.declaring import Declared
from circuits.models.adapter.flow import Flow, limits_of
from circuits.models.adapter.head_sites import (
    Points,
    checked,
    find_projections,
    head_sites,
    look_at,
    named,
    normed_sites,
)
from circuits.models.adapter.head_weights import HeadWeights
from circuits.models.adapter.parts import Parts, TracedParts
from circuits.models.adapter.program import (
    DEVICES,
    Operation,
    Program,
    Recorder,
    Value,
    own_tensors,
)
from circuits.models.adapter.state import Held, Slot, holding, remember_state
from circuits.models.adapter.streams import NoStreamError, TracedStream, find_stream, stream_sites
from circuits.tensors import is_in_fewer_digits, is_transformed
from circuits.units import Site, SiteKind, unknown

TRACE_BATCHES = (3, 2)
"""Sizes of the two batches that are traced: a tensor whose first axis follows them has the batch in front."""


@contextmanager
def evaluating(module: nn.Module, settings: bool = False) -> Iterator[None]:
    """Put a module in evaluation mode with parameters held fixed inside the block; restore both after it.

    Inside a caller's `torch.autocast` it runs in its own precision: a model is known by what it computes itself. The
    fast path of torch's own transformer layers, which calls none of their modules, is off: it rounds differently, and
    torch takes it only while nothing is hooked.

    Args:
        module: the module.
        settings: restore all that the code of a pass writes into its modules' buffers and attributes. What
            `trace_model` has found to be state is always restored.
    """
    # Flags are set one by one: `module.train()` acts on all submodules, also on those that were in evaluation mode
    # before.
    parts = list(module.modules())
    training = [m for m in parts if m.training]
    # Torch lets nobody change the flag of a tensor that was made inside `torch.inference_mode()`.
    owned = (p for m in parts for p in m._parameters.values() if p is not None)
    trainable = [p for p in owned if p.requires_grad and not p.is_inference()]
    try:
        for m in training:
            m.training = False
        for p in trainable:
            p.requires_grad_(False)
        with ExitStack() as stack:
            # Swin of Hugging Face shrinks its windows when it sees a small image, and keeps them small: one pass at
            # another size would change all that follow.
            stack.enter_context(holding(module, everything=settings))
            if any(
                isinstance(m, nn.MultiheadAttention | nn.TransformerEncoderLayer) for m in parts
            ):
                stack.enter_context(_SLOW_PATH)
            for kind in DEVICES:
                if torch.is_autocast_enabled(kind) and not is_in_fewer_digits():
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        for m in training:
            m.training = True
        for p in trainable:
            p.requires_grad_(True)


class _SlowPath:
    """Turns torch's fast path for attention off while any thread is inside, and restores it after the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = True

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.backends.mha.set_fastpath_enabled(self._before)


_SLOW_PATH = _SlowPath()
"""One for all models: torch has one switch for the whole process."""


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` was called with, if it was: compiled code does not call hooks.

    Raises:
        ValueError: if a part of it is compiled, or it was compiled in place.
    """
    module = getattr(module, "_orig_mod", module)
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ValueError(
                f"module {repr(name) if name else type(module).__name__} is a script of torch.jit, which does not let "
                "its tensors be read or changed: expected the model in Python"
            )
        if hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"module {repr(name) if name else type(module).__name__} is compiled by torch.compile, and compiled "
                "code does not let its tensors be read or changed: expected the model as it was before"
            )
    return module


def is_bridge(module: nn.Module) -> bool:
    """Whether `module` is a TransformerLens bridge, judged by its attributes, so that nothing is imported."""
    # A bridge's `hook_dict` is a property that goes through all of its parts each time it is asked for.
    own = "hook_dict" in vars(module) or hasattr(type(module), "hook_dict")
    return own and hasattr(module, "cfg")


@dataclass(frozen=True)
class TracedModel:
    """What tracing finds out about a model.

    Attributes:
        sites: every site with the tap that reaches it, in order of execution.
        unplaced: the shapes (for one example) of tensors that are no sites, because nothing tells which axis holds
            their units, by the name that the site would have.
        left_out: why each tensor that is no site is none, by that name.
        program: the operations of one pass.
        listed: whether the model returns a list with an entry for each example.
        state: the buffers and attributes that every pass changes.
        transformer: the norms and weights along its residual stream; why they are not known, if it has none.
        head_weights: the weights of the heads of each attention, by its name; none of a bridge's.
    """

    sites: list[tuple[Site, Tap]]
    unplaced: dict[str, tuple[int, ...]]
    left_out: dict[str, str]
    program: Program
    listed: bool = False
    state: tuple[str, ...] = ()
    transformer: Parts | str = "no attention was found in it"
    head_weights: Mapping[str, HeadWeights] = field(default_factory=dict)


def trace_model(
    module: nn.Module,
    examples: Callable[[int], Tensor],
    given: Labels,
    axes: Mapping[str, Sequence[str]] | None = None,
    declarations: Sequence[Declared] = (),
) -> TracedModel:
    """Run a model on two batches and describe every tensor that it shows.

    Args:
        module: any module, or a TransformerLens bridge (its hook points become the sites).
        examples: makes a batch of the number of examples that it is given.
        given: the labels of the input's axes (see `circuits.models.adapter.axes`).
        axes: the axes of sites where they cannot be found, by name: `batch` first, `unit` or `channel` once.
        declarations: attention that is not found.

    Raises:
        KeyError: if a declaration names a call that there is not.
        ValueError: if the model cannot run on its example, no module returns a batch of floating-point numbers, or
            `axes` or `declarations` do not fit.
    """
    names = _named(module)
    size, other = TRACE_BATCHES
    (traces, final, first), state = _traced_with_state(module, names, examples(size))
    again, _, second = _traced(module, names, examples(other), first)
    if not is_bridge(module) and not _alike(first.program, second.program):
        # Some models keep what the first pass has computed.
        traces, final, first = _traced(module, names, examples(size), second)
    shapes = {t.name: t.value.shape for t in again}
    found: dict[str, tuple[Site, Tap]] = {}
    unplaced: dict[str, tuple[int, ...]] = {}
    doubtful: set[str] = set()
    labels = {} if is_bridge(module) else follow_axes(first.program, given)
    asked = {name: _checked_axes(name, own) for name, own in (axes or {}).items()}
    left_out: dict[str, str] = {}
    for t in traces:
        why = _no_site(t.value, shapes.get(t.name))
        if why and is_bridge(module) and t.name.endswith("hook_resid_mid"):
            t, why = _by_example(t, shapes.get(t.name), why)
        if why:
            left_out[t.name] = why
            continue
        if isinstance(t.tap.module, HookPoint):
            site, tap = _hook_point_site(t, t.tap.module), t.tap
        elif is_bridge(module):
            site, tap = _bridge_site(t, names)
        else:
            value = t.notes[1]
            own = asked.pop(t.name, None) or _site_axes(t, labels.get(value, ()) if value else ())
            if own is None:
                unplaced[t.name] = tuple(t.value.shape[1:])
                left_out[t.name] = _unplaced(t)
                continue
            site, tap = _module_site(t, own, t.value is final), t.tap
            if labels and labels.get(value or Value(-1), ("",))[0] == UNKNOWN:
                doubtful.add(site.name)
        found.setdefault(site.name, (site, tap))
    for name in [n for n in found if _shown_too_late(n, list(found))]:
        del found[name]
        left_out[name] = "it is shown only once attention is done, where changes have no effect"
    for name in _not_by_example(module, names, examples, doubtful):
        del found[name]
        left_out[name] = "its first axis is as long as two of three batches by chance"
    transformer: Parts | str = "no attention was found in it"
    head_weights: Mapping[str, HeadWeights] = {}
    if is_bridge(module):
        if declarations:
            raise ValueError(
                f"attention: {declarations[0].name} is declared for a TransformerLens bridge, which says itself where "
                "its attention is"
            )
    else:
        attention = find_attention(first.program, second.program, declarations)
        left_out |= attention.refused
        found, transformer, head_weights = _with_heads(
            module, examples, first, second.program, attention, traces, found, final, left_out
        )
    if asked:
        raise ValueError(f"axes: {unknown('site', next(iter(asked)), [*found, *unplaced]).args[0]}")
    if not found:
        raise _without_sites(module, unplaced)
    values = {t.name: t.notes[1] for t in traces if t.notes[1] is not None}
    makers = {made: op for op in first.program.operations for made in op.outputs}
    return TracedModel(
        [
            (_with_ceiling(site, values, first.program, makers, found), tap)
            for site, tap in found.values()
        ],
        unplaced,
        left_out,
        second.program,
        final is None,
        state,
        transformer,
        head_weights,
    )


def _with_ceiling(
    site: Site,
    values: Mapping[str, Value],
    program: Program,
    makers: Mapping[Value, Operation],
    known: Container[str],
) -> Site:
    """The site with its ceiling, if functions such as ReLU6 made it, and with the site of what they were given."""
    value = values.get(site.name)
    floors, ceilings, before = [], [], ""
    while value is not None:
        op = makers.get(value)
        limits = None if op is None else limits_of(op)
        if op is None or limits is None or program.shapes[op.inputs[0]] != program.shapes[value]:
            break
        floors += [limits[0]] if limits[0] is not None else []
        ceilings += [limits[1]] if limits[1] is not None else []
        value = op.inputs[0]
        # The last that shows it: a module inside another one may put out the same tensor.
        shown = [n for n, v in values.items() if v == value and n in known and n != site.name]
        before = shown[-1] if shown else before
    if not ceilings:
        return site
    return replace(site, floor=max(floors, default=None), ceiling=min(ceilings), before=before)


def _named(module: nn.Module) -> Named:
    """What may be sites, by name: hook points of a bridge, or modules, and those of attached autoencoders."""
    names = _hook_points(module) if is_bridge(module) else _modules(module)
    # The modules inside an attached autoencoder are no sites of the model, except its two hook points.
    inside = tuple(f"{name}." for name in autoencoders(module))
    kept = {n: m for n, m in names.items() if not n.startswith(inside)}
    return kept | {name: (spot, ()) for name, spot in hook_points(module).items()}


def _unplaced(t: Trace) -> str:
    return (
        f"it has the shape {tuple(t.value.shape[1:])} and nothing tells which axis holds its units: say so by "
        f"HookedModel(…, axes={{{t.name!r}: ('batch', …)}}), with 'unit' for that axis"
    )


def _without_sites(module: nn.Module, unplaced: Mapping[str, object]) -> ValueError:
    """The error for a model in which nothing can be a site."""
    more = ""
    if unplaced:
        more = f' whose axes are known; say what they are: axes={{{next(iter(unplaced))!r}: ("batch", …)}}'
    return ValueError(
        f"model {type(module).__name__} has no site: no module returns a batch of floating-point numbers{more}"
    )


def _alike(one: Program, other: Program) -> bool:
    return [op.name for op in one.operations] == [op.name for op in other.operations]


def _with_heads(
    module: nn.Module,
    examples: Callable[[int], Tensor],
    recorder: Recorder,
    other: Program,
    attention: Found,
    traces: Sequence[Trace],
    found: Mapping[str, tuple[Site, Tap]],
    final: Tensor | None,
    left_out: dict[str, str],
) -> tuple[dict[str, tuple[Site, Tap]], Parts | str, dict[str, HeadWeights]]:
    """The sites of modules and those of attention and the residual stream, in order of execution; the parts of the
    stream, or why there are none; the weights of heads.

    What turns out to be no attention goes to `left_out`.
    """
    if not attention.attentions:
        return dict(found), "no attention was found in it", {}
    flow, points = Flow(recorder.program), Points(module)
    search = Batches(flow, other)
    example = examples(2)
    with evaluating(module), torch.no_grad():
        attentions, refused = checked(module, example, attention.attentions, flow, points)
    left_out |= refused
    if not attentions:
        return dict(found), "no attention was found in it", {}
    projections = find_projections(module, example, flow, attentions, search, points, evaluating)
    heads = named(attentions, projections, flow)
    constants = Constants(flow, recorder.constants)
    weights = [HeadWeights(head, Products(flow, search), constants, points) for head in heads]
    ends = [t.notes for t in traces if None not in t.notes]
    made = [*head_sites(heads, flow, points), *normed_sites(heads, flow, ends, points)]
    transformer: Parts | str
    known = dict(found)
    try:
        end = None if final is None else recorder.value(final)
        stream = find_stream(flow, search, weights, end)
    except NoStreamError as error:
        transformer = str(error)
    else:
        transformer = TracedParts(stream, constants, _norms(stream, traces))
        known, more = stream_sites(stream, search, known, traces, points)
        if any(site.name == "hook_pos_embed" for site, _ in more):
            transformer.adds_positions = False
        made += more
    own = {site.name: (site, tap) for site, tap in made if site.name not in known}
    both = known | own
    with evaluating(module), torch.no_grad():
        seen = look_at(module, example, {name: tap for name, (_, tap) in both.items()})
    for name in seen.overwritten.intersection(own):
        site, tap = own[name]
        both[name] = site, replace(tap, overwritten=True)
    ordered = _without_double_names(both, _in_order(seen.order, both))
    return ordered, transformer, {own.head.name: own for own in weights}


def _without_double_names(
    found: Mapping[str, tuple[Site, Tap]], order: Sequence[str]
) -> dict[str, tuple[Site, Tap]]:
    """Sites in an order, without aliases that are a site's name or an earlier site's alias."""
    names = set(order)
    kept: dict[str, tuple[Site, Tap]] = {}
    for name in order:
        site, tap = found[name]
        aliases = tuple(a for a in site.aliases if a not in names)
        names |= set(aliases)
        kept[name] = replace(site, aliases=aliases), tap
    return kept


def _in_order(seen: Sequence[str], names: Iterable[str]) -> list[str]:
    """Names in the order in which they were seen, those that were not after the ones that they followed."""
    order = {name: float(n) for n, name in enumerate(seen)}
    last = -1.0
    for name in names:
        last = order.setdefault(name, last + 0.5)
    return sorted(order, key=order.__getitem__)


def _norms(stream: TracedStream, traces: Sequence[Trace]) -> dict[tuple[Value, Value], nn.Module]:
    """Modules by the value that each was given and the one that it returned."""
    found: dict[tuple[Value, Value], nn.Module] = {}
    for t in traces:
        given, made = t.notes
        if given is not None and made is not None and t.tap.call == 0:
            found.setdefault((stream.same(given), stream.same(made)), t.tap.module)
    return found


def _no_site(value: Tensor, other: torch.Size | None) -> str:
    """Why a tensor is no site, given its shape in the other traced batch; empty if it may be one."""
    if is_transformed(value):
        return "it is inside torch.func.vmap (or grad), where it has no numbers of its own"
    if not value.is_floating_point():
        return f"its numbers are of type {value.dtype}"
    if other is None:
        return "it is not computed for every batch"
    if value.ndim < 2:
        return "it has no axis of units"
    both = list(zip(value.shape, other, strict=False))
    if both[0] == TRACE_BATCHES and value.shape[1:] == other[1:]:
        return ""
    if value.shape == other:  # position embeddings, for example
        return "it does not depend on the examples"
    if TRACE_BATCHES in both and both[0] != TRACE_BATCHES:
        return (
            f"its axis {both.index(TRACE_BATCHES)} is the batch, and a site has it first (sequences come first here: "
            "expected batch_first=True, or axes that are put in that order)"
        )
    return "its first axis is not the examples"


def _by_example(t: Trace, other: torch.Size | None, why: str) -> tuple[Trace, str]:
    """A trace laid out by example and position, if its rows are the positions of all examples (OPT); else why not."""
    (size, again), shape = TRACE_BATCHES, t.value.shape
    joined = t.value.ndim == 2 and not shape[0] % size and other is not None
    if not joined or other is None or other[0] * size != shape[0] * again:
        return t, why
    tap = replace(t.tap, layout=ByExample())
    return replace(t, tap=tap, value=t.value.unflatten(0, (size, -1))), ""


def _not_by_example(
    module: nn.Module, names: Named, examples: Callable[[int], Tensor], doubtful: set[str]
) -> set[str]:
    """Of sites whose first axis may be another than the batch's, those whose length does not follow a third batch: the
    rows that a router sends to an expert can be as many as the examples of two batches by chance.
    """
    if not doubtful:
        return set()
    n = sum(TRACE_BATCHES)
    seen = {t.name: len(t.value) for t in _traced(module, names, examples(n))[0]}
    return {name for name in doubtful if seen.get(name) != n}


def _traced_with_state(
    module: nn.Module, names: Named, example: Tensor
) -> tuple[tuple[list[Trace], Tensor | None, Recorder], tuple[str, ...]]:
    """The first pass (see `_traced`), and the buffers and attributes that every pass changes.

    Their values of before are put back then, after this pass and all that follow (`holding`).
    """
    remember_state(module, ())
    held, state = Held(module), []
    try:
        made = _traced(module, names, example)
        changed = held.changed()
        if changed:
            state = _state(module, example, changed, made[2].program)
    except BaseException:
        held.put_back()
        raise
    held.put_back(everything=bool(state))
    if state:
        remember_state(module, changed)
        made = _traced(module, names, example)
    return made, tuple(map(str, state))


def _state(
    module: nn.Module, example: Tensor, changed: Sequence[Slot], program: Program
) -> list[Slot]:
    """What is state among the slots that a pass has changed.

    That is what the state dict has, and what changes again when the pass is repeated: caches do not, nor does what a
    module only notes of its pass. A tensor that is noted may (with dropout); it is not read.
    """
    held = Held(module)
    try:
        with evaluating(module), torch.no_grad():
            module(example.clone())
        again = held.changed()
    finally:
        held.put_back()
    read = {source.partition(" ")[0] for source in program.sources.values()}
    tensors = {name for name in map(str, again) if name in own_tensors(module)}
    return [
        slot
        for slot in changed
        if slot.in_state_dict or (slot in again and (str(slot) not in tensors or str(slot) in read))
    ]


def _traced(
    module: nn.Module, names: Named, example: Tensor, before: Recorder | None = None
) -> tuple[list[Trace], Tensor | None, Recorder]:
    """The tensors of one pass, and the model's output; the output is traced too, even if no module returned it. It is
    None where the model returns a list of examples.
    """
    outputs: list[Any] = []
    recorder = Recorder(module, [example], before)
    with (
        evaluating(module),
        torch.no_grad(),
        naming_model(type(module).__name__, example),
        recorder,
    ):
        traces = trace(
            module,
            {name: m for name, (m, _) in names.items()},
            lambda: outputs.append(module(example)),
            recorder.value,
        )
    if lists_examples(outputs[0]):
        return traces, None, recorder
    final = main_output(outputs[0])
    if not any(t.value is final for t in traces):
        path = () if final is outputs[0] else (_main_key(outputs[0]),)
        traces.append(
            Trace(Tap(module, 0, path), "output", final, notes=(None, recorder.value(final)))
        )
    return traces, final, recorder


def lists_examples(output: Any) -> bool:
    """Whether a model's output is a list with a record for each example, as that of detection models."""
    return isinstance(output, list | tuple) and any(isinstance(item, Mapping) for item in output)


def listed_error(name: str = "") -> ValueError:
    """The error for a model that returns a list of examples where its logits are asked for."""
    which = f"model {name}" if name else "the model"
    return ValueError(
        f"{which} returns a list with a record for each example, as detection models do, and so has no logits: name a "
        "unit of one of its sites instead (SITE:INDEX; `circuits sites` lists them), or wrap a module that returns one "
        "tensor, the output that is meant"
    )


def main_output(output: Any) -> Tensor:
    """The tensor with the logits in a model's output; without logits the embedding of an example, if it names one.

    Raises:
        TypeError: if there is none.
        ValueError: if the model returns a list of examples.
    """
    if lists_examples(output):
        raise listed_error()
    if isinstance(output, Tensor):
        return output
    if is_record(output) or (isinstance(output, Mapping | list | tuple) and len(output)):
        return main_output(entry(output, _main_key(output)))
    raise TypeError(f"model output of type {type(output).__name__} holds no tensor")


def _main_key(output: Any) -> Any:
    """The key of the first of `_OUTPUTS` that a nested output has, else of its first entry."""
    if isinstance(output, Mapping):
        keys = list(output)
    elif is_record(output):
        keys = [field.name for field in fields(output)]
    else:
        names = getattr(output, "_fields", ())
        return next((names.index(name) for name in _OUTPUTS if name in names), 0)
    return next((k for k in _OUTPUTS if k in keys and entry(output, k) is not None), keys[0])


_OUTPUTS = ("logits", "logits_per_image", "image_embeds", "text_embeds", "pooler_output")
"""What the outputs of models name their result, before the states of their layers."""


Named = dict[str, tuple[nn.Module, tuple[str, ...]]]
"""Site name -> the module whose output it is, and the site's other names."""


# --- any module --------------------------------------------------------------------------------


def _modules(root: nn.Module) -> Named:
    """Every module by its name, with characters that no site name may contain replaced by `_`."""
    modules = {name: module for name, module in root.named_modules() if name}
    found: Named = {}
    for name, module in modules.items():
        allowed = re.sub(r"[\s:,+*]|^-", "_", name)
        while allowed != name and (allowed in modules or allowed in found):
            allowed += "_"
        found[allowed] = (module, ())
    return found


def _hook_point_site(t: Trace, point: HookPoint) -> Site:
    shape, stored = tuple(t.value.shape[1:]), type(point).__qualname__  # the name that stores know
    return Site(t.name, point.kind, point.axes, point.unit_axis, shape, (), stored)


def _module_site(t: Trace, axes: tuple[str, ...], final: bool) -> Site:
    """Describe a module's output, or the model's if it is `final`."""
    place = axes.index("channel" if "channel" in axes else "unit")
    kind: SiteKind = "channel" if "channel" in axes else "neuron"
    shape = tuple(t.value.shape[1:])
    return Site(
        t.name, "logit" if final else kind, axes, place, shape, module=type(t.tap.module).__name__
    )


def _site_axes(t: Trace, labels: Labels) -> tuple[str, ...] | None:
    """The axes of a site: units second are channels; None if nothing tells where the units are."""
    n = t.value.ndim
    place = unit_axis(labels)
    if n == 2 and (place == 1 or set(labels[1:]) <= {UNKNOWN}):
        return ("batch", "unit")  # one vector an example: its numbers are the units
    if not place:
        return None
    kinds = [label.partition("/")[0] for label in labels]
    axes = [
        kind if kind != UNKNOWN and kinds.count(kind) == 1 else f"axis{i}"
        for i, kind in enumerate(kinds)
    ]
    if n == 3:
        axes = ["position"] * 3
    axes[0], axes[place] = "batch", "channel" if place == 1 else UNIT
    return tuple(axes)


def _checked_axes(name: str, axes: Sequence[str]) -> tuple[str, ...]:
    own = tuple(axes.split()) if isinstance(axes, str) else tuple(axes)
    if (
        own[:1] != ("batch",)
        or sum(axis in ("unit", "channel") for axis in own) != 1
        or len({*own}) < len(own)
    ):
        raise ValueError(
            f"axes of site {name!r} are {own}: expected different names, `batch` first, and one of `unit` and `channel`"
        )
    return own


# --- TransformerLens bridges -------------------------------------------------------------------


def _hook_points(bridge: Any) -> Named:
    """A bridge's hook points by the names that users of TransformerLens know; other names become aliases."""
    by_point: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, point in bridge.hook_dict.items():
        by_point.setdefault(id(point), (point, []))[1].append(name)
    named: Named = {}
    for point, names in by_point.values():
        # `blocks.0.attn.hook_z` is preferred to `blocks.0.attn.o.hook_in`, which is the same hook point.
        names.sort(key=lambda name: (name.endswith(("hook_in", "hook_out")), len(name), name))
        named[names[0]] = (point, tuple(names[1:]))
    return named


_HEADS = re.compile(r"hook_(z|q|k|v|rot_q|rot_k|result)$")
_PATTERNS = re.compile(r"hook_(pattern|attn_scores)$")
_NEURONS = re.compile(r"(mlp|hook)\S*hook_(pre|post|pre_linear|mid)$|mlp\.(in|gate)\.hook_out$")
_LOGITS = re.compile(r"hook_unembed$|unembed\.hook_out$|^output$")


def _bridge_site(t: Trace, names: Named) -> tuple[Site, Tap]:
    tap = t.tap
    conversion = getattr(tap.module, "hook_conversion", None)
    if conversion is not None:
        tap = replace(tap, layout=BridgeLayout(conversion))
    # A bridge converts tensors only for its own hooks: torch's hooks see the wrapped module's layout, heads not split.
    value = tap.read(t.value) if conversion is not None else t.value
    axes, unit_axis, kind = _bridge_axes(t.name, value.ndim)
    # The model's own output has no hook point, and so no aliases, where logits are capped after the last one
    # (Gemma 2).
    _, aliases = names.get(t.name, (tap.module, ()))
    site = Site(t.name, kind, axes, unit_axis, tuple(value.shape[1:]), aliases, "HookPoint")
    return site, tap


@dataclass(frozen=True, eq=False)
class BridgeLayout:
    """The layout that a bridge shows its own hooks.

    Attributes:
        conversion: the bridge's own, of a hook point.
    """

    conversion: Any

    def read(self, held: Tensor) -> Tensor:
        return self.conversion.convert(held)

    def write(self, held: Tensor, value: Tensor) -> Tensor:
        return self.conversion.revert(value)


def attention_patterns(sites: Sequence[Site]) -> list[Site]:
    """The sites of attention patterns at which an edit has an effect.

    Some bridges (GPT-J) call the hook of the pattern only after attention is done: there it can be read only.
    """
    order = [site.name for site in sites]
    patterns = [s for s in sites if s.kind == "pattern" and s.name.endswith("hook_pattern")]
    return [s for s in patterns if not _shown_too_late(s.name, order, "hook_pattern")]


def _shown_too_late(name: str, order: list[str], what: str = "hook_attn_scores") -> bool:
    """Whether a bridge calls the hook of the scores only after attention is done, where edits have no effect."""
    z = name.replace(what, "hook_z")
    return z != name and z in order and order.index(name) > order.index(z)


def _bridge_axes(name: str, ndim: int) -> tuple[tuple[str, ...], int, SiteKind]:
    if _PATTERNS.search(name) and ndim == 4:
        return ("batch", "head", "query", "key"), 1, "pattern"
    if _HEADS.search(name) and ndim == 4:
        return ("batch", "position", "head", "d_head"), 2, "head"
    if ndim == 2:
        return ("batch", "unit"), 1, "neuron"
    if ndim != 3:
        between = tuple(f"axis{i}" for i in range(ndim - 2))
        return ("batch", *between, "unit"), ndim - 1, "neuron"
    kind: SiteKind = "residual"
    if _LOGITS.search(name):
        kind = "logit"
    elif _NEURONS.search(name):
        kind = "neuron"
    return ("batch", "position", "unit"), 2, kind


def logits_last(sites: Sequence[Site], logits: Tensor) -> Tensor:
    """A model's logits with the axis of classes or tokens last, whatever the model's layout."""
    site = next((s for s in reversed(sites) if s.kind == "logit"), None)
    return logits if site is None else logits.movedim(site.unit_axis, -1)


def find_embedding(seen: Mapping[str, Tensor], order: Sequence[str]) -> str | None:
    """The first site that depends on the tokens; position embeddings, for example, come earlier and do not.

    Args:
        seen: the tensors of sites, by name, for two texts that have no token in common at any position.
        order: the sites in order of execution.
    """

    def differs(value: Tensor) -> bool:
        one, other = value[0].double(), value[1].double()
        return bool((one - other).abs().max() > 1e-4 * one.abs().max())

    return next((name for name in order if name in seen and differs(seen[name])), None)
