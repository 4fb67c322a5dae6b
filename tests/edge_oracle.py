"""Scores of edges from their definitions: slow, in float64, one copy of every sender's output for each edge.

A network is a set of senders and targets. An edge (sender, target) is the copy of the sender's output that this target
reads. Between two runs, `live` (recomputed now) and `other` (recorded before), edge e carries

    live + w_e (other - live),    w_e from 0 to 1,

so that w = 0 everywhere is the run itself and w = 1 everywhere is the other run. A score is the change of the metric m
when an edge is replaced by the corrupted run: the gradient methods multiply (corrupted - clean) output of the sender by
the gradient of m with respect to the edge's copy. All scores are tensors of example x edge, summed over positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.plain_transformer import Edge, Plain

Values = Mapping[str, Tensor]
"""What each sender writes: example x ...; for a transformer example x position x d_model."""

See = Callable[[str, Values], Values]
"""What a target sees of the senders that it reads, given what they wrote."""

Metric = Callable[[Tensor], Tensor]
"""One number for each example, from logits."""

Rule = Literal["left", "right", "midpoint"]
"""At which alphas a sum of K steps takes the gradient: k/K from k = 0; k/K from k = 1; (k + 1/2)/K."""


def as_it_is(target: str, values: Values) -> Values:
    """The unchanged network."""
    return values


def last_logits(weights: Tensor) -> Metric:
    """A weighted sum of the logits at the last position, `weights` one for each token."""
    return lambda logits: logits[:, -1] @ weights.to(logits)


class Network(Protocol):
    """What the scores need to know of a network."""

    @property
    def edges(self) -> Sequence[Edge]:
        """All edges, in the order of the scores."""
        ...

    @property
    def sites(self) -> Sequence[Sequence[str]]:
        """Senders that are interpolated together, in the order in which they write; the inputs are the first."""
        ...

    def start(self, inputs: Tensor) -> Values:
        """What the senders of the first site write: embeddings, or the channels of images."""
        ...

    def run(
        self, start: Values, see: See = as_it_is, replaced: Values | None = None
    ) -> tuple[Tensor, Values]:
        """Logits, and what every sender wrote; what the senders in `replaced` write is given."""
        ...


@dataclass
class TransformerEdges:
    """A transformer: senders are embeddings, heads and MLPs; a target reads their sum through its normalisation."""

    plain: Plain
    edges: Sequence[Edge]

    @property
    def sites(self) -> list[list[str]]:
        plain = self.plain
        found = [["token", "position"] if "pos" in plain.w else ["token"]]
        for layer in range(plain.n_layers):
            found += [[f"{layer}.{h}" for h in range(plain.n_heads)], [f"mlp:{layer}"]]
        return found

    def start(self, inputs: Tensor) -> Values:
        w = self.plain.w
        token = w["embed"][inputs]
        if "pos" not in w:
            return {"token": token}
        return {"token": token, "position": w["pos"][: inputs.shape[1]].expand_as(token)}

    def heads(self, layer: int, read: Callable[[str, str], Tensor]) -> dict[str, Tensor]:
        """What the attention of a layer writes, by sender; what is called `bias…` is no sender."""
        return self.plain.heads(layer, read)

    def mlp(self, layer: int, read: Tensor) -> dict[str, Tensor]:
        """The same of the MLP."""
        return {f"mlp:{layer}": self.plain.mlp(layer, read)}

    def run(
        self, start: Values, see: See = as_it_is, replaced: Values | None = None
    ) -> tuple[Tensor, Values]:
        plain, made = self.plain, dict(start) | dict(replaced or {})
        made = {name: made[name] for name in self.sites[0]}
        biases: dict[str, Tensor] = {}  # of attention: the same in every run, and no senders

        def read(target: str, norm: str) -> Tensor:
            parts = [*see(target, made).values(), *biases.values()]
            return plain.normed(torch.stack(torch.broadcast_tensors(*parts)).sum(0), norm)

        def written(new: Values) -> dict[str, Tensor]:
            return {name: (replaced or {}).get(name, value) for name, value in new.items()}

        for layer in range(plain.n_layers):
            heads = self.heads(layer, read)
            bias = {name: heads.pop(name) for name in list(heads) if name.startswith("bias")}
            if not plain.parallel:
                made |= written(heads)
                biases |= bias
            mlp = self.mlp(layer, read(f"mlp:{layer}", f"{layer}.ln2"))
            bias |= {name: mlp.pop(name) for name in list(mlp) if name.startswith("bias")}
            made |= written(heads | mlp)
            biases |= bias
        return plain.unembedded(read("logits", "ln_final")), made


class Frozen(Plain):
    """The same values as those of a transformer, with the gradients of RelP (Jafari et al. 2025): its `eap` is RelP.

    Propagation rules as gradients: the normaliser is a constant (LN-rule), so are attention patterns (AH-rule) and the
    ratio act(x)/x of an activation (identity rule), and each factor of a product gets half of its gradient (half-rule).
    """

    @classmethod
    def of(cls, plain: Plain) -> Frozen:
        return cls(**vars(plain))

    def normed(self, x: Tensor, name: str) -> Tensor:
        if not self.norm:
            return x
        if self.norm == "ln":
            x = x - x.mean(-1, keepdim=True)
        made = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt().detach() * self.w[name]
        return made + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else made

    def pattern(self, scores: Tensor) -> Tensor:
        return super().pattern(scores).detach()

    def hidden(self, inner: Tensor, gate: Tensor | None) -> Tensor:
        if gate is None:
            return proportional(self.act, inner)
        product = proportional(self.act, gate) * inner
        return product / 2 + product.detach() / 2


def proportional(act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """act(x) as x times a constant: act(x)/x, and its limit act'(0) at 0, for activations with act(0) = 0."""
    zero = torch.zeros((), dtype=x.dtype, requires_grad=True)
    (limit,) = torch.autograd.grad(act(zero), zero)
    ratio = torch.where(x == 0, limit, act(x) / x)
    return x * ratio.detach()


