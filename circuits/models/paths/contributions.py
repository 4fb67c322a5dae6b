"""What paths of a transformer carry: what senders add to the residual stream, and how that changes what receivers
read.

Several sets of senders are patched at once, along a first axis, so that many paths share a forward pass.
Normalisations and MLPs are computed by the model's own modules; nothing is linearised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuits.models.adapter.head_weights import Matrices
from circuits.models.adapter.hooked_model import ActivationCache
from circuits.models.adapter.norms import Tangent, measure_norm
from circuits.models.adapter.sites import evaluating
from circuits.models.paths.parts import PartsChange
from circuits.models.paths.residual import NEURONS, Receiver, Sender, Stream, Writers
from circuits.models.paths.written import Written

_PARTS = ("q", "k", "v")
_READS: Mapping[str, Matrices] = {"q": "W_Q", "k": "W_K", "v": "W_V"}
_BIASES: Mapping[str, Matrices] = {"q": "b_Q", "k": "b_K", "v": "b_V"}


def written_change(
    stream: Stream, site: str, live: Tensor, other: Tensor
) -> Float[Tensor, "set sender example position d_model"]:
    """How what senders add to the stream differs from what they added in another run, for all senders at a site.

    Args:
        stream: the model's residual stream.
        site: the site of an embedding, an MLP, or the heads of a layer.
        live: its tensor in this run, with the sets of senders that are patched as a first axis (of length 1 if they
            have all the same).
        other: its tensor in the other run, with the same axes.
    """
    change = other - live
    layer = stream.layer_of_heads(site)
    if layer is None:
        mlp = stream.layer_of_mlp(site) if stream.scales else None
        scale = 1.0 if mlp is None else stream.mlp_scale(mlp)
        return (change if scale == 1 else change * scale)[:, None]
    return torch.einsum("sephd,hdm->shepm", change, stream.matrix("W_O", layer))


def stream_change(
    stream: Stream,
    off: Float[Tensor, "set sender receiver *span"],
    receiver: Receiver,
    written: Written,
    live: Mapping[str, Tensor],
    index: Int[Tensor, " set"],
    through_mlps: bool = False,
    span: Int[Tensor, "example position"] | None = None,
) -> Float[Tensor, "set receiver example position d_model"]:
    """The change of the stream that receivers at one site read if some senders write what they wrote in another run.

    Args:
        stream: the model's residual stream.
        off: for each set, sender and receiver: 0 if the receiver reads what the sender writes in this run, 1 if it
            reads what the sender wrote in the other run. What lies between is a mixture of both.
        receiver: one of the receivers.
        written: the changes of all senders that are replaced.
        live: the tensors of sites in this run, set x example x …, of what is normalised after attention and, with
            `through_mlps`, of what the MLPs read.
        index: the numbers of the sets in the pass, as `written` has them.
        through_mlps: MLPs on the way are recomputed on the changed stream, and their change is added (Wang et al.
            2022); heads on the way are not.
        span: the span that each position is in, if `off` has spans.
    """
    passed, total = stream.mlps_before(receiver), _Total(stream, off, written, live, index, span)
    for sender in stream.senders[:2]:
        if sender.kind in ("token", "position"):
            total.add(Writers(stream.output_site(sender), stream.index_of(sender)))
    for layer in range(stream.n_layers):
        attention = stream.writers(layer, "attention")
        if not stream.parallel:
            total.add(attention)
        mlp = Receiver("mlp", layer)
        if mlp in passed:
            own = stream.writers(layer, "mlp")
            if through_mlps:
                # An MLP that is a sender itself is replaced instead: its output is the other run's.
                before = total.value()
                kept = (off[:, own.columns] == 0).to(before).transpose(1, 2)[..., None, None]
                total.put(_recomputed(stream, before, mlp, live) * kept)
            total.add(own)
        if stream.parallel:
            # Attention and MLP read the same stream: the MLP does not see these heads.
            total.add(attention)
    return total.value()


class _Total:
    """The change of the stream, as one writer after the other is added; its arguments are those of `stream_change`."""

    def __init__(
        self,
        stream: Stream,
        off: Tensor,
        written: Written,
        live: Mapping[str, Tensor],
        index: Tensor,
        span: Tensor | None,
    ) -> None:
        self.stream, self.off, self.written, self.live = stream, off, written, live
        self.index, self.span = index, span
        self._sum: Tensor | None = None
        self._together: list[str] = []  # sites whose senders are summed as one

    def add(self, writers: Writers) -> None:
        """Add what senders at a site write."""
        if writers.norm is None and writers.split is None and self.span is None:
            self._together.append(writers.site)
        else:
            made = self._mixed(writers.site, writers.columns)
            self.put(_through_post_norm(writers, made, self.live))

    def put(self, made: Tensor | None) -> None:
        """Add a change; None is none."""
        if made is not None:
            self._sum = made if self._sum is None else self._sum + made

    def value(self) -> Float[Tensor, "set receiver example position d_model"]:
        """The change so far."""
        if self._together:
            self.put(self.written.mixed(self._together, self.off, self.index))
        self._together = []
        if self._sum is not None:
            return self._sum
        any_of = next(iter(self.live.values()))
        shape = len(self.off), self.off.shape[2], *any_of.shape[1:3], self.stream.width
        return any_of.new_zeros(shape)

    def _mixed(self, site: str, columns: slice) -> Tensor | None:
        """The change that some senders make together; None if no set replaces any, and no gradient is asked for."""
        weights = self.off[:, columns]
        sloped = weights.requires_grad and site in self.written
        if not sloped and not weights.any():
            return None
        change = self.written.of(site, self.index)
        if isinstance(change, PartsChange):
            return change.mixed(weights.to(change.activations), self.span)
        if self.span is not None:
            own = weights.to(change)[..., self.span]
            return torch.einsum("suepm,sukep->skepm", change, own)
        return torch.einsum("suepm,suk->skepm", change, weights.to(change))


def _through_post_norm(
    writers: Writers, moved: Tensor | None, live: Mapping[str, Tensor]
) -> Tensor | None:
    """The change of what attention or an MLP adds, if its output is normalised before it is added."""
    if moved is None or writers.norm is None:
        return moved
    # The sum of all heads is normalised before it is added to the stream, so heads interact.
    return _norm_change(writers.norm, live[writers.before][:, None], moved)


def _norm_change(norm: Any, before: Tensor, change: Tensor) -> Tensor:
    """The change of a normalisation's output; zero to the bit where nothing changes."""
    made = norm(before + change) - norm(before)
    # Sums over tensors of different shapes may be rounded differently.
    still = (change == 0).all(-1, keepdim=True)
    if made.requires_grad:
        return torch.where(still, made - made.detach(), made)
    return made.masked_fill_(still, 0)


