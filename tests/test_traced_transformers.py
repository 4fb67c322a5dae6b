"""Residual streams and weights of transformers that are no bridges, next to bridges and to weights read off by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuits.attribution.logits import direct_logit_attribution
from circuits.edits.recipes import edited
from circuits.edits.records import read_edit
from circuits.experiments.patching import patch_paths
from circuits.models.adapter.composition import composition_scores, ov, qk
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.adapter.transformer import Letter, Transformer
from circuits.models.paths.routes import stream_of
from circuits.weights import ov_circuit, qk_circuit
from tests.attention_models import CASES, Case
from tests.person_models import CONTEXT, N_VOCAB, NanoGPT
from tests.transformer_families import bridged

FAMILIES = ("gpt2", "gpt-j", "falcon", "llama", "gemma2", "olmo2", "cohere", "opt")
"""Learned and rotary positions, parallel layers, one key for all heads, norms after attention and of queries, scaled
and capped logits, an MLP whose rows are not by example."""


@pytest.fixture(scope="module", params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[HookedModel, HookedModel]:
    """A model as a bridge and as its own module."""
    bridge, inner = bridged(request.param, tmp_path_factory.mktemp(request.param))
    return bridge, HookedModel(inner, bridge.input, request.param)


def names(model: HookedModel) -> dict[str, str]:
    return {name: site.name for site in model.sites for name in (site.name, *site.aliases)}


def test_the_stream_of_another_run_put_in_gives_that_runs_logits(
    pair: tuple[HookedModel, HookedModel],
) -> None:
    """A change of the stream reaches all that reads it, skip connections too (Gemma 2's norms begin with a cast)."""
    _, traced = pair
    clean = traced.input.example(2)
    other = clean.flip(0).roll(1, 1)
    sites = [s for s in ("hook_embed", "blocks.0.hook_resid_post") if s in names(traced)]
    there = traced.run(other, read=sites)
    wanted = traced.logits(other)
    assert not torch.allclose(traced.logits(clean), wanted)
    for site in sites:
        made = traced.logits(clean, {site: lambda _, site=site: there[site] * 1})
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)


LAID_OUT = ("q_normed", "k_normed")
"""Where bridges show the layout of the module that they wrap, heads not split or before positions."""


