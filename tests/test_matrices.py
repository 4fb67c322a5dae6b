"""Weights that no layer holds: parameters that functions multiply with, as matrices that can be edited."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from circuits.cli.main import run
from circuits.database import Database
from circuits.edits.associative import associate, second_moment
from circuits.edits.layers import EraseWeights
from circuits.edits.ledger import Ledger
from circuits.edits.recipes import Recipe, bake, commute, edited, save_baked
from circuits.edits.records import parse_edit, read_edit
from circuits.edits.weights import layer_named
from circuits.environment import WORKSPACE
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.adapter.matrices import WeightMatrix
from circuits.models.zoo.weights_files import read_weights
from circuits.weights.connections import incoming
from tests.conftest import seeded
from tests.person_models import (
    CONTEXT,
    HEADS,
    N_VOCAB,
    WIDTH,
    Grouped,
    Multihead,
    NanoGPT,
    OfFunctions,
    Person,
    TorchEncoder,
)
from tests.random_edits import RandomEdits
from tests.vision_transformer import VisionTransformer

D = WIDTH // HEADS
State = dict[str, nn.Parameter]


class Crossing(nn.Module):
    """Queries of one stream, keys and values of another: `in_proj_weight` is multiplied in parts.

    Args:
        batch_first: the order of the axes of attention.
        apart: keys and values of other widths, for which `nn.MultiheadAttention` has a parameter each.
    """

    def __init__(self, batch_first: bool, apart: bool) -> None:
        super().__init__()
        keys, values = (12, 20) if apart else (WIDTH, WIDTH)
        self.tokens, self.others = nn.Embedding(N_VOCAB, WIDTH), nn.Embedding(N_VOCAB, keys)
        self.more = nn.Embedding(N_VOCAB, values) if apart else self.others
        self.mix = nn.MultiheadAttention(
            WIDTH, HEADS, kdim=keys, vdim=values, batch_first=batch_first
        )
        self.head = nn.Linear(WIDTH, N_VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x, k = self.tokens(tokens), self.others(tokens)
        v = k if self.more is self.others else self.more(tokens)
        given = (x, k, v) if self.mix.batch_first else [t.transpose(0, 1) for t in (x, k, v)]
        read = self.mix(*given, need_weights=False)[0]
        return self.head(x + (read if self.mix.batch_first else read.transpose(0, 1)))


class Stacked(nn.Module):
    """A decoder with one parameter for all layers of each kind, used by `einsum`, `@`, `F.linear`, views and slices."""

    embed: Tensor
    qkv: Tensor
    b_qkv: Tensor
    out: Tensor
    b_out: Tensor
    wide: Tensor
    b_wide: Tensor
    narrow: Tensor

    def __init__(self) -> None:
        super().__init__()
        shapes = {
            "embed": (N_VOCAB, WIDTH), "qkv": (2, WIDTH, 3, HEADS, D), "b_qkv": (2, 3, HEADS, D),
            "out": (2, WIDTH, HEADS * D), "b_out": (2, WIDTH), "wide": (2, 24, WIDTH), "b_wide": (2, 24),
            "narrow": (2, 24, WIDTH),
        }  # fmt: skip
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(5))

    def attention(self, x: Tensor, n: int) -> Tensor:
        qkv = torch.einsum("bpm,mshd->bpshd", x, self.qkv[n]) + self.b_qkv[n]
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return z.transpose(1, 2).flatten(2) @ self.out[n].T + self.b_out[n]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed[tokens]
        for n in range(2):
            x = x + self.attention(self.norms[2 * n](x), n)
            hidden = F.linear(self.norms[2 * n + 1](x), self.wide[n], self.b_wide[n]).relu()
            x = x + torch.matmul(hidden, self.narrow[n])
        return self.norms[4](x) @ self.embed.T


class Dots(Person):
    """A person's decoder whose equations leave the leading axes out."""

    def weighed(self, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        pattern = self.softmax(torch.einsum("...qd,...kd->...qk", q, k) / q.shape[-1] ** 0.5)
        return torch.einsum("...qk,...kd->...qd", pattern, v).transpose(1, 2)

    def attention(self, x: Tensor, n: int) -> Tensor:
        def projected(name: str) -> Tensor:
            weight, shift = getattr(self, f"{name}{n}"), getattr(self, f"shift_{name}{n}")
            return (torch.einsum("...m,hmd->...hd", x, weight) + shift).transpose(1, 2)

        z = self.weighed(projected("query"), projected("key"), projected("value"), n)
        return torch.einsum("...hd,hdm->...m", z, getattr(self, f"out{n}"))


class Mixed(nn.Module):
    """Weights of their own for each group of numbers, an axis of which is the last but one of the parameter's."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.read, self.made = (
            nn.Embedding(N_VOCAB, WIDTH),
            nn.Identity(),
            nn.Identity(),
        )
        self.mix, self.head = nn.Parameter(torch.zeros(D, HEADS, 3)), nn.Linear(HEADS * 3, N_VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.read(self.tokens(tokens)).unflatten(2, (HEADS, D))
        return self.head(self.made(torch.einsum("bphd,dhe->bphe", x, self.mix).flatten(2)))


def wrapped(module: nn.Module) -> HookedModel:
    return HookedModel(seeded(module), TokenInput(N_VOCAB, CONTEXT), type(module).__name__)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "multihead": lambda: Multihead(False),
    "multihead-weights": lambda: Multihead(True),
    "encoder": lambda: TorchEncoder(True, False),
    "encoder-sequence": lambda: TorchEncoder(False, True, True),
    "person": Person,
    "dots": Dots,
    "grouped": Grouped,
    "functions": OfFunctions,
    "crossing": lambda: Crossing(True, False),
    "crossing-sequence": lambda: Crossing(False, False),
    "apart": lambda: Crossing(True, True),
    "apart-sequence": lambda: Crossing(False, True),
    "stacked": Stacked,
    "mixed": Mixed,
}


@pytest.fixture(scope="module")
def models() -> dict[str, HookedModel]:
    return {name: wrapped(make()) for name, make in MODELS.items()}


def by_hand(model: HookedModel, change: Callable[[State], object]) -> Tensor:
    """The logits of a copy of a model's module whose parameters were changed by hand."""
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        change(dict(module.named_parameters()))
        return module(model.input.example(3))


def site_of(model: HookedModel, what: str, layer: int = 0) -> str:
    """The name of a site of attention: `hook_v` of the layer."""
    return [s.name for s in model.sites if s.name.endswith(f".{what}")][layer]


Change = Callable[[Tensor], Tensor]


def in_rows(parameter: str, letters: str = "qkv", many: int = HEADS) -> Callable[..., Tensor]:
    """A head's rows of a parameter that has queries, keys and values below each other."""

    def rows(p: State, letter: str, head: int) -> Tensor:
        first = letters.index(letter) * many * D + head * D
        return p[parameter].data[first : first + D]

    return rows


def in_heads(words: str) -> Callable[..., Tensor]:
    """A head's part of parameters with heads first."""
    named = dict(zip("qkv", words.split(), strict=True))
    return lambda p, letter, head: p[named[letter]].data[head]


_MULTIHEAD = in_rows("layers.0.mix.in_proj_weight"), in_rows("layers.0.mix.in_proj_bias")
_ENCODER = tuple(in_rows(f"encoder.layers.0.self_attn.in_proj_{p}") for p in ("weight", "bias"))
_PERSON = in_heads("query0 key0 value0"), in_heads("shift_query0 shift_key0 shift_value0")
_APART = (
    lambda p, letter, head: p[f"mix.{letter}_proj_weight"].data[head * D : (head + 1) * D],
    in_rows("mix.in_proj_bias"),
)
_CROSSING = in_rows("mix.in_proj_weight"), in_rows("mix.in_proj_bias")
_STACKED = (
    lambda p, letter, head: p["qkv"].data[0, :, "qkv".index(letter), head],
    lambda p, letter, head: p["b_qkv"].data[0, "qkv".index(letter), head],
)
HAND: dict[str, tuple[Callable[..., Tensor], ...]] = {
    "multihead": _MULTIHEAD, "multihead-weights": _MULTIHEAD, "encoder": _ENCODER, "encoder-sequence": _ENCODER,
    "person": _PERSON, "dots": _PERSON, "grouped": _PERSON, "functions": _PERSON, "crossing": _CROSSING,
    "crossing-sequence": _CROSSING, "apart": _APART, "apart-sequence": _APART, "stacked": _STACKED,
}  # fmt: skip
"""Where a person finds the weights and the biases of a head of the first layer."""


def output_columns(p: State, head: int) -> Tensor:
    """The weights by which what a head of the first layer reads is written, by the parameter's name."""
    columns = slice(head * D, (head + 1) * D)
    for name in ("out0", "out"):
        if name in p:
            return p[name].data[head] if name == "out0" else p[name].data[0, :, columns].T
    return p[next(n for n in p if n.endswith("out_proj.weight"))].data[:, columns].T


@pytest.mark.parametrize("letter", ["q", "k", "v"])
@pytest.mark.parametrize("name", HAND)
def test_a_heads_rows_are_those_of_the_parameter(
    models: dict[str, HookedModel], name: str, letter: str
) -> None:
    model, site = models[name], site_of(models[name], f"hook_{letter}")
    weights, biases = HAND[name]
    for bias in (False, True):
        edit = read_edit(model, f"scale_weights into={site}:1 factor=-1.5 bias={str(bias).lower()}")
        wanted = by_hand(
            model,
            lambda p: (
                weights(p, letter, 1).mul_(-1.5),
                biases(p, letter, 1).mul_(-1.5 if bias else 1),  # noqa: B023
            ),
        )
        x = model.input.example(3)
        plain, before = model.run(x, read=[site]), model.hash
        own = {key: p.data.clone() for key, p in model.parameters.items()}
        with edited(model, [edit]):
            seen = model.run(x, read=[site])
            torch.testing.assert_close(model.logits(x), wanted, rtol=1e-6, atol=1e-6)
        assert not torch.equal(seen[site][:, :, 1], plain[site][:, :, 1])
        others = [h for h in range(seen[site].shape[2]) if h != 1]
        assert torch.equal(seen[site][:, :, others], plain[site][:, :, others])
        assert torch.equal(model.logits(x), plain.output)
        assert all(torch.equal(own[key], p.data) for key, p in model.parameters.items())
        assert model.hash == before


@pytest.mark.parametrize("name", HAND)
def test_what_a_head_writes_is_scaled_in_its_columns(
    models: dict[str, HookedModel], name: str
) -> None:
    model, site = models[name], site_of(models[name], "hook_z")
    x = model.input.example(3)
    wanted = by_hand(model, lambda p: output_columns(p, 3).zero_())
    with edited(model, [read_edit(model, f"scale_weights from={site}:3 factor=0")]):
        torch.testing.assert_close(model.logits(x), wanted, rtol=1e-6, atol=1e-6)
    with edited(model, [read_edit(model, f"scale {site}:3 factor=0")]):
        torch.testing.assert_close(model.logits(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "into"),
    [
        ("multihead", "layers.0.mix"),
        ("encoder-sequence", "blocks.0.hook_attn_out"),
        ("person", "blocks.0.hook_attn_out"),
        ("functions", "blocks.0.hook_attn_out"),
    ],
)
def test_one_connection_from_a_head_to_the_stream(
    models: dict[str, HookedModel], name: str, into: str
) -> None:
    model, site = models[name], site_of(models[name], "hook_z")
    edit = read_edit(model, f"scale_weights into={into}:5 from={site}:2 factor=3")
    wanted = by_hand(model, lambda p: output_columns(p, 2)[:, 5].mul_(3))
    with edited(model, [edit]):
        torch.testing.assert_close(
            model.logits(model.input.example(3)), wanted, rtol=1e-6, atol=1e-6
        )


def test_neurons_of_bare_parameters_are_edited(models: dict[str, HookedModel]) -> None:
    model, x = models["person"], models["person"].input.example(3)
    site = "blocks.0.mlp.hook_post"
    wanted = by_hand(model, lambda p: p["narrow0"].data[7].zero_())
    with edited(model, [read_edit(model, f"scale_weights from={site}:7")]):
        torch.testing.assert_close(model.logits(x), wanted, rtol=1e-6, atol=1e-6)


# --- layouts ---------------------------------------------------------------------------------------


def matrix_of(model: HookedModel, name: str) -> WeightMatrix:
    return layer_named(model.matrices, name)


def test_names_say_which_part_of_a_parameter(models: dict[str, HookedModel]) -> None:
    assert [m.name for m in models["crossing"].matrices] == [
        "mix.in_proj_weight[0:16]", "mix.in_proj_weight[16:48]", "mix.out_proj", "head",
    ]  # fmt: skip
    assert [m.name for m in models["apart"].matrices] == [
        "mix.q_proj_weight", "mix.k_proj_weight", "mix.v_proj_weight", "mix.out_proj", "head",
    ]  # fmt: skip
    assert [m.name for m in models["stacked"].matrices] == [
        "embed", "qkv[0]", "qkv[1]", "out[0]", "out[1]", "wide[0]", "wide[1]", "narrow[0]", "narrow[1]",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "layer", "dense", "bias"),
    [
        ("person", "value1", lambda p: p["value1"].transpose(1, 2).flatten(0, 1), "shift_value1"),
        ("person", "out0", lambda p: p["out0"].flatten(0, 1).T, ""),
        ("stacked", "qkv[1]", lambda p: p["qkv"][1].flatten(1).T, "b_qkv"),
        ("stacked", "out[1]", lambda p: p["out"][1], "b_out"),
        ("stacked", "narrow[0]", lambda p: p["narrow"][0].T, ""),
        ("crossing", "mix.in_proj_weight[16:48]", lambda p: p["mix.in_proj_weight"][16:], "mix.in_proj_bias"),
        ("functions", "wide0", lambda p: p["wide0"].T, ""),
    ],
)  # fmt: skip
def test_rows_and_columns_are_outputs_and_inputs(
    models: dict[str, HookedModel],
    name: str,
    layer: str,
    dense: Callable[[dict[str, Tensor]], Tensor],
    bias: str,
) -> None:
    model = models[name]
    matrix, parameter = matrix_of(model, layer), model.parameters
    wanted = dense({key: p.data for key, p in parameter.items()})
    own = parameter[matrix.weight].data.clone()
    assert matrix.shape == tuple(wanted.shape)
    assert torch.equal(matrix.whole(own), wanted)
    assert (matrix.bias or "") == bias
    rows, columns = torch.tensor([3, 0]), torch.tensor([5, 1, 2])
    assert torch.equal(matrix.block(own, rows, columns), wanted[rows][:, columns])
    block = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    matrix.put(own, rows, columns, block)
    wanted = wanted.clone()
    wanted[rows[:, None], columns] = block
    assert torch.equal(matrix.whole(own), wanted)
    assert (own != parameter[matrix.weight].data).sum() == 6
    other = torch.empty(own.stride()[::-1]).new_zeros(own.shape)
    matrix.fill(other, wanted)
    assert torch.equal(matrix.whole(other), wanted)
    # Whatever order the numbers of a parameter have in memory.
    turned = torch.zeros(own.shape[::-1]).permute(*reversed(range(own.ndim)))
    matrix.fill(turned, wanted)
    assert torch.equal(turned, other)