def _recomputed(stream: Stream, total: Tensor, mlp: Receiver, live: Mapping[str, Tensor]) -> Tensor:
    """The change of an MLP's output that the change of the stream so far causes."""
    norm = norm_of(stream, mlp)
    read = live[stream.stream_site(mlp)][:, None]
    return _norm_change(lambda x: mlp_output(stream, mlp.layer, norm(x)), read, total)


def mlp_output(
    stream: Stream, layer: int, read: Float[Tensor, "*axes position d_model"]
) -> Float[Tensor, "*axes position d_model"]:
    """What an MLP adds to the stream for an input that is normalised already."""
    mlp, after = stream.parts.mlp(layer), stream.norm("ln2_post", layer)
    assert mlp is not None, "it is a receiver"
    made = mlp(read.reshape(-1, *read.shape[-2:]))
    made = (made[0] if isinstance(made, tuple) else made).reshape(read.shape)
    made = made if after is None else after(made)
    return made if not stream.scales else made * stream.scales[layer][1]


def input_change(
    stream: Stream,
    receivers: Sequence[Receiver],
    before: Float[Tensor, "#set example position d_model"],
    change: Float[Tensor, "set receiver example position d_model"],
    hold_norm: bool = False,
) -> Float[Tensor, "set example position *inner"]:
    """The change of receivers' inputs (at `Stream.input_site`) that changes of the stream before them cause.

    It is zero to the bit where the stream's change is zero.

    Args:
        stream: the model's residual stream.
        receivers: queries, keys or values of heads of one layer (`inner` is receiver x d_head), neurons of one
            (`inner` is receiver), or one receiver of another kind, except the stream itself (`inner` is d_model).
        before: the stream without the change.
        change: what is added to the stream, for each receiver.
        hold_norm: freeze the normalisation's scale instead of recomputing it.
    """
    first = receivers[0]
    norm, before = norm_of(stream, first), before[:, None]
    made = _held(norm, before, change) if hold_norm else _norm_change(norm, before, change)
    if first.kind not in (*_PARTS, *NEURONS):
        return made[:, 0]
    given = torch.einsum("skepm,kmd->sepkd", made, read_matrices(stream, receivers))
    return given[..., 0] if first.kind in NEURONS else given


