"""Autoencoders in training: the loss and the constraints of each architecture.

Rows are centred and scaled: their mean is 0, and E||x||^2 is their width. All losses are fractions of variance
unexplained (FVU) of the rows to reconstruct: the mean alone would give 1. So learning rates and penalties carry over
from site to site, and an offset of the rows, however far above their spread, changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function

from circuits.autoencoders import About, Autoencoder, Code
from circuits.autoencoders.sparse import batch_top_k, decode, encode_at, top_k
from circuits.sae.batches import Calibration

Architecture = Literal["topk", "batchtopk", "matryoshka", "relu", "jumprelu", "gated"]
"""`topk`: Gao et al. 2024; `batchtopk`: Bussmann et al. 2024; `matryoshka`: Bussmann et al. 2025, nested prefixes on
batchtopk; `relu`: L1 weighted by the decoder's norms (Conerly et al. 2024); `jumprelu`: Rajamanoharan et al. 2024b;
`gated`: Rajamanoharan et al. 2024a."""

_TOP_K = ("topk", "batchtopk", "matryoshka")
_THRESHOLD_STEPS = 1000
"""Steps over which the threshold of `batchtopk` is averaged; at most a twentieth of the training."""


@dataclass(frozen=True)
class Hyperparameters:
    """The architecture of an autoencoder and how it is trained.

    Attributes:
        architecture: the architecture.
        n_latents: the number of latents.
        k: for `topk`, `batchtopk` and `matryoshka`: the L0, in each row for the first, on average for the other two.
        sparsity: for `relu` and `gated`: the factor of the L1 penalty; for `jumprelu`: of the L0 penalty. In units of
            rows whose squared distance from their mean is their width d on average, the loss is the squared error of a
            row plus `sparsity` times its L1 or L0 (divided by d, so that it is in units of the FVU). SAELens
            (`expected_average_only_in`) scales rows to an average norm of sqrt(d), dictionary_learning to a mean
            squared norm of 1, both without centring: for rows with mean 0 the L1 factor is about the same as in the
            former, and sqrt(d) times that in the latter.
        lr: the learning rate; 2e-4 / sqrt(n_latents / 2^14) if None (Gao et al. 2024).
        aux: the factor of the auxiliary loss AuxK, by which dead latents learn from the reconstruction error.
        dead_after: the number of rows without activity after which a latent counts as dead. If None, 1000 times the
            rows in which an average latent is active once, but at most a fifth of the training and 10 million.
        bias: the initial value of the decoder's bias: the `mean` or the geometric `median` of the rows.
        skip: for a transcoder: whether it has a linear map from input to output in addition to its latents.
        seed: the seed of the initial weights.
    """

    architecture: Architecture = "topk"
    n_latents: int = 4096
    k: int = 32
    sparsity: float = 1.0
    lr: float | None = None
    aux: float = 1 / 32
    dead_after: int | None = None
    bias: Literal["mean", "median"] = "mean"
    skip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Architecture):
            raise ValueError(
                f"architecture {self.architecture!r} is not one of {', '.join(get_args(Architecture))}"
            )
        if self.n_latents < 1:
            raise ValueError(f"n_latents {self.n_latents} must be at least 1")
        if self.architecture in _TOP_K and not 1 <= self.k <= self.n_latents:
            raise ValueError(
                f"k {self.k} must be from 1 to the number of latents, {self.n_latents}"
            )
        if self.bias not in ("mean", "median"):
            raise ValueError(f"bias {self.bias!r} is not one of mean, median")
        for name in ("sparsity", "aux"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} {getattr(self, name)} must be 0 or more")
        if self.lr is not None and not 0 < self.lr < 1:
            raise ValueError(f"lr {self.lr} must be between 0 and 1")
        if self.dead_after is not None and self.dead_after < 1:
            raise ValueError(f"dead_after {self.dead_after} must be at least 1 row")

    @property
    def rate(self) -> float:
        """The learning rate."""
        return 2e-4 / (self.n_latents / 2**14) ** 0.5 if self.lr is None else self.lr

    def label(self) -> str:
        """A name that tells it from autoencoders with other hyperparameters."""
        by_count = self.architecture in _TOP_K
        sparsity = repr(self.sparsity).removesuffix(".0").replace(".", "_")  # no `.` in file names
        how = f"k{self.k}" if by_count else f"l{sparsity}"
        return f"{self.architecture}-{self.n_latents}-{how}-s{self.seed}"


@dataclass(frozen=True, eq=False)
class TrainingStep:
    """The result of a learner's forward pass on a batch.

    Attributes:
        loss: the loss to minimise.
        fvu: the fraction of variance unexplained.
        l0: the mean number of active latents in a row.
        active: which latents were active in any row.
    """

    loss: Tensor
    fvu: Tensor
    l0: Tensor
    active: Tensor


class Learner(nn.Module):
    """One autoencoder in training.

    Args:
        settings: its hyperparameters.
        calibration: the statistics of the rows.
        steps: the number of steps of the whole training.
        batch: rows in a batch.
        transcoder: whether it reconstructs another site than it encodes.
        half: compute the encoder's matrix product in bfloat16.
    """

    mean: Tensor
    target_mean: Tensor
    silent: Tensor
    bound: Tensor

    def __init__(
        self,
        settings: Hyperparameters,
        calibration: Calibration,
        steps: int,
        batch: int,
        transcoder: bool = False,
        half: bool = False,
    ) -> None:
        super().__init__()
        self.settings, self.transcoder, self.in_bfloat16 = settings, transcoder, half
        generator = torch.Generator().manual_seed(settings.seed)
        n, d_out = settings.n_latents, len(calibration.target_mean)
        d_in = len(calibration.mean)
        directions = torch.randn(n, d_out, generator=generator)
        self.W_dec = nn.Parameter(directions / directions.norm(dim=1, keepdim=True))
        # The encoder begins as the decoder's transpose, which leaves few latents dead (Gao et al. 2024, section 2.4).
        encoder = (
            self.W_dec.detach()
            if not transcoder
            else F.normalize(torch.randn(n, d_in, generator=generator))
        )
        self.W_enc = nn.Parameter(encoder.clone())
        self.b_enc = nn.Parameter(torch.zeros(n))
        self.scale, self.target_scale = calibration.scale, calibration.target_scale
        self.variance = float(d_out)  # of the scaled rows
        self.register_buffer("mean", calibration.mean, persistent=False)
        self.register_buffer("target_mean", calibration.target_mean, persistent=False)
        # A decoder that begins at the middle of the rows, for which rows are centred, has nothing to learn about it.
        middle = calibration.target_mean if settings.bias == "mean" else calibration.target_median
        self.b_dec = nn.Parameter((middle - calibration.target_mean) * self.target_scale)
        # A latent is active once in n / L0 rows on average; without a k, an L0 of 32 is assumed.
        wait = n / settings.k if settings.architecture in _TOP_K else n / 32
        self.dead_after = settings.dead_after or max(
            1, min(10_000_000, steps * batch // 5, int(1000 * wait))
        )
        self.threshold_steps = max(1, min(_THRESHOLD_STEPS, steps // 20))
        self.register_buffer(
            "silent", torch.zeros(n, dtype=torch.int64)
        )  # rows since each was active
        # The threshold of batchtopk: a running mean of the smallest active value; negative until there is one.
        self.register_buffer("bound", torch.tensor(-1.0))
        if settings.skip:
            self.W_skip = nn.Parameter(torch.zeros(d_out, d_in))
        if settings.architecture == "jumprelu":
            # As a logarithm, so that gradient steps keep thresholds positive.
            self.log_threshold = nn.Parameter(torch.full((n,), 0.01).log())
        if settings.architecture == "gated":
            self.log_gain, self.b_gate = nn.Parameter(torch.zeros(n)), nn.Parameter(torch.zeros(n))

    # --- one step --------------------------------------------------------------------------------

    def forward(
        self, x: Float[Tensor, "row input"], y: Float[Tensor, "row output"], warm: float
    ) -> TrainingStep:
        """Compute the loss of a batch.

        Args:
            x: the rows to encode, neither centred nor scaled.
            y: the rows to reconstruct, likewise; `x` itself unless it is a transcoder.
            warm: the share of the sparsity penalty that counts so far, 0 to 1.
        """
        own = y is x
        x = (x - self.mean) * self.scale
        y = x if own else (y - self.target_mean) * self.target_scale
        # The decoder's bias of a transcoder belongs to another site.
        inside = x if self.transcoder else x - self.b_dec
        kind = self.settings.architecture
        if kind in _TOP_K:
            return self._top_k_step(inside, y)
        if kind == "relu":
            return self._relu(inside, y, warm)
        return (
            self._jumprelu(inside, y, warm) if kind == "jumprelu" else self._gated(inside, y, warm)
        )

    def _with_skip(self, written: Tensor, inside: Tensor) -> Tensor:
        """The decoder's output plus that of a skip transcoder's linear map."""
        return written + inside @ self.W_skip.T if self.settings.skip else written

    def _fvu(self, error: Tensor) -> Tensor:
        """The fraction of variance unexplained."""
        return error.square().sum(1).mean() / self.variance

    def _pre(self, inside: Tensor) -> Tensor:
        """Pre-activations of all latents, without history: gradients are needed only where a latent is active."""
        with (
            torch.no_grad(),
            torch.autocast(inside.device.type, torch.bfloat16, enabled=self.in_bfloat16),
        ):
            return F.linear(inside, self.W_enc, self.b_enc).float()

    def _top_k_step(self, inside: Tensor, y: Tensor) -> TrainingStep:
        """`topk`, `batchtopk` and `matryoshka`: the loss is the FVU, and L0 is fixed by the choice of latents."""
        s = self.settings
        pre = self._pre(inside)
        if s.architecture == "topk":
            start, latent = top_k(pre, s.k)
        else:
            start, latent = batch_top_k(pre, s.k * len(pre))
        value = encode_at(inside, self.W_enc, self.b_enc, pre, start, latent).relu()
        code = Code(start, latent, value, s.n_latents)
        # Of the k largest values of a row some may be negative, which the ReLU has cut off: these are not active.
        on = value.detach() > 0
        # Matryoshka: every nested prefix of the dictionary has to reconstruct the rows (Bussmann et al. 2025).
        if s.architecture == "matryoshka":
            parts = [self._error(code.prefix(n), inside, y) for n in prefixes(s.n_latents)]
            error = parts[-1]
            # The mean over prefixes, not the sum, so that the loss has the scale of the other architectures.
            loss = torch.stack([self._fvu(e) for e in parts]).mean()
        else:
            error = self._error(code, inside, y)
            loss = self._fvu(error)
        active = torch.zeros(s.n_latents, dtype=torch.bool, device=y.device)
        active[latent[on]] = True
        # In use there is no batch to choose in: a latent is active above a threshold, the mean over batches of the
        # smallest value that was chosen (Bussmann et al. 2024).
        if s.architecture != "topk" and self.training and bool(on.any()):
            least = value.detach()[on].min()
            self.bound.copy_(
                least if self.bound < 0 else self.bound.lerp(least, 1 / self.threshold_steps)
            )
        fvu = self._fvu(error.detach())
        loss = loss + s.aux * self._aux(inside, error.detach())
        return TrainingStep(loss, fvu, on.sum() / len(y), active)

    def _error(self, code: Code, inside: Tensor, y: Tensor) -> Tensor:
        """The reconstruction error of a code."""
        return y - self._with_skip(decode(code, self.W_dec) + self.b_dec, inside)

    def _aux(self, inside: Tensor, error: Tensor) -> Tensor:
        """The auxiliary loss: how well the k_aux most active dead latents reconstruct the error of the live ones
        (Gao et al. 2024, appendix A.2; k_aux is half of the width, as recommended there).
        """
        dead = (self.silent > self.dead_after).nonzero()[:, 0]
        if not len(dead) or not self.settings.aux:
            return error.new_zeros(())
        k = min(max(1, error.shape[1] // 2), len(dead))
        w_enc, b_enc = self.W_enc[dead], self.b_enc[dead]
        with torch.no_grad():
            pre = F.linear(inside, w_enc, b_enc)
            start, latent = top_k(pre, k)
        value = encode_at(inside, w_enc, b_enc, pre, start, latent).relu()
        made = decode(Code(start, latent, value, len(dead)), self.W_dec[dead])
        spread = (error - error.mean(0)).square().sum(1).mean().clamp_min(1e-12)
        # An error that is next to nothing gives infinities or NaN, which must not reach the weights (as there).
        return ((error - made).square().sum(1).mean() / spread).nan_to_num(0.0)

    def _relu(self, inside: Tensor, y: Tensor, warm: float) -> TrainingStep:
        """FVU + sparsity * L1 of the codes, each times the norm of its direction (Conerly et al. 2024).

        With that weight, long directions with small codes do not evade the penalty, and need no unit norm.
        """
        codes = F.linear(inside, self.W_enc, self.b_enc).relu()
        error = y - self._with_skip(codes @ self.W_dec + self.b_dec, inside)
        weighted = (codes * self.W_dec.norm(dim=1)).sum(1).mean()
        share = self._fvu(error)
        return self._dense_step(share + self._penalty(warm) * weighted, share, codes)

    def _penalty(self, warm: float) -> float:
        """The factor of the sparsity term, in the units of the FVU."""
        return self.settings.sparsity * warm / self.variance

    def _jumprelu(self, inside: Tensor, y: Tensor, warm: float) -> TrainingStep:
        """FVU + sparsity * L0, with straight-through gradients for thresholds (Rajamanoharan et al. 2024b)."""
        pre = F.linear(inside, self.W_enc, self.b_enc)
        threshold = self.log_threshold.exp()
        codes = _JumpReLU.apply(pre, threshold)
        count = _Heaviside.apply(pre, threshold).sum(1).mean()
        error = y - self._with_skip(codes @ self.W_dec + self.b_dec, inside)
        share = self._fvu(error)
        return self._dense_step(share + self._penalty(warm) * count, share, codes)

    def _gated(self, inside: Tensor, y: Tensor, warm: float) -> TrainingStep:
        """FVU + sparsity * L1 of the gates + FVU of what the gates alone reconstruct (Rajamanoharan et al. 2024a,
        section 3). The gate decides whether a latent is active, its magnitude how much; both share W_enc, the
        magnitude with a gain of its own, so that the L1 penalty does not shrink it.
        """
        shared = F.linear(inside, self.W_enc)
        gate = shared + self.b_gate
        codes = (gate > 0) * (shared * self.log_gain.exp() + self.b_enc).relu()
        error = y - self._with_skip(codes @ self.W_dec + self.b_dec, inside)
        open_ = gate.relu()
        # The step function of the gate has no gradient: gates learn from the auxiliary reconstruction, through a
        # copy of the decoder that this term does not change.
        held, bias = self.W_dec.detach(), self.b_dec.detach()
        through = y - self._with_skip(open_ @ held + bias, inside)
        weighted = (open_ * self.W_dec.norm(dim=1)).sum(1).mean()
        share = self._fvu(error)
        loss = share + self._penalty(warm) * weighted + self._fvu(through)
        return self._dense_step(loss, share, codes)

    def _dense_step(self, loss: Tensor, share: Tensor, codes: Tensor) -> TrainingStep:
        on = codes.detach() > 0
        return TrainingStep(loss, share.detach(), on.sum(1).float().mean(), on.any(0))

    # --- constraints -----------------------------------------------------------------------------

    @property
    def unit_norm(self) -> bool:
        """Whether each latent's direction is kept at length 1."""
        return self.settings.architecture != "relu"

    @torch.no_grad()
    def before_step(self) -> None:
        """Remove the part of the decoder's gradient that would only change the length of directions (Bricken et al.
        2023); then scale the gradient of all parameters together to norm 1.

        Adam divides by a running mean of squared gradients: after the large gradients of the first steps it would
        move little for hundreds of steps. With one norm all steps count alike.
        """
        gradient = self.W_dec.grad
        if self.unit_norm and gradient is not None:
            along = torch.linalg.vecdot(gradient, self.W_dec)
            gradient.addcmul_(self.W_dec, along[:, None], value=-1)
        every = [p.grad for p in self.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(every).clamp_min(1e-12)
        for each in every:
            each.div_(norm)

    @torch.no_grad()
    def after_step(self, active: Tensor, rows: int) -> None:
        """Scale directions to length 1, and count for how many rows each latent has been silent."""
        if self.unit_norm:
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8))
        self.silent += rows
        self.silent[active] = 0

    @property
    def dead(self) -> float:
        """The share of dead latents."""
        return float((self.silent > self.dead_after).float().mean())

    # --- the result ------------------------------------------------------------------------------

    @torch.no_grad()
    def folded(self, about: About) -> Autoencoder:
        """The autoencoder for rows as they are, with directions of length 1 and everything else folded in.

        In training a = f(W_enc (s x - c) + b_enc) and t (y - m) = W_dec^T a + b_dec + W_skip (s x - c), with the scales
        s and t, the mean m of y, and c = s E[x], plus b_dec unless it is a transcoder. With directions of length n,
        the codes for y become a n / t: the weights of the encoder are multiplied by s n / t, its biases and thresholds
        by n / t.
        """
        length = self.W_dec.norm(dim=1).clamp_min(1e-8)
        by = length / self.target_scale
        center = self.mean * self.scale + (0 if self.transcoder else self.b_dec)
        W_dec = self.W_dec / length[:, None]
        b_dec = self.target_mean + self.b_dec / self.target_scale
        W_skip = None
        if self.settings.skip:
            W_skip = self.W_skip * (self.scale / self.target_scale)
            b_dec = b_dec - _product(self.W_skip, center) / self.target_scale
        kind = self.settings.architecture
        shift = _product(self.W_enc, center)
        W_enc, b_enc = self.W_enc, self.b_enc - shift
        threshold: Tensor | None = None
        if kind == "gated":
            # The gate is open where W x > -b_gate, which is where the magnitude gain W x + b_mag exceeds b_mag -
            # gain b_gate: a JumpReLU (Rajamanoharan et al. 2024a, section 3.3). Where that is below zero, the ReLU
            # of the magnitude is the threshold.
            gain = self.log_gain.exp()
            threshold = (self.b_enc - gain * self.b_gate).clamp_min(0)
            W_enc, b_enc = gain[:, None] * W_enc, self.b_enc - gain * shift
        elif kind == "jumprelu":
            threshold = self.log_threshold.exp()
        elif kind in ("batchtopk", "matryoshka"):
            threshold = self.bound.clamp_min(0).expand(len(by))
        return Autoencoder(
            (W_enc * (self.scale * by)[:, None]).clone(), (b_enc * by).clone(), W_dec.clone(), b_dec.clone(),
            "topk" if kind == "topk" else "relu" if kind == "relu" else "jumprelu",
            self.settings.k if kind == "topk" else None,
            None if threshold is None else threshold * by, W_skip, about,
        )  # fmt: skip


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    """Their product, added up in float64: where the mean is far above the spread, terms cancel."""
    return (matrix.double() @ vector.double()).float()


def prefixes(n: int) -> list[int]:
    """The nested sizes of a Matryoshka dictionary: a sixteenth, an eighth, …, all of the latents.

    >>> prefixes(4096)
    [256, 512, 1024, 2048, 4096]
    """
    return sorted({max(1, n >> i) for i in range(5)})


_BANDWIDTH = 0.05
"""Width of the window around a threshold in which pre-activations give it a gradient (called epsilon there)."""


class _JumpReLU(Function):
    """x where it is above the threshold, else 0.

    The straight-through gradient by the threshold is -(threshold / epsilon) K((x - threshold) / epsilon) with the
    rectangle K of width 1 (Rajamanoharan et al. 2024b).
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < _BANDWIDTH / 2) / _BANDWIDTH
        return grads[0] * (pre > threshold), (-threshold * near * grads[0]).sum(0)


class _Heaviside(Function):
    """1 where x is above the threshold, else 0, which summed is the L0.

    The straight-through gradient by the threshold is -(1 / epsilon) K((x - threshold) / epsilon).
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return (pre > threshold).to(pre)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < _BANDWIDTH / 2) / _BANDWIDTH
        return torch.zeros_like(pre), (-near * grads[0]).sum(0)
