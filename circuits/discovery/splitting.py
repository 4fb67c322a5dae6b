"""What splits attention and MLPs of a transformer's graph: MLPs into neurons, outputs into an autoencoder's latents.

The latents are those of autoencoders that are attached to the model (`HookedModel.attach`). What they miss of the
site's tensor, and the latents that are left out, is one more source, the error, so that all together are exactly what
the site adds to the stream.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from circuits.models.adapter.attaching import PREFIX, autoencoders
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.sites import evaluating
from circuits.models.paths.contributions import norm_of
from circuits.models.paths.parts import Split
from circuits.models.paths.residual import NEURONS, Receiver, Sender, Stream
from circuits.tasks.task import Task
from circuits.units import Units, unknown

_LAYER = re.compile(r"[0-9]{1,6}")

ALL = "all"


def parse_layers(text: str, stream: Stream, option: str = "neurons") -> tuple[int, ...]:
    """The layers of a list such as `3,5-7`, or `all` for all that have an MLP.

    Args:
        text: the list.
        stream: the model's residual stream.
        option: what the list is given as.

    Raises:
        ValueError: if it is no such list, or there is no such layer.
    """
    n = stream.n_layers
    if text.strip() == ALL:
        return tuple(r.layer for r in stream.receivers if r.kind == "mlp")
    found: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = (p.strip() for p in part.partition("-"))
        ends = (first, last if dash else first)
        if not all(_LAYER.fullmatch(end) for end in ends):
            raise ValueError(
                f"{option} {text!r}: expected numbers of layers such as 3,5-7, or {ALL}"
            )
        low, high = map(int, ends)
        if low > high:
            raise ValueError(
                f"{option} {text!r}: {part.strip()} runs backwards; expected {high}-{low}"
            )
        if high >= n:
            raise ValueError(f"{option} {text!r}: {stream.model.name} has the layers 0 to {n - 1}")
        found |= dict.fromkeys(range(low, high + 1))
    return tuple(found)


def neurons(stream: Stream, layer: int) -> Split:
    """The neurons of a layer's MLP: an activation times a row of the output matrix. Its bias is no part.

    Raises:
        ValueError: if its output is not the sum of neurons.
    """
    at, found = stream.layers[layer], stream.parts.neurons(layer)
    if at.neurons is None or found is None:
        raise ValueError(
            f"neurons {layer}: the MLP of layer {layer} of {stream.model.name} has no single layer of neurons; "
            "expected other layers"
        )
    norm, out = stream.norm("ln2_post", layer), found[1]
    if norm is None and stream.scales:
        out = out * stream.scales[layer][1]
    before = at.mlp or "" if norm is not None else ""
    site = stream.model.site(at.neurons).name
    made = Split(
        layer, "mlp", f"mlp:{layer}", site, torch.arange(len(out)), out, norm=norm, before=before
    )
    _check(stream, made, f"neurons {layer}")
    return made


def check_neurons_read(stream: Stream, layer: int) -> None:
    """Raise ValueError unless each neuron of a layer's MLP is given a product of what the MLP is given.

    It is asked of the difference between two examples, since biases cancel in it.
    """
    model, wider = stream.model, stream.with_neurons((layer,))
    first = {r.kind: r for r in reversed(wider.receivers) if r.kind in NEURONS and r.layer == layer}
    known = {name for s in model.sites for name in (s.name, *s.aliases)}
    sites = {
        "neuron": f"blocks.{layer}.mlp.hook_pre",
        "neuron_linear": f"blocks.{layer}.mlp.hook_pre_linear",
    }
    if not first or not {sites[kind] for kind in first} <= known:
        raise ValueError(
            f"neuron_targets {layer}: model {model.name} shows no site at which what the neurons of layer {layer} are "
            "given can be changed; expected other layers"
        )
    before = stream.stream_site(first["neuron"])
    cache = model.run(model.input.example(2), read=[before, *(sites[kind] for kind in first)])
    for kind, receiver in first.items():
        made, matrix = (
            cache[sites[kind]],
            stream.parts.neuron_inputs(layer)[NEURONS.index(receiver.kind)],
        )
        with model.lock, evaluating(model.module), torch.no_grad():
            read = norm_of(stream, receiver)(cache[before])
            wanted = (read[1] - read[0]) @ matrix
        off, size = float((made[1] - made[0] - wanted).abs().max()), float(made.abs().max())
        if not off <= min(1e3 * torch.finfo(made.dtype).eps, 0.1) * max(size, 1e-6):
            raise ValueError(
                f"neuron_targets {layer}: {sites[kind]} of {model.name} differs by {off:.2g} (of {size:.2g}) from a "
                "product of what the MLP is given; expected other layers"
            )


def latents(stream: Stream, units: Units) -> Split:
    """Latents of an attached autoencoder, and its error.

    Args:
        stream: the residual stream of a model with the autoencoder.
        units: latents, `sae/NAME` with or without indices.

    Raises:
        KeyError: if there is no such autoencoder.
        ValueError: if it does not code what attention or an MLP writes to the stream.
    """
    model = stream.model
    name = units.site if units.site.startswith(PREFIX) else PREFIX + units.site
    known = autoencoders(model.module)
    if name not in known:
        raise unknown(f"autoencoder of {model.name}", name, known)
    attached = known[name]
    whole, target = attached.source.site, attached.target.site
    if whole is not target and whole.name != target.name:
        raise ValueError(
            f"autoencoder {name} writes {target.name} and reads {whole.name}: expected one of one site, no transcoder"
        )
    n = model.site(name).n_units
    kept = torch.arange(n) if units.indices is None else torch.tensor(sorted(units.indices))
    if len(kept) and int(kept[-1]) >= n:
        raise ValueError(f"latent {int(kept[-1])} of {name}: expected 0 to {n - 1}")
    decoder = attached.code.W_dec
    assert isinstance(decoder, Tensor)
    directions = decoder.detach()[kept]
    for found in _written_at(stream, whole.name):
        out = found.out
        made = Split(
            found.layer, found.writing, name, model.site(name).name, kept,
            directions if out is None else directions.to(out) @ out, whole.name, out, found.norm, found.before,
        )  # fmt: skip
        _check(stream, made, f"autoencoder {name}")
        return made
    raise ValueError(
        f"autoencoder {name} is of site {whole.name}, which is not what attention or an MLP of {model.name} writes; "
        f"expected one of a site such as {stream.attention_site(0)} or {stream.heads_site(0)}"
    )


def _written_at(stream: Stream, site: str) -> Iterator[Split]:
    """How what a site shows gets to the stream, as a split without parts."""
    model, none = stream.model, torch.zeros(0, stream.width)
    nothing = torch.arange(0)

    def named(name: str) -> str:
        known = {n: s.name for s in model.sites for n in (s.name, *s.aliases)}
        return known.get(name, "")

    for layer, at in enumerate(stream.layers):
        after = stream.norm("ln1_post", layer)
        before = "" if after is None else stream.before_post_norm_site(layer)
        if site == stream.attention_site(layer):
            yield Split(layer, "attention", "", "", nothing, none)
        if site == stream.heads_site(layer):
            out = stream.matrix("W_O", layer).flatten(0, 1)
            yield Split(layer, "attention", "", "", nothing, none, "", out, after, before)
        if site in (
            named(f"blocks.{layer}.attn.hook_out"),
            named(f"blocks.{layer}.attn.o.hook_out"),
        ):
            yield Split(layer, "attention", "", "", nothing, none, "", None, after, before)
        if Receiver("mlp", layer) not in stream.receivers:
            continue
        if site == stream.output_site(Sender("mlp", layer)):
            yield Split(layer, "mlp", "", "", nothing, none)
        if site == at.mlp:
            after = stream.norm("ln2_post", layer)
            yield Split(layer, "mlp", "", "", nothing, none, "", None, after, site if after else "")


def _check(stream: Stream, split: Split, what: str) -> None:
    """Raise ValueError unless parts add up to the change of what is written, between two examples."""
    model = stream.model
    attention = split.writing == "attention"
    added = (
        stream.attention_site(split.layer)
        if attention
        else stream.output_site(Sender("mlp", split.layer))
    )
    cache = model.run(model.input.example(2), read=dict.fromkeys([*split.sites, added]))
    one, two = ({s: cache[s][i : i + 1] for s in (*split.sites, added)} for i in (0, 1))
    with model.lock, evaluating(model.module), torch.no_grad():
        change = split.change(
            {s: v[None] for s, v in one.items()}, {s: v[None] for s, v in two.items()}
        )
        made = change.mixed(change.activations.new_ones(1, len(split.names), 1))[0, 0]
        if split.norm is not None:
            before = one[split.before]
            made = split.norm(before + made) - split.norm(before)
    wanted = (two[added] - one[added]) * stream.shown_scale(split.layer, split.writing)
    off, size = float((made - wanted).abs().max()), float(one[added].abs().max())
    if not off <= min(1e3 * torch.finfo(made.dtype).eps, 0.1) * max(size, 1e-6):
        raise ValueError(
            f"{what}: parts add up to what {added} of {model.name} shows with an error of {off:.2g} (of {size:.2g}); "
            "expected a site that is their sum"
        )


def active_latents(
    model: HookedModel,
    task: Task,
    names: Sequence[str],
    also: Mapping[str, Sequence[int]] | None = None,
) -> tuple[Units, ...]:
    """The latents of attached autoencoders that are active on some example of a task, or on a counterpart.

    Args:
        model: the model, with the autoencoders.
        task: the task, with both of its halves: which latents there are is no result.
        names: the sites of the latents, `sae/NAME`.
        also: by site, latents that are among them however active they are.

    Raises:
        ValueError: if none is active.
    """
    found = {name: torch.zeros(model.site(name).n_units, dtype=torch.bool) for name in names}
    for part in task.batches():
        for inputs in (part.inputs, part.counterparts):
            if inputs is None:
                continue
            cache = model.run(inputs, mask=part.mask, read=list(names), until=model.last(names))
            for name in names:
                active = cache[name] != 0
                if part.mask is not None:
                    active = active & part.mask[..., None].to(active.device)
                found[name] |= active.flatten(0, -2).any(0).cpu()
    for name, more in (also or {}).items():
        found[name][list(more)] = True
    for name, own in found.items():
        if not bool(own.any()):
            raise ValueError(
                f"autoencoder {name}: none of its {len(own)} latents is active on task {task.name}"
            )
    return tuple(Units(name, tuple(own.nonzero()[:, 0].tolist())) for name, own in found.items())
