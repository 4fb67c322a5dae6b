"""The residual stream of a transformer: what writes to it, what reads it, in which order, and at which sites.

The stream is a sum (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"). Its senders are the token
and position embeddings, every head and every MLP; its receivers are the queries, keys and values of every head, every
MLP and the logits, each after its normalisation. The names of layers' sites come from `adapter.transformer`;
`contributions` computes what they carry, `routes` lists and checks them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from circuits.models.adapter.head_weights import Matrices
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.norms import Norm, measure_norm
from circuits.models.adapter.parts import NormName, Parts
from circuits.models.adapter.transformer import LayerSites, Transformer
from circuits.models.paths.parts import Split, Writing
from circuits.units import unknown

SenderKind = Literal["token", "position", "head", "mlp", "bias", "part", "rest"]
ReceiverKind = Literal[
    "q", "k", "v", "mlp", "neuron", "neuron_linear", "logits", "resid_pre", "resid_mid", "resid_post"
]  # fmt: skip

STREAMS: tuple[ReceiverKind, ...] = ("resid_pre", "resid_mid", "resid_post")
"""Receivers that are the stream itself: a change there reaches everything that reads the stream from there on."""

NEURONS: tuple[ReceiverKind, ...] = ("neuron", "neuron_linear")
"""What a neuron of an MLP is given before its nonlinearity, and, in gated MLPs, what this is multiplied with."""

_PARTS: tuple[ReceiverKind, ...] = ("q", "k", "v")

_READOUTS = ("unembed.hook_in", "head.hook_in")
"""The site of what logits are made of: by the unembedding, or by a head of several layers (masked language models)."""


@dataclass(frozen=True, order=True)
class Sender:
    """Something that writes to the residual stream.

    Attributes:
        kind: `token` or `position` embedding, `head`, `mlp`, or `bias`: the output bias of an attention layer, which
            is the same in every run. Where attention or an MLP is split, each `part` of it, and the `rest`.
        layer: the layer of a head, MLP, bias or part.
        head: the number of a head or part.
        name: what parts are called before their number.

    >>> str(Sender("head", 0, 3)), str(Sender("mlp", 1)), str(Sender("token"))
    ('0.3', 'mlp:1', 'token')
    """

    kind: SenderKind
    layer: int = 0
    head: int = 0
    name: str = field(default="", repr=False)

    def __str__(self) -> str:
        if self.kind == "head":
            return f"{self.layer}.{self.head}"
        if self.name:
            return f"{self.name}:{self.head}" if self.kind == "part" else f"{self.name}.error"
        return self.kind if self.kind in ("token", "position") else f"{self.kind}:{self.layer}"


@dataclass(frozen=True, order=True)
class Receiver:
    """Something that reads the residual stream.

    Attributes:
        kind: a head's queries, keys or values; an MLP, or one of its neurons; the logits; or the stream itself at a
            layer.
        layer: the layer.
        head: the number of the head; for shared keys and values (grouped-query attention), of the group; of a neuron
            its own.

    >>> str(Receiver("q", 1, 0)), str(Receiver("mlp", 0)), str(Receiver("neuron", 0, 7)), str(Receiver("resid_mid", 2))
    ('1.0.q', 'mlp:0', 'mlp:0:7', 'resid_mid:2')
    """

    kind: ReceiverKind
    layer: int = 0
    head: int = 0

    def __str__(self) -> str:
        if self.kind in _PARTS:
            return f"{self.layer}.{self.head}.{self.kind}"
        if self.kind in NEURONS:
            return f"mlp:{self.layer}:{self.head}"
        return self.kind if self.kind == "logits" else f"{self.kind}:{self.layer}"


Path = tuple[Sender, Receiver]
"""A direct path: from a sender to a receiver through the residual stream alone."""

PathName = tuple[str | Sender, str | Receiver]
"""A path as it is written: names, or the objects themselves."""


@dataclass(frozen=True, eq=False)
class Writers:
    """The senders of attention or the MLP of a layer.

    Attributes:
        site: the site at which they are told apart.
        columns: their places among the stream's senders.
        norm: the normalisation that their sum goes through before it is added (Gemma 2); None if there is none.
        before: the site of what this normalises.
        split: the parts that they are; None if they are heads or an MLP.
    """

    site: str
    columns: slice
    norm: nn.Module | None = None
    before: str = ""
    split: Split | None = None


@dataclass(frozen=True, eq=False)
class Stream:
    """A model's residual stream.

    Attributes:
        model: a transformer.
        senders: in the order in which they write.
        receivers: in the order in which they read.
        parallel: whether attention and MLP of a layer read the same stream, as in GPT-J.
        layers: the sites of each layer.
        parts: the norms and weights.
        width: the number of its dimensions.
        last: the site of the stream that is read out.
        splits: attention and MLPs whose parts are senders.
        scales: by what attention's and the MLP's outputs are multiplied in each layer before they are added (Granite);
            empty where they are added as they are.
    """

    model: HookedModel
    senders: tuple[Sender, ...]
    receivers: tuple[Receiver, ...]
    parallel: bool
    layers: tuple[LayerSites, ...]
    parts: Parts
    width: int
    last: str
    splits: tuple[Split, ...] = ()
    scales: tuple[tuple[float, float], ...] = ()
    _norms: dict[nn.Module, Norm] = field(default_factory=dict, repr=False)
    _modules: dict[tuple[NormName, int], nn.Module | None] = field(default_factory=dict, repr=False)
    _reaching: dict[Receiver, Tensor] = field(default_factory=dict, repr=False)
    _writers: dict[tuple[int, Writing], Writers] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: HookedModel) -> Stream:
        """Find a model's residual stream from its sites.

        Raises:
            ValueError: if a layer lacks a site that is needed.
        """
        transformer = Transformer(model)
        parallel = transformer.parallel
        known = {name for s in model.sites for name in (s.name, *s.aliases)}
        if transformer.parts.renormalised:
            raise ValueError(
                f"model {model.name} normalises its residual stream itself, in or between its layers (as BERT does): "
                "what a part writes reaches later ones through all normalisations between, so that nothing is added "
                "along a direct path; expected a model that normalises what reads the stream, or whole sites to patch "
                "(`circuits patch`)"
            )
        # `[x] * condition` is a list of one or none. Rotary and ALiBi models add no position embedding to the stream.
        senders = [Sender("token"), *[Sender("position")] * (transformer.position is not None)]
        receivers: list[Receiver] = []
        for layer in range(len(transformer.layers)):
            mlp = transformer.parts.has_mlp(layer)
            if mlp and f"blocks.{layer}.mlp.hook_in" not in known:
                raise ValueError(
                    f"model {model.name} has no site at which only the input of the MLP of layer {layer} can be "
                    "changed: its code gives that input to something else as well, or in another form, so that paths "
                    "cannot be patched"
                )
            _require(model, known, layer, mlp, mlp and not parallel)
            heads = {p: model.site(f"blocks.{layer}.attn.hook_{p}").n_units for p in _PARTS}
            bias = transformer.parts.attention("b_O", layer) is not None
            senders += [Sender("head", layer, h) for h in range(heads["q"])]
            senders += [Sender("bias", layer)] * bias + [Sender("mlp", layer)] * mlp
            receivers.append(Receiver("resid_pre", layer))
            receivers += [
                Receiver(p, layer, h) for h in range(heads["q"]) for p in _PARTS if h < heads[p]
            ]
            receivers += [Receiver("resid_mid", layer)] * (mlp and not parallel)
            receivers += [Receiver("mlp", layer)] * mlp + [Receiver("resid_post", layer)]
        if known.isdisjoint(_READOUTS):
            raise ValueError(
                f"model {model.name} has no site at which only what its logits are made of can be changed: its output "
                "is not made of its last stream alone, by a product with weights, so that nothing has an edge to it"
            )
        last = "ln_final.hook_in" if "ln_final.hook_in" in known else transformer.last
        return cls(
            model, tuple(senders), (*receivers, Receiver("logits")), parallel, transformer.layers,
            transformer.parts, transformer.width, last, scales=_scales(transformer, known),
        )  # fmt: skip

    def split(self, splits: Sequence[Split]) -> Stream:
        """The same stream with parts as senders, in the place of the heads of a layer or of an MLP."""
        own = {(split.layer, split.writing): split for split in splits}
        senders: dict[Sender, None] = {}
        for sender in self.senders:
            split = own.get((sender.layer, "mlp" if sender.kind == "mlp" else "attention"))
            if split is None or sender.kind not in ("mlp", "head"):
                senders[sender] = None
                continue
            at = split.layer, split.name
            senders |= {Sender("part", at[0], i, at[1]): None for i in split.units.tolist()}
            senders |= {Sender("rest", at[0], 0, at[1]): None} if split.whole else {}
        new: dict[str, dict[Any, Any]] = {"_reaching": {}, "_writers": {}}
        return replace(self, senders=tuple(senders), splits=tuple(splits), **new)  # type: ignore[arg-type]

    def with_neurons(self, layers: Sequence[int]) -> Stream:
        """The same stream with the neurons of some layers' MLPs as receivers, besides the MLPs.

        Raises:
            ValueError: if a layer's MLP has no matrix by which its neurons read the stream.
        """
        receivers = list[Receiver]()
        for receiver in self.receivers:
            receivers.append(receiver)
            if receiver.kind == "mlp" and receiver.layer in layers:
                matrices = self.parts.neuron_inputs(receiver.layer)
                for kind, matrix in zip(NEURONS, matrices, strict=False):
                    receivers += [Receiver(kind, receiver.layer, i) for i in range(matrix.shape[1])]
        new: dict[str, dict[Any, Any]] = {"_reaching": {}, "_writers": {}}
        return replace(self, receivers=tuple(receivers), **new)  # type: ignore[arg-type]

    @property
    def n_layers(self) -> int:
        """The model's number of layers."""
        return len(self.layers)

    def norm(self, name: NormName, layer: int = 0) -> nn.Module | None:
        """A norm of a layer; None if it has none."""
        key = name, layer
        if key not in self._modules:
            self._modules[key] = self.parts.norm(name, layer)
        return self._modules[key]

    def measured(self, module: nn.Module) -> Norm:
        """What a normalisation does; it is measured once."""
        known = self._norms
        if module not in known:
            known[module] = measure_norm(module, self.width, device=self.model.device)
        return known[module]

    def matrix(self, name: Matrices, layer: int) -> Tensor:
        """A matrix of a layer's attention.

        Raises:
            ValueError: if it has none.
        """
        found = self.parts.attention(name, layer)
        if found is None:
            raise ValueError(
                f"layer {layer} of {self.model.name} has no matrix {name}: between its heads and the stream there are "
                "several steps (as in latent attention), so that heads have no edges; expected a model whose heads "
                "read and write the stream through one matrix each, or whole sites to patch (`circuits patch`)"
            )
        scale = self.attention_scale(layer) if name.endswith("_O") else 1.0
        return found.detach() if scale == 1 else found.detach() * scale

    def attention_scale(self, layer: int) -> float:
        """By what a layer's attention is multiplied before it is added to the stream."""
        return self.scales[layer][0] if self.scales else 1.0

    def shown_scale(self, layer: int, writing: Writing) -> float:
        """By what the tensor at the site of what attention or the MLP adds is multiplied before it is added."""
        if writing == "mlp":
            return self.mlp_scale(layer)
        return 1.0 if self.layers[layer].attention else self.attention_scale(layer)

    def mlp_scale(self, layer: int) -> float:
        """By what the tensor at the site of an MLP's output is multiplied before it is added to the stream."""
        return 1.0 if self.layers[layer].mlp_added or not self.scales else self.scales[layer][1]

    def layer_of_mlp(self, site: str) -> int | None:
        """The layer whose MLP writes what a site shows; None if it is another site."""
        mlps = (r.layer for r in self.receivers if r.kind == "mlp")
        return next((i for i in mlps if self.output_site(Sender("mlp", i)) == site), None)

    # --- names -----------------------------------------------------------------------------------

    def sender(self, text: str | Sender) -> Sender:
        """The sender with a name: `token`, `position`, `0.3` or `head:0.3`, `mlp:0`, `bias:0`.

        Raises:
            KeyError: if there is none; the message offers the nearest names.
        """
        return self.senders[_place(self.model, "sender", str(text), self.senders)]

    def receiver(self, text: str | Receiver) -> Receiver:
        """The receiver with a name: `1.0.q`, `mlp:0`, `logits`, `resid_pre:1`.

        Raises:
            KeyError: if there is none; the message offers the nearest names.
        """
        return self.receivers[_place(self.model, "receiver", str(text), self.receivers)]

    def path(self, pair: PathName) -> Path:
        """The path between a sender and a receiver with these names.

        Raises:
            KeyError: if there is no such sender or receiver.
            ValueError: if the receiver reads before the sender writes.
        """
        sender, receiver = self.sender(pair[0]), self.receiver(pair[1])
        if not self.reaches(sender, receiver):
            first = next(r for r in self.receivers if self.reaches(sender, r))
            raise ValueError(
                f"path {sender} -> {receiver} leads backwards: the first that {sender} reaches is {first}"
            )
        return sender, receiver

    def paths(self) -> tuple[Path, ...]:
        """Every direct path, sorted by receiver, without biases and the stream itself."""
        return tuple(
            (sender, receiver)
            for receiver in self.receivers
            if receiver.kind not in STREAMS
            for sender in self.senders
            if sender.kind != "bias" and self.reaches(sender, receiver)
        )

    # --- order -----------------------------------------------------------------------------------

    def reaches(self, sender: Sender, receiver: Receiver) -> bool:
        """Whether the receiver reads a stream that the sender has written to."""
        return self._writes_at(sender) < self._reads_at(receiver)

    def reaching(self, receiver: Receiver) -> Bool[Tensor, " sender"]:
        """Which senders the receiver reads; not those that write the same in every run."""
        if receiver not in self._reaching:
            self._reaching[receiver] = self._times < self._reads_at(receiver)
        return self._reaching[receiver]

    @cached_property
    def _times(self) -> Tensor:
        """When each sender writes; never, if it writes the same in every run."""
        return torch.tensor(
            [math.inf if s.kind == "bias" else self._writes_at(s) for s in self.senders]
        )

    def stream_after(self, sender: Sender) -> Receiver:
        """The first place of the stream after a sender: everything that reads the sender's output reads it there."""
        return next(r for r in self.receivers if r.kind in STREAMS and self.reaches(sender, r))

    def _writes_at(self, sender: Sender) -> int:
        """The time at which a sender writes; `reaches` compares it with the time at which a receiver reads.

        In layer l attention reads at 4l + 1 and writes at 4l + 2, the MLP reads at 4l + 3 and writes at 4l + 4; in
        parallel layers both read at 4l + 1 and write at 4l + 4. Embeddings write at 0.
        """
        if sender.kind in ("token", "position"):
            return 0
        split = self._split_of.get(sender.name)
        late = sender.kind == "mlp" or (split is not None and split.writing == "mlp")
        return 4 * sender.layer + (4 if late or self.parallel else 2)

    @cached_property
    def _split_of(self) -> Mapping[str, Split]:
        """Attention and MLPs that are split, by the name of their parts."""
        return {split.name: split for split in self.splits}

    def _reads_at(self, receiver: Receiver) -> int:
        """The time at which a receiver reads (see `_writes_at`)."""
        if receiver.kind == "logits":
            return 4 * self.n_layers + 1
        late = receiver.kind in ("mlp", *NEURONS, "resid_mid") and not self.parallel
        return 4 * receiver.layer + (5 if receiver.kind == "resid_post" else 3 if late else 1)

    # --- sites -----------------------------------------------------------------------------------

    def index_of(self, sender: Sender) -> slice:
        """The place of a sender among the senders, as a slice."""
        at = self.senders.index(sender)
        return slice(at, at + 1)

    def heads_of(self, layer: int) -> slice:
        """The places of a layer's heads among the senders."""
        first = self.senders.index(Sender("head", layer, 0))
        n = sum(s.kind == "head" and s.layer == layer for s in self.senders)
        return slice(first, first + n)

    def writers(self, layer: int, writing: Writing) -> Writers:
        """The senders of attention or the MLP of a layer."""
        key = layer, writing
        if key not in self._writers:
            split = next((s for s in self.splits if (s.layer, s.writing) == key), None)
            self._writers[key] = self._found(layer, writing, split)
        return self._writers[key]

    def _found(self, layer: int, writing: Writing, split: Split | None) -> Writers:
        if split is not None:
            first = next(i for i, s in enumerate(self.senders) if s.name == split.name)
            columns = slice(first, first + len(split.names))
            return Writers(split.site, columns, split.norm, split.before, split)
        if writing == "mlp":
            mlp = Sender("mlp", layer)
            return Writers(self.output_site(mlp), self.index_of(mlp))
        norm = self.norm("ln1_post", layer)
        before = "" if norm is None else self.before_post_norm_site(layer)
        return Writers(self.heads_site(layer), self.heads_of(layer), norm, before)

    def layer_of_heads(self, site: str) -> int | None:
        """The layer whose heads a site shows; None if it is another site."""
        return next((i for i in range(self.n_layers) if self.heads_site(i) == site), None)

    def sender_sites(self, among: Iterable[Sender]) -> tuple[str, ...]:
        """The sites that show what some senders write."""
        found: dict[str, None] = {}
        for sender in among:
            if sender.name:
                found |= dict.fromkeys(self._split_of[sender.name].sites)
            elif sender.kind == "head":
                found[self.heads_site(sender.layer)] = None
                if self.norm("ln1_post", sender.layer) is not None:
                    found[self.before_post_norm_site(sender.layer)] = None
            elif sender.kind != "bias":
                found[self.output_site(sender)] = None
        return tuple(found)

    def output_site(self, sender: Sender) -> str:
        """The site of what a sender writes; for heads that of their layer, before their output weights W_O; for parts
        that of their activations.
        """
        if sender.name:
            return self._split_of[sender.name].site
        if sender.kind == "head":
            return self.heads_site(sender.layer)
        if sender.kind == "mlp":
            layer = self.layers[sender.layer]
            return _shown(layer.mlp_added or layer.mlp)
        if sender.kind == "position":
            return self._named("hook_pos_embed")
        # What enters the first layer is that of the tokens, if nothing shows their embedding by itself.
        return self._named("hook_embed") if "hook_embed" in self._known else self.layers[0].before

    def heads_site(self, layer: int) -> str:
        """The site of a layer's heads, before their output weights W_O."""
        return _shown(self.layers[layer].heads)

    def attention_site(self, layer: int) -> str:
        """The site of what a layer's heads and bias add to the stream together, or of that before it is scaled."""
        return self.layers[layer].attention or self._named(f"blocks.{layer}.attn.hook_out")

    def before_post_norm_site(self, layer: int) -> str:
        """The same before the normalisation that some models (Gemma 2) have after attention."""
        return self._named(f"blocks.{layer}.attn.hook_out")

    def stream_site(self, receiver: Receiver) -> str:
        """The site of the stream that a receiver reads, before its normalisation."""
        if receiver.kind == "logits":
            return self.last
        layer = self.layers[receiver.layer]
        if receiver.kind == "resid_post":
            return layer.after
        of_mlp = receiver.kind in ("mlp", *NEURONS)
        middle = receiver.kind == "resid_mid" or (of_mlp and not self.parallel)
        return _shown(layer.between) if middle else layer.before

    def input_site(self, receiver: Receiver) -> str:
        """The site at which the input of this receiver alone can be changed (for a head or a neuron: of those of its
        layer).
        """
        if receiver.kind == "logits":
            return self._named(next(name for name in _READOUTS if name in self._known))
        # A change at `hook_resid_mid` would reach the MLP only: the skip connection around the MLP is not read from
        # it. What attention adds goes both ways.
        if receiver.kind == "resid_mid":
            found = self.layers[receiver.layer].attention
            if found is None:
                raise ValueError(
                    f"resid_mid:{receiver.layer} of {self.model.name}: no site shows what attention adds to the stream "
                    f"after it is scaled; expected resid_pre:{receiver.layer} or resid_post:{receiver.layer}"
                )
            return found
        if receiver.kind in STREAMS:
            return self.stream_site(receiver)
        own = {"mlp": "hook_in", "neuron": "hook_pre", "neuron_linear": "hook_pre_linear"}.get(
            receiver.kind
        )
        inner = f"attn.hook_{receiver.kind}" if own is None else f"mlp.{own}"
        return self._named(f"blocks.{receiver.layer}.{inner}")

    @cached_property
    def _known(self) -> frozenset[str]:
        """All names of the model's sites."""
        return frozenset(name for s in self.model.sites for name in (s.name, *s.aliases))

    def _named(self, site: str) -> str:
        """A site's own name, by any of its names."""
        return self.model.site(site).name

    def mlps_before(self, receiver: Receiver) -> tuple[Receiver, ...]:
        """The MLPs that write before a receiver reads."""
        mlps = (r for r in self.receivers if r.kind == "mlp")
        return tuple(r for r in mlps if self.reaches(Sender("mlp", r.layer), receiver))