def test_sites_hold_what_those_of_a_bridge_hold(pair: tuple[HookedModel, HookedModel]) -> None:
    bridge, traced = pair
    tokens = bridge.input.example(2)
    shared = [n for n in names(traced) if n in names(bridge) and not n.endswith(LAID_OUT)]
    for layer in (0, 1):
        some = (
            "attn.hook_q",
            "attn.hook_k",
            "attn.hook_v",
            "attn.hook_pattern",
            "attn.hook_z",
            "hook_resid_post",
        )
        assert {f"blocks.{layer}.{part}" for part in some} <= set(shared)
    one, other = bridge.run(tokens, read=shared), traced.run(tokens, read=shared)
    for name in shared:
        assert traced.site(name).axes == bridge.site(name).axes
        torch.testing.assert_close(
            other[name], one[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_weights_and_parts_of_logits_are_those_of_a_bridge(
    pair: tuple[HookedModel, HookedModel],
) -> None:
    one, other = (Transformer(model) for model in pair)
    for make in (qk, ov):
        for head in (0, 3):
            wanted, made = (make(transformer, 1, head) for transformer in (one, other))
            torch.testing.assert_close(
                made.left @ made.right, wanted.left @ wanted.right, rtol=1e-4, atol=1e-5
            )
    scores = [composition_scores(ov(t, 0, 1), qk(t, 1, 2), ov(t, 1, 2)) for t in (one, other)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)
    found, again = (direct_logit_attribution(m, m.input.example(2), "token:3") for m in pair)
    assert set(again.names) == set(found.names)
    for name, values in zip(again.names, again.values.T, strict=True):
        wanted = found.values[:, found.names.index(name)]
        torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt-j", "gemma2"])
def test_paths_have_the_effects_that_they_have_in_a_bridge(family: str, tmp_path: Path) -> None:
    bridge, inner = bridged(family, tmp_path)
    traced = HookedModel(inner, bridge.input, family)
    clean = bridge.input.example(2)
    corrupted = (clean + 3) % N_VOCAB
    some = [
        ("0.1", "1.2.q"),
        ("token", "logits"),
        ("mlp:0", "1.0.v"),
        ("0.3", "mlp:1"),
        ("1.1", "logits"),
    ]
    found, again = (patch_paths(m, clean, corrupted, some) for m in (bridge, traced))
    assert bool((found.effects.abs().amax(1) > 1e-4).all())
    torch.testing.assert_close(again.effects, found.effects, rtol=1e-3, atol=1e-5)


BY_HAND = {name: case for name, case in CASES.items() if case.qk is not None and not case.refused}


@pytest.mark.parametrize("name", BY_HAND)
def test_weights_by_head_are_those_of_the_state_dict(name: str) -> None:
    case: Case = BY_HAND[name]
    module = case.make(case.implementations[0])
    model = HookedModel(module, case.input, name)
    if isinstance(model.transformer, str):
        pytest.skip(f"no residual stream: {model.transformer}")
    found = Transformer(model)
    letters: tuple[Letter, ...] = ("Q", "K", "V")
    for layer in range(len(found.layers)):
        out, _ = found.writes_of(layer)
        for head in range(len(out)):
            query, key, value = (found.reads(letter, layer, head)[0] for letter in letters)
            where = f"blocks.{layer}.attn"
            torch.testing.assert_close(query @ key.T, _double(case.qk(module, where, head)))
            torch.testing.assert_close(value @ out[head], _double(case.ov(module, where, head)))


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double()


def test_weights_that_are_not_those_of_the_heads_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = HookedModel(NanoGPT(slow=True), TokenInput(N_VOCAB, CONTEXT), "nano")
    transformer = Transformer(model)
    assert not isinstance(model.transformer, str)
    turned = model.transformer.attention

    def wrong(name: str, layer: int) -> Tensor | None:
        found = turned(name, layer)  # type: ignore[arg-type]
        return found if found is None or name != "W_K" else found.flip(0)

    monkeypatch.setattr(transformer.parts, "attention", wrong)
    with pytest.raises(
        ValueError, match=r"blocks\.1\.attn\.hook_k of nano is off by .* of its size"
    ):
        transformer.reads("K", 1, 0)


def test_a_model_without_a_stream_says_why() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(N_VOCAB, 8)
            self.mix = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            return self.mix(x, x, x, need_weights=False)[0]

    model = HookedModel(Alone(), TokenInput(N_VOCAB, 6), "alone")
    assert model.site("blocks.0.attn.hook_z").shape == (6, 2, 4)
    with pytest.raises(
        ValueError,
        match=r"model alone has no residual stream: what blocks\.0\.attn puts out is added to",
    ):
        stream_of(model)


class Written(nn.Module):
    """A model of one layer of causal attention, written out, with what differs between the tests as methods."""

    heads, groups, width = 4, 4, 16

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        d = self.width // self.heads
        self.embed, self.unembed = nn.Embedding(N_VOCAB, self.width), nn.Linear(self.width, N_VOCAB)
        self.layers = nn.ModuleList(
            nn.ModuleDict({
                "q": nn.Linear(self.width, self.width),
                "k": nn.Linear(self.width, d * self.groups),
                "v": nn.Linear(self.width, d * self.groups),
                "o": nn.Linear(self.width, self.width),
            })
            for _ in range(layers)
        )  # fmt: skip

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.width // self.heads)).transpose(1, 2)

    def weighs(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def reads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[-2]
        scores = q @ k.mT / q.shape[-1] ** 0.5 + torch.full((n, n), -1e9).triu(1)
        return (self.weighs(scores) @ v).transpose(1, 2).flatten(2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            q, k, v = (self.split(layer[name](x)) for name in "qkv")  # type: ignore[index]
            x = x + layer["o"](self.reads(q, k, v))  # type: ignore[index]
        return self.unembed(x)


def written(module: nn.Module) -> HookedModel:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return HookedModel(module, TokenInput(N_VOCAB, CONTEXT), "written")


def test_heads_that_lie_before_examples_are_told_from_examples() -> None:
    class HeadsFirst(Written):
        def reads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            b, n = len(q), q.shape[2]
            q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))
            mask = torch.full((n, n), -1e9).triu(1)
            z = (torch.bmm(q, k.mT) / 2 + mask).softmax(-1) @ v
            return z.unflatten(0, (self.heads, b)).permute(1, 2, 0, 3).flatten(2)

    first = written(HeadsFirst())
    same = written(Written())
    tokens = same.input.example(3)
    read = [f"blocks.0.attn.hook_{part}" for part in ("q", "k", "v", "pattern", "z")]
    found, wanted = first.run(tokens, read=read), same.run(tokens, read=read)
    for name in read:
        torch.testing.assert_close(found[name], wanted[name])


def test_heads_that_share_keys_in_turn_have_the_weights_of_theirs() -> None:
    class Tiled(Written):
        groups = 2

        def reads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return super().reads(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))

    model = written(Tiled())
    weight = model.module.layers[0]["v"].weight.detach().double()  # type: ignore[index, union-attr]
    for head in range(4):
        made = Transformer(model).reads("V", 0, head)[0]
        torch.testing.assert_close(made, weight[4 * (head % 2) :][:4].T)


def test_values_that_are_changed_before_they_are_weighed_have_no_weights_of_their_own() -> None:
    class Scaled(Written):
        def reads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return super().reads(q, k, v.relu() * 2.5)

    transformer = Transformer(written(Scaled()))
    for _ in range(2):  # what was refused once is refused again
        with pytest.raises(ValueError, match=r"blocks\.0\.attn\.hook_z of written is off by"):
            transformer.reads("V", 0, 1)


def test_values_without_weights_are_what_is_weighed() -> None:
    """The stream itself, split into heads, and not what an earlier layer adds to it."""
    module = Written(2)
    for layer in module.layers:
        layer["v"] = nn.Identity()  # type: ignore[index, operator]
    model = written(module)
    tokens = model.input.example(2)
    read = [f"blocks.1.attn.hook_{part}" for part in ("pattern", "v", "z", "q")]
    found = model.run(tokens, read=[*read, "blocks.1.hook_resid_pre"])
    pattern, v, z, q = (found[name] for name in read)
    assert torch.equal(v.flatten(2), found["blocks.1.hook_resid_pre"])
    torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", pattern, v), z)
    with edited(model, [read_edit(model, "zero blocks.1.attn.hook_v:0")]):
        changed = model.run(tokens, read=read[2:])
    assert torch.equal(changed[read[3]], q)
    assert not changed[read[2]][:, :, 0].any()
    assert torch.equal(changed[read[2]][:, :, 1:], z[:, :, 1:])
    (output,) = [one for one in model.matrices if one.name == "layers.0.o"]
    assert not [edge.site for edge in output.writes if edge.site.endswith("hook_v")]
    with pytest.raises(ValueError, match="layer 1 of written has no matrix W_V"):
        ov_circuit(model, "blocks.1.attn.hook_z:0")


def test_values_that_are_what_queries_read_are_changed_alone() -> None:
    """Without a stream they are what the layer before puts out, which is no projection of the next layer's."""

    class InARow(Written):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            for layer in self.layers:
                own: Any = layer
                q, k, v = (self.split(x if n == "v" else own[n](x)) for n in "qkv")
                x = own["o"](self.reads(q, k, v))
            return self.unembed(x)

    model = written(InARow(2))
    tokens = model.input.example(2)
    read = [f"blocks.1.attn.hook_{part}" for part in ("q", "k", "z")]
    before = model.run(tokens, read=read)
    with edited(model, [read_edit(model, "zero blocks.1.attn.hook_v:0")]):
        after = model.run(tokens, read=read)
    assert torch.equal(after[read[0]], before[read[0]])
    assert torch.equal(after[read[1]], before[read[1]])
    assert not after[read[2]][:, :, 0].any()
    with pytest.raises(ValueError, match="has no matrix W_V"):
        ov_circuit(model, "blocks.1.attn.hook_z:0")


class Talking(Written):
    def reads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT / 2
        mixed = scores + 0.3 * scores.flip(1) + torch.full(scores.shape[-2:], -1e9).triu(1)
        return (mixed.softmax(-1) @ v).transpose(1, 2).flatten(2)


class ContentBias(Written):
    def __init__(self) -> None:
        super().__init__()
        self.content = nn.Parameter(torch.zeros(4, 4))

    def reads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().reads(q + self.content[:, None], k, v)


class Negative(Written):
    def reads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().reads(q * -1, k, v)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (Talking, r"no bilinear form q R\(offset\) k\^T of a head's own queries and keys"),
        (ContentBias, r"head 0 scores keys even with queries of zeros: something is added"),
        (Negative, r"the scores of head 0 are q \. k times -0\.5, which is not above 0"),
    ],
)
def test_scores_that_are_not_of_a_heads_own_weights_are_refused(
    made: type[Written], words: str
) -> None:
    """Heads that are mixed before the softmax, Transformer-XL's content bias, and a negative factor."""
    with pytest.raises(ValueError, match=f"layer 0 of written: .*{words}"):
        qk_circuit(written(made()), "blocks.0.attn.hook_z:1")