@dataclass
class ConvolutionEdges:
    """Convolutions and linear layers in a row: senders are the channels between them, and those of the image.

    Channel k that layer `conv2` makes is its target `conv2:k`. What an activation behind it makes of that is the sender
    `act1:k` of the next layer. So each layer that has weights is named, and its senders are named by the module before
    it, leaving out `nn.Flatten` (`image` before the first).

    Attributes:
        module: the network.
        frozen: give what activations do the gradient of RelP.
    """

    module: nn.Sequential
    frozen: bool = False

    def layers(self) -> Iterator[tuple[str, str, nn.Module, list[nn.Module]]]:
        """Of each layer with weights: the name of its senders, its own, itself, and the modules until the next one."""
        sender, rest = "image", list(self.module.named_children())
        starts = [i for i, (_, m) in enumerate(rest) if hasattr(m, "weight")] + [len(rest)]
        for at, end in pairwise(starts):
            behind = [(n, m) for n, m in rest[at + 1 : end] if not isinstance(m, nn.Flatten)]
            yield sender, rest[at][0], rest[at][1], [m for _, m in behind]
            sender = behind[-1][0] if behind else rest[at][0]

    @property
    def edges(self) -> list[Edge]:
        return [
            (f"{sender}:{i}", f"{name}:{k}")
            for sender, name, layer, _ in self.layers()
            for k in range(_weight(layer).shape[0])
            for i in range(_weight(layer).shape[1])
        ]

    @property
    def sites(self) -> list[list[str]]:
        return [
            [f"{sender}:{i}" for i in range(_weight(layer).shape[1])]
            for sender, _, layer, _ in self.layers()
        ]

    def start(self, inputs: Tensor) -> Values:
        return {f"image:{i}": inputs[:, i].double() for i in range(inputs.shape[1])}

    def run(
        self, start: Values, see: See = as_it_is, replaced: Values | None = None
    ) -> tuple[Tensor, Values]:
        made = dict(start) | {n: v for n, v in (replaced or {}).items() if n in start}
        layers, reads = list(self.layers()), dict(made)
        outputs: list[Tensor] = []
        for (_, name, layer, behind), following in zip(layers, [*layers[1:], None], strict=True):
            outputs = []
            for k in range(len(_weight(layer))):
                value = channel(layer, k, list(see(f"{name}:{k}", reads).values()))
                for module in behind:
                    value = proportional(module, value) if self.frozen else module(value)
                outputs.append(value)
            if following is not None:
                reads = {f"{following[0]}:{k}": value for k, value in enumerate(outputs)}
                reads = {n: (replaced or {}).get(n, value) for n, value in reads.items()}
                made |= reads
        return torch.stack(outputs, 1), made