def test_groups_have_columns_of_their_own(models: dict[str, HookedModel]) -> None:
    model, x = models["mixed"], models["mixed"].input.example(3)
    matrix = matrix_of(model, "mix")
    assert (matrix.shape, matrix.groups) == ((HEADS * 3, WIDTH), HEADS)
    own = model.parameters["mix"].data
    blocks = torch.block_diag(*own.permute(1, 2, 0))
    every = [torch.arange(n) for n in matrix.shape]
    assert torch.equal(matrix.block(own, *every), blocks)
    wanted = by_hand(model, lambda p: p["mix"].data[1, 1, 1].mul_(2))
    with edited(model, [read_edit(model, "scale_weights into=made:4 from=read:5 factor=2")]):
        torch.testing.assert_close(model.logits(x), wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="no weights lead into made:4 from read:2"):
        read_edit(model, "scale_weights into=made:4 from=read:2")


FORMS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "@": ((WIDTH, 6), lambda x, w, b: x @ w + b, lambda w: w[:, 1]),
    "rmatmul": ((6, WIDTH), lambda x, w, b: (w @ x.mT).mT, lambda w: w[1]),
    "linear": ((6, WIDTH), F.linear, lambda w: w[1]),
    "addmm": ((WIDTH, 6), lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w).reshape(len(x), -1, 6), lambda w: w[:, 1]),
    "conv1d": ((6, WIDTH, 1), lambda x, w, b: F.conv1d(x.mT, w, b).mT, lambda w: w[1, :, 0]),
    "bmm": ((WIDTH, 6), lambda x, w, b: torch.bmm(x, w.expand(len(x), -1, -1)), lambda w: w[:, 1]),
    "copied": ((6, WIDTH), lambda x, w, b: x @ w.to(x.dtype).clone().t().contiguous() + b, lambda w: w[1]),
    "einsum": ((WIDTH, 6), lambda x, w, b: torch.einsum("bpm,mn->bpn", x, w) + b, lambda w: w[:, 1]),
    "dots": ((WIDTH, 6), lambda x, w, b: torch.einsum("...m,mn->...n", x, w) + b, lambda w: w[:, 1]),
    "flipped": ((WIDTH, 6), lambda x, w, b: x @ w.flip(1), lambda w: w[:, 4]),
    "every other": ((WIDTH, 12), lambda x, w, b: x @ w[:, ::2] + b, lambda w: w[:, 2]),
    "across": ((7, WIDTH + 1), lambda x, w, b: x @ w.flatten()[3:99].view(6, WIDTH).T, lambda w: w.flatten()[19:35]),
    "vectors": ((2, 3, WIDTH), lambda x, w, b: x @ w.flatten(0, 1).mT, lambda w: w[0, 1]),
    "one row": ((WIDTH,), lambda x, w, b: F.linear(x, w)[..., None] * torch.ones(6), lambda w: w),
}  # fmt: skip


