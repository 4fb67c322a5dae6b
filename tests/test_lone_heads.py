"""QK and OV circuits of heads where there is no single residual stream, against rows of the library's state dict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuits.attribution import direct_logit_attribution
from circuits.edits.connections import ScaleWeights
from circuits.edits.recipes import edited
from circuits.models.adapter.head_weights import Matrices
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput, ModelInput, TokenInput
from circuits.models.adapter.lone_heads import lone_head
from circuits.units import Units
from circuits.weights import head_composition, ov_circuit, qk_circuit
from tests import vision_families
from tests.attention_models import CASES, Returning

pytestmark = pytest.mark.filterwarnings("ignore")  # other packages' own

N_VOCAB, CONTEXT = 20, 6


@dataclass(frozen=True)
class Rows:
    """Where a state dict has the weights of an attention.

    Attributes:
        name: of its sites.
        heads: how many it has.
        query, key, value, output: the names of the weights of its linear layers.
    """

    name: str
    heads: int
    query: str
    key: str
    value: str
    output: str

    def matrices(self, state: Mapping[str, Tensor], head: int) -> dict[Matrices, Tensor]:
        """W_Q, W_K, W_V and W_O of a head, in float64: a linear layer has a row for each output, heads in turn."""
        found: dict[Matrices, Tensor] = {}
        names: tuple[tuple[Matrices, str], ...] = (
            ("W_Q", self.query),
            ("W_K", self.key),
            ("W_V", self.value),
        )
        for matrix, name in names:
            weight = state[name].double()
            size = len(weight) // self.heads
            found[matrix] = weight[head * size : (head + 1) * size].T
        output = state[self.output].double()
        size = output.shape[1] // self.heads
        return {**found, "W_O": output[:, head * size : (head + 1) * size].T}


def rows(name: str, heads: int, path: str, names: str) -> Rows:
    return Rows(name, heads, *(f"{path}.{own}.weight" for own in names.split()))


_CVT = "inner.cvt.encoder.stages.{}.layers.{}.attention"
_CVT_NAMES = (
    "attention.projection_query attention.projection_key attention.projection_value output.dense"
)
_PVT = "inner.pvt_v2.encoder.layers.{}.blocks.0.attention"
VISION = {
    "cvt": [
        rows(f"blocks.{n}.attn", heads, _CVT.format(stage, layer), _CVT_NAMES)
        for n, (stage, layer, heads) in enumerate(
            [(0, 0, 1), (1, 0, 1), (1, 1, 1), (2, 0, 2), (2, 1, 2), (2, 2, 2)]
        )
    ],
    "pvt-v2": [
        rows(f"blocks.{n}.attn", n + 1, _PVT.format(n), "query key value proj") for n in range(2)
    ],
    "swin-v2": [],
    "levit": [],
    "hiera": [],
}


def of_case(name: str) -> list[Rows]:
    return [
        rows(own.name, own.n_heads, own.module, " ".join((own.q, own.k, own.v, own.o)))
        for own in CASES[name].attentions
    ]


KNOWN = {name: of_case(name) for name in ("t5", "bart", "swin")} | VISION


@cache
def wrapped(name: str) -> HookedModel:
    if name in CASES:
        return HookedModel(CASES[name].make(), CASES[name].input, name)
    size = vision_families.image_size(name)
    inner = Returning(vision_families.huggingface_classifier(name))
    return HookedModel(inner, ImageInput(3, size, size), name)


def close(made: Tensor, wanted: Tensor) -> None:
    """Equal to 1e-6 of the largest number."""
    torch.testing.assert_close(
        made.double(), wanted.double(), rtol=0, atol=1e-6 * float(wanted.abs().max())
    )


@pytest.mark.parametrize("name", [name for name, own in KNOWN.items() if own])
def test_weights_and_circuits_are_those_of_the_state_dict(name: str) -> None:
    model = wrapped(name)
    assert isinstance(model.transformer, str), "there is no single stream"
    state = model.module.state_dict()
    assert list(model.head_weights) == [own.name for own in KNOWN[name]]
    for own in KNOWN[name]:
        for head in range(own.heads):
            unit = f"{own.name}.hook_z:{head}"
            wanted = own.matrices(state, head)
            found = lone_head(model, unit)
            close(found.read("Q").weight, wanted["W_Q"])
            close(found.read("K").weight, wanted["W_K"])
            close(found.read("V").weight, wanted["W_V"])
            close(found.write(), wanted["W_O"])
            attends, moves = qk_circuit(model, unit), ov_circuit(model, unit)
            for matrix in attends.matrix:  # nothing turns queries and keys
                close(matrix, wanted["W_Q"] @ wanted["W_K"].T)
            close(moves.matrix, wanted["W_V"] @ wanted["W_O"])
            for circuit in (attends, moves):
                assert own.name in circuit.spaces
                assert circuit.spaces.endswith(
                    "no single residual stream is known, so no normalisation is folded in"
                )


# --- circuits are what attention does ------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """What linear layers were given and returned, by the names of their weights, and patterns by attention."""

    given: dict[str, Tensor]
    made: dict[str, Tensor]
    patterns: dict[str, Tensor]


def passed(name: str) -> Pass:
    """A pass of the library's own model, seen by torch's hooks."""
    module, given, made = wrapped(name).module, {}, {}

    def note(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            given[f"{path}.weight"], made[f"{path}.weight"] = args[0].double(), output.double()

        return hook

    linear = [(path, part) for path, part in module.named_modules() if isinstance(part, nn.Linear)]
    handles = [part.register_forward_hook(note(path)) for path, part in linear]
    inputs = CASES[name].input.example(2, seed=3)
    try:
        sites = CASES[name].oracle(module, inputs)
        with torch.no_grad():
            module(inputs)
    finally:
        for handle in handles:
            handle.remove()
    patterns = {
        key.removesuffix(".hook_pattern"): value.double()
        for key, value in sites.items()
        if key.endswith("hook_pattern")
    }
    return Pass(given, made, patterns)


def relative(module: nn.Module, name: str, n: int) -> Tensor:
    """What T5 adds to the scores of self-attention for positions: head x query x key, shared by all layers."""
    half = "encoder" if name.startswith("encoder") else "decoder"
    first: Any = module.get_submodule(f"inner.{half}.block.0.layer.0.SelfAttention")
    with torch.no_grad():
        return first.compute_bias(n, n)[0].double()


@pytest.mark.parametrize(("name", "scale"), [("bart", 0.5), ("t5", 1.0)])
def test_circuits_are_what_attention_does(name: str, scale: float) -> None:
    """Patterns from W_QK and its biases on what the projections are given, outputs from patterns, W_OV and its bias.

    Scores are divided by the square root of d_head = 4 in BART, not in T5, which adds a bias of positions.
    """
    model, seen = wrapped(name), passed(name)
    state = model.module.state_dict()
    for own in KNOWN[name]:
        x, y = seen.given[own.query], seen.given[own.key]
        added = torch.zeros(own.heads, x.shape[1], y.shape[1])
        if name == "t5" and not own.name.endswith("cross_attn"):
            added = relative(model.module, own.name, x.shape[1])
        output = torch.zeros_like(seen.made[own.output])
        for head in range(own.heads):
            attends = qk_circuit(model, f"{own.name}.hook_z:{head}", offset=0)
            moves = ov_circuit(model, f"{own.name}.hook_z:{head}")
            scores = x @ attends.at(0).double() @ y.mT + attends.constant[0].double()
            scores += (x @ attends.key_bias[0].double())[..., None]
            scores += (y @ attends.query_bias[0].double())[:, None]
            pattern = seen.patterns[own.name][:, head]
            made = torch.where(pattern > 0, scale * scores + added[head], -math.inf).softmax(-1)
            torch.testing.assert_close(made, pattern, rtol=1e-4, atol=1e-5)
            output += pattern @ (y @ moves.matrix.double()) + moves.bias.double()
        bias = state.get(own.output.replace("weight", "bias"), torch.zeros(1)).double()
        torch.testing.assert_close(output + bias, seen.made[own.output], rtol=1e-4, atol=1e-5)


# --- models of a person's own ----------------------------------------------------------------------


class TwoWidths(nn.Module):
    """Queries of one embedding read keys and values of another, which is half as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Embedding(N_VOCAB, 16), nn.Embedding(N_VOCAB, 8)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(8, 16), nn.Linear(8, 16)
        self.o, self.unembed = nn.Linear(16, 16), nn.Linear(16, N_VOCAB)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (4, 4)).transpose(1, 2)

    def turned(self, x: Tensor) -> Tensor:
        return x

    def asked(self, x: Tensor) -> Tensor:
        return self.heads(self.q(x))

    def scored(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT / 2

    def forward(self, tokens: Tensor) -> Tensor:
        x, y = self.wide(tokens), self.narrow(tokens).flip(1)
        q, k, v = self.turned(self.asked(x)), self.heads(self.k(y)), self.heads(self.v(y))
        z = self.scored(q, k).softmax(-1) @ v
        return self.unembed(x + self.o(z.transpose(1, 2).flatten(2)))


class Windows(nn.Module):
    """Attention in windows of a map, with one fused projection, and a second stage of twice the width."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.qkv = nn.ModuleList([nn.Linear(8, 24), nn.Linear(16, 48)])
        self.out = nn.ModuleList([nn.Linear(8, 8), nn.Linear(16, 16)])
        self.merge, self.head = nn.Linear(8, 16), nn.Linear(16, 5)

    def attend(self, x: Tensor, n: int) -> Tensor:
        b, side, _, c = x.shape
        w = x.reshape(b, side // 4, 4, side // 4, 4, c).transpose(2, 3).reshape(-1, 16, c)
        q, k, v = self.qkv[n](w).reshape(-1, 16, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        z = (q @ k.mT / (c // 2) ** 0.5).softmax(-1) @ v
        made = self.out[n](z.transpose(1, 2).reshape(-1, 16, c))
        made = made.reshape(b, side // 4, side // 4, 4, 4, c).transpose(2, 3)
        return x + made.reshape(b, side, side, c)

    def forward(self, images: Tensor) -> Tensor:
        x = self.attend(self.patch(images).permute(0, 2, 3, 1), 0)
        return self.head(self.attend(self.merge(x), 1).mean((1, 2)))


def own(module: nn.Module, given: ModelInput, name: str) -> HookedModel:
    vision_families.redraw(module, 5)
    return HookedModel(module.eval(), given, name)


def two_widths(module: nn.Module | None = None) -> HookedModel:
    return own(module or TwoWidths(), TokenInput(N_VOCAB, CONTEXT), "two")


def test_queries_and_keys_of_other_widths() -> None:
    model = two_widths()
    where = Rows("decoder_blocks.0.cross_attn", 4, "q.weight", "k.weight", "v.weight", "o.weight")
    state = model.module.state_dict()
    for head in range(4):
        wanted = where.matrices(state, head)
        attends = qk_circuit(model, f"{where.name}.hook_z:{head}")
        moves = ov_circuit(model, f"{where.name}.hook_z:{head}")
        assert attends.at(-1).shape == (16, 8)
        close(attends.at(-1), wanted["W_Q"] @ wanted["W_K"].T)
        close(moves.matrix, wanted["W_V"] @ wanted["W_O"])
        own_rows = slice(4 * head, 4 * head + 4)
        close(attends.query_bias[0], state["q.bias"][own_rows].double() @ wanted["W_K"].T)
        close(attends.key_bias[0], wanted["W_Q"] @ state["k.bias"][own_rows].double())
        close(attends.constant[0], state["q.bias"][own_rows] @ state["k.bias"][own_rows])
        close(moves.bias, state["v.bias"][own_rows].double() @ wanted["W_O"])
    assert qk_circuit(model, f"{where.name}.hook_z:0").spaces == (
        "rows are the 16 dimensions that the projection of queries of decoder_blocks.0.cross_attn is given, columns "
        "the 8 that the one of keys is given: no single residual stream is known, so no normalisation is folded in"
    )


def test_circuits_are_those_of_the_weights_in_force() -> None:
    model = two_widths()
    first, second = (f"decoder_blocks.0.cross_attn.hook_z:{head}" for head in (0, 1))
    before = [ov_circuit(model, head).matrix for head in (first, second)]
    cut = ScaleWeights(into=Units.parse("decoder_blocks.0.cross_attn.hook_v:1"), factor=-3.0)
    with edited(model, [cut]):
        close(ov_circuit(model, first).matrix, before[0])
        close(ov_circuit(model, second).matrix, -3 * before[1])
    close(ov_circuit(model, second).matrix, before[1])


def test_windows_with_a_fused_projection() -> None:
    model = own(Windows(), ImageInput(3, 32, 32), "windows")
    assert isinstance(model.transformer, str)
    state = model.module.state_dict()
    for n, width in ((0, 8), (1, 16)):
        fused, out = (state[f"{part}.{n}.weight"].double() for part in ("qkv", "out"))
        size = width // 2
        for head in range(2):
            unit = f"blocks.{n}.attn.hook_z:{head}"
            here = slice(head * size, (head + 1) * size)
            q, k, v = (part[here].T for part in fused.chunk(3))
            close(qk_circuit(model, unit).at(0), q @ k.T)
            close(ov_circuit(model, unit).matrix, v @ out[:, here].T)


# --- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "swin-v2",
            r"blocks\.0\.attn of swin-v2: the scores of head 0 are not q \. k times a constant \(off by [0-9.]+ of",
        ),
        (
            "levit",
            r"blocks\.0\.attn\.hook_z of levit is off by 0\.\d+ of its size .*\(at most 1e-05",
        ),
        ("hiera", r"blocks\.0\.attn of hiera: values of the shape .* lie in other windows"),
    ],
)
def test_scores_and_weights_of_another_form_are_refused(name: str, words: str) -> None:
    """Cosine attention, batch normalisation behind the projections, windows that are made of what they put out."""
    with pytest.raises(ValueError, match=words):
        qk_circuit(wrapped(name), "blocks.0.attn.hook_z:0", hold_norms=True)


def test_values_of_cosine_attention_have_their_circuit() -> None:
    model = wrapped("swin-v2")
    path = "inner.swinv2.encoder.layers.0.blocks.0.attention"
    where = rows("blocks.0.attn", 2, path, "self.query self.key self.value output.dense")
    wanted = where.matrices(model.module.state_dict(), 1)
    close(ov_circuit(model, "blocks.0.attn.hook_z:1").matrix, wanted["W_V"] @ wanted["W_O"])


def test_queries_that_are_turned_by_positions_are_refused() -> None:
    class Turned(TwoWidths):
        def turned(self, x: Tensor) -> Tensor:
            signs = torch.where(torch.arange(x.shape[2]) % 2 == 0, 1.0, -1.0)[:, None]
            return torch.cat([x[..., :2] * signs, x[..., 2:]], -1)

    with pytest.raises(ValueError, match=r"the scores of head 0 are not q \. k .* turned by their"):
        qk_circuit(two_widths(Turned()), "decoder_blocks.0.cross_attn.hook_z:1")


class Mixed(TwoWidths):
    """Scores of a head are made of those of all heads, before the softmax (talking heads)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(4) + 0.5)

    def scored(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("hg,bgqk->bhqk", self.mix, super().scored(q, k))


class Biased(TwoWidths):
    """Queries have a bias that is added when heads are apart, as the content bias of Transformer-XL."""

    def __init__(self) -> None:
        super().__init__()
        self.content = nn.Parameter(torch.randn(4, 4))

    def asked(self, x: Tensor) -> Tensor:
        return super().asked(x) + self.content[:, None]


class Beside(TwoWidths):
    """Queries are what their projection makes and what it is given."""

    def asked(self, x: Tensor) -> Tensor:
        return self.heads(self.q(x) + x)


class Opposed(TwoWidths):
    """The scores of one head are multiplied by a negative number."""

    def scored(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scored(q, k) * torch.tensor([1.0, -0.4, 1.0, 1.0])[:, None, None]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (Mixed, r"the scores of head 0 are not q \. k times a constant .*or heads are mixed"),
        (Biased, r"head 0 scores keys even with queries of zeros: something is added to queries"),
        (Opposed, r"the scores of head 1 are q \. k times -0\.2, which is not above 0"),
    ],
)
def test_scores_that_are_not_of_a_heads_own_weights_are_refused(
    made: type[TwoWidths], words: str
) -> None:
    model = two_widths(made())
    (unit,) = [site.name for site in model.sites if site.name.endswith("hook_z")]
    with pytest.raises(ValueError, match=words):
        qk_circuit(model, f"{unit}:1")