def _shown(site: str | None) -> str:
    assert site is not None, "required when the stream was found"
    return site


def _require(model: HookedModel, known: set[str], layer: int, mlp: bool, middle: bool) -> None:
    """Raise ValueError if a layer lacks a site."""
    if "hook_embed" not in known and "hook_pos_embed" in known:
        raise ValueError(
            f"model {model.name} has no site hook_embed: no single embedding of its tokens enters the stream"
        )
    needed = [
        ["hook_resid_pre"],
        ["hook_resid_post"],
        ["hook_attn_out", "attn.hook_out"],
        ["attn.hook_z"],
    ]
    needed += [[f"attn.hook_{part}"] for part in _PARTS]
    needed += [["hook_mlp_out", "mlp.hook_out"]] * mlp + [["hook_resid_mid"]] * middle
    for names in needed:
        if known.isdisjoint(f"blocks.{layer}.{name}" for name in names):
            raise ValueError(
                f"model {model.name} has no site blocks.{layer}.{names[0]} with the batch in front: its residual "
                "stream cannot be followed"
            )


def _scales(transformer: Transformer, known: set[str]) -> tuple[tuple[float, float], ...]:
    """By what outputs of attention and MLPs are multiplied before they are added, where they are not added as they are.

    Raises:
        ValueError: if that cannot be told.
    """
    shown = all(at.attention is not None for at in transformer.layers)
    if shown and not transformer.parts.scaled:
        return ()
    found = []
    for layer, made in zip(transformer.layers, transformer.writes, strict=True):
        mlp = transformer.parts.has_mlp(layer.number) and layer.mlp_added is None
        if made.attention is None or (mlp and made.mlp is None):
            raise ValueError(
                f"model {transformer.model.name}: what layer {layer.number} adds to the stream is not the output of "
                "its heads and its MLP, or that times a number; paths need a stream that is the sum of its senders"
            )
        found.append((made.attention.scale, made.mlp.scale if made.mlp else 1.0))
    return tuple(found)


_HEAD = re.compile(r"head:([0-9]{1,18}\.[0-9]{1,18})")


def _place(
    model: HookedModel, what: str, text: str, known: Sequence[Sender] | Sequence[Receiver]
) -> int:
    """The index in `known` of the one with a name; an only MLP may be called `mlp`."""
    match = _HEAD.fullmatch(text)
    name = text if match is None else match[1]
    names = [str(one) for one in known]
    mlps = [n for n in names if n.startswith("mlp:")]
    if name == "mlp" and len(mlps) == 1:
        name = mlps[0]
    if name not in names:
        raise unknown(f"{what} of {model.name}", text, names)
    return names.index(name)
