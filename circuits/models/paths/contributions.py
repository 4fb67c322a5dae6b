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
from circuits.models.adapter.norms import measure_norm
from circuits.models.adapter.sites import evaluating
from circuits.models.paths.residual import Receiver, Sender, Stream

_PARTS = ("q", "k", "v")
_READS: Mapping[str, Matrices] = {"q": "W_Q", "k": "W_K", "v": "W_V"}
_BIASES: Mapping[str, Matrices] = {"q": "b_Q", "k": "b_K", "v": "b_V"}


def stream_change(
    stream: Stream,
    sets: Sequence[frozenset[Sender]],
    receiver: Receiver,
    live: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    through_mlps: bool = False,
) -> Float[Tensor, "set example position d_model"]:
    """The change of the stream that a receiver reads if some senders write what they wrote in another run.

    Args:
        stream: the model's residual stream.
        sets: the senders that are replaced, for each set.
        receiver: the receiver at which the paths end.
        live: the tensors of sites in this run, set x example x … (of `Stream.sender_sites` and, with `through_mlps`,
            of what the MLPs read).
        other: the same sites in the other run, of the same shapes.
        through_mlps: MLPs on the way are recomputed on the changed stream, and their change is added (Wang et al.
            2022); heads on the way are not.
    """
    first = next(iter(live.values()))
    total = first.new_zeros((*first.shape[:3], stream.width))  # type: ignore[union-attr, arg-type]
    passed = stream.mlps_before(receiver)
    for sender in (Sender("token"), Sender("position")):
        _add_output(stream, total, sets, sender, live, other)
    for layer in range(stream.n_layers):
        mlp = Receiver("mlp", layer)
        if not stream.parallel:
            _add_heads(stream, total, sets, layer, live, other)
        if mlp in passed:
            if through_mlps:
                # An MLP that is a sender itself is replaced instead: its output is the other run's.
                kept = _holding(sets, Sender("mlp", layer), False)
                _add_recomputed(stream, total, kept, mlp, live)
            _add_output(stream, total, sets, Sender("mlp", layer), live, other)
        if (
            stream.parallel
        ):  # attention and MLP read the same stream, so the MLP does not see these heads
            _add_heads(stream, total, sets, layer, live, other)
    return total


def _holding(sets: Sequence[frozenset[Sender]], sender: Sender, holding: bool = True) -> Tensor:
    """Which sets contain a sender (with `holding`), or do not."""
    return torch.tensor([(sender in group) == holding for group in sets])


def _add_output(
    stream: Stream,
    total: Tensor,
    sets: Sequence[frozenset[Sender]],
    sender: Sender,
    live: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
) -> None:
    """Add the difference of an embedding's or MLP's output, for the sets that contain it."""
    rows = _holding(sets, sender)
    if rows.any():
        site = stream.output_site(sender)
        total[rows] += other[site][rows] - live[site][rows]


def _add_heads(
    stream: Stream,
    total: Tensor,
    sets: Sequence[frozenset[Sender]],
    layer: int,
    live: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
) -> None:
    """Add the differences of the outputs of a layer's heads, for the sets that contain them."""
    heads = sorted({s for group in sets for s in group if s.kind == "head" and s.layer == layer})
    if not heads:
        return
    site, post_norm = stream.heads_site(layer), stream.norm("ln1_post", layer)
    out = stream.matrix("W_O", layer)
    # Without a normalisation after attention, each head's change is added to the stream by itself.
    moved = total if post_norm is None else torch.zeros_like(total)
    for head in heads:
        rows = _holding(sets, head)
        z = other[site][rows][..., head.head, :] - live[site][rows][..., head.head, :]
        moved[rows] += z @ out[head.head]
    if post_norm is not None:
        # The sum of all heads is normalised before it is added to the stream, so heads interact.
        before = live[stream.before_post_norm_site(layer)]
        total += post_norm(before + moved) - post_norm(before)


def _add_recomputed(
    stream: Stream, total: Tensor, rows: Tensor, mlp: Receiver, live: Mapping[str, Tensor]
) -> None:
    """Add the change of an MLP's output that the change of the stream so far causes."""
    if not total[rows].any():
        return
    before, norm = live[stream.stream_site(mlp)][rows], norm_of(stream, mlp)
    changed = mlp_output(stream, mlp.layer, norm(before + total[rows]))
    total[rows] += changed - mlp_output(stream, mlp.layer, norm(before))


def mlp_output(
    stream: Stream, layer: int, read: Float[Tensor, "*axes position d_model"]
) -> Float[Tensor, "*axes position d_model"]:
    """What an MLP adds to the stream for an input that is normalised already."""
    mlp, after = stream.parts.mlp(layer), stream.norm("ln2_post", layer)
    assert mlp is not None, "it is a receiver"
    made = mlp(read.reshape(-1, *read.shape[-2:]))
    made = (made[0] if isinstance(made, tuple) else made).reshape(read.shape)
    return made if after is None else after(made)


def input_change(
    stream: Stream,
    receiver: Receiver,
    before: Float[Tensor, "*axes d_model"],
    change: Float[Tensor, "*axes d_model"],
    hold_norm: bool = False,
) -> Float[Tensor, "*axes inner"]:
    """The change of a receiver's input (at `Stream.input_site`) that a change of the stream before it causes.

    It is zero to the bit where the stream's change is zero.

    Args:
        stream: the model's residual stream.
        receiver: any but the stream itself; of queries, keys and values only the given head's.
        before: the stream without the change.
        change: what is added to the stream.
        hold_norm: freeze the normalisation's scale instead of recomputing it.
    """
    norm = norm_of(stream, receiver)
    made = _held(norm, before, change) if hold_norm else norm(before + change) - norm(before)
    if receiver.kind not in _PARTS:
        return made
    return made @ stream.matrix(_READS[receiver.kind], receiver.layer)[receiver.head]


def norm_of(stream: Stream, receiver: Receiver) -> Any:
    """The module that normalises what a receiver reads."""
    if receiver.kind == "logits":
        return stream.norm("ln_final") or nn.Identity()
    layer = receiver.layer
    # Parallel layers have one normalisation for attention and MLP (GPT-J), or one for each (GPT-NeoX).
    own = stream.norm("ln2", layer) if receiver.kind == "mlp" else None
    if receiver.kind == "mlp" and not stream.parallel:
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
        site for r in stream.receivers for site in (stream.input_site(r), stream.stream_site(r))
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
        yield stream.attention_site(layer), written
        mlp = Receiver("mlp", layer)
        if mlp in stream.receivers:
            before = here if stream.parallel else here + written
            yield stream.input_site(mlp), norm_of(stream, mlp)(before)
            written = written + cache[stream.output_site(Sender("mlp", layer))]
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
            same = bool(torch.allclose(made, cache[site], rtol=1e-3, atol=1e-5))
        except (
            TypeError,
            RuntimeError,
        ):  # Bloom's MLP takes the residual stream as a second argument
            same = False
        if not same:
            raise ValueError(
                f"through_mlps: the MLP of layer {mlp.layer} of {model.name} cannot be called alone"
            )