class Rounded(TwoWidths):
    """Queries are computed in half precision."""

    def asked(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            q = x @ self.q.weight.T + self.q.bias
        return self.heads(q.float())


def test_rounding_is_told_from_other_weights() -> None:
    model = two_widths(Rounded())
    (unit,) = [site.name for site in model.sites if site.name.endswith("hook_z")]
    words = r"hook_q of two is off by 0\.00\d+ of .* rounds to half precision on the way, as under"
    with pytest.raises(ValueError, match=words):
        qk_circuit(model, f"{unit}:1")


def test_offsets_make_no_difference_without_a_stream() -> None:
    model = two_widths()
    found = qk_circuit(model, "decoder_blocks.0.cross_attn.hook_z:1", offset=(5, 0, -100))
    assert found.offsets == (5, 0, -100)
    assert torch.equal(found.at(5), found.at(0))
    assert torch.equal(found.at(-100), found.at(0))


def test_queries_of_more_than_their_projection_are_shown_and_have_no_weights() -> None:
    model = two_widths(Beside())
    (unit,) = [site.name for site in model.sites if site.name.endswith("hook_z")]
    tokens = model.input.example(2)
    module: Any = model.module
    with torch.no_grad():
        wanted = module.asked(module.wide(tokens)).transpose(1, 2)
    site = unit.replace("hook_z", "hook_q")
    close(model.run(tokens, read=[site])[site], wanted)
    with pytest.raises(
        ValueError, match=r"attn of two has no matrix W_Q: its heads have no weights"
    ):
        qk_circuit(model, f"{unit}:1")


def test_scores_of_a_head_whose_queries_are_zero_are_zero() -> None:
    model = two_widths()
    module: Any = model.module
    with torch.no_grad():
        module.q.weight[4:8] = 0
        module.q.bias[4:8] = 0
    found = qk_circuit(model, "decoder_blocks.0.cross_attn.hook_z:1")
    assert not found.matrix.any()


def test_weights_that_are_not_those_of_the_heads_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = two_widths()
    weights = model.head_weights["decoder_blocks.0.cross_attn"]
    right = weights.matrix
    for name, site in (("W_K", "k"), ("W_V", "v"), ("W_O", "out")):

        def wrong(asked: Matrices, name: str = name) -> Tensor | None:
            found = right(asked)
            return found if found is None or asked != name else found.flip(0)

        monkeypatch.setattr(weights, "matrix", wrong)
        with pytest.raises(
            ValueError,
            match=rf"decoder_blocks\.0\.cross_attn\.hook_{site} of two is off by .* of its size",
        ):
            ov_circuit(model, "decoder_blocks.0.cross_attn.hook_z:0")


def test_what_needs_a_stream_says_why_there_is_none() -> None:
    model = wrapped("bart")
    head, later = "encoder_blocks.0.attn.hook_z:1", "encoder_blocks.1.attn.hook_z:1"
    why = "model bart has no residual stream: it has an encoder and a decoder"
    for ask in (
        lambda: head_composition(model, head, later),
        lambda: direct_logit_attribution(model, model.input.example(2)),
        lambda: qk_circuit(model, head, tokens=True),
        lambda: ov_circuit(model, head, tokens=True),
    ):
        with pytest.raises(ValueError, match=why):
            ask()
    with pytest.raises(ValueError, match=r"hook_q:1 is not a head, ATTENTION\.hook_z:INDEX"):
        qk_circuit(model, "encoder_blocks.0.attn.hook_q:1")
    with pytest.raises(ValueError, match="offset is empty"):
        qk_circuit(model, head, offset=())


# --- images along a stream ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["vit", "deit", "dinov2-registers", "clip-vision", "whisper-encoder"]
)
def test_heads_of_images_along_a_stream_have_their_circuits(name: str) -> None:
    """The product of weights by the state dict, through the linear part of the norm before: gain and mean."""
    case = CASES[name]
    model = HookedModel(case.make(), case.input, name)
    for own_ in case.attentions:
        norm: Any = next(
            part
            for path, part in model.module.named_modules()
            if isinstance(part, nn.LayerNorm)
            and path.startswith(own_.module.rpartition(".")[0] + ".")
        )
        gain = norm.weight.detach().double()
        folded = torch.diag(gain) - gain[None] / len(gain)  # x -> (x - mean(x)) * gain
        for head in range(own_.n_heads):
            wanted = case.qk(model.module, own_.name, head).double()
            found = qk_circuit(model, f"{own_.name}.hook_z:{head}")
            close(found.at(0), folded @ wanted @ folded.T)
            assert torch.equal(found.at(-1), found.at(0)), "nothing turns queries and keys"
            assert "residual stream" in found.spaces
