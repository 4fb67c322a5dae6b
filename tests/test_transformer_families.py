"""Norms, direct logit attribution and heads' weights, on models of many families, against their own modules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuits.attribution import direct_logit_attribution
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.norms import measure_norm
from circuits.models.zoo.loading import load_model
from circuits.weights import direct_logits, head_composition, ov_circuit, qk_circuit
from tests.transformer_families import (
    FAMILIES,
    HEADS,
    LAYERS,
    N_VOCAB,
    WIDTH,
    Watched,
    bias_of,
    bridged,
    centred,
    saved,
    watched,
    weight_of,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # other packages' own

TOKENS = torch.randint(N_VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
REFUSED = {"openai-gpt", "codegen", "phimoe"}
SPLIT = sorted(set(FAMILIES) - REFUSED - {"mamba"})
"""The families whose layers are split into heads and MLP."""


class Oddity(nn.Module):
    """Divides each half of a vector by its own length."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([half / half.norm(dim=-1, keepdim=True) for half in x.chunk(2, -1)], -1)


class OnePlus(nn.Module):
    """A norm whose gain is one more than its weight, over a root mean square of d_model = 5 and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([-1.0, 0.5, 2.0, -3.0, 0.0]))
        self.bias = nn.Parameter(torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return (
            x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + self.weight) + self.bias
        )


def test_what_a_norm_does_is_found_by_feeding_it_vectors() -> None:
    found = measure_norm(OnePlus().bfloat16(), 5)
    torch.testing.assert_close(found.gain, torch.tensor([0.0, 1.5, 3.0, -2.0, 1.0]).double())
    torch.testing.assert_close(found.bias, torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0]).double())
    assert (found.centred, found.divides) == (False, True)
    x = torch.tensor([[3.0, 0.0, 0.0, 0.0, 4.0]]).double()
    torch.testing.assert_close(found.factor(x), torch.tensor([[5**-0.5]]).double())
    plain = nn.LayerNorm(7)
    torch.nn.init.normal_(plain.weight, generator=torch.Generator().manual_seed(0))
    layer = measure_norm(plain, 7)
    assert layer.centred
    torch.testing.assert_close(layer.gain, plain.weight.detach().double())
    row, other = torch.randn(2, 1, 7, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(layer.held(row, row) + layer.bias, plain.double()(row).detach())
    torch.testing.assert_close(
        (layer.adjoint(other) * row).sum(), (other * layer.linear(row)).sum()
    )
    assert not measure_norm(nn.Identity(), 7).divides
    with pytest.raises(ValueError, match=r"normalisation ln1 \(Oddity\) is not of the form"):
        measure_norm(Oddity(), 6, "ln1")


NIGHTLY = {
    "gpt-neox-serial", "gpt-bigcode", "qwen3-moe", "olmo3", "olmoe", "glm", "glm4", "exaone4", "xglm", "arcee",
    "seed-oss",
}  # fmt: skip
"""Families whose parts other families have as well."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(f, marks=[pytest.mark.nightly] * (f in NIGHTLY)) for f in SPLIT],
)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def loaded(family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[HookedModel, Watched]:
    """A family's bridge, and what the Hugging Face model's own modules compute on `TOKENS`."""
    model, inner = bridged(family, tmp_path_factory.mktemp(family))
    return model, watched(inner, TOKENS)


@pytest.fixture(scope="module", params=["bridge", "traced"])
def both(
    request: pytest.FixtureRequest, family: str, loaded: tuple[HookedModel, Watched]
) -> tuple[HookedModel, Watched]:
    """The same with the model as a bridge, and as its own module, whose parts are found by tracing."""
    model, seen = loaded
    if request.param == "traced":
        model = HookedModel(seen.inner, model.input, family)
    return model, seen


def parts_of(seen: Watched, family: str, token: int, traced: bool) -> Iterator[tuple[str, Tensor]]:
    """The parts of a token's logit at the last position, computed from a model's own modules."""
    known, inner = FAMILIES[family], seen.inner
    readout: Any = inner.get_output_embeddings()
    final = next(n for n in reversed(seen.outputs) if "norm" in n.lower() or n.endswith("ln_f"))
    read = seen.gain(final)[:, -1] * readout.weight.detach().double()[token]

    def adds(part: Tensor) -> Tensor:
        return (centred(inner.get_submodule(final), part) * read).sum(-1)

    embedded = seen.stream(0)[:, -1]
    places = [n for n in seen.outputs if n.endswith(("wpe", "embed_positions"))]
    # The positions of XGLM are shown where the model is traced, and are no part of the bridge.
    if places and (family != "xglm" or traced):
        position = seen.outputs[places[0]][..., -1, :].expand_as(embedded)
        yield "pos_embed", adds(position)
        embedded = embedded - position
    yield "embed", adds(embedded)
    for i, layer in enumerate(seen.layers):
        name = seen.output_weights(i)
        out, z = weight_of(inner.get_submodule(name)), seen.inputs[name][:, -1]
        bias = bias_of(inner.get_submodule(name))
        # A norm by the root mean square multiplies each entry, and so each head's share of it.
        after, last = (torch.full((1,), known.added),) * 2
        if known.behind is not None:
            after, last = (seen.gain(f"{layer}.{norm}")[:, -1] for norm in known.behind)
        for head, (part, rows) in enumerate(zip(z.chunk(HEADS, 1), out.chunk(HEADS), strict=True)):
            yield f"blocks.{i}.attn.hook_z:{head}", adds(part @ rows * after)
        if bias.any():
            yield f"blocks.{i}.attn bias", adds((bias * after).expand_as(embedded))
        yield (
            f"blocks.{i}.mlp",
            adds(seen.outputs[f"{layer}.{known.mlp}"].reshape(*TOKENS.shape, -1)[:, -1] * last),
        )
    constant = (bias_of(inner.get_submodule(final)) * readout.weight.detach().double()[token]).sum()
    yield "norm bias", constant.expand(len(TOKENS))
    yield "unembed bias", bias_of(readout).expand(N_VOCAB)[token].expand(len(TOKENS))


def test_each_part_of_a_logit_is_what_the_model_adds(
    family: str, both: tuple[HookedModel, Watched]
) -> None:
    model, seen = both
    found = direct_logit_attribution(model, TOKENS, "token:3")
    readout = next(
        n for n, m in seen.inner.named_modules() if m is seen.inner.get_output_embeddings()
    )
    logits = seen.outputs[readout][:, -1, 3].float()
    torch.testing.assert_close(found.logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.values.sum(1), found.logits, rtol=1e-5, atol=1e-6)
    wanted = dict(parts_of(seen, family, 3, traced=model.module is seen.inner))
    assert set(found.names) == set(wanted)
    for name, values in zip(found.names, found.values.T, strict=True):
        torch.testing.assert_close(
            values, wanted[name].float(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


HELD = {"qwen3", "qwen3-moe", "gemma3", "olmo2", "olmo3", "olmoe", "exaone4"}
"""The families that normalise queries and keys before they turn them."""


def test_circuits_are_what_attention_does(family: str, both: tuple[HookedModel, Watched]) -> None:
    """On real residual streams: patterns from W_QK and its biases, a head's output from patterns, W_OV and its bias."""
    model, seen = both
    known, layer, query = FAMILIES[family], 1, 3
    x = seen.stream(layer) * seen.read_factor(layer)
    offsets = (-2, -1, 0)
    for head in (1, 2):
        name = f"blocks.{layer}.attn.hook_z:{head}"
        if family == "hunyuan":  # normalised after they are turned
            with pytest.raises(
                ValueError, match=r"layer 1 of hunyuan: what attention computes .* no bilinear form"
            ):
                qk_circuit(model, name, hold_norms=True)
        else:
            if family in HELD:
                with pytest.raises(
                    ValueError, match=f"layer 1 of {family} normalises queries and keys"
                ):
                    qk_circuit(model, name)
            attends = qk_circuit(model, name, offset=offsets, hold_norms=family in HELD)
            assert attends.held_norms == (family in HELD)
            scores = []
            for k, offset in enumerate(offsets):
                key = query + offset
                score = (
                    torch.einsum("bi,ij,bj->b", x[:, query], attends.at(offset).double(), x[:, key])
                    + x[:, query] @ attends.key_bias[k].double()
                    + x[:, key] @ attends.query_bias[k].double()
                    + attends.constant[k].double()
                )
                size = (
                    seen.qk_factor(layer, "q", head)[:, query]
                    * seen.qk_factor(layer, "k", head)[:, key]
                )
                score = score * size * known.scale
                capped = score if known.cap is None else known.cap * (score / known.cap).tanh()
                scores.append(capped + known.slopes[head] * key)
            made = torch.stack(scores, 1)
            pattern = seen.patterns[layer][:, head, query, query - 2 : query + 1].log()
            torch.testing.assert_close(
                made - made[:, -1:], pattern - pattern[:, -1:], rtol=1e-4, atol=1e-4
            )
        moves = ov_circuit(model, name)
        seen_there = torch.einsum("bk,bki->bi", seen.patterns[layer][:, head, query], x)
        written = seen_there @ moves.matrix.double() + moves.bias.double()
        end = seen.output_weights(layer)
        rows = weight_of(seen.inner.get_submodule(end)).chunk(HEADS)[head]
        wanted = seen.inputs[end][:, query].chunk(HEADS, 1)[head] @ rows * known.added
        assert moves.held_norm == (known.behind is not None)
        if known.behind is not None:
            norm = f"{seen.layers[layer]}.{known.behind[0]}"
            written = written * seen.factor(norm)[:, query]
            wanted = wanted * seen.gain(norm)[:, query]
        torch.testing.assert_close(written, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma3", "olmo2", "granite", "llama"])
def test_neurons_write_through_every_norm_on_their_way(family: str, tmp_path: Path) -> None:
    """W_out, the gain behind the MLP, what the stream is multiplied by, the final gain and the unembedding."""
    model, inner = bridged(family, tmp_path)
    state = {name.split("model.", 1)[-1]: p.detach() for name, p in inner.named_parameters()}
    more = 1.0 if family == "gemma3" else 0.0
    out = state["layers.0.mlp.down_proj.weight"][:, 5] * FAMILIES[family].added
    if FAMILIES[family].behind is not None:
        out = out * (more + state["layers.0.post_feedforward_layernorm.weight"])
    final = more + state["norm.weight"]
    wanted = inner.get_output_embeddings().weight.detach() @ (out * final)
    found = direct_logits(model, "blocks.0.mlp.hook_post:5")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# --- what is asked of any of them ------------------------------------------------------------------


def test_a_layer_that_is_not_attention_and_mlp_is_one_part(tmp_path: Path) -> None:
    model, inner = bridged("mamba", tmp_path)
    seen = watched(inner, TOKENS)
    found = direct_logit_attribution(model, TOKENS, "token:3")
    assert found.names == ("embed", "blocks.0", "blocks.1", "norm bias", "unembed bias")
    read = seen.gain("backbone.norm_f")[:, -1] * inner.lm_head.weight.detach().double()[3]
    for i in range(LAYERS):
        added = (seen.stream(i + 1) - seen.stream(i))[:, -1]
        torch.testing.assert_close(
            found.values[:, 1 + i], (added * read).sum(1).float(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("family", "attributed"),
    [
        ("gemma2", "logit before the model's cap"),
        ("cohere", "logit before the model multiplies it by 0.25"),
        ("llama", "logit"),
    ],
)
def test_a_logit_that_is_changed_once_more_is_named(
    family: str, attributed: str, tmp_path: Path
) -> None:
    model = bridged(family, tmp_path)[0]
    found = direct_logit_attribution(model, TOKENS)
    assert found.attributed == attributed == found.to_dict()["attributed"]
    assert found.table(0, "text", 3).title.startswith(f"text: {attributed} ")


@pytest.mark.parametrize(
    ("family", "words"),
    [
        (
            "openai-gpt",
            "does not expose its residual stream: site blocks.1.hook_resid_post is missing",
        ),
        (
            "codegen",
            "model TransformerBridge cannot run on an input of shape .* no attribute 'embed_positions'",
        ),
        (
            "phimoe",
            r"TransformerLens has no bridge for what is in it: Could not determine .* from config$",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_line(
    family: str, words: str, tmp_path: Path
) -> None:
    saved(family, tmp_path)
    with pytest.raises(ValueError, match=words):
        direct_logit_attribution(load_model(f"tl:{tmp_path}"), TOKENS)


def test_half_precision_is_attributed_exactly(tmp_path: Path) -> None:
    """Parts of a model in bfloat16, from its own streams but computed in float64; what rounding took is shown."""
    model = bridged("gpt2", tmp_path)[0]
    bridge: Any = model.module.to(torch.bfloat16)
    found = direct_logit_attribution(model, TOKENS, "token:5")
    names = ["hook_embed", "blocks.1.hook_resid_post", "blocks.0.hook_resid_pre", "hook_pos_embed"]
    cache = {name: model.run(TOKENS, read=[name])[name][:, -1].double() for name in names}
    last, norm = cache["blocks.1.hook_resid_post"], bridge.ln_final
    size = (last - last.mean(1, keepdim=True)).square().mean(1, keepdim=True).add(1e-5).sqrt()
    read = norm.weight.detach().double() * bridge.W_U.detach().double()[:, 5] / size
    embed = cache["blocks.0.hook_resid_pre"] - cache["hook_pos_embed"]
    wanted = ((embed - embed.mean(1, keepdim=True)) * read).sum(1)
    torch.testing.assert_close(found.values[:, 0], wanted.float(), rtol=1e-6, atol=1e-6)
    assert found.names[-1] == "missing"
    torch.testing.assert_close(found.values.sum(1), found.logits)
    assert float(found.values[:, -1].abs().max()) < 0.03 * float(found.values.abs().sum(1).max())


def test_what_no_part_accounts_for_is_shown(bridge: HookedModel) -> None:
    tokens = bridge.input.example(2)
    inside: Any = dict(bridge.module.unembed.named_children())["_original_component"]  # type: ignore[union-attr, operator]
    more = inside.register_forward_hook(lambda *args: args[-1] + 1.0)
    try:
        found = direct_logit_attribution(bridge, tokens, "token:3")
    finally:
        more.remove()
    assert found.names[-1] == "missing"
    torch.testing.assert_close(found.values[:, -1], torch.ones(2), rtol=1e-5, atol=1e-5)
    assert found.table(0, "text", 1).rows[-1][0] == "missing"


def test_composition_is_beside_random_matrices_of_the_same_spectrum(tmp_path: Path) -> None:
    model = bridged("llama", tmp_path)[0]
    source, target = "blocks.0.attn.hook_z:1", "blocks.1.attn.hook_z:2"
    found = head_composition(model, source, target, draws=200, seed=3)
    moved, moves = ov_circuit(model, source).matrix, ov_circuit(model, target).matrix
    for k, offset in enumerate((-1, 0)):
        attends = qk_circuit(model, target).at(offset)
        wanted = [
            float(product.norm() / moved.norm() / factor.norm())
            for product, factor in (
                (moved @ attends, attends),
                (attends @ moved.T, attends),
                (moved @ moves, moves),
            )
        ]
        torch.testing.assert_close(found.scores[k], torch.tensor(wanted), rtol=1e-5, atol=1e-6)
    # E ||A Q B||^2 = ||A||^2 ||B||^2 / n over random rotations Q of n dimensions.
    torch.testing.assert_close(
        found.random.square().mean(0), torch.full((2, 3), 1 / WIDTH), rtol=0.1, atol=0
    )
    again = head_composition(model, source, target, draws=200, seed=3)
    assert torch.equal(again.random, found.random)
    with pytest.raises(ValueError, match="must be in an earlier layer than target"):
        head_composition(model, target, source)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_every_site_that_is_listed_matters(family: str, tmp_path: Path) -> None:
    """Rotary embeddings take the stream for its device only, and OPT's positions take what they do not read."""
    model, _ = bridged(family, tmp_path)
    assert not {"rotary_emb.hook_in", "pos_embed.hook_in"} & {s.name for s in model.sites}
    tokens = model.input.example(2)
    before = model.logits(tokens)
    for site in model.sites:
        if site.kind == "pattern":  # some are shown after attention is done, and are read only
            continue
        noise = torch.Generator().manual_seed(1)
        edit = {site.name: lambda t, g=noise: t / 2 + torch.rand(t.shape, generator=g)}
        assert not torch.equal(model.logits(tokens, edit), before), site.name
