"""Sparse codes and their matrix products, which cost only as much as there are active latents.

Of the five matrix products in a training step of a TopK autoencoder, four involve only k of n latents in each row.
Here these are sparse products on compressed rows (CSR), with exact gradients; only the encoder's product is dense.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function


@dataclass(frozen=True, eq=False)
class Code:
    """The codes of some rows as compressed rows: what is not listed is zero.

    Attributes:
        start: the first entry of each row, and in the end the number of entries.
        latent: the latent of each entry.
        value: the activation of each entry; zero is allowed.
        n_latents: the number of latents.
    """

    start: Int[Tensor, " row_and_end"]
    latent: Int[Tensor, " entry"]
    value: Float[Tensor, " entry"]
    n_latents: int

    def __len__(self) -> int:
        return len(self.start) - 1

    @property
    def row(self) -> Int[Tensor, " entry"]:
        """The row of each entry."""
        return row_of_entries(self.start)

    def dense(self) -> Float[Tensor, "row latent"]:
        """The codes as a matrix, with zeros."""
        out = self.value.new_zeros(len(self), self.n_latents)
        return out.index_put((self.row, self.latent), self.value)

    def prefix(self, n: int) -> Code:
        """The codes of the first `n` latents only."""
        keep = self.latent < n
        counts = torch.zeros(len(self), dtype=self.start.dtype, device=self.start.device)
        counts.index_add_(0, self.row[keep], torch.ones_like(self.latent[keep]))
        start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Code(start, self.latent[keep], self.value[keep], n)


def row_of_entries(start: Int[Tensor, " row_and_end"]) -> Int[Tensor, " entry"]:
    """The row of each entry, given where rows begin."""
    counts = start.diff()
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def top_k(pre: Float[Tensor, "row latent"], k: int) -> tuple[Tensor, Tensor]:
    """The k largest places of each row, as `start` and `latent` of a `Code`; ties are broken arbitrarily."""
    chosen = pre.topk(k, dim=1, sorted=False).indices
    start = torch.arange(0, chosen.numel() + 1, k, device=pre.device)
    return start, chosen.reshape(-1)


def batch_top_k(pre: Float[Tensor, "row latent"], n: int) -> tuple[Tensor, Tensor]:
    """The `n` largest places of a whole batch that are above zero, as `start` and `latent` of a `Code`.

    Sorting all places would be slow, and few are wanted. So a bound is guessed from a sample of rows, the places above
    it are listed, and the exact choice is made among those.
    """
    if n >= pre.numel():
        rows, latents = (pre > 0).nonzero(as_tuple=True)
        return _starts(rows, len(pre)), latents
    step = max(1, len(pre) // 64)
    sample = pre[::step].reshape(-1)
    # Twice as many as their share: the bound is then low enough in all but unlucky samples.
    wanted = min(sample.numel(), int(2 * n * sample.numel() / pre.numel()) + 1)
    bound = float(sample.topk(wanted, sorted=False).values.min().clamp_min(0))
    rows, latents = (pre > bound).nonzero(as_tuple=True)
    if len(rows) < n and bound > 0:  # an unlucky sample
        rows, latents = (pre > 0).nonzero(as_tuple=True)
    if len(rows) > n:
        # Sorted, so that entries stay in the order of rows, as compressed rows need it.
        best = pre[rows, latents].topk(n, sorted=False).indices.sort().values
        rows, latents = rows[best], latents[best]
    return _starts(rows, len(pre)), latents


def _starts(rows: Tensor, n: int) -> Tensor:
    """The first entry of each of n rows, given the row of each entry, and in the end the number of entries."""
    counts = torch.bincount(rows, minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def encode_at(
    x: Float[Tensor, "row input"],
    weight: Float[Tensor, "latent input"],
    bias: Float[Tensor, " latent"],
    pre: Float[Tensor, "row latent"],
    start: Tensor,
    latent: Tensor,
) -> Float[Tensor, " entry"]:
    """`x @ weight.T + bias` at some entries, with gradients that are computed at these entries only.

    Args:
        x: the rows to encode.
        weight: the encoder's weights.
        bias: the encoder's bias.
        pre: all of `x @ weight.T + bias`, already computed, without autograd history.
        start: the first entry of each row (see `Code`).
        latent: the latent of each entry.
    """
    return _EncodeAt.apply(x, weight, bias, pre, start, latent)  # type: ignore[no-any-return]


def decode(code: Code, weight: Float[Tensor, "latent output"]) -> Float[Tensor, "row output"]:
    """`code.dense() @ weight`, with gradients for the code's values and the weights."""
    return _Decode.apply(code.value, weight, code.start, code.latent)  # type: ignore[no-any-return]