class Form(nn.Module):
    """A product of one form between two sites."""

    def __init__(self, name: str) -> None:
        super().__init__()
        shape, self.form, _ = FORMS[name]
        self.tokens, self.read, self.made = (
            nn.Embedding(N_VOCAB, WIDTH),
            nn.Identity(),
            nn.Identity(),
        )
        self.w, self.b = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(6))
        self.head = nn.Linear(6, N_VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.made(self.form(self.read(self.tokens(tokens)), self.w, self.b)))


@pytest.mark.parametrize("name", FORMS)
def test_products_of_many_forms(name: str) -> None:
    model, row = wrapped(Form(name)), FORMS[name][2]
    x, ends = model.input.example(3), "from=read:3,5"
    (matrix,) = [m for m in model.matrices if m.weight == "w"]
    part = {"across": ".flatten()[3:99]", "every other": "[:,0:11]"}.get(name, "")
    assert (matrix.name, matrix.calls, matrix.tied) == (f"w{part}", 1, ())
    own = model.parameters["w"].data
    if name != "one row":
        ends = f"into=made:1 {ends}"
        assert torch.equal(matrix.whole(own)[1], row(own))
    wanted = by_hand(model, lambda p: row(p["w"].data).index_fill_(0, torch.tensor([3, 5]), 0))
    with edited(model, [read_edit(model, f"scale_weights {ends}")]):
        torch.testing.assert_close(model.logits(x), wanted, rtol=1e-6, atol=1e-6)
    if matrix.bias:
        wanted = by_hand(model, lambda p: (row(p["w"].data).zero_(), p["b"].data[1].zero_()))
        with edited(model, [read_edit(model, "scale_weights into=made:1 bias=true")]):
            torch.testing.assert_close(model.logits(x), wanted, rtol=1e-6, atol=1e-6)