def input_gradient(
    stream: Stream,
    receivers: Sequence[Receiver],
    tangent: Tangent | None,
    gradient: Float[Tensor, "example position *inner"],
    hold_norm: bool = False,
) -> Float[Tensor, "example receiver position d_model"]:
    """The gradient at the stream that each of some receivers reads, from that at their inputs.

    Args:
        stream: the model's residual stream.
        receivers: all receivers at one site; of neurons some will do.
        tangent: of the normalisation before them, at the stream that they read (`tangent_of`).
        gradient: the gradient at `Stream.input_site`.
        hold_norm: freeze the normalisation's scale.
    """
    if receivers[0].kind in NEURONS:
        gradient = gradient[..., [r.head for r in receivers], None]
    elif receivers[0].kind not in _PARTS:
        given = gradient[:, None]
        return given if tangent is None else tangent.pulled(given, hold_norm)
    matrices = read_matrices(stream, receivers)
    if tangent is None:
        return torch.einsum("epkd,kmd->ekpm", gradient, matrices)
    return tangent.pulled_through(gradient, matrices, hold_norm)


def tangent_of(
    stream: Stream, receiver: Receiver, before: Float[Tensor, "example position d_model"]
) -> Tangent | None:
    """The derivative of the normalisation before a receiver, with an axis for several; None if there is none."""
    norm = norm_of(stream, receiver)
    return None if isinstance(norm, nn.Identity) else stream.measured(norm).tangent(before[:, None])


def read_matrices(
    stream: Stream, receivers: Sequence[Receiver]
) -> Float[Tensor, "receiver d_model d_head"]:
    """What queries, keys or values of heads of one layer are multiplied with, after the normalisation.

    Of neurons of one layer `d_head` is 1.
    """
    first = receivers[0]
    if first.kind in NEURONS:
        matrix = stream.parts.neuron_inputs(first.layer)[NEURONS.index(first.kind)]
        return matrix.detach().T[[r.head for r in receivers], :, None]
    return stream.matrix(_READS[first.kind], first.layer)[[r.head for r in receivers]]


def norm_of(stream: Stream, receiver: Receiver) -> Any:
    """The module that normalises what a receiver reads."""
    if receiver.kind == "logits":
        return stream.norm("ln_final") or nn.Identity()
    layer = receiver.layer
    # Parallel layers have one normalisation for attention and MLP (GPT-J), or one for each (GPT-NeoX).
    of_mlp = receiver.kind in ("mlp", *NEURONS)
    own = stream.norm("mlp_input", layer) if of_mlp else None
    if of_mlp and not stream.parallel:
        return own or nn.Identity()
    return own or stream.norm("ln1", layer) or nn.Identity()


def _held(norm: Any, before: Tensor, change: Tensor) -> Tensor:
    """The change of a normalisation's output if its scale is frozen: the bias cancels."""
    return (
        measure_norm(norm, before.shape[-1], device=before.device).held(change, before).to(change)
    )


def position_embedding(
    stream: Stream, ids: Int[Tensor, "batch position"]
) -> Float[Tensor, "batch position d_model"]:
    """What the position embedding writes at some positions.

    Raises:
        ValueError: if the model has none, or a position is beyond its context.
    """
    if Sender("position") not in stream.senders:
        raise ValueError(
            f"positions: model {stream.model.name} adds no position embedding to its residual stream"
        )
    table = stream.parts.positions()
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= len(table):
        raise ValueError(
            f"position {low if low < 0 else high} of {stream.model.name} must be from 0 to {len(table) - 1}"
        )
    return table[ids.to(table.device)]


# --- checks that the model computes what is assumed here -------------------------------------------


def check_stream(stream: Stream) -> None:
    """Raise ValueError unless, on examples, senders add up to the stream and receivers read it as is assumed."""
    model = stream.model
    names = {
        site
        for r in stream.receivers
        if r.kind != "resid_mid"
        for site in (stream.input_site(r), stream.stream_site(r))
    }
    names |= {
        *stream.sender_sites(stream.senders),
        *map(stream.attention_site, range(stream.n_layers)),
    }
    cache = model.run(model.input.example(2), read=names)
    with model.lock, evaluating(model.module), torch.no_grad():
        for site, made in _expected(stream, cache):
            off, size = (made - cache[site]).abs().max().item(), cache[site].abs().max().item()
            # 1000 units of rounding, but never more than a tenth of the tensor's size (for bfloat16). Written as
            # "not <=", so that NaN is refused too.
            if not off <= min(1e3 * torch.finfo(made.dtype).eps, 0.1) * max(size, 1e-6):
                raise ValueError(
                    f"model {model.name}: {site} differs by {off:.2g} (of {size:.2g}) from what the residual stream "
                    "before it implies; paths need a stream that is the sum of its senders"
                )