class _EncodeAt(Function):
    """See `encode_at`. With G the gradient at the entries: dx = G W, dW = G^T x, db = sum of G over rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        pre: Tensor,
        start: Tensor,
        latent: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, start, latent)
        return pre[row_of_entries(start), latent]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, start, latent = ctx.saved_tensors
        code = Code(start, latent, grads[0].contiguous(), len(weight))
        d_x = _weighted_sum(code, weight) if ctx.needs_input_grad[0] else None
        d_weight = _transposed_product(code, x) if ctx.needs_input_grad[1] else None
        d_bias = None
        if ctx.needs_input_grad[2]:
            d_bias = code.value.new_zeros(len(weight)).index_add_(0, latent, code.value)
        return d_x, d_weight, d_bias, None, None, None


class _Decode(Function):
    """See `decode`. With g the gradient of the output: dvalue = (g W^T) at the entries, dW = code^T g."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: Tensor, start: Tensor, latent: Tensor) -> Tensor:
        ctx.save_for_backward(value, weight, start, latent)
        return _weighted_sum(Code(start, latent, value, len(weight)), weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        value, weight, start, latent = ctx.saved_tensors
        grad, code = grads[0].contiguous(), Code(start, latent, value, len(weight))
        d_value = _products_at(code, grad, weight) if ctx.needs_input_grad[0] else None
        d_weight = _transposed_product(code, grad) if ctx.needs_input_grad[1] else None
        return d_value, d_weight, None, None


def _weighted_sum(code: Code, weight: Tensor) -> Tensor:
    """code @ weight, as weighted sums of rows of an embedding table, which torch computes in parallel."""
    if not len(code.latent):
        return weight.new_zeros(len(code), weight.shape[1])
    return F.embedding_bag(
        code.latent,
        weight.detach(),
        code.start[:-1],
        per_sample_weights=code.value.detach(),
        mode="sum",
    )


def _products_at(code: Code, left: Tensor, right: Tensor) -> Tensor:
    """(left @ right.T) at the code's entries."""
    if not len(code.latent):
        return code.value.new_zeros(0)
    pattern = _csr(code.start, code.latent, torch.zeros_like(code.value), code.n_latents)
    return torch.sparse.sampled_addmm(pattern, left, right.detach().T).values()


def _transposed_product(code: Code, right: Tensor) -> Tensor:
    """code.T @ right."""
    right = right.detach()
    if not len(code.latent):
        return right.new_zeros(code.n_latents, right.shape[1])
    # On a CPU torch multiplies compressed rows by MKL only.
    if not torch.backends.mkl.is_available() and not right.is_cuda:
        return code.dense().T @ right
    # Sorting entries by latent transposes the matrix. Stable, so that sums are added up in one order every time.
    order = torch.argsort(code.latent, stable=True)
    starts = _starts(code.latent, code.n_latents)
    return _csr(starts, code.row[order], code.value.detach()[order], len(code)) @ right


def _csr(start: Tensor, column: Tensor, value: Tensor, n: int) -> Tensor:
    size = (len(start) - 1, n)
    with warnings.catch_warnings():  # torch warns that its support of compressed rows is in beta
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(start, column, value, size, check_invariants=False)