def channel(layer: nn.Module, k: int, inputs: Sequence[Tensor]) -> Tensor:
    """One channel that a layer makes, from the channels that it reads: each example x y x x, or example for one number.

    A linear layer reads channels that are 1 x 1.
    """
    weight, bias = _weight(layer)[k : k + 1].double(), layer.bias[k : k + 1].double()  # type: ignore[index]
    if isinstance(layer, nn.Conv2d):
        made = F.conv2d(torch.stack(list(inputs), 1), weight, bias, layer.stride, layer.padding)  # type: ignore[arg-type]
        return made[:, 0]
    return F.linear(torch.stack([x.flatten(1)[:, 0] for x in inputs], 1), weight, bias)[:, 0]


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach()


@dataclass
class Oracle:
    """The scores of all edges of a network between a clean and a corrupted batch.

    Attributes:
        network: the network.
        metric: one number for each example, from logits.
        clean: clean inputs.
        corrupted: their counterparts, of the same shape.
    """

    network: Network
    metric: Metric
    clean: Tensor
    corrupted: Tensor

    def __post_init__(self) -> None:
        self.starts = {
            "clean": self.network.start(self.clean),
            "corrupted": self.network.start(self.corrupted),
        }
        self.logits, self.live = self.network.run(self.starts["clean"])
        self.other_logits, self.other = self.network.run(self.starts["corrupted"])

    @cached_property
    def differences(self) -> dict[str, Tensor]:
        """What each sender writes in the corrupted run less what it writes in the clean one."""
        return {name: self.other[name] - self.live[name] for name in self.live}

    # --- circuits --------------------------------------------------------------------------------

    def value(self, w: Tensor, base: Literal["clean", "corrupted"] = "clean") -> Tensor:
        """The metric where edge e carries live + w_e (other - live): example.

        Args:
            w: one weight an edge, or example x edge.
            base: the run that is live; the other one is fixed.
        """
        other = self.other if base == "clean" else self.live
        at = {edge: i for i, edge in enumerate(self.network.edges)}

        def see(target: str, values: Values) -> Values:
            found = {}
            for name, live in values.items():
                share = w[..., at[name, target]]
                share = share.reshape(share.shape + (1,) * (live.ndim - 1) * (share.ndim > 0))
                found[name] = live + share * (other[name] - live)
            return found

        return self.metric(self.network.run(self.starts[base], see)[0])

    def circuit(self, edges: Sequence[Edge]) -> Tensor:
        """The metric where these edges alone are live and all others carry the corrupted run: example."""
        left_out = [float(edge not in edges) for edge in self.network.edges]
        return self.value(torch.tensor(left_out, dtype=torch.float64))

    def noising(self) -> Tensor:
        """Each edge alone replaced by the corrupted run: the change from the clean metric."""
        return self._one_by_one("clean")

    def denoising(self) -> Tensor:
        """In the corrupted run each edge alone replaced by the clean run: the change from the corrupted metric."""
        return self._one_by_one("corrupted")

    def together(self, edges: Sequence[Edge], base: Literal["clean", "corrupted"]) -> Tensor:
        """The change of the metric where some edges are replaced at once: noising for base `clean`: example."""
        w = torch.tensor([float(edge in edges) for edge in self.network.edges])
        return self.value(w.double(), base) - self.value(torch.zeros_like(w).double(), base)

    def _one_by_one(self, base: Literal["clean", "corrupted"]) -> Tensor:
        return torch.stack([self.together([edge], base) for edge in self.network.edges], 1)

    def slopes(self, w: Tensor) -> Tensor:
        """dm/dw_e at some weights: example x edge."""
        rows = w.expand(len(self.clean), -1).clone().requires_grad_()
        return torch.autograd.grad(self.value(rows).sum(), rows)[0]

    # --- gradients -------------------------------------------------------------------------------

    def gradients(self, start: Values, replaced: Values | None = None) -> dict[Edge, Tensor]:
        """dm/d(copy of the sender's output that the target reads), for each edge, at one run.

        As a target of a transformer reads a sum, this is the gradient of the stream that it reads, whatever the sender.
        """
        probes: dict[Edge, Tensor] = {}

        def see(target: str, values: Values) -> Values:
            found = {}
            for name, live in values.items():
                # A target that is read several times (keys that heads share) has one probe.
                zero = torch.zeros_like(live, requires_grad=True)
                found[name] = live + probes.setdefault((name, target), zero)
            return found

        logits, _ = self.network.run(start, see, replaced)
        edges = list(self.network.edges)
        made = torch.autograd.grad(
            self.metric(logits).sum(), [probes[e] for e in edges], materialize_grads=True
        )
        return dict(zip(edges, made, strict=True))

    def _scores(self, runs: Sequence[Mapping[Edge, Tensor]]) -> Tensor:
        """(corrupted - clean) output of each edge's sender times the mean of its gradients: example x edge."""
        found = []
        for sender, target in self.network.edges:
            gradient = torch.stack([run[sender, target] for run in runs]).mean(0)
            product = self.differences[sender] * gradient
            found.append(product.reshape(len(product), -1).sum(1))
        return torch.stack(found, 1)

    def eap(self) -> Tensor:
        """Edge attribution patching: the gradient at the clean run."""
        return self._scores([self.gradients(self.starts["clean"])])

    def clean_corrupted(self) -> Tensor:
        """The mean of the gradients at the clean and at the corrupted run."""
        return self._scores([self.gradients(self.starts[end]) for end in ("clean", "corrupted")])

    def ig_inputs(self, steps: int, rule: Rule) -> Tensor:
        """EAP-IG-inputs: gradients of runs whose embeddings (or images) lie between the corrupted and clean ones."""
        runs = []
        for alpha in alphas(steps, rule):
            start = {n: self.between(n, alpha) for n in self.starts["clean"]}
            runs.append(self.gradients(start))
        return self._scores(runs)

    def ig_activations(self, steps: int, rule: Rule = "right") -> Tensor:
        """EAP-IG-activations: for the edges of each site, what that site writes is interpolated in the clean run."""
        found = torch.zeros(len(self.clean), len(self.network.edges), dtype=torch.float64)
        for site in self.network.sites:
            runs = [
                self.gradients(self.starts["clean"], {n: self.between(n, alpha) for n in site})
                for alpha in alphas(steps, rule)
            ]
            own = torch.tensor([sender in site for sender, _ in self.network.edges])
            found = torch.where(own, self._scores(runs), found)
        return found

    def between(self, sender: str, alpha: float) -> Tensor:
        """What a sender writes, from the corrupted run (alpha 0) to the clean one (alpha 1)."""
        return self.other[sender] + alpha * (self.live[sender] - self.other[sender])


def alphas(steps: int, rule: Rule) -> list[float]:
    """Where the gradients of integrated gradients are taken; 0 is the corrupted run.

    >>> alphas(4, "left"), alphas(2, "right"), alphas(2, "midpoint")
    ([0.0, 0.25, 0.5, 0.75], [0.5, 1.0], [0.25, 0.75])
    """
    shift = {"left": 0.0, "right": 1.0, "midpoint": 0.5}[rule]
    return [(k + shift) / steps for k in range(steps)]