OPERATORS = [
    "scale_weights", "filter_weights", "keep_weights", "set_weights", "transplant", "low_rank", "associate",
    "erase_weights",
]  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ["multihead", "person", "stacked", "crossing-sequence"])
def test_every_operator_restores_to_the_bit(
    models: dict[str, HookedModel], name: str, operator: str
) -> None:
    model, draw, x = models[name], RandomEdits(models[name], 5), models[name].input.example(2)
    before, digest, moved = model.logits(x), model.hash, 0
    own = {key: p.data.clone() for key, p in model.parameters.items()}
    for _ in range(4):
        with edited(model, [draw.edit(operator)]):
            moved += not torch.equal(model.logits(x), before)
            assert model.intact_hash == digest
    assert moved
    assert torch.equal(model.logits(x), before)
    assert model.hash == digest
    assert all(torch.equal(own[key], p.data) for key, p in model.parameters.items())


@pytest.mark.parametrize("name", ["person", "stacked", "crossing"])
def test_edits_of_whole_layers_are_what_they_are_of_a_linear_one(
    models: dict[str, HookedModel], name: str
) -> None:
    """The same edit of an `nn.Linear` with the same rows, columns and biases."""
    model, draw = models[name], RandomEdits(models[name], 2)
    for operator in ("low_rank", "associate", "erase_weights"):
        edit = draw.edit(operator)
        matrix = matrix_of(model, edit.layer)  # type: ignore[attr-defined]
        own = model.parameters[matrix.weight].data
        linear = nn.Linear(matrix.shape[1], matrix.shape[0])
        linear.weight.data = matrix.whole(own).clone()
        every = torch.arange(matrix.shape[0])
        if matrix.bias:
            given = model.parameters[matrix.bias].data
            linear.bias.data = given[matrix.bias_index(given, every)].clone()
        else:
            linear.register_parameter("bias", None)
        module = nn.Sequential(nn.Embedding(N_VOCAB, matrix.shape[1]), linear)
        plain = HookedModel(module, TokenInput(N_VOCAB, CONTEXT))
        raw = edit.to_dict() | {"layer": "1"}
        with edited(model, [edit]), edited(plain, [parse_edit(json.loads(json.dumps(raw)))]):
            now = model.parameters
            assert torch.equal(matrix.whole(now[matrix.weight].data), linear.weight.data)
            if matrix.bias:
                given = now[matrix.bias].data
                assert torch.equal(given[matrix.bias_index(given, every)], linear.bias.data)


