"""Relevance as activation x gradient of a network whose operations are replaced by linear ones.

Layer-wise relevance propagation (Bach et al. 2015; Montavon et al. 2019, chapter 10 of Explainable AI) is usually
written as a rule for each layer. Each rule is also a gradient: the relevance of an operation's input is input x
gradient if the operation is replaced by one with the same value that is linear in its input. A torch function mode that
makes these replacements therefore works for every model, and autograd's result is conserved: the target's value is the
sum over the site, over what reaches the target without passing the site, and over all biases.

- A linear operation (convolution, fully connected, batch norm) is itself (epsilon rule, up to epsilon), or has
  its positive weights strengthened (gamma, z-plus), scaled back to its own value.
- An activation function f(x) is x times f(x) / x, held fixed, f'(0) where both are zero (any other f(0) counts as a
  bias). A divisor is fixed, and so is a reciprocal that an activation is multiplied by: normalisations divide by a
  fixed size.
- A function that is homogeneous of degree k, such as a variance, has its gradient divided by k (Euler's theorem); a log
  of summed exponentials is its tangent, whose value at zero counts as a bias.
- A softmax is fixed (Ali et al. 2022 for transformers); a product of two activations gives half to each
  (Achtibat et al. 2024).
- Maximum, average, sum and concatenation are themselves; parameters and numbers that are added to activations, joined
  with them or put in their place (class tokens, position embeddings, masks) count as biases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import get_unwrapped
from torch.overrides import TorchFunctionMode

from circuits.models.adapter.normalisation import local_response_norm, response_scale
from circuits.models.paths.tape import RECURRENT
from circuits.tensors import at_least_single, is_transformed

RelevanceRule = Literal["gradient", "epsilon", "gamma", "z_plus"]
"""`gradient` replaces nothing: activation x gradient, exact for networks of ReLUs and maxima."""

_EPSILON = 1e-9
"""Replaces divisors that are closer to zero than this."""


class UnclearBatchError(Exception):
    """A tensor in the pass does not have the examples along its first axis."""


class Propagation(TorchFunctionMode):
    """Inside this mode operations are replaced by linear ones with the same values, and biases are counted.

    Args:
        rule: the rule for linear operations.
        batch: the number of examples in the pass; biases are counted for each.
        like: a tensor with the pass's dtype and device; sums over biases are in float32 at least.
        gamma: how much the rule `gamma` strengthens positive weights.
        tokens: whether the input is tokens, which enter by embeddings; embeddings of anything else are parameters.

    Attributes:
        biases: a one for each example that every bias is multiplied by; its gradient is the biases' relevance.
        embedded: the same for embeddings, whose relevance is that of the input tokens.
    """

    def __init__(
        self,
        rule: RelevanceRule,
        batch: int,
        like: Tensor,
        gamma: float = 0.25,
        tokens: bool = True,
    ) -> None:
        super().__init__()
        self.rule, self.gamma, self.tokens = rule, gamma, tokens
        ones = at_least_single(torch.ones(batch, device=like.device, dtype=like.dtype))
        self.biases = ones.requires_grad_(True)
        self.embedded = torch.ones_like(self.biases, requires_grad=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plain = _IN_PLACE.get(func, func)
        rule = _RULES.get(plain)
        if rule is None or (self.rule == "gradient" and plain not in _WITH_BIAS):
            return func(*args, **kwargs)
        # Activation functions have no other flag, and it may be passed by place.
        asked = rule in (_activation, _rectified) and any(value is True for value in args)
        if plain is func and not asked and not kwargs.get("inplace"):
            return rule(self, func, args, kwargs)
        # Replaced like the operation that makes a new tensor. The given one is overwritten all the same, since the
        # model may go on with it; a copy of it leaves autograd what it has saved.
        written = args[0] if args else kwargs["input"]
        others = {k: v for k, v in kwargs.items() if k not in ("input", "inplace")}
        rest = [value for value in args[1:] if value is not True]
        return written.copy_(rule(self, plain, (written.clone(), *rest), others))

    def bias(self, bias: Tensor | None, output: Tensor, axis: int) -> Tensor | float:
        """A bias along an axis of the output, counted."""
        if bias is None:
            return 0.0
        shape = [1] * output.ndim
        shape[axis] = -1
        return bias.reshape(shape) * self._each(self.biases, output)

    def _each(self, ones: Tensor, output: Tensor) -> Tensor:
        """The ones of each example, shaped to multiply something of an output's shape.

        Raises:
            UnclearBatchError: if the output's first axis is not the examples; they must then be run one by one.
        """
        if len(ones) == 1:
            return ones.to(output.dtype).reshape([1] * output.ndim)
        if output.shape[0] != len(ones):
            raise UnclearBatchError
        return ones.to(output.dtype).reshape(-1, *[1] * (output.ndim - 1))

    def constant(self, value: Tensor | float, output: Tensor) -> Tensor:
        """A number or tensor that does not depend on any activation, counted as a bias."""
        ones = self._each(self.biases, output)
        if not isinstance(value, Tensor):
            return value * ones if math.isfinite(value) else ones.new_full((), value)
        # Masks hold infinities, whose relevance is none, but times a gradient of zero they would be NaN.
        counted = value.nan_to_num(0, 0, 0) * ones
        return torch.where(value.isfinite(), counted, value)

    def embedding(self, value: Tensor) -> Tensor:
        """A token's embedding, counted as input."""
        return value * self._each(self.embedded, value)

    # --- linear operations -----------------------------------------------------------------------

    def linear(
        self,
        apply: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        axis: int,
    ) -> Tensor:
        """A linear operation by the rule; `apply` computes it without bias."""
        plain = apply(x, w)
        z = plain + self.bias(b, plain, axis)
        if self.rule in ("gradient", "epsilon"):
            return z
        up, down = w.clamp_min(0), w.clamp_max(0)
        if self.rule == "z_plus":
            positive = self._parts(apply, x, up, down)
            made = positive + self.bias(None if b is None else b.clamp_min(0), positive, axis)
            # An output without any positive contribution keeps its own value, since nothing could carry its relevance.
            return torch.where(made.abs() < _smallest(made), z, _rescaled(made, z))
        # gamma (Montavon et al. 2019, table 10.1), generalised to inputs and outputs of either sign as in zennit:
        # contributions with the output's own sign are strengthened, so that the sum in the denominator cannot vanish.
        g = self.gamma
        strong = plain + g * self._parts(apply, x, up, down)
        strong = strong + self.bias(None if b is None else b + g * b.clamp_min(0), plain, axis)
        weak = plain + g * self._parts(apply, x, down, up)
        weak = weak + self.bias(None if b is None else b + g * b.clamp_max(0), plain, axis)
        return torch.where(z >= 0, _rescaled(strong, z), _rescaled(weak, z))

    @staticmethod
    def _parts(
        apply: Callable[[Tensor, Tensor], Tensor], x: Tensor, up: Tensor, down: Tensor
    ) -> Tensor:
        """Positive inputs times one set of weights plus negative inputs times the other."""
        made = apply(x.clamp_min(0), up)
        return made + apply(x.clamp_max(0), down) if _holds_any(x < 0) else made


