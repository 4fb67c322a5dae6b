"""A transformer's layers: the sites of its residual stream, attention and MLPs, its norms, and its weights by head.

Whoever splits a logit, reads a head's weights or stops at a depth asks here. Where a model keeps its norms and weights
is known to `circuits.models.adapter.parts`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuits.models.adapter.calling import check_weights_finite
from circuits.models.adapter.head_weights import (
    BIASES,
    WEIGHTS,
    WORDS,
    Letter,
    Seen,
    check_same,
    recomputed,
)
from circuits.models.adapter.norms import Norm, measure_norm
from circuits.models.adapter.parts import BridgeParts, NormName, Parts, TracedParts
from circuits.models.adapter.sites import TRACE_BATCHES, evaluating, is_bridge
from circuits.units import Site, Unit

ROUNDING = 4.0
"""How many units of rounding of a stream what is added to it may be off."""


@dataclass(frozen=True)
class LayerSites:
    """The sites of a layer; None where the model shows no such tensor.

    Attributes:
        number: the layer's number, from 0.
        before: the residual stream before the layer.
        between: the stream between attention and MLP; None where both read the same stream, too.
        after: the stream after the layer.
        heads: what heads read by their patterns, before the output weights.
        queries: before any rotation or normalisation of queries.
        keys: the same of keys.
        rotated: queries and keys after rotation, where they are shown.
        patterns: attention patterns, which may be readable only.
        attention: what attention adds to the stream, normalised if it is.
        mlp_added: what the MLP adds to it.
        mlp: the MLP's output before anything is done to it on its way to the stream.
        neurons: the neurons after their nonlinearity.
    """

    number: int
    before: str
    between: str | None
    after: str
    heads: str | None
    queries: str | None
    keys: str | None
    rotated: tuple[str, str] | None
    patterns: str | None
    attention: str | None
    mlp_added: str | None
    mlp: str | None
    neurons: str | None

    @property
    def name(self) -> str:
        """What the layer is called in names of parts."""
        return f"blocks.{self.number}"


@dataclass(frozen=True, eq=False)
class Write:
    """What is done to an output before it is added to the stream: x -> scale * norm(x).

    Attributes:
        norm: the normalisation behind attention or MLP, as Gemma 2 and OLMo 2 have it; None if there is none.
        scale: what it is multiplied by, as in Granite.
    """

    norm: Norm | None = None
    scale: float = 1.0

    def linear(self, x: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """What is added for x, without the division by the norm of the output and without the norm's bias."""
        return self.scale * (x.double() if self.norm is None else self.norm.linear(x))

    def held(
        self, x: Float[Tensor, "*axes d_model"], at: Float[Tensor, "*#axes d_model"]
    ) -> Float[Tensor, "*axes d_model"]:
        """What is added for a part x of the whole output `at`, the norm's factor held at that of the whole."""
        return self.linear(x) if self.norm is None else self.linear(x) * self.norm.factor(at)

    def bias(self, like: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes d_model"]:
        """What the norm adds to any output."""
        if self.norm is None:
            return torch.zeros_like(like)
        return (self.scale * self.norm.bias).expand_as(like)


@dataclass(frozen=True, eq=False)
class LayerWrites:
    """What a layer's attention and MLP add to the stream.

    Attributes:
        between: the stream between both, if the layer has one.
        attention: what is done to the sum of the heads' outputs; None if what attention adds is no such thing.
        mlp: the same for the MLP's output.
        split: whether what the layer adds is what attention and MLP add.
    """

    between: str | None
    attention: Write | None
    mlp: Write | None
    split: bool


class Transformer:
    """A transformer's layers, with what can be asked about them; norms are measured once, with the weights in force.

    Args:
        model: a `HookedModel`.

    Attributes:
        layers: in order.
        adds_positions: whether an embedding of positions that is no site is added to that of the tokens.
        parallel: whether attention and MLP of a layer read the same stream, as in GPT-J.
        embed: the site of the token embedding, if it is shown.
        position: the site of the position embedding, if one is added to the stream.
        last: the stream that is read out.
        normalised: the same after the final normalisation; `last` if there is none.
        logits: the logits before the model caps or scales them.

    Raises:
        ValueError: if the model has no residual stream, does not show it, or has weights that are not finite.
    """

    def __init__(self, model: Any) -> None:
        check_weights_finite(model.module, model.name)
        self.model, self.parts = model, _parts(model)
        self._known: dict[str, Site] = {n: s for s in model.sites for n in (s.name, *s.aliases)}
        self.parallel, self.adds_positions = self.parts.parallel, self.parts.adds_positions
        self._norms: dict[tuple[str, int], Norm | None] = {}
        self._verified: set[int] = set()
        n = self.parts.n_layers
        if not n:
            raise ValueError(
                f"model {model.name} has no layers that follow each other along one residual stream"
            )
        self.layers = tuple(self._layer(i, n) for i in range(n))
        self.embed, self.position = self._site("hook_embed"), self._site("hook_pos_embed")
        self.last = self.layers[-1].after
        self.normalised = self._site("unembed.hook_in", "ln_final.hook_out") or self.last
        self.logits = (
            self._site("hook_unembed", "unembed.hook_out", "output") or model.sites[-1].name
        )

    def _site(self, *names: str) -> str | None:
        """The first of some names that is a site, as the site's own name."""
        return next((self._known[name].name for name in names if name in self._known), None)

    def _layer(self, i: int, n: int) -> LayerSites:
        def site(*parts: str) -> str | None:
            return self._site(*(f"blocks.{i}.{part}" for part in parts))

        before = site("hook_resid_pre")
        after = site("hook_resid_post") or (
            self._site(f"blocks.{i + 1}.hook_resid_pre") if i < n - 1 else None
        )
        for found, part in ((before, "pre"), (after, "post")):
            if found is None:
                raise ValueError(
                    f"model {self.model.name} does not expose its residual stream: site blocks.{i}.hook_resid_{part} "
                    "is missing"
                )
        assert before is not None, "checked above"
        assert after is not None, "checked above"
        turned = site("attn.hook_rot_q"), site("attn.hook_rot_k")
        return LayerSites(
            i, before, None if self.parallel else site("hook_resid_mid"), after, site("attn.hook_z"),
            site("attn.hook_q"), site("attn.hook_k"), (turned[0], turned[1]) if turned[0] and turned[1] else None,
            site("attn.hook_pattern"), site("hook_attn_out"), site("hook_mlp_out"),
            site("mlp.out.hook_out", "mlp.hook_out", "hook_mlp_out"),
            site("mlp.hook_post") if self.parts.neurons(i) is not None else None,
        )  # fmt: skip

    def streams(self, between: bool = False) -> tuple[str, ...]:
        """The sites of the residual stream before each layer and after the last; with `between` also inside layers."""
        inside = [(at.before, at.between if between else None) for at in self.layers]
        return tuple(
            name for pair in (*inside, (self.last, None)) for name in pair if name is not None
        )

    # --- units -----------------------------------------------------------------------------------

    def head(self, unit: str | Unit) -> tuple[int, int]:
        """Layer and number of a head, given as a unit of `blocks.N.attn.hook_z`.

        Raises:
            ValueError: if the unit is no head.
        """
        return self._place(unit, "heads", "a head, blocks.N.attn.hook_z:INDEX")

    def neuron(self, unit: str | Unit) -> tuple[int, int]:
        """Layer and number of a neuron, given as a unit of `blocks.N.mlp.hook_post`.

        Raises:
            ValueError: if the unit is no neuron.
        """
        return self._place(unit, "neurons", "a neuron, blocks.N.mlp.hook_post:INDEX")

    def _place(self, unit: str | Unit, kind: str, expected: str) -> tuple[int, int]:
        found = self.model.unit(unit)
        for layer in self.layers:
            if found.site == getattr(layer, kind):
                return layer.number, found.index
        raise ValueError(f"unit {found} is not {expected}")

    # --- norms -----------------------------------------------------------------------------------

    def norm(self, what: Literal["attention", "mlp", "final"], layer: int = 0) -> Norm:
        """The normalisation of what attention, an MLP or the unembedding reads, as it is measured.

        Raises:
            ValueError: if it is no map of the form that `Norm` has.
        """
        if what == "final":
            return self._measured("ln_final") or self._none()
        found = self._measured("ln2" if what == "mlp" else "ln1", layer)
        if found is None and what == "mlp" and self.layers[layer].between is None:
            # In parallel layers one normalisation can serve attention and MLP (GPT-J).
            found = self._measured("ln1", layer)
        return found or self._none()

    def qk_norm(self, letter: Letter, layer: int, head: int) -> Norm | None:
        """The normalisation of a head's queries or keys, as Qwen 3 and Gemma 3 have it; None if there is none.

        Raises:
            ValueError: if it is of no known form, or what it does to one head depends on the others.
        """
        heads, (weight, _) = self._heads(layer, letter), self.reads(letter, layer, head)
        size = weight.shape[1]
        name: NormName = "q_norm" if letter == "Q" else "k_norm"
        module = self.parts.norm(name, layer)
        if module is None:
            return None
        # One for each head, one that all heads share, or one over all heads' numbers (OLMo 2).
        own = getattr(module, "weight", None)
        together = isinstance(own, Tensor) and own.numel() == heads * size != size
        found = self._measured(name, layer, heads * size if together else size)
        assert found is not None, "there is such a module"
        if (together and found.centred) or bool(found.bias.any()):
            raise ValueError(
                f"layer {layer} of {self.model.name} normalises {WORDS[letter]} with a bias or a mean over all heads: "
                "they have no linear part of their own"
            )
        at = self._shared(layer, letter, head)
        gain = found.gain.reshape(-1, size)[at if together else 0]
        return replace(found, gain=gain, bias=torch.zeros_like(gain))

    def normalises_qk(self, layer: int) -> bool:
        """Whether a layer normalises its queries and keys."""
        return any(self.parts.norm(name, layer) is not None for name in ("q_norm", "k_norm"))

    def normed_sites(self, layer: int) -> tuple[str, str] | None:
        """The sites of queries and keys behind their normalisation, if they have one before any rotation."""
        query, key = (self._site(f"blocks.{layer}.attn.hook_{x}_normed") for x in ("q", "k"))
        if query is None or key is None:
            return None
        turned, order = self.layers[layer].rotated, [site.name for site in self.model.sites]
        after = turned is not None and order.index(turned[0]) < order.index(query)
        return None if after else (query, key)

    def _measured(self, name: NormName, layer: int = 0, width: int | None = None) -> Norm | None:
        if (name, layer) not in self._norms:
            module = self.parts.norm(name, layer)
            with self.model.lock:
                self._norms[name, layer] = (
                    None if module is None else self._measure(module, name, width)
                )
        return self._norms[name, layer]

    def _measure(self, module: nn.Module, name: NormName, width: int | None) -> Norm:
        try:
            return measure_norm(module, width or self.width, f"{name} of {self.model.name}")
        except (
            RuntimeError,
            TypeError,
            IndexError,
        ) as error:  # it does not take vectors one by one
            first = str(error).splitlines()[0]
            raise ValueError(
                f"{name} of {self.model.name} is no normalisation of vectors: {first}"
            ) from error

    def _none(self) -> Norm:
        return measure_norm(nn.Identity(), self.width, device=self.model.device)

    @property
    def width(self) -> int:
        """The number of dimensions of the residual stream."""
        return self._known[self.last].n_units

    # --- weights ---------------------------------------------------------------------

    def reads(
        self, letter: Letter, layer: int, head: int
    ) -> tuple[Float[Tensor, "d_model d_head"], Float[Tensor, " d_head"]]:
        """Weights and bias of a head's queries, keys or values, in float64; groups of heads may share them.

        Raises:
            ValueError: if the model has no such matrices (multi-head latent attention).
        """
        weight = self.parts.attention(WEIGHTS[letter], layer)
        bias = self.parts.attention(BIASES[letter], layer)
        if weight is None:
            raise ValueError(
                f"layer {layer} of {self.model.name} has no matrix W_{letter}: its heads have no weights of their own "
                f"for {WORDS[letter]}"
            )
        self._verify(layer)
        at = self._shared(layer, letter, head)
        own = weight[at].detach().double()
        return own, own.new_zeros(own.shape[1]) if bias is None else bias[
            at
        ].detach().double().reshape(-1)

    def _heads(self, layer: int, letter: Letter) -> int:
        weight = self.parts.attention(WEIGHTS[letter], layer)
        return 0 if weight is None else len(weight)

    def _shared(self, layer: int, letter: Letter, head: int) -> int:
        """The number of the matrix that a head has, among those that groups of heads share."""
        return self.parts.group(letter, layer, head)

    def writes_of(
        self, layer: int
    ) -> tuple[Float[Tensor, "head d_head d_model"], Float[Tensor, " d_model"]]:
        """The output weights W_O of a layer's heads, and the bias b_O of attention, in float64.

        Raises:
            ValueError: if the model has no such matrices.
        """
        weight, bias = self.parts.attention("W_O", layer), self.parts.attention("b_O", layer)
        if weight is None:
            raise ValueError(
                f"layer {layer} of {self.model.name} has no matrix W_O: its heads write no parts of their own"
            )
        self._verify(layer)
        out = weight.detach().double()
        return out, out.new_zeros(out.shape[-1]) if bias is None else bias.detach().double()

    def _verify(self, layer: int) -> None:
        """Raise ValueError unless weights that were found by tracing give what the layer's heads read and write."""
        if layer in self._verified or isinstance(self.parts, BridgeParts):
            return
        with self.model.lock, self.model.outside():
            seen, sites = self._seen(layer)
            matrix = partial(self.parts.attention, layer=layer)
            where, group = f"layer {layer} of {self.model.name}", partial(self._shared, layer)
            try:
                for name, made, found in recomputed(where, matrix, group, seen):
                    check_same(f"{sites[name]} of {self.model.name}", "the stream", made, found)
            except ValueError:
                self._check_given(layer)  # which says why, if they are made of something else
                raise
        self._verified.add(layer)

    def _check_given(self, layer: int) -> None:
        """Raise ValueError unless queries, keys and values are made of the stream before a layer, normalised."""
        assert isinstance(self.parts, TracedParts), "bridges say what their weights are"
        model, norm = self.model, self.parts.norm("ln1", layer)
        inputs = model.fitted(model.input.example(TRACE_BATCHES[0]))
        before = self.layers[layer].before
        stream: Tensor = model.run(inputs, read=[before])[before]
        with evaluating(model.module), torch.no_grad():
            stream = stream if norm is None else norm(stream)
            given = self.parts.given(layer, model.module, inputs)
        for letter, value in given.items():
            same = value.numel() == stream.numel() and value.shape[-1] == stream.shape[-1]
            off = (value.reshape(stream.shape) - stream).abs().max() if same else math.inf
            if not off <= 1e-2 * stream.abs().max():
                shapes = f"of the shape {tuple(value.shape)}, where that has {tuple(stream.shape)}"
                raise ValueError(
                    f"layer {layer} of {model.name} makes its {WORDS[letter]} of another tensor than the stream before "
                    f"it{'' if norm is None else ', normalised'} ({'scaled or changed' if same else shapes}): its "
                    "weights act on no stream, so it has no circuits along one"
                )

    def _seen(self, layer: int) -> tuple[Seen, Mapping[str, str]]:
        """What a layer's heads read from the stream and make of it, and the sites of the latter."""
        at, model = self.layers[layer], self.model
        shown = {name: self._site(f"blocks.{layer}.attn.hook_{name}") for name in ("q", "k", "v")}
        shown |= {"out": self._site(f"blocks.{layer}.attn.hook_out"), "z": at.heads}
        if not self.parts.mixes(layer):
            shown["pattern"] = at.patterns
        sites = {name: site for name, site in shown.items() if site is not None}
        cache = model.run(model.input.example(2), read=[at.before, *sites.values()])
        norm = self.parts.norm("ln1", layer)
        with evaluating(model.module), torch.no_grad():
            read: Tensor = cache[at.before] if norm is None else norm(cache[at.before])
        made = {name: cache[site] for name, site in sites.items()}
        return Seen(dict.fromkeys(WEIGHTS, read), made), sites

    def neuron_weights(
        self, layer: int
    ) -> tuple[Float[Tensor, "d_model neuron"], Float[Tensor, "neuron d_model"]]:
        """W_in and W_out of a layer's MLP, in the model's precision.

        Raises:
            ValueError: if it has several (experts) or none.
        """
        found = self.parts.neurons(layer)
        if found is None:
            raise ValueError(
                f"layer {layer} of {self.model.name} has no single MLP (it has experts or none): its neurons have no "
                "weights W_in and W_out"
            )
        return found

    def unembedding(self) -> tuple[Float[Tensor, "d_model token"], Float[Tensor, " token"]]:
        """W_U and b_U, in the model's precision."""
        return self.parts.unembedding()

    def embedding(self) -> Float[Tensor, "token d_model"]:
        """W_E, in the model's precision."""
        return self.parts.embedding()

    # --- what is added to the stream ---------------------------------------------------------------

    @cached_property
    def writes(self) -> tuple[LayerWrites, ...]:
        """What each layer adds, found on random tokens: outside all edits, by comparing the stream before and after."""
        names = {
            s
            for layer in self.layers
            for s in (layer.before, layer.between, layer.after, layer.heads, layer.mlp)
            if s
        }
        with self.model.lock, self.model.outside():
            cache = self.model.run(self.model.input.example(2), read=names)
            return tuple(self._layer_writes(layer, cache) for layer in self.layers)

    def _layer_writes(self, layer: LayerSites, cache: Mapping[str, Tensor]) -> LayerWrites:
        before, after = cache[layer.before], cache[layer.after]
        slack = (
            ROUNDING
            * torch.finfo(before.dtype).eps
            * float(before.double().norm() + after.double().norm())
        )
        between = layer.between
        if between is not None and torch.equal(cache[between], before):
            between = None  # both read the same stream
        before, after = before.double(), after.double()
        made = self._attention_output(layer, cache)
        of_attention = self._measured("ln1_post", layer.number)
        of_mlp = self._measured("ln2_post", layer.number)
        mlp = None if layer.mlp is None else cache[layer.mlp].double()
        if between is not None:
            middle = cache[between].double()
            return LayerWrites(
                between,
                _fitted(made, middle - before, of_attention, slack),
                _fitted(mlp, after - middle, of_mlp, slack),
                True,
            )
        if made is None:
            return LayerWrites(None, None, None, False)
        if not self.parts.has_mlp(layer.number):
            only = _fitted(made, after - before, of_attention, slack)
            return LayerWrites(None, only, None, only is not None)
        # Nothing shows what attention adds by itself: it is taken to be its output, which has to leave the MLP's.
        attention = Write(of_attention)
        rest = after - before - attention.held(made, made) - attention.bias(made)
        written = _fitted(mlp, rest, of_mlp, slack)
        split = written is not None or mlp is None
        return LayerWrites(None, attention if split else None, written, split)

    def _attention_output(self, layer: LayerSites, cache: Mapping[str, Tensor]) -> Tensor | None:
        """What the heads of a layer put out together, in float64; None if it cannot be computed from them."""
        if layer.heads is None or cache[layer.heads].ndim != 4:
            return None
        try:
            out, bias = self.writes_of(layer.number)
        except ValueError:
            return None
        return torch.einsum("bphd,hdm->bpm", cache[layer.heads].double(), out) + bias


def _fitted(made: Tensor | None, added: Tensor, norm: Norm | None, slack: float) -> Write | None:
    """What was done to an output before it was added to the stream; None if it was neither left nor scaled."""
    if made is None:
        return None
    plain = made if norm is None else norm.held(made, made) + norm.bias
    scale = float((plain * added).sum() / plain.square().sum().clamp_min(1e-30))
    if abs(scale - 1) * float(plain.norm()) <= max(slack, 1e-3 * float(added.norm())):
        scale = 1.0  # as far as rounding lets one see
    off = float((scale * plain - added).norm())
    return Write(norm, scale) if off <= max(slack, 1e-3 * float(added.norm())) else None


def _parts(model: Any) -> Parts:
    if is_bridge(model.module):
        return BridgeParts(model.module)
    if isinstance(model.transformer, str):
        raise ValueError(f"model {model.name} has no residual stream: {model.transformer}")
    return model.transformer