# --- recipes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["multihead", "encoder-sequence", "person", "apart", "stacked"])
def test_baked_weights_load_into_a_fresh_module(
    models: dict[str, HookedModel], name: str, tmp_path: Path
) -> None:
    model, x = models[name], models[name].input.example(2)
    v, z = site_of(model, "hook_v"), site_of(model, "hook_z")
    recipe = Recipe.of(
        model,
        [
            read_edit(model, f"scale_weights into={v}:0 factor=0 bias=true"),
            read_edit(model, f"scale_weights from={z}:1 factor=2"),
        ],
    )
    with edited(model, recipe):
        wanted, digest = model.logits(x), model.hash
    made = bake(model, recipe)
    assert made.hash == digest
    save_baked(made, tmp_path / "w.safetensors", model, recipe)
    fresh = MODELS[name]().eval()
    fresh.load_state_dict(made.module.state_dict())
    again = HookedModel(fresh, model.input, model.name)
    assert torch.equal(again.logits(x), wanted)
    assert again.hash == digest
    loaded = MODELS[name]().eval()
    loaded.load_state_dict(read_weights(tmp_path / "w.safetensors"))
    assert torch.equal(HookedModel(loaded, model.input).logits(x), wanted)


def test_a_ledger_undoes_to_the_bit(models: dict[str, HookedModel], tmp_path: Path) -> None:
    for name in ("multihead", "person"):
        model, x = models[name], models[name].input.example(2)
        ledger, draw = Ledger(Database(tmp_path / f"{name}.db"), model), RandomEdits(model, 1)
        plain = model.logits(x)
        ledger.apply([draw.edit("scale_weights"), draw.edit("set_weights")], "first")
        with ledger.edited():
            assert not torch.equal(model.logits(x), plain)
        ledger.undo()
        ledger.undo()
        with ledger.edited():
            assert torch.equal(model.logits(x), plain)
        assert all(r.same for r in ledger.replay())


_FILE = """
from circuits import HookedModel, TokenInput
from circuits.weights.connections import incoming
from tests.conftest import seeded
from tests.person_models import Multihead, Person

def multihead():
    return HookedModel(seeded(Multihead(False)), TokenInput(20, 12), "multihead")

def person():
    return HookedModel(seeded(Person()), TokenInput(20, 12), "person")
"""