def _smallest(x: Tensor) -> float:
    """The size below which a divisor counts as zero, in the type of a tensor: float16 has nothing below 6e-8."""
    return max(_EPSILON, torch.finfo(x.dtype).tiny)


def _rescaled(made: Tensor, z: Tensor) -> Tensor:
    """`made` times the constant factor that gives it the value `z`."""
    return made * (z / _stable(made)).detach()


def _stable(x: Tensor) -> Tensor:
    least = _smallest(x)
    return torch.where(x.abs() < least, torch.where(x < 0, -least, least).to(x), x)


# --- rules by function -------------------------------------------------------------------------

Call = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def _named(names: tuple[str, ...], args: Args, kwargs: Kwargs) -> Kwargs:
    return dict(zip(names, args, strict=False)) | kwargs


def _convolution(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    given = _named(("input", "weight", "bias"), args[:3], kwargs)
    rest = args[3:]
    others = {k: v for k, v in kwargs.items() if k not in ("input", "weight", "bias")}
    x, w, b = given["input"], given["weight"], given.get("bias")
    return p.linear(lambda x, w: func(x, w, None, *rest, **others), x, w, b, 1)


def _fully_connected(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    given = _named(("input", "weight", "bias"), args, kwargs)
    return p.linear(F.linear, given["input"], given["weight"], given.get("bias"), -1)


def _addmm(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    bias, x, w = args
    if kwargs or w.requires_grad or bias.requires_grad:
        return func(*args, **kwargs)
    return p.linear(lambda x, w: x @ w, x, w, bias, -1)


def _batch_norm(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    names = (
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "training",
        "momentum",
        "eps",
    )
    given = _named(names, args, kwargs)
    x, mean, var = given["input"], given["running_mean"], given["running_var"]
    if mean is None or given.get("training"):
        return func(*args, **kwargs)
    scale = (var + given.get("eps", 1e-5)).rsqrt()
    if given.get("weight") is not None:
        scale = scale * given["weight"]
    shift = -mean * scale
    if given.get("bias") is not None:
        shift = shift + given["bias"]
    shape = [1, -1] + [1] * (x.ndim - 2)
    made = x * scale.reshape(shape)
    return made + p.bias(shift, made, 1)


def _layer_norm(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    given = _named(("input", "normalized_shape", "weight", "bias", "eps"), args, kwargs)
    x, axes = given["input"], tuple(range(-len(given["normalized_shape"]), 0))
    centered = x - x.mean(axes, keepdim=True)
    size = (centered.square().mean(axes, keepdim=True) + given.get("eps", 1e-5)).sqrt().detach()
    made = centered / size
    if given.get("weight") is not None:
        made = made * given["weight"]
    bias = given.get("bias")
    if bias is None:
        return made
    return made + (bias * p._each(p.biases, made))


def _rms_norm(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    given = _named(("input", "normalized_shape", "weight", "eps"), args, kwargs)
    x, eps = given["input"], given.get("eps")
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    axes = tuple(range(-len(given["normalized_shape"]), 0))
    # The factor itself, and not output / input: an entry that is zero has it too.
    factor = (at_least_single(x.detach()).square().mean(axes, keepdim=True) + eps).rsqrt()
    made = x * factor.to(x)
    return made if given.get("weight") is None else made * given["weight"]


def _response_norm(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    if p.rule == "gradient":
        return local_response_norm(*args, **kwargs)
    given = _named(("input", "size", "alpha", "beta", "k"), args, kwargs)
    x = given.pop("input")
    return x * response_scale(x.detach(), **given)


def _scaled_by(x: Tensor, out: Tensor) -> Tensor:
    """`out` as x times a constant factor, which makes it linear in x."""
    return x * (out / _stable(x)).detach()


def _activation(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    """A function of single numbers; of two arguments, as in powers, the first activation carries the relevance."""
    out = func(*args, **kwargs)
    given = [v for v in (*args, *kwargs.values()) if _carries_gradient(v)]
    if not given:
        return out
    x = given[0]
    if p.rule == "gradient":
        return _piece(p, func, x, out) if len(given) == 1 and x.shape == out.shape else out
    at_zero, held = x.abs() < _smallest(x), out.detach()
    if _holds_any((held != 0) & at_zero):
        held = p.constant(held, held)
    made = torch.where(at_zero, held, _scaled_by(x, out))
    # Where f(0) = 0, f(x) / x has the limit f'(0): zero keeps its value, and what would change it is passed on.
    through = at_zero & (out.abs() < _smallest(out)) if out.shape == x.shape else None
    if func in _OF_NUMBERS and through is not None and not is_transformed(x) and through.any():
        made = torch.where(through, x * _slope(func, x, args, kwargs), made)
    return made


def _piece(p: Propagation, func: Call, x: Tensor, out: Tensor) -> Tensor:
    """A function that is linear piece by piece: what its piece has at zero counts as a bias, as ReLU6's 6 does."""
    # On its piece f(x) = slope x + offset; the gradient is torch's own, and carries the first of the two.
    offset = (out - _PIECES[func](x, out) * x).detach()
    return out + (p.constant(offset, out) - offset)


def _slope(func: Call, x: Tensor, args: Args, kwargs: Kwargs) -> Tensor:
    """The derivative of a function of single numbers by one of its arguments; 0 where it is not finite."""
    leaf = x.detach().requires_grad_(True)

    def held(value: Any) -> Any:
        return leaf if value is x else value.detach() if isinstance(value, Tensor) else value

    with torch.enable_grad():
        made = func(*map(held, args), **{k: held(v) for k, v in kwargs.items()})
    return torch.autograd.grad(made.sum(), leaf)[0].nan_to_num(0, 0, 0)


def _holds_any(found: Tensor) -> bool:
    """Whether something is found; inside `torch.func.vmap`, where values cannot be asked for, it may be."""
    return is_transformed(found) or bool(found.any())


def _power(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    out = _activation(p, func, args, kwargs)
    exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
    return _as_divisor(out) if isinstance(exponent, float | int) and exponent < 0 else out


def _reciprocal(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    return _as_divisor(_activation(p, func, args, kwargs))


def _as_divisor(x: Tensor) -> Tensor:
    """Mark a reciprocal, so that an activation times it is treated like one divided by its inverse."""
    node: Any = x.grad_fn
    if node is not None:
        node.metadata["divisor"] = True
    return x


def _is_divisor(x: Tensor) -> bool:
    """Whether a tensor is a reciprocal, perhaps in another shape or type, or times constants."""
    node: Any = x.grad_fn
    while node is not None and "divisor" not in node.metadata:
        origins = [origin for origin, _ in node.next_functions if origin is not None]
        if len(origins) != 1 or node.name().rstrip("0123456789") not in _KEEPING:
            return False
        node = origins[0]
    return node is not None


_KEEPING = frozenset(
    f"{name}Backward"
    for name in (
        "Mul", "Div", "Neg", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Expand", "Transpose",
        "Permute", "Slice", "Select", "Repeat", "ToCopy", "Clone", "Alias",
    )
)  # fmt: skip
"""Operations of autograd, of one activation, that leave a reciprocal one."""


def _homogeneous(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    """A variance, whose degree is 2, alone or with the mean."""
    out = func(*args, **kwargs)
    if isinstance(out, tuple):
        return _of_degree(2, out[0]), out[1]
    return _of_degree(2, out)


def _of_degree(k: int, out: Tensor) -> Tensor:
    """A homogeneous function of a degree, whose gradient times its input is then its value (Euler's theorem)."""
    return out / k + (out - out / k).detach()


def _product_of_all(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    out = func(*args, **kwargs)
    x = args[0] if args else kwargs["input"]
    return _of_degree(x.numel() // max(1, out.numel()), out) if _carries_gradient(out) else out


def _log_sum(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    """log sum exp(x) = sum of softmax(x) x + the softmax's entropy, which counts as a bias."""
    given = _named(("input", "dim", "keepdim"), args, kwargs)
    x, axes, keep = given["input"], given["dim"], given.get("keepdim", False)
    out = func(*args, **kwargs)
    if not _carries_gradient(x):
        return out
    apart = x - torch.logsumexp(x, axes, keepdim=True)
    carried = (apart.exp().detach() * x).nan_to_num(0, 0, 0).sum(axes, keepdim=keep)
    return carried + p.constant((out - carried).detach(), out)


def _log_softmax(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    given = _named(("input", "dim"), args, kwargs)
    x, axis = given["input"], given.get("dim")
    if not isinstance(axis, int) or not _carries_gradient(x):
        return func(*args, **kwargs)
    kinds = (v for v in (*args, *kwargs.values()) if isinstance(v, torch.dtype))
    x = x.to(next(kinds, x.dtype))
    return x - _log_sum(p, torch.logsumexp, (x, axis, True), {})


def _log_add(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    given = _named(("input", "other"), args, kwargs)
    pair = torch.broadcast_tensors(given["input"], given["other"])
    return _log_sum(p, torch.logsumexp, (_join(p, torch.stack, (pair, -1), {}), -1), {})


def _rectified(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    # Torch's own keeps its result for the gradient, which fails where the model overwrites that.
    x = args[0] if args else kwargs["input"]
    return torch.where(x <= 0, 0, x)


def _group_norm(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    given = _named(("input", "num_groups", "weight", "bias", "eps"), args, kwargs)
    x, groups = given["input"], given["num_groups"]
    return _standardised(
        p, x, groups, given.get("weight"), given.get("bias"), given.get("eps", 1e-5)
    )


def _instance_norm(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    names = (
        "input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps",
    )  # fmt: skip
    given = _named(names, args, kwargs)
    if not given.get("use_input_stats", True):
        names = ("input", "running_mean", "running_var", "weight", "bias")
        return _batch_norm(
            p, func, (), {k: given.get(k) for k in names} | {"eps": given.get("eps", 1e-5)}
        )
    x = given["input"]
    return _standardised(
        p, x, x.shape[1], given.get("weight"), given.get("bias"), given.get("eps", 1e-5)
    )


def _standardised(
    p: Propagation, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Channels in groups, each minus its mean, divided by its standard deviation, which is held constant."""
    parted = x.reshape(x.shape[0], groups, -1)
    centered = parted - parted.mean(-1, keepdim=True)
    size = (centered.square().mean(-1, keepdim=True) + eps).sqrt().detach()
    made = (centered / size).reshape(x.shape)
    shape = [1, -1] + [1] * (x.ndim - 2)
    if weight is not None:
        made = made * weight.reshape(shape)
    return made + p.bias(bias, made, 1)


def _multi_head(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    """`torch.nn.MultiheadAttention`, which torch computes in one piece: with the pattern held constant, only the value
    and output projections carry relevance."""
    names = (
        "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias",
        "bias_k", "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias",
    )  # fmt: skip
    given = _named(names, args, kwargs)
    odd = [
        n
        for n in ("bias_k", "bias_v", "add_zero_attn", "static_k", "static_v")
        if given.get(n) not in (None, False)
    ]
    if odd or given.get("use_separate_proj_weight") or given["query"].ndim != 3:
        raise ValueError(
            f"relevance through multi-head attention with {', '.join(odd) or 'this layout'} is not supported: expected "
            "plain self-attention"
        )
    _, pattern = func(*args, **(kwargs | {"need_weights": True, "average_attn_weights": False}))
    value, weight, bias = given["value"], given["in_proj_weight"], given["in_proj_bias"]
    width, heads = value.shape[-1], given["num_heads"]
    v = p.linear(
        F.linear, value, weight[2 * width :], None if bias is None else bias[2 * width :], -1
    )
    # position x batch x width, as multi-head attention has it inside
    apart = v.reshape(*v.shape[:2], heads, width // heads)
    mixed = torch.einsum("bhqk,kbhd->qbhd", pattern.detach(), apart).flatten(2)
    out = p.linear(F.linear, mixed, given["out_proj_weight"], given["out_proj_bias"], -1)
    return out, (pattern.mean(1) if given.get("need_weights", True) else None)


def _recurrent(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    states = args[1] if isinstance(args[1], list | tuple) else [args[1]]
    if not any(map(_carries_gradient, [args[0], *states])):
        return func(*args, **kwargs)
    raise ValueError(
        f"relevance through the recurrent layer {func.__name__} has no rule {p.rule!r}: expected rule 'gradient'"
    )


def _fixed(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    out = func(*args, **kwargs)
    return out.detach() if isinstance(out, Tensor) else out


def _attention(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    query, key, *rest = args
    return func(query.detach(), key.detach(), *rest, **kwargs)


def _product(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    """A product of two activations: each gets half of the relevance (Achtibat et al. 2024)."""
    # a b = 1/2 a [b] + 1/2 [a] b with [.] held constant: the same value, and linear in each of the two.
    a, b, rest, kwargs = _two(args, kwargs)
    if not (_carries_gradient(a) and _carries_gradient(b)):
        return func(a, b, *rest, **kwargs)
    first, second = func(a, b.detach(), *rest, **kwargs), func(a.detach(), b, *rest, **kwargs)
    if _is_divisor(a) != _is_divisor(b):
        return second if _is_divisor(a) else first
    return 0.5 * first + 0.5 * second


_SECOND = ("other", "x2", "mat2", "tensor", "vec", "vec2")


def _two(args: Args, kwargs: Kwargs) -> tuple[Any, Any, Args, Kwargs]:
    """The two operands of a function, given by place or by name, and its other arguments."""
    rest = dict(kwargs)
    operands = list(args[:2])
    for names in (("input", "x1"), _SECOND)[len(operands) :]:
        operands.append(next(rest.pop(name) for name in names if name in rest))
    return operands[0], operands[1], args[2:], rest


def _gated_linear(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    """The product of one half of the channels with the sigmoid of the other half."""
    x = args[0] if args else kwargs["input"]
    value, gate = x.chunk(2, args[1] if len(args) > 1 else kwargs.get("dim", -1))
    opened = _activation(p, torch.sigmoid, (gate,), {})
    return _product(p, torch.mul, (value, opened), {})


def _einsum(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    operands = args[1:]
    if len(operands) != 2 or not (
        _carries_gradient(operands[0]) and _carries_gradient(operands[1])
    ):
        return func(*args, **kwargs)
    a, b = operands
    return 0.5 * func(args[0], a, b.detach()) + 0.5 * func(args[0], a.detach(), b)


def _quotient(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    a, b, rest, kwargs = _two(args, kwargs)
    if not _carries_gradient(b):
        return func(a, b, *rest, **kwargs)
    if _carries_gradient(a):
        return func(a, b.detach(), *rest, **kwargs)
    return _reciprocal(p, func, (a, b, *rest), kwargs)


def _bilinear(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    given = _named(("input1", "input2", "weight", "bias"), args, kwargs)
    made = _product(p, func, (given["input1"], given["input2"], given["weight"]), {})
    return made + p.bias(given.get("bias"), made, -1)


def _cosine(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    given = _named(("x1", "x2", "dim", "eps"), args, kwargs)
    axis, eps = given.get("dim", 1), given.get("eps", 1e-8)
    a, b = (
        x / x.norm(dim=axis, keepdim=True).clamp_min(eps).detach()
        for x in (given["x1"], given["x2"])
    )
    return _product(p, torch.mul, (a, b), {}).sum(axis)


def _sum(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    """A sum, difference, maximum or distance of an activation and a constant: the constant counts as a bias."""
    a, b, rest, kwargs = _two(args, kwargs)
    if _carries_gradient(a) and _is_constant(b):
        b = p.constant(b, a)
    elif _carries_gradient(b) and _is_constant(a):
        a = p.constant(a, b)
    return func(a, b, *rest, **kwargs)


def _extreme(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    """The larger or smaller of two tensors; over an axis it is itself."""
    of_two = isinstance(args[1] if len(args) > 1 else kwargs.get("other"), Tensor)
    return _sum(p, func, args, kwargs) if of_two else func(*args, **kwargs)


def _affine(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    """What is linear in its activations but for constants: its value where they are zero counts as a bias."""
    out = func(*args, **kwargs)
    if not _carries_gradient(out):
        return out

    def without(value: Any) -> Any:
        return torch.zeros_like(value) if _carries_gradient(value) else value

    rest = func(*map(without, args), **{k: without(v) for k, v in kwargs.items()})
    rest = rest.nan_to_num(0, 0, 0)
    return out + (p.constant(rest, out) - rest) if _holds_any(rest) else out


def _added(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    """A tensor plus a multiple of the product or quotient of two."""
    given = _named(("input", "tensor1", "tensor2"), args, kwargs)
    join, rule = (torch.div, _quotient) if "addcdiv" in func.__name__ else (torch.mul, _product)
    made = _inside(p, rule, join, given["tensor1"], given["tensor2"])
    return _sum(p, torch.add, (given["input"], made * given.get("value", 1)), {})


def _blended(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    """start + weight (end - start)."""
    given = _named(("input", "end", "weight"), args, kwargs)
    start, way = given["input"], _sum(p, torch.sub, (given["end"], given["input"]), {})
    return _sum(p, torch.add, (start, _inside(p, _product, torch.mul, way, given["weight"])), {})


def _inside(p: Propagation, rule: Call, func: Call, a: Any, b: Any) -> Any:
    """A part of an operation by its own rule; the rule `gradient` has none but for biases."""
    return func(a, b) if p.rule == "gradient" else rule(p, func, (a, b), {})


def _join(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    """A list of tensors that become one: constants among them, such as class tokens, count as biases."""
    named = next((k for k in ("tensors", "arrays") if k in kwargs), "")
    parts = kwargs[named] if named else args[0]
    carrier = next((t for t in parts if _carries_gradient(t)), None)
    if carrier is None:
        return func(*args, **kwargs)
    counted = [p.constant(t, t) if _is_constant(t) else t for t in parts]
    if named:
        return func(*args, **(kwargs | {named: counted}))
    return func(counted, *args[1:], **kwargs)


def _where(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    """Entries of a constant in place of an activation's, or the other way around: the constant counts as a bias."""
    out = func(*args, **kwargs)
    if not _carries_gradient(out):
        return out
    given = _named(("condition", "input", "other"), args, kwargs)
    if func in (Tensor.where, torch.masked_fill, Tensor.masked_fill):
        names = ("input", "condition", "other")
        if func is not Tensor.where:  # the other way around: it replaces where the mask is true
            names = ("other", "condition", "input")
        given = _named(
            names,
            args,
            {{"mask": "condition", "value": "input"}.get(k, k): v for k, v in kwargs.items()},
        )
    a, b = (p.constant(v, out) if _is_constant(v) else v for v in (given["input"], given["other"]))
    return torch.where(given["condition"], a, b)


def _written(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    """`x[where] = value`: a constant that is written among activations counts as a bias, and so does what they are
    written into."""
    x, where, value = args
    if _carries_gradient(value) and _is_constant(x):
        x.copy_(p.constant(x.clone(), x))
    elif _carries_gradient(x) and _is_constant(value):
        value = p.constant(value, x[where])
    return func(x, where, value, **kwargs)


def _embedding(p: Propagation, func: Call, args: Args, kwargs: Kwargs) -> Any:
    out = func(*args, **kwargs)
    # Position embeddings of an image model stay constants, which are counted where they meet an activation.
    return p.embedding(out) if p.tokens else out


def _carries_gradient(x: Any) -> bool:
    # Inside `torch.func.vmap` a tensor does not tell; the one that it wraps does.
    while isinstance(x, Tensor) and is_transformed(x) and not x.requires_grad:
        x = get_unwrapped(x)
    return isinstance(x, Tensor) and x.requires_grad


def _is_constant(x: Any) -> bool:
    if isinstance(x, Tensor):
        return x.is_floating_point() and not _carries_gradient(x)
    return isinstance(x, float | int) and x != 0


_CONVOLUTIONS = (
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
)  # fmt: skip
_HOLDERS = (torch, Tensor, torch.special, torch.linalg, F)


def _called(names: str) -> tuple[Any, ...]:
    """The functions and methods of torch that have one of some names, separated by spaces."""
    found = (getattr(holder, name, None) for name in names.split() for holder in _HOLDERS)
    return tuple(f for f in found if f is not None)


_RECTIFIERS = (F.relu, torch.relu, Tensor.relu)
_SUMS = _called(
    "add __add__ __radd__ sub subtract __sub__ __rsub__ rsub maximum minimum fmax fmin hypot pairwise_distance cdist"
)
_EXTREMES = _called("max min")
_AFFINE = _called(
    "pad constant_pad_nd index_add index_copy index_fill index_put scatter scatter_add masked_scatter select_scatter "
    "slice_scatter diagonal_scatter diff baddbmm addbmm addmv addr"
)
_ADDED = _called("addcmul addcdiv")
_BLENDED = _called("lerp")
_JOINS = (
    torch.cat, torch.concat, torch.concatenate, torch.stack, torch.hstack, torch.vstack, torch.dstack,
    torch.column_stack,
)  # fmt: skip
_CHOICES = (torch.where, Tensor.where, torch.masked_fill, Tensor.masked_fill)
SINGLE_NUMBERS = (
    "gelu silu elu leaky_relu softplus hardswish mish celu selu relu6 hardtanh hardsigmoid sigmoid tanh threshold "
    "logsigmoid softsign tanhshrink hardshrink softshrink clamp clip clamp_min clamp_max exp exp2 expm1 log log2 log10 "
    "log1p erf erfc erfcx erfinv ndtr ndtri log_ndtr expit logit sin cos tan asin acos atan arcsin arccos arctan sinh "
    "cosh asinh acosh atanh arcsinh arccosh arctanh sinc sqrt square atan2 arctan2 i0 i0e i1 i1e entr lgamma gammaln "
    "digamma psi polygamma mvlgamma multigammaln round floor ceil trunc fix frac sign sgn remainder fmod __mod__"
)
"""Functions of single numbers, by their names in torch: x times f(x) / x, held fixed."""

_OF_NUMBERS = frozenset(_called(SINGLE_NUMBERS))

_PIECES: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    **dict.fromkeys(
        _called("relu6 hardtanh clamp clip clamp_min clamp_max threshold"), lambda x, out: out == x
    ),
    **dict.fromkeys(_called("hardsigmoid"), lambda x, out: ((out > 0) & (out < 1)) / 6),
    **dict.fromkeys(_called("softshrink"), lambda x, out: out != 0),
}
"""Functions that are linear piece by piece and not through zero, with their slope by argument and value."""

_RULES: dict[Any, Callable[[Propagation, Call, Args, Kwargs], Any]] = {
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
    F.linear: _fully_connected,
    torch.addmm: _addmm,
    F.batch_norm: _batch_norm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.multi_head_attention_forward: _multi_head,
    F.rms_norm: _rms_norm,
    F.local_response_norm: _response_norm,
    F.scaled_dot_product_attention: _attention,
    torch.einsum: _einsum,
    F.glu: _gated_linear,
    **dict.fromkeys(RECURRENT, _recurrent),
    **dict.fromkeys(_RECTIFIERS, _rectified),
    **dict.fromkeys(_SUMS, _sum),
    **dict.fromkeys(_JOINS, _join),
    **dict.fromkeys(_CHOICES, _where),
    Tensor.__setitem__: _written,
    **dict.fromkeys(_EXTREMES, _extreme),
    **dict.fromkeys(_AFFINE, _affine),
    **dict.fromkeys(_ADDED, _added),
    **dict.fromkeys(_BLENDED, _blended),
    # Normalised vectors are multiples of their input, too.
    **dict.fromkeys(_called(SINGLE_NUMBERS + " normalize renorm"), _activation),
    **dict.fromkeys(_called("pow float_power __pow__ __rpow__"), _power),
    **dict.fromkeys(_called("reciprocal rsqrt __rtruediv__ __rdiv__"), _reciprocal),
    **dict.fromkeys(_called("softmax softmin"), _fixed),
    **dict.fromkeys(_called("var var_mean"), _homogeneous),
    **dict.fromkeys(_called("prod"), _product_of_all),
    **dict.fromkeys(_called("logsumexp"), _log_sum),
    **dict.fromkeys(_called("log_softmax"), _log_softmax),
    **dict.fromkeys(_called("logaddexp"), _log_add),
    **dict.fromkeys(
        _called("mul multiply __mul__ __rmul__ matmul __matmul__ bmm mm mv dot inner outer"), _product
    ),
    **dict.fromkeys(_called("div divide true_divide __truediv__"), _quotient),
    F.bilinear: _bilinear,
    F.cosine_similarity: _cosine,
}  # fmt: skip

_WITH_BIAS = frozenset(
    {
        *_CONVOLUTIONS,
        F.linear,
        torch.addmm,
        F.batch_norm,
        F.embedding,
        F.local_response_norm,
        *_RECTIFIERS,
        *_SUMS,
        *_EXTREMES,
        *_AFFINE,
        *_ADDED,
        *_BLENDED,
        *_JOINS,
        *_CHOICES,
        *_PIECES,
        Tensor.__setitem__,
    }
)
"""The operations that the rule `gradient` replaces too, in order to count biases, or since the model may overwrite what
autograd has saved."""


def _in_place_forms() -> dict[Any, Any]:
    """The forms `name_` and `__iname__` of operations that have a rule, each with the one that makes a new tensor."""
    found = {}
    for plain in _RULES:
        name = getattr(plain, "__name__", "")
        for holder in (torch, Tensor, F):
            made = getattr(holder, name, None)
            for form in (f"{name}_", f"__i{name.strip('_')}__"):
                if made in _RULES and hasattr(holder, form):
                    found[getattr(holder, form)] = made
    return found


_IN_PLACE = _in_place_forms()
