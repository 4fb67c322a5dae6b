"""Sparse autoencoders and transcoders in use: encode and decode.

Whatever its architecture in training, an autoencoder is used in one form: a linear map, a nonlinearity that leaves few
latents active, and a linear map back. What training adds to that (centring, scaling, gates) is folded into the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuits.autoencoders.sparse import Code, decode, row_of_entries, top_k
from circuits.tables import Table

Activation = Literal["relu", "topk", "jumprelu"]
"""What makes codes sparse: ReLU alone; the k largest values of each row; or a threshold for each latent."""


@dataclass(frozen=True)
class About:
    """Where an autoencoder comes from.

    Attributes:
        name: its name; the latents' site is `sae/NAME`.
        site: the site that it encodes.
        target: the site that it reconstructs: another one for a transcoder.
        model: the model's name.
        model_hash: the hash of the model; empty if not known (a file of another tool).
        data: the data that it was trained on.
        architecture: its architecture in training: `topk`, `batchtopk`, `gated`, …
        settings: how it was trained, as a dictionary for JSON.
        metrics: its numbers at the end of the training, as a dictionary for JSON.
    """

    name: str = ""
    site: str = ""
    target: str = ""
    model: str = ""
    model_hash: str = ""
    data: str = ""
    architecture: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)


def autoencoders_table(codes: Mapping[str, Autoencoder]) -> Table:
    """Autoencoders by name."""
    columns = (
        "autoencoder", "model", "site", "architecture", "latents", "fvu in training", "l0", "dead",
    )  # fmt: skip
    rows = [
        (
            name, code.about.model, code.about.site, code.about.architecture, code.n_latents,
            *(code.about.metrics.get(what, "-") for what in ("fvu", "l0", "dead")),
        )
        for name, code in codes.items()
    ]  # fmt: skip
    return Table(columns, rows)


class Autoencoder(nn.Module):
    """codes = f(W_enc x + b_enc), output = W_dec^T codes + b_dec (+ W_skip x).

    Args:
        W_enc: the encoder's weights, latent x input.
        b_enc: the encoder's bias, one number for each latent.
        W_dec: the decoder's weights, latent x output: each row is the direction that its latent writes.
        b_dec: the decoder's bias, one number for each output dimension.
        activation: f, an `Activation`.
        k: for `topk`: the number of latents that may be active in a row.
        threshold: for `jumprelu`: what each latent's pre-activation must exceed, 0 or more.
        W_skip: for a skip transcoder: the linear map from input to output, output x input.
        about: where it comes from.

    Raises:
        ValueError: if shapes do not fit, numbers are not finite, or `k` or `threshold` is missing or out of range.
    """

    threshold: Tensor | None
    W_skip: Tensor | None

    def __init__(
        self,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        activation: str = "relu",
        k: int | None = None,
        threshold: Tensor | None = None,
        W_skip: Tensor | None = None,
        about: About | None = None,
    ) -> None:
        super().__init__()
        _check(W_enc, b_enc, W_dec, b_dec, activation, k, threshold, W_skip)
        self.W_enc, self.b_enc = nn.Parameter(W_enc), nn.Parameter(b_enc)
        self.W_dec, self.b_dec = nn.Parameter(W_dec), nn.Parameter(b_dec)
        self.register_buffer("threshold", threshold)
        self.register_buffer("W_skip", W_skip)
        # k as a buffer: the hash of a model covers its tensors, and another k is another autoencoder.
        self.register_buffer("kept", torch.tensor(k or 0))
        self.activation = activation
        self.k = k
        self.about = about or About()
        # It is used, not trained: the models that it is attached to hold their parameters fixed as well.
        self.requires_grad_(False)

    @property
    def n_latents(self) -> int:
        """The number of latents."""
        return self.W_enc.shape[0]

    @property
    def d_in(self) -> int:
        """The width of its input."""
        return self.W_enc.shape[1]

    def describe(self) -> dict[str, Any]:
        """What it is and where it comes from, as JSON has it."""
        a = self.about
        return {
            "name": a.name, "site": a.site, "target": a.target, "model": a.model, "model_hash": a.model_hash,
            "data": a.data, "architecture": a.architecture, "n_latents": self.n_latents, "width": self.d_in,
            "k": self.k, "metrics": {k: v for k, v in a.metrics.items() if k != "curve"},
        }  # fmt: skip

    @property
    def d_out(self) -> int:
        """The width of its output."""
        return self.W_dec.shape[1]

    def encode(self, x: Float[Tensor, "*rows input"]) -> Float[Tensor, "*rows latent"]:
        """The activation of each latent."""
        pre = torch.nn.functional.linear(x, self.W_enc, self.b_enc)
        if self.activation == "topk":
            assert self.k is not None, "checked when it was built"
            # Negative values among the k largest are cut off, so that fewer than k latents may be active.
            kept = pre.topk(self.k, dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter(-1, kept.indices, kept.values.relu())
        if self.activation == "jumprelu":
            assert self.threshold is not None, "checked when it was built"
            return pre * (pre > self.threshold)
        return pre.relu()

    def code(self, x: Float[Tensor, "row input"]) -> Code:
        """The codes of rows in compressed form, which saves time and memory with `topk`."""
        pre = torch.nn.functional.linear(x, self.W_enc, self.b_enc)
        if self.activation == "topk":
            assert self.k is not None, "checked when it was built"
            start, latent = top_k(pre, self.k)
        else:
            active = pre > (0 if self.threshold is None else self.threshold)
            counts = active.sum(1)
            start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            latent = active.nonzero(as_tuple=True)[1]
        return Code(start, latent, pre[row_of_entries(start), latent].relu(), self.n_latents)

    def decode(
        self, codes: Float[Tensor, "*rows latent"], x: Float[Tensor, "*rows input"] | None = None
    ) -> Float[Tensor, "*rows output"]:
        """The reconstruction from codes.

        Args:
            codes: the activation of each latent.
            x: the input, which a skip transcoder needs.

        Raises:
            ValueError: if a skip transcoder is not given `x`.
        """
        return self.with_skip(codes @ self.W_dec + self.b_dec, x)

    def decode_code(self, code: Code, x: Tensor | None = None) -> Float[Tensor, "row output"]:
        """The same for codes in compressed form."""
        return self.with_skip(decode(code, self.W_dec) + self.b_dec, x)

    def with_skip(self, written: Tensor, x: Tensor | None) -> Tensor:
        """Add what a skip transcoder's linear map makes of the input."""
        if self.W_skip is None:
            return written
        if x is None:
            raise ValueError("x is missing: a skip transcoder decodes with its input")
        return written + x @ self.W_skip.T

    def forward(self, x: Float[Tensor, "*rows input"]) -> Float[Tensor, "*rows output"]:
        """The reconstruction of rows."""
        return self.decode(self.encode(x), x)