@pytest.mark.parametrize("name", ["multihead", "person"])
def test_the_command_line_edits_undoes_and_bakes(
    capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(WORKSPACE, str(tmp_path / "cache"))
    (tmp_path / "mine.py").write_text(_FILE)
    model, weights = f"python:{tmp_path / 'mine.py'}:{name}", str(tmp_path / "w.safetensors")

    def said(*arguments: str) -> str:
        assert run(["edit", *arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    text = "scale_weights into=blocks.0.attn.hook_v:3 factor=0 bias=true"
    said("apply", model, text, "--no-measure")
    assert json.loads(said("replay", model, "--json"))["same"] is True
    assert "undone" in said("undo", model)
    said("bake", model, weights, text)
    stored = read_weights(Path(weights))
    plain = MODELS[name]().eval()
    seeded(plain)
    value, bias = (where(dict(plain.named_parameters()), "v", 3) for where in HAND[name])
    value.zero_()
    bias.zero_()
    assert all(torch.equal(stored[key], own) for key, own in plain.state_dict().items())


@pytest.mark.parametrize(
    ("name", "layer"), [("multihead", "layers.1.mix.out_proj"), ("person", "narrow1")]
)
def test_one_fact_is_stored_in_a_parameter(
    models: dict[str, HookedModel], name: str, layer: str
) -> None:
    model = models[name]
    prompts = torch.randint(0, N_VOCAB, (40, 6), generator=torch.Generator().manual_seed(0))
    moment = second_moment(model, layer, prompts.split(8))
    edit = associate(model, layer, prompts[:1], 7, moment, steps=60)
    before = model.logits(prompts)[0, -1].softmax(-1)[7]
    with edited(model, [edit]):
        assert model.logits(prompts)[0, -1].softmax(-1)[7] > 2 * before


def test_edits_of_other_parts_of_a_parameter_commute(models: dict[str, HookedModel]) -> None:
    model = models["crossing"]
    q, k, v = (site_of(model, f"hook_{letter}") for letter in "qkv")

    def edit(into: str) -> object:
        return read_edit(model, f"scale_weights into={into} factor=2")

    assert commute(model, edit(f"{q}:0"), edit(f"{k}:0"))  # type: ignore[arg-type]
    assert commute(model, edit(f"{v}:0"), edit(f"{v}:1"))  # type: ignore[arg-type]
    assert not commute(model, edit(f"{v}:0,1"), edit(f"{v}:1"))  # type: ignore[arg-type]


def test_heads_of_a_vision_transformer_own_rows_and_columns() -> None:
    model = HookedModel(seeded(VisionTransformer()), VisionTransformer.input_shape, "vit")
    x = model.input.example(2)
    for text, change in (
        ("into=blocks.0.attn.hook_v:1", lambda p: p["blocks.0.qkv.weight"].data[20:24].zero_()),
        ("from=blocks.1.attn.hook_z:0", lambda p: p["blocks.1.proj.weight"].data[:, :4].zero_()),
    ):
        module = copy.deepcopy(model.module)
        change(dict(module.named_parameters()))
        with edited(model, [read_edit(model, f"scale_weights {text}")]):
            torch.testing.assert_close(model.logits(x), module(x), rtol=1e-6, atol=1e-6)


# --- what is refused, or changed only by name ------------------------------------------------------


class Computed(nn.Module):
    """A head of a person's whose weights are computed: masked, joined of two, or changed in place before their use."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.tokens, self.made, self.how = nn.Embedding(N_VOCAB, WIDTH), nn.Identity(), how
        self.w, self.more = nn.Parameter(torch.zeros(8, WIDTH)), nn.Parameter(torch.zeros(8, WIDTH))

    def weights(self) -> Tensor:
        if self.how == "masked":
            return self.w * (torch.arange(WIDTH) % 2)
        if self.how == "joined":
            return torch.cat([self.w, self.more])
        if self.how == "repeated":
            return self.w.repeat(2, 1)
        if self.how == "picked":
            return self.w[[3, 1, 3]]
        copied = self.w.clone()
        copied[0] = 1
        return copied

    def forward(self, tokens: Tensor) -> Tensor:
        return self.made(self.tokens(tokens) @ self.weights().T)


@pytest.mark.parametrize("how", ["masked", "joined", "repeated", "picked", "written"])
def test_weights_that_are_computed_are_refused(how: str) -> None:
    model = wrapped(Computed(how))
    assert not model.matrices
    with pytest.raises(
        ValueError, match=r"^no weights lead into made:1: no layer writes made \(we"
    ):
        read_edit(model, "scale_weights into=made:1")
    with pytest.raises(KeyError, match="whose weights are computed from other parameters"):
        layer_named(model.matrices, "w")


class Shared(nn.Module):
    """A table that is looked up and multiplied with, and weights that are used twice, once turned."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second = (
            nn.Embedding(N_VOCAB, WIDTH),
            nn.Identity(),
            nn.Identity(),
        )
        self.w, self.turned = (nn.Parameter(torch.zeros(WIDTH, WIDTH)) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.first((self.embed(tokens) @ self.w).relu() @ self.w)
        x = self.second((x @ self.turned).relu()) @ self.turned.T
        return F.linear(x, self.embed.weight)


def test_what_else_changes_is_named() -> None:
    model = wrapped(Shared())
    named = {m.name: (m.tied, m.calls) for m in model.matrices}
    assert named == {
        "embed": (("embed/embedding@0",), 1),
        "w": ((), 2),
        "turned": (("turned@1",), 1),
        "turned@1": (("turned",), 1),
    }
    with pytest.raises(
        ValueError, match="layer embed shares its weights with embed/embedding@0: n"
    ):
        read_edit(model, "scale_weights into=output:3")
    with pytest.raises(
        ValueError, match="layer w runs 2 times in a pass, with the same weights: n"
    ):
        read_edit(model, "scale_weights into=first:3")
    with pytest.raises(ValueError, match="layer turned@1 shares its weights with turned: name"):
        read_edit(model, "scale_weights from=second:3")
    edit = read_edit(model, "scale_weights into=output:3 layer=embed factor=2")
    wanted = by_hand(model, lambda p: p["embed.weight"].data[3].mul_(2))
    with edited(model, [edit]):
        torch.testing.assert_close(
            model.logits(model.input.example(3)), wanted, rtol=1e-6, atol=1e-6
        )


class SharedBias(nn.Module):
    """Two layers whose biases are the same numbers: of a parameter, of two linear layers, or a row of the weights."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.tokens, self.first, self.second = (
            nn.Embedding(N_VOCAB, WIDTH),
            nn.Identity(),
            nn.Identity(),
        )
        self.how, self.one, self.two = how, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.two.bias = self.one.bias
        self.v, self.w = (nn.Parameter(torch.zeros(n, WIDTH)) for n in (WIDTH, WIDTH + 1))
        self.b = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        if self.how == "linear":
            return self.second(self.two(self.first(self.one(x)).relu()))
        before, after = (self.w[-1], self.w[0]) if self.how == "row" else (self.b, self.b)
        return self.second(self.first(x @ self.w[:-1] + before).relu() @ self.v + after)


@pytest.mark.parametrize(
    ("how", "layer", "others", "bias"),
    [
        ("function", "v", f"w[0:{WIDTH}]", lambda p: p["b"].data),
        ("linear", "two", "one", lambda p: p["one.bias"].data),
        ("row", "v", f"the weights of w[0:{WIDTH}]", lambda p: p["w"].data[0]),
    ],
)
def test_biases_that_something_else_uses_are_changed_only_by_name(
    how: str, layer: str, others: str, bias: Callable[[State], Tensor]
) -> None:
    model = wrapped(SharedBias(how))
    x, text = model.input.example(3), "scale_weights into=second:1 factor=-2"
    why = re.escape(f"layer {layer} shares its biases with {others}: name layer={layer} to change")
    with pytest.raises(ValueError, match=f"^{why} all of them$"):
        read_edit(model, f"{text} bias=true")
    with edited(model, [read_edit(model, text)]):
        seen = model.run(x, read=["first"])["first"]
    assert torch.equal(seen, model.run(x, read=["first"])["first"])

    def change(p: State) -> None:
        bias(p)[1] *= -2
        (p["two.weight"].data[1] if how == "linear" else p["v"].data[:, 1]).mul_(-2)

    wanted = by_hand(model, change)
    with edited(model, [read_edit(model, f"{text} bias=true layer={layer}")]):
        torch.testing.assert_close(model.logits(x), wanted, rtol=1e-6, atol=1e-6)


def test_weights_that_are_biases_elsewhere_are_changed_only_by_name() -> None:
    model = wrapped(SharedBias("row"))
    with pytest.raises(
        ValueError, match=r"^layer w\[0:16\] shares its weights with the biases of v"
    ):
        read_edit(model, "scale_weights into=first:1")


class Again(nn.Module):
    """A linear layer whose weight and bias functions use once more, computed with."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.tokens, self.first, self.second = (
            nn.Embedding(N_VOCAB, WIDTH),
            nn.Identity(),
            nn.Identity(),
        )
        self.how, self.q, self.norm = how, nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        if how == "norm":
            self.norm.bias = self.q.bias

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        first = self.first(self.q(x))
        if self.how == "masked":
            return self.second(F.linear(x, self.q.weight * (torch.arange(WIDTH) % 2))) + first
        return self.second(self.norm(first) * (self.how == "norm" or self.q.weight[3:].mean()))


def test_a_layers_parameters_that_functions_use_are_changed_only_by_name() -> None:
    for how, call in (("masked", "mul@0"), ("mean", "mean@0")):
        model = wrapped(Again(how))
        with pytest.raises(ValueError, match=f"^layer q shares its weights with {call}: name lay"):
            read_edit(model, "scale_weights into=first:3")
    (matrix,) = wrapped(Again("norm")).matrices
    assert (matrix.tied, matrix.bias_tied) == ((), ("norm/layer_norm@0",))
    (head,) = (m for m in wrapped(NanoGPT(False)).matrices if m.name == "lm_head")
    assert head.tied == ("transformer.wte",)


@pytest.mark.parametrize("form", ["alpha", "beta", "computed", "batched", "same"])
def test_biases_that_are_computed_are_not_left_out(form: str) -> None:
    def multiply(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if form == "computed":
            return F.linear(x, w.T, b * 2)
        if form == "batched":
            return torch.baddbmm(b, x, w.expand(len(x), -1, -1), beta=0.5)
        more = {"alpha": {"alpha": 2.0}, "beta": {"beta": 0.5}, "same": {"beta": 1, "alpha": 1.0}}
        made = torch.addmm(b, x.flatten(0, 1), w, **more[form])
        return made.unflatten(0, x.shape[:2])

    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.made = nn.Embedding(N_VOCAB, WIDTH), nn.Identity()
            self.w, self.b = nn.Parameter(torch.zeros(WIDTH, 8)), nn.Parameter(torch.zeros(8))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.made(multiply(self.tokens(tokens), self.w, self.b))

    axes = {"made": ("batch", "pos", "unit")}
    model = HookedModel(seeded(Adding()), TokenInput(N_VOCAB, CONTEXT), form, axes=axes)
    text = "scale_weights into=made:1 factor=0 bias=true"
    if form != "same":
        with pytest.raises(ValueError, match="no layer writes made"):
            read_edit(model, text)
        return
    with edited(model, [read_edit(model, text)]):
        seen = model.run(model.input.example(3), read=["made"])["made"]
    assert not seen[..., 1].any()


class OneMemory(nn.Module):
    """A parameter in the memory of another, turned or not, or part of which another tensor is."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.tokens, self.first, self.second = (
            nn.Embedding(N_VOCAB, WIDTH),
            nn.Identity(),
            nn.Identity(),
        )
        self.one = nn.Parameter(torch.zeros(WIDTH, WIDTH))
        data = self.one.data
        taken = {"same": data, "turned": data.T, "part": data[3:5], "apart": data[:, ::2]}
        self.unused = data  # no pass takes it, and it is not kept with the weights
        self.two = taken[how] if how == "part" else nn.Parameter(taken[how])
        if how == "apart":
            self.one = nn.Parameter(self.one.data[:, 1::2])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        first = self.first(x @ self.one)
        two = self.two.T if len(self.two) < WIDTH else self.two
        return self.second(x @ two).sum(-1, keepdim=True) + first


@pytest.mark.parametrize("how", ["same", "turned", "part"])
def test_parameters_in_the_memory_of_others_are_refused(how: str) -> None:
    model = wrapped(OneMemory(how))
    named = {end.site: m.name for m in model.matrices for end in m.writes}
    assert named["first"] == "one"
    why = "^one of layer one lies in the same memory as two, and an edit would change only one of"
    with pytest.raises(ValueError, match=why):
        read_edit(model, "scale_weights into=first:1 layer=one")
    erased = EraseWeights("one", torch.eye(WIDTH)[:, :1])
    with pytest.raises(ValueError, match=why):
        erased.checked(model)
    if how != "part":
        assert named["second"] == "two"
        with pytest.raises(
            ValueError, match=r"^two of layer two lies in the same memory as one, a"
        ):
            read_edit(model, "scale_weights into=second:1")


class Sliced(nn.Module):
    """Two parts of a parameter that read one site."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.first, self.second = (
            nn.Embedding(N_VOCAB, WIDTH),
            nn.Identity(),
            nn.Identity(),
        )
        self.w = nn.Parameter(torch.zeros(WIDTH, 16))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        return self.first(x @ self.w[:, :8]) * self.second(x @ self.w[:, 8:])


def test_all_parts_of_a_parameter_that_read_a_unit_are_changed() -> None:
    model = wrapped(Sliced())
    wanted = by_hand(model, lambda p: p["w"].data[3].mul_(-2))
    with edited(model, [read_edit(model, "scale_weights source=tokens:3 factor=-2")]):
        torch.testing.assert_close(
            model.logits(model.input.example(3)), wanted, rtol=1e-6, atol=1e-6
        )


def test_the_matrix_is_named_where_no_layer_writes_a_unit(models: dict[str, HookedModel]) -> None:
    for name, part in (("person", "query0"), ("multihead", "layers.0.mix.in_proj_weight")):
        model = models[name]
        unit = model.site(site_of(model, "hook_q")).unit(1)
        written = f"the weights {part} of {model.name} write {unit}, and edits change them, but con"
        with pytest.raises(ValueError, match=re.escape(written)):
            incoming(model, unit)


def test_parameters_between_the_numbers_of_others_are_edited() -> None:
    model = wrapped(OneMemory("apart"))
    x, sites = model.input.example(3), ["first", "second"]
    plain = model.run(x, read=sites)
    with edited(model, [read_edit(model, "scale_weights into=first:1 factor=3")]):
        seen = model.run(x, read=sites)
    torch.testing.assert_close(seen["first"][..., 1], 3 * plain["first"][..., 1])
    assert torch.equal(seen["second"], plain["second"])


class Choosing(nn.Module):
    """Which weights it uses depends on its numbers: with random ones it takes the others."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.read, self.made = (
            nn.Embedding(N_VOCAB, WIDTH),
            nn.Identity(),
            nn.Identity(),
        )
        self.one, self.other = (nn.Parameter(torch.zeros(WIDTH, WIDTH)) for _ in range(2))
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor) -> Tensor:
        weights = self.one if float(self.gate) == 5 else self.other
        return self.made(self.read(self.tokens(tokens)) @ weights)


def test_other_weights_in_the_same_place_are_not_taken_for_them() -> None:
    module = seeded(Choosing())
    module.get_parameter("gate").data.fill_(5)
    model = HookedModel(module, TokenInput(N_VOCAB, CONTEXT), "choosing")
    (matrix,) = model.matrices
    assert (matrix.name, matrix.reads, matrix.writes) == ("one", (), ())
    with pytest.raises(ValueError, match="no layer writes made"):
        read_edit(model, "scale_weights into=made:1")