class OfAnotherWidth(Written):
    """Values are made of what a narrow layer makes of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0]["v"] = nn.Sequential(nn.Linear(16, 7), nn.Linear(7, 16))  # type: ignore[index, operator]


class Quartered(Written):
    """Queries are made of a quarter of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0]["q"] = nn.Sequential(Times(0.25), nn.Linear(16, 16))  # type: ignore[index, operator]


class WithOnes(Written):
    """Biases are a row of the weights of queries, keys and values, which are given ones beside the stream."""

    def __init__(self) -> None:
        super().__init__()
        for name in "qkv":
            self.layers[0][name] = Joined(nn.Linear(17, 16, bias=False))  # type: ignore[index, operator]


class Joined(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.cat([x, torch.ones_like(x[..., :1])], -1))


def test_ones_that_are_joined_to_vectors_are_no_normalisation() -> None:
    with pytest.raises(ValueError, match=r"ln1 of written returns 17 numbers for a vector of 16"):
        ov_circuit(written(WithOnes()), "blocks.0.attn.hook_z:1")


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (
            OfAnotherWidth,
            r"values of another tensor .* \(of the shape \(3, \d+, 7\), where that has",
        ),
        (Quartered, r"queries of another tensor than the stream before it \(scaled or changed\)"),
    ],
)
def test_heads_that_read_something_else_than_the_stream_are_refused(
    made: type[Written], words: str
) -> None:
    model = written(made())
    for circuit in (qk_circuit, ov_circuit):
        with pytest.raises(ValueError, match=f"layer 0 of written makes its {words}"):
            circuit(model, "blocks.0.attn.hook_z:1")