def _check(
    W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, activation: str, k: int | None,
    threshold: Tensor | None, W_skip: Tensor | None,
) -> None:  # fmt: skip
    """Raise ValueError if the parts of an autoencoder do not fit each other."""
    if activation not in get_args(Activation):
        raise ValueError(
            f"activation {activation!r} is not one of {', '.join(get_args(Activation))}"
        )
    if W_enc.ndim != 2 or W_dec.ndim != 2 or 0 in W_enc.shape or 0 in W_dec.shape:
        raise ValueError(
            f"W_enc {tuple(W_enc.shape)} and W_dec {tuple(W_dec.shape)} must be latent x width"
        )
    n, wanted = len(W_enc), {"b_enc": (b_enc, (len(W_enc),))}
    wanted |= {"W_dec": (W_dec, (n, W_dec.shape[1])), "b_dec": (b_dec, (W_dec.shape[1],))}
    if W_skip is not None:
        wanted["W_skip"] = (W_skip, (W_dec.shape[1], W_enc.shape[1]))
    if threshold is not None:
        wanted["threshold"] = (threshold, (n,))
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} does not fit: expected {shape}"
            )
    for name, (tensor, _) in {"W_enc": (W_enc, ()), **wanted}.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} holds {tensor.dtype}: expected floating-point numbers")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds numbers that are not finite")
    if (activation == "topk") != (k is not None) or (k is not None and not 1 <= k <= n):
        raise ValueError(f"k {k} of activation {activation!r} must be 1 to {n} for topk, else None")
    if (activation == "jumprelu") != (threshold is not None):
        raise ValueError(
            f"threshold is {'missing' if threshold is None else 'given'}: activation {activation!r} takes one if it is "
            "jumprelu"
        )
    if threshold is not None and bool((threshold < 0).any()):
        raise ValueError("threshold holds numbers below 0")
