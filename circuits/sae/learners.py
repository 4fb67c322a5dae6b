"""Autoencoders as they are trained: losses and constraints of each architecture.

Rows come scaled, so that E||x||^2 is their width. All losses are fractions of the variance of what is to be
written: 1 is what the mean alone leaves.
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

_BY_COUNT = ("topk", "batchtopk", "matryoshka")
_MEMORY = 1000
"""Steps over which batchtopk's threshold is averaged (a factor of 0.999); a twentieth of a shorter training."""


@dataclass(frozen=True)
class Hyperparameters:
    """What one autoencoder is and how it learns.

    Attributes:
        architecture: which.
        n_latents: how many latents.
        k: of `topk`, `batchtopk`, `matryoshka`: latents active in a row (on average, for the last two).
        sparsity: of `relu` and `gated`: factor of the L1 term; of `jumprelu`: of the number of active latents.
        lr: learning rate; 2e-4 / sqrt(n_latents / 2^14) if None (Gao et al. 2024).
        aux: factor of the loss that dead latents take from what is left over (AuxK).
        dead_after: rows after which a latent that was not active counts as dead; if None, 1000 times as long as
            the average one waits, at most a fifth of the training and 10 M.
        bias: where the decoder's bias begins: the `mean` or the geometric `median`.
        skip: for a transcoder: a linear map straight from input to output beside.
        seed: of where it begins.
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
        if self.architecture in _BY_COUNT and not 1 <= self.k <= self.n_latents:
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
        """What tells it from others trained beside it."""
        by_count = self.architecture in _BY_COUNT
        sparsity = repr(self.sparsity).removesuffix(".0").replace(".", "_")  # every digit counts
        how = f"k{self.k}" if by_count else f"l{sparsity}"
        return f"{self.architecture}-{self.n_latents}-{how}-s{self.seed}"


@dataclass(frozen=True, eq=False)
class Step:
    """What a learner says of a batch.

    Attributes:
        loss: to minimise.
        fvu: the share of the variance that it does not explain.
        l0: latents active in a row, on average.
        active: which latents were.
    """

    loss: Tensor
    fvu: Tensor
    l0: Tensor
    active: Tensor


class Learner(nn.Module):
    """One autoencoder while it is trained.

    Args:
        settings: what it is.
        calibration: of the rows.
        steps: of the whole training, for what depends on it.
        batch: rows in each.
        transcoder: it writes something else than it reads.
        half: compute the encoder's product in bfloat16.
    """

    center: Tensor
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
        self.settings, self.transcoder, self.rounded = settings, transcoder, half
        generator = torch.Generator().manual_seed(settings.seed)
        n, d_out = settings.n_latents, len(calibration.target_mean)
        d_in = len(calibration.mean)
        directions = torch.randn(n, d_out, generator=generator)
        self.W_dec = nn.Parameter(directions / directions.norm(dim=1, keepdim=True))
        began = (
            self.W_dec.detach()
            if not transcoder
            else F.normalize(torch.randn(n, d_in, generator=generator))
        )
        self.W_enc = nn.Parameter(began.clone())
        self.b_enc = nn.Parameter(torch.zeros(n))
        self.scale, self.target_scale = calibration.scale, calibration.target_scale
        self.variance = calibration.variance
        middle = calibration.target_mean if settings.bias == "mean" else calibration.target_median
        self.b_dec = nn.Parameter(middle * self.target_scale)
        wait = n / settings.k if settings.architecture in _BY_COUNT else n / 32
        self.dead_after = settings.dead_after or max(
            1, min(10_000_000, steps * batch // 5, int(1000 * wait))
        )
        self.memory = max(1, min(_MEMORY, steps // 20))
        center = calibration.mean * self.scale  # of a transcoder's input
        self.register_buffer("center", center, persistent=False)
        self.register_buffer("silent", torch.zeros(n, dtype=torch.int64))
        self.register_buffer(
            "bound", torch.tensor(-1.0)
        )  # of batchtopk: the least active value, on average
        if settings.skip:
            self.W_skip = nn.Parameter(torch.zeros(d_out, d_in))
        if settings.architecture == "jumprelu":
            self.log_threshold = nn.Parameter(torch.full((n,), 0.01).log())
        if settings.architecture == "gated":
            self.log_gain, self.b_gate = nn.Parameter(torch.zeros(n)), nn.Parameter(torch.zeros(n))

    # --- one step --------------------------------------------------------------------------------

    def forward(
        self, x: Float[Tensor, "row input"], y: Float[Tensor, "row output"], warm: float
    ) -> Step:
        """The loss of a batch, in the data's own scale.

        Args:
            x: what is encoded.
            y: what is to be written.
            warm: how much of the sparsity counts yet, 0 to 1.
        """
        own = y is x
        x = x * self.scale
        y = x if own else y * self.target_scale
        inside = x - (self.center if self.transcoder else self.b_dec)
        kind = self.settings.architecture
        if kind in _BY_COUNT:
            return self._by_count(inside, y)
        if kind == "relu":
            return self._relu(inside, y, warm)
        return (
            self._jumprelu(inside, y, warm) if kind == "jumprelu" else self._gated(inside, y, warm)
        )

    def _skipped(self, written: Tensor, inside: Tensor) -> Tensor:
        return written + inside @ self.W_skip.T if self.settings.skip else written

    def _share(self, error: Tensor) -> Tensor:
        return error.square().sum(1).mean() / self.variance

    def _pre(self, inside: Tensor) -> Tensor:
        with (
            torch.no_grad(),
            torch.autocast(inside.device.type, torch.bfloat16, enabled=self.rounded),
        ):
            return F.linear(inside, self.W_enc, self.b_enc).float()

    def _by_count(self, inside: Tensor, y: Tensor) -> Step:
        s = self.settings
        pre = self._pre(inside)
        if s.architecture == "topk":
            start, latent = top_k(pre, s.k)
        else:
            start, latent = batch_top_k(pre, s.k * len(pre))
        value = encode_at(inside, self.W_enc, self.b_enc, pre, start, latent).relu()
        code = Code(start, latent, value, s.n_latents)
        on = value.detach() > 0
        if s.architecture == "matryoshka":
            parts = [self._error(code.below(n), inside, y) for n in prefixes(s.n_latents)]
            error = parts[-1]
            loss = torch.stack([self._share(e) for e in parts]).mean()
        else:
            error = self._error(code, inside, y)
            loss = self._share(error)
        active = torch.zeros(s.n_latents, dtype=torch.bool, device=y.device)
        active[latent[on]] = True
        if s.architecture != "topk" and self.training and bool(on.any()):
            least = value.detach()[on].min()
            self.bound.copy_(least if self.bound < 0 else self.bound.lerp(least, 1 / self.memory))
        fvu = self._share(error.detach())
        loss = loss + s.aux * self._aux(inside, error.detach())
        return Step(loss, fvu, on.sum() / len(y), active)

    def _error(self, code: Code, inside: Tensor, y: Tensor) -> Tensor:
        return y - self._skipped(decode(code, self.W_dec) + self.b_dec, inside)

    def _aux(self, inside: Tensor, error: Tensor) -> Tensor:
        """What dead latents, the most active of them, leave of the error (Gao et al. 2024, A.2)."""
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
        return ((error - made).square().sum(1).mean() / spread).nan_to_num(0.0)

    def _relu(self, inside: Tensor, y: Tensor, warm: float) -> Step:
        codes = F.linear(inside, self.W_enc, self.b_enc).relu()
        error = y - self._skipped(codes @ self.W_dec + self.b_dec, inside)
        weighted = (codes * self.W_dec.norm(dim=1)).sum(1).mean()
        share = self._share(error)
        return self._dense_step(share + self._penalty(warm) * weighted, share, codes)

    def _penalty(self, warm: float) -> float:
        return self.settings.sparsity * warm / self.variance

    def _jumprelu(self, inside: Tensor, y: Tensor, warm: float) -> Step:
        pre = F.linear(inside, self.W_enc, self.b_enc)
        threshold = self.log_threshold.exp()
        codes = _Jump.apply(pre, threshold)
        count = _Above.apply(pre, threshold).sum(1).mean()
        error = y - self._skipped(codes @ self.W_dec + self.b_dec, inside)
        share = self._share(error)
        return self._dense_step(share + self._penalty(warm) * count, share, codes)

    def _gated(self, inside: Tensor, y: Tensor, warm: float) -> Step:
        shared = F.linear(inside, self.W_enc)
        gate = shared + self.b_gate
        codes = (gate > 0) * (shared * self.log_gain.exp() + self.b_enc).relu()
        error = y - self._skipped(codes @ self.W_dec + self.b_dec, inside)
        open_ = gate.relu()
        held, bias = self.W_dec.detach(), self.b_dec.detach()
        through = y - self._skipped(open_ @ held + bias, inside)
        weighted = (open_ * self.W_dec.norm(dim=1)).sum(1).mean()
        share = self._share(error)
        loss = share + self._penalty(warm) * weighted + self._share(through)
        return self._dense_step(loss, share, codes)

    def _dense_step(self, loss: Tensor, share: Tensor, codes: Tensor) -> Step:
        on = codes.detach() > 0
        return Step(loss, share.detach(), on.sum(1).float().mean(), on.any(0))

    # --- constraints -----------------------------------------------------------------------------

    @property
    def unit_norm(self) -> bool:
        """Whether each latent's direction is held at length 1."""
        return self.settings.architecture != "relu"

    @torch.no_grad()
    def before_step(self) -> None:
        """Take from the decoder's gradient what would only change the length of directions; all together get norm 1.

        Adam would remember the large gradients of the first steps and move little for hundreds of steps after them;
        of one norm, all steps count alike.
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
        """Set directions to length 1, and count how long each latent has been silent."""
        if self.unit_norm:
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8))
        self.silent += rows
        self.silent[active] = 0

    @property
    def dead(self) -> float:
        """The share of latents that have been silent for too long."""
        return float((self.silent > self.dead_after).float().mean())

    # --- as it is used ---------------------------------------------------------------------------

    @torch.no_grad()
    def folded(self, about: About) -> Autoencoder:
        """The autoencoder in the data's own scale: directions of length 1, all else folded in.

        With inputs times s, outputs times t, and directions of length n: codes times n / t.
        """
        length = self.W_dec.norm(dim=1).clamp_min(1e-8)
        by = length / self.target_scale
        center = self.center if self.transcoder else self.b_dec
        W_dec, b_dec = self.W_dec / length[:, None], self.b_dec / self.target_scale
        W_skip = None
        if self.settings.skip:
            W_skip = self.W_skip * (self.scale / self.target_scale)
            b_dec = b_dec - (self.W_skip @ center) / self.target_scale
        kind = self.settings.architecture
        W_enc, b_enc = self.W_enc, self.b_enc - self.W_enc @ center
        threshold: Tensor | None = None
        if kind == "gated":
            # open where W x > -b_gate, so where gain W x + b_mag > b_mag - gain b_gate (section 3.3)
            gain = self.log_gain.exp()
            threshold = (self.b_enc - gain * self.b_gate).clamp_min(0)
            W_enc, b_enc = gain[:, None] * W_enc, self.b_enc - gain * (self.W_enc @ center)
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


def prefixes(n: int) -> list[int]:
    """The nested sizes of a Matryoshka dictionary: a sixteenth, an eighth, … all of the latents.

    >>> prefixes(4096)
    [256, 512, 1024, 2048, 4096]
    """
    return sorted({max(1, n >> i) for i in range(5)})


_BANDWIDTH = 0.05
"""How wide the window is through which a threshold gets its gradient."""


class _Jump(Function):
    """x where it is above the threshold; the threshold's gradient by a rectangle of `_BANDWIDTH`."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < _BANDWIDTH / 2) / _BANDWIDTH
        return grads[0] * (pre > threshold), (-threshold * near * grads[0]).sum(0)


class _Above(Function):
    """1 where x is above the threshold; gradients likewise."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return (pre > threshold).to(pre)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < _BANDWIDTH / 2) / _BANDWIDTH
        return torch.zeros_like(pre), (-near * grads[0]).sum(0)