def test_keys_through_a_narrow_layer_are_of_no_encoder() -> None:
    """Their heads have circuits all the same, between what each projection is given."""
    module = Written()
    module.layers[0]["k"] = nn.Sequential(nn.Linear(16, 7), nn.Linear(7, 16))  # type: ignore[index, operator]
    model = written(module)
    (unit,) = [site.name for site in model.sites if site.name.endswith("hook_z")]
    with pytest.raises(
        ValueError, match=r"the keys of \S+ are made of what its queries read by seve"
    ):
        stream_of(model)
    layer: Any = module.layers[0]
    found = qk_circuit(model, f"{unit}:1").matrix[0]
    wanted = layer["q"].weight[4:8].T @ layer["k"][1].weight[4:8]
    torch.testing.assert_close(found, wanted.detach())


class AnotherKey(Written):
    """A key of zeros, which is of no token (`add_zero_attn`)."""

    def reads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (torch.cat([x, torch.zeros_like(x[:, :, :1])], 2) for x in (k, v))
        return ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Pooled(Written):
    """Keys and values are means over all tokens but the first, and the first."""

    def reads(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (torch.stack([x[:, :, 0], x[:, :, 1:].mean(2)], 2) for x in (k, v))
        return ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Latent(nn.Module):
    """A number of queries that is learned reads tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.latent = nn.Embedding(N_VOCAB, 16), nn.Parameter(torch.zeros(5, 16))
        self.inner, self.unembed = Written(), nn.Linear(16, N_VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x, y, inner = self.embed(tokens), self.latent.expand(len(tokens), -1, -1), self.inner
        layer: Any = inner.layers[0]
        q, k, v = (
            inner.split(layer[name](given)) for name, given in zip("qkv", (y, x, x), strict=True)
        )
        z = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.unembed(y + layer["o"](z))


@pytest.mark.parametrize("made", [AnotherKey, Pooled, Latent])
def test_keys_and_queries_that_are_not_one_for_each_token_are_refused(
    made: type[nn.Module],
) -> None:
    with pytest.raises(
        ValueError, match=r"positions are merged|not one for each token|no residual"
    ):
        qk_circuit(written(made()), "blocks.0.attn.hook_z:1")


def test_several_softmaxes_that_weigh_the_same_values_are_no_heads() -> None:
    class Differential(Written):
        def weighs(self, scores: Tensor) -> Tensor:
            return scores.softmax(-1) - 0.3 * (scores * 2).softmax(-1)

    model = written(Differential())
    assert not [site for site in model.sites if site.kind == "head"]
    assert any("several softmaxes" in why for why in model.left_out.values())


def test_a_pattern_that_is_changed_after_its_softmax_is_what_weighs_the_values() -> None:
    class Renormalised(Written):
        def weighs(self, scores: Tensor) -> Tensor:
            pattern = super().weighs(scores)
            kept = pattern * (pattern >= pattern.topk(2, -1).values[..., -1:])
            return kept / kept.sum(-1, keepdim=True)

    model = written(Renormalised())
    read = [f"blocks.0.attn.hook_{part}" for part in ("pattern", "v", "z")]
    found = model.run(model.input.example(2), read=read)
    pattern, v, z = (found[name] for name in read)
    assert int((pattern[0, 0, -1] > 0).sum()) < 6  # of 12 keys
    torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", pattern, v), z)


def test_what_an_adapter_adds_is_part_of_queries_and_no_mlp() -> None:
    class Adapted(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner
            self.down, self.up = nn.Linear(inner.in_features, 2), nn.Linear(2, inner.out_features)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 2 * self.up(self.down(x))

    queries, outputs = Written(2), Written(2)
    queries.layers[0]["q"] = Adapted(queries.layers[0]["q"])  # type: ignore[index, operator]
    outputs.layers[0]["o"] = Adapted(outputs.layers[0]["o"])  # type: ignore[index, operator]
    model = written(queries)
    tokens = model.input.example(2)
    found = model.run(tokens, read=["layers.0.q", "blocks.0.attn.hook_q"])
    assert torch.equal(found["layers.0.q"], found["blocks.0.attn.hook_q"].flatten(2))
    with pytest.raises(ValueError, match="layer 0 of written has no matrix W_Q"):
        Transformer(model).reads("Q", 0, 0)
    adapted = written(outputs)
    assert adapted.site("blocks.0.attn.hook_z").n_units == 4
    with pytest.raises(ValueError, match="written has no residual stream: "):
        Transformer(adapted)


@pytest.mark.parametrize(
    "name", [n for n in BY_HAND if n.startswith(("torch", "multi", "func", "gpt2"))]
)
def test_heads_and_parts_add_up_in_every_layout(name: str) -> None:
    case: Case = BY_HAND[name]
    model = HookedModel(case.make(case.implementations[0]), case.input, name)
    transformer = Transformer(model)
    tokens = model.input.example(2)
    found = direct_logit_attribution(model, tokens, "token:3")
    logits = model.logits(tokens)[:, -1, 3]
    torch.testing.assert_close(found.values.sum(1), logits.float(), rtol=1e-4, atol=1e-5)
    if "post-norm" not in name:  # else what a head adds is normalised with the stream
        assert "blocks.1.attn.hook_z:2" in found.names
        assert ov(transformer, 1, 2).left.shape == (16, 4)