def check_mlp_inputs(stream: Stream) -> None:
    """Raise ValueError unless what MLPs write is that of what they are given at the sites of their inputs alone."""
    mlps = [r for r in stream.receivers if r.kind == "mlp"]
    inputs = [stream.input_site(r) for r in mlps]
    outputs = [stream.output_site(Sender("mlp", r.layer)) for r in mlps]
    example = stream.model.input.example(2)
    cache = stream.model.run(example, read=[*inputs, *outputs])
    put = {s: lambda _, s=s: cache[s].flip(0) * 1 for s in inputs}
    made = stream.model.run(example, read=outputs, edits=put)
    for site, mlp in zip(outputs, mlps, strict=True):
        if not torch.allclose(made[site], cache[site].flip(0), rtol=1e-2, atol=1e-4):
            raise ValueError(
                f"model {stream.model.name}: what the MLP of layer {mlp.layer} writes depends on more than "
                f"{stream.input_site(mlp)}, the site of its input, so that no edges lead into it"
            )


def _expected(stream: Stream, cache: ActivationCache) -> Iterator[tuple[str, Tensor]]:
    """What each site must hold, computed from the sites before it."""
    embedded = [stream.output_site(s) for s in stream.senders if s.kind in ("token", "position")]
    here = torch.stack([cache[site] for site in embedded]).sum(0)
    if stream.parts.adds_positions:  # which is no site, since it is the same for all examples
        here = cache[stream.layers[0].before]
    if Sender("position") in stream.senders:
        ids = torch.arange(here.shape[1])[None]
        yield embedded[1], position_embedding(stream, ids).expand_as(here)
    for layer in range(stream.n_layers):
        yield stream.stream_site(Receiver("resid_pre", layer)), here
        for kind in _PARTS:
            receiver = Receiver(kind, layer)
            read = norm_of(stream, receiver)(here)
            made = torch.einsum("bpm,hmd->bphd", read, stream.matrix(_READS[kind], layer))
            bias = stream.parts.attention(_BIASES[kind], layer)
            yield (
                stream.input_site(receiver),
                made if bias is None else made + bias.reshape(made.shape[2:]),
            )
        written = torch.einsum(
            "bphd,hdm->bpm", cache[stream.heads_site(layer)], stream.matrix("W_O", layer)
        )
        if Sender("bias", layer) in stream.senders:
            written = written + stream.matrix("b_O", layer)
        post_norm = stream.norm("ln1_post", layer)
        written = written if post_norm is None else post_norm(written)
        yield stream.attention_site(layer), written / stream.shown_scale(layer, "attention")
        mlp = Receiver("mlp", layer)
        if mlp in stream.receivers:
            before = here if stream.parallel else here + written
            yield stream.input_site(mlp), norm_of(stream, mlp)(before)
            made = cache[stream.output_site(Sender("mlp", layer))]
            written = written + made * stream.mlp_scale(layer)
        here = here + written
        yield stream.stream_site(Receiver("resid_post", layer)), here
        # From the model's own tensor on, so that rounding does not add up over layers.
        here = cache[stream.stream_site(Receiver("resid_post", layer))]
    yield stream.input_site(Receiver("logits")), norm_of(stream, Receiver("logits"))(here)


def check_mlps(stream: Stream) -> None:
    """Raise ValueError unless each MLP can be called alone, which paths through MLPs need."""
    model = stream.model
    mlps = stream.mlps_before(Receiver("logits"))
    outputs = {mlp: stream.output_site(Sender("mlp", mlp.layer)) for mlp in mlps}
    cache = model.run(
        model.input.example(2), read=[*map(stream.input_site, mlps), *outputs.values()]
    )
    for mlp, site in outputs.items():
        try:
            with model.lock, evaluating(model.module), torch.no_grad():
                made = mlp_output(stream, mlp.layer, cache[stream.input_site(mlp)])
            wanted = cache[site] * stream.mlp_scale(mlp.layer)
            same = bool(torch.allclose(made, wanted, rtol=1e-3, atol=1e-5))
        except (
            TypeError,
            RuntimeError,
            AssertionError,
        ):  # Bloom's MLP takes the residual stream as a second argument; experts are found to be no module
            same = False
        if not same:
            raise ValueError(
                f"through_mlps: the MLP of layer {mlp.layer} of {model.name} cannot be called alone"
            )
