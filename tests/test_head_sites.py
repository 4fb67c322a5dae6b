"""Heads of traced models under all that happens to models: other lengths, types, threads, errors, autoencoders."""

from __future__ import annotations

import copy
import threading
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from circuits.call_points import writes_in_place
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput, TokenInput
from tests.attention_models import CASES
from tests.person_models import HEADS, MLP, NanoGPT

N_VOCAB, WIDTH = 20, 16
Z = "blocks.0.attn.hook_z"


def zero_head(head: int, z: Tensor) -> Tensor:
    return torch.where(torch.arange(z.shape[-2], device=z.device)[:, None] == head, 0, z)


def modes() -> list[Any]:
    return list(_get_current_function_mode_stack())


class Block(nn.Module):
    """Attention in one of several ways of writing it, without positions.

    Args:
        how: `sdpa`, `softmax`, `statements` (in place, outputs ignored), `out` (into a buffer), `copied` (by indices).
    """

    def __init__(self, how: str = "sdpa", width: int = WIDTH) -> None:
        super().__init__()
        self.how = how
        self.norm, self.qkv, self.proj = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.how == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if self.how == "softmax":
            return scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        if self.how == "out":
            out = torch.empty_like(scores)
            torch.mul(scores, 0.5, out=out)
            out.masked_fill_(later, -torch.inf)
            return out.softmax(-1) @ v
        scores.masked_fill_(later, -torch.inf)
        scores -= scores.amax(-1, keepdim=True)
        scores.exp_()
        scores /= scores.sum(-1, keepdim=True)
        return scores @ v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        return x + self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Texts(nn.Module):
    """A decoder of blocks.

    Args:
        how: how each block attends.
        shared: use the first block for all layers.
    """

    def __init__(self, *how: str, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(N_VOCAB, WIDTH), nn.Linear(WIDTH, N_VOCAB)
        self.layers = nn.ModuleList(Block(each) for each in how)
        self.shared = shared

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = self.layers[0](x) if self.shared else layer(x)
        return self.head(x)


def texts(*how: str, **more: Any) -> HookedModel:
    return HookedModel(Texts(*how, **more), TokenInput(N_VOCAB, 40))


TOKENS = TokenInput(N_VOCAB, 12).example(2)


# --- what is found has an effect -----------------------------------------------------------------


@pytest.mark.parametrize("how", ["softmax", "statements", "out", "sdpa"])
def test_every_site_that_is_found_has_an_effect(how: str) -> None:
    """Also where a function works in place and its output is ignored."""
    model = texts(how, how)
    plain = model.logits(TOKENS)
    own = [s for s in model.sites if s.kind in ("head", "pattern")]
    assert {s.name.rpartition("_")[2] for s in own} == {"q", "k", "v", "scores", "pattern", "z"}
    for site in own:
        read = model.run(TOKENS, read=[site])
        assert torch.equal(model.logits(TOKENS, {site.name: torch.clone}), read.output), site.name
        changed = model.logits(TOKENS, {site.name: lambda t, s=site: t.flip(s.unit_axis)})
        assert (changed - plain).abs().max() > 1e-4, site.name
        # What is kept is what was there, though the model writes over it later.
        same = model.logits(TOKENS, {site.name: lambda t, v=read[site.name]: v.clone()})
        assert torch.equal(same, read.output), site.name


def test_patterns_are_the_same_however_attention_is_written() -> None:
    first = texts("softmax")
    for how in ("statements", "sdpa"):
        other = texts(how)
        for name in (Z, "blocks.0.attn.hook_pattern"):
            one, two = (m.run(TOKENS, read=[name])[name] for m in (first, other))
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "writes"),
    [
        ("torch.Tensor.masked_fill_", True),
        ("torch.Tensor.__iadd__", True),
        ("torch.Tensor.__setitem__", True),
        ("torch.Tensor.__invert__", False),
        ("torch.Tensor.add", False),
    ],
)
def test_which_functions_write_in_place(name: str, writes: bool) -> None:
    assert writes_in_place(name) == writes


# --- other inputs than traced --------------------------------------------------------------------


@pytest.mark.parametrize("how", ["sdpa", "softmax", "statements"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (5, 7), (2, 16)])
def test_texts_of_other_lengths(how: str, shape: tuple[int, int]) -> None:
    model = texts(how, how)
    tokens = torch.randint(N_VOCAB, shape, generator=torch.Generator().manual_seed(1))
    names = [f"blocks.1.attn.hook_{x}" for x in ("pattern", "v", "z", "q")]
    pattern, v, z, q = model.run(tokens, read=names).values()
    batch, length = shape
    assert pattern.shape == (batch, HEADS, length, length)
    assert q.shape == (batch, length, HEADS, WIDTH // HEADS)
    torch.testing.assert_close(z, torch.einsum("bhqk,bkhd->bqhd", pattern, v))
    plain = model.logits(tokens)
    assert torch.equal(model.logits(tokens, {names[2]: torch.clone}), plain)


class Pictures(nn.Module):
    """Patches that attend to each other; takes images of any size."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.block, self.head = Block(how), nn.Linear(WIDTH, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.block(x).mean(1))


@pytest.mark.parametrize("how", ["sdpa", "softmax"])
def test_images_of_other_sizes(how: str) -> None:
    model = HookedModel(Pictures(how), ImageInput(3, 16, 16))
    for size in (16, 24, 8):
        images = torch.rand(1, 3, size, size + 4)
        z = model.run(images, read=[Z])[Z]
        assert z.shape == (1, (size // 4) * (size // 4 + 1), HEADS, WIDTH // HEADS)
        assert torch.equal(
            model.logits(images, {Z: lambda _, z=z: z.clone()}), model.logits(images)
        )


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["sdpa", "softmax", "statements"])
def test_other_types_of_numbers(kind: torch.dtype, how: str) -> None:
    model = HookedModel(Texts(how, how).to(kind), TokenInput(N_VOCAB, 12))
    plain = model.logits(TOKENS)
    for site in [s for s in model.sites if s.kind in ("head", "pattern")]:
        read = model.run(TOKENS, read=[site])
        assert read[site.name].dtype == kind
        again = model.logits(TOKENS, {site.name: lambda t, v=read[site.name]: v.float()})
        close = 1e-5 if kind == torch.float64 else 3e-2
        torch.testing.assert_close(again, plain, rtol=close, atol=close)


# --- caches and shared layers --------------------------------------------------------------------


def test_a_library_model_that_makes_a_cache() -> None:
    case = CASES["llama"]
    module: Any = case.make("sdpa")
    module.inner.config.use_cache = True
    model = HookedModel(module, case.input)
    inputs = case.input.example(2, seed=1)
    sites = case.oracle(module, inputs)
    for _ in range(2):  # a cache that outlived a pass would lengthen the keys of the next
        for name, value in model.run(inputs, read=list(sites)).items():
            torch.testing.assert_close(value, sites[name], rtol=1e-5, atol=1e-5)


def test_a_block_that_is_used_for_several_layers() -> None:
    model = texts("sdpa", "sdpa", "sdpa", shared=True)
    names = [f"blocks.{n}.attn.hook_z" for n in range(3)]
    assert [s.name for s in model.sites if s.name.endswith("hook_z")] == names
    module: Any = model.module
    apart = Texts("sdpa", "sdpa", "sdpa")
    apart.load_state_dict(module.state_dict())
    for layer in apart.layers[1:]:
        layer.load_state_dict(module.layers[0].state_dict())
    expected = HookedModel(apart, TokenInput(N_VOCAB, 40))
    for name in names:
        change = {name: partial(zero_head, 2)}
        torch.testing.assert_close(model.logits(TOKENS, change), expected.logits(TOKENS, change))


# --- hooks among hooks ---------------------------------------------------------------------------


def test_nested_interventions_add_up() -> None:
    model = texts("sdpa", "softmax")
    both = model.logits(TOKENS, {Z: lambda z: zero_head(1, zero_head(2, z))})
    with model.intervening({Z: partial(zero_head, 1)}):
        with model.intervening({Z: partial(zero_head, 2)}):
            assert torch.equal(model.logits(TOKENS), both)
            seen: list[Tensor] = []
            model.observe(TOKENS, {Z: seen.append}, until=Z)
            assert not seen[0][:, :, 1:3].any()
        assert torch.equal(model.logits(TOKENS), model.logits(TOKENS, {Z: partial(zero_head, 1)}))
    assert modes() == []


class Nested(nn.Module):
    """Calls `matmul` itself and in a part of its own, so that the calls of one are among those of the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(N_VOCAB, WIDTH), nn.Linear(WIDTH, N_VOCAB)
        self.inner = Block("softmax")

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for _ in range(2):
            x = self.inner(x)
            q = x.unflatten(-1, (2, -1)).transpose(1, 2)
            x = x + (torch.matmul(q, q.mT * 2).softmax(-1) @ q).transpose(1, 2).flatten(2)
        return self.head(x)


def test_points_of_scopes_within_each_other() -> None:
    """Reading all sites at once is reading each alone."""
    model = HookedModel(Nested(), TokenInput(N_VOCAB, 12))
    names = [s.name for s in model.sites]
    assert sum(name.endswith("hook_z") for name in names) == 4
    together = model.run(TOKENS, read=names)
    for name in names:
        assert torch.equal(model.run(TOKENS, read=[name])[name], together[name]), name
    changes = dict.fromkeys(names, torch.clone)
    assert torch.equal(model.logits(TOKENS, changes), model.logits(TOKENS))


def test_an_error_in_a_pass_leaves_nothing_behind() -> None:
    model = texts("sdpa", "softmax")
    plain = model.logits(TOKENS)

    def fail(_: Tensor) -> Tensor:
        raise ArithmeticError("on purpose")

    for site in [s.name for s in model.sites if s.kind in ("head", "pattern")]:
        with pytest.raises(ArithmeticError):
            model.logits(TOKENS, {"blocks.1.attn.hook_k": torch.clone, site: fail})
        assert modes() == []
        assert torch.equal(model.logits(TOKENS), plain)
    for module in model.module.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_an_error_of_the_model_leaves_nothing_behind() -> None:
    model = texts("sdpa")
    module: Any = model.module
    with pytest.raises(IndexError), model.intervening({Z: torch.clone}):
        module(torch.full((1, 3), N_VOCAB))
    module.layers[0].proj.weight.data = torch.zeros(3, 3)
    with pytest.raises(RuntimeError), model.intervening({Z: torch.clone}):
        module(TOKENS)
    assert modes() == []


def test_two_threads_with_a_model_each() -> None:
    models = [texts("sdpa", "sdpa"), texts("softmax", "sdpa")]
    changes = [{Z: partial(zero_head, head)} for head in range(2)]
    expected = [m.logits(TOKENS, c) for m, c in zip(models, changes, strict=True)]
    found: list[list[bool]] = [[], []]

    def work(n: int) -> None:
        for _ in range(20):
            found[n].append(torch.equal(models[n].logits(TOKENS, changes[n]), expected[n]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[True] * 20] * 2


def test_the_fast_path_of_torch_is_as_it_was() -> None:
    """Also where passes of two threads overlap."""
    case = CASES["torch-encoder-batch-first-pre-norm"]
    model, other = (HookedModel(case.make(), case.input) for _ in range(2))
    inputs = case.input.example(1)
    inside, done = threading.Event(), threading.Event()

    def wait(z: Tensor) -> Tensor:
        inside.set()
        assert done.wait(30)
        return z

    thread = threading.Thread(target=model.logits, args=(inputs, {Z: wait}))
    thread.start()
    assert inside.wait(30)
    assert not torch.backends.mha.get_fastpath_enabled()
    other.logits(inputs)
    assert not torch.backends.mha.get_fastpath_enabled()
    done.set()
    thread.join()
    assert torch.backends.mha.get_fastpath_enabled()


def test_gradients_flow_through_sites() -> None:
    for how in ("sdpa", "softmax"):
        model = texts(how, how)
        seen: list[Tensor] = []

        def see(value: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(value * 1)
            return seen[-1]

        changes = dict.fromkeys((Z, "blocks.1.attn.hook_pattern"), see)
        cache = model.run(TOKENS, edits=changes, grad=True)
        found = torch.autograd.grad(cache.output.square().sum(), seen)
        assert len(found) == 2
        assert all(slope.abs().max() > 0 for slope in found)


# --- copies and autoencoders ---------------------------------------------------------------------


def test_a_deep_copy_has_sites_of_its_own() -> None:
    model = texts("sdpa", "softmax")
    change = {Z: partial(zero_head, 1)}
    before = model.logits(TOKENS, change)
    copied = HookedModel(copy.deepcopy(model.module), model.input)
    with model.intervening({Z: torch.zeros_like}):
        assert torch.equal(copied.logits(TOKENS, change), before)
        inside = HookedModel(copy.deepcopy(copied.module), model.input)
    assert torch.equal(inside.logits(TOKENS, change), before)
    whole = copy.copy(model)
    assert torch.equal(whole.logits(TOKENS, change), before)


class Code(nn.Module):
    """An autoencoder with more latents than numbers, which misses something."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.weight = nn.Parameter(torch.randn(width, 2 * width, generator=generator) / width**0.5)

    def encode(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.weight)

    def decode(self, codes: Tensor) -> Tensor:
        return codes @ self.weight.mT / 2


@pytest.mark.parametrize("how", ["sdpa", "softmax", "statements"])
@pytest.mark.parametrize("site", ["hook_z", "hook_v", "hook_q"])
def test_an_autoencoder_at_a_head_site(how: str, site: str) -> None:
    base = texts(how, how)
    name = f"blocks.0.attn.{site}"
    plain, x = base.logits(TOKENS), base.run(TOKENS, read=[name])[name]
    code = Code()
    model = base.attach(code, "one", name)
    del base
    assert torch.equal(model.logits(TOKENS), plain)
    codes = code.encode(x.flatten(2))
    cache = model.run(TOKENS, read=["sae/one", "sae/one.error", name])
    assert torch.equal(cache.output, plain)
    torch.testing.assert_close(cache["sae/one"], codes)
    torch.testing.assert_close(cache["sae/one.error"].flatten(2), x.flatten(2) - code.decode(codes))
    assert torch.equal(cache[name], x)
    change = {"sae/one": lambda latents: latents * 0}
    edited = model.run(TOKENS, read=[name, "blocks.1.attn.hook_z"], edits=change)
    assert torch.equal(edited[name], x), "the model's own tensor"
    expected = texts(how, how).logits(TOKENS, {name: lambda z: z - code.decode(codes).view_as(z)})
    torch.testing.assert_close(edited.output, expected)
    assert model.hash != texts(how, how).hash
    assert modes() == []


def test_two_autoencoders_and_a_transcoder() -> None:
    base = texts("sdpa", "sdpa")
    last = "blocks.1.attn.hook_z"
    model = base.attach(Code(), "one", Z).attach(Code(), "two", last)
    model = model.attach(Code(), "across", Z, last)
    names = ["sae/one", "sae/two", "sae/across"]
    cache = model.run(TOKENS, read=names)
    assert torch.equal(cache.output, base.logits(TOKENS))
    assert torch.equal(cache["sae/one"], cache["sae/across"])
    for name in names:
        changed = model.logits(TOKENS, {name: torch.zeros_like})
        assert (changed - cache.output).abs().max() > 1e-4, name


def test_nanogpt_with_an_mlp_is_one_attention_a_block() -> None:
    model = HookedModel(NanoGPT(False).eval(), TokenInput(N_VOCAB, 12))
    assert isinstance(model.module.transformer.h[0].mlp, MLP)
    aliases = model.site(Z).aliases
    assert aliases == ("transformer.h.0.attn.hook_z",)
    assert model.site("transformer.h.0.attn.hook_z") is model.site(Z)


# --- other forms of attention --------------------------------------------------------------------


class Windows(nn.Module):
    """Attention within windows that are an axis of their own, between heads and positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(N_VOCAB, WIDTH), nn.Linear(WIDTH, N_VOCAB)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4).unflatten(3, (-1, 4))
        z = (q @ k.mT).softmax(-1) @ v
        return self.head(x + self.proj(z.flatten(2, 3).transpose(1, 2).flatten(2)))


def test_windows_are_no_heads() -> None:
    model = HookedModel(Windows(), TokenInput(N_VOCAB, 12))
    assert model.site(Z).axes == ("batch", "window", "position", "head", "d_head")
    assert model.site(Z).shape == (3, 4, 4, 4)
    names = [f"blocks.0.attn.hook_{x}" for x in ("q", "k", "v", "pattern", "z")]
    q, k, v, pattern, z = model.run(TOKENS, read=names).values()
    assert q.shape == (2, 12, 4, 4), "the projection knows no windows"
    q, k, v = (t.unflatten(1, (3, 4)) for t in (q, k, v))
    expected = torch.einsum("bwqhd,bwkhd->bwhqk", q, k).softmax(-1)
    torch.testing.assert_close(pattern, expected)
    torch.testing.assert_close(z, torch.einsum("bwhqk,bwkhd->bwqhd", pattern, v))
    assert torch.equal(model.logits(TOKENS, {Z: torch.clone}), model.logits(TOKENS))


class OneHead(nn.Module):
    """One head with projections of its own, as in a well-known lecture."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, 4, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(-2, -1) * 4**-0.5
        return F.softmax(scores, dim=-1) @ self.value(x)


class HeadsApart(nn.Module):
    """Two layers of heads that are modules, joined by `cat`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(N_VOCAB, WIDTH), nn.Linear(WIDTH, N_VOCAB)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.heads = nn.ModuleList(OneHead() for _ in range(8))
        self.proj = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for n in range(2):
            read = self.norms[n](x)
            z = torch.cat([self.heads[4 * n + h](read) for h in range(4)], -1)
            x = x + self.proj[n](z)
        return self.head(x)


def test_heads_that_are_modules_of_their_own() -> None:
    """They are several attentions of one block."""
    model = HookedModel(HeadsApart(), TokenInput(N_VOCAB, 12))
    found = [s for s in model.sites if s.name.endswith("hook_z")]
    names = [f"blocks.{n}.attn.{h}.hook_z" for n in range(2) for h in range(4)]
    assert [s.name for s in found] == names
    assert found[5].aliases == ("heads.5.hook_z",)
    assert found[5].shape == (12, 1, 4)
    module: Any = model.module
    ablated = model.logits(TOKENS, {names[5]: torch.zeros_like})
    with torch.no_grad():
        module.proj[1].weight[:, 4:8] = 0
    torch.testing.assert_close(ablated, model.logits(TOKENS))


class Parts(Block):
    """Keys are written part by part into an empty tensor."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = k.new_empty(k.shape)
        keys[..., :2].copy_(k[..., :2])
        keys[..., 2:].copy_(k[..., 2:])
        return F.scaled_dot_product_attention(q, keys, v, is_causal=True)


def test_what_is_written_part_by_part_depends_on_the_input() -> None:
    model = texts("sdpa", "sdpa")
    layers: Any = model.module.layers
    parts = Texts("sdpa", "sdpa")
    parts.layers = nn.ModuleList(Parts() for _ in range(2))
    parts.layers.load_state_dict(layers.state_dict())
    other = HookedModel(parts, TokenInput(N_VOCAB, 40))
    for name in (Z, "blocks.1.attn.hook_k", "blocks.1.attn.hook_pattern"):
        assert torch.equal(
            other.run(TOKENS, read=[name])[name], model.run(TOKENS, read=[name])[name]
        )
        assert torch.equal(other.logits(TOKENS, {Z: torch.clone}), model.logits(TOKENS))


class Sinks(Block):
    """Each head has a score of no key, which is dropped after the softmax."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.linspace(-1, 1, HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
        scores = (q @ k.mT).masked_fill(later, -torch.inf)
        sinks = self.sinks.view(1, -1, 1, 1).expand(len(q), -1, q.shape[-2], -1)
        joined = torch.cat([scores, sinks], -1)
        joined = joined - joined.max(-1, keepdim=True).values
        return joined.softmax(-1)[..., :-1] @ v


def test_sinks_are_no_keys() -> None:
    module = Texts()
    module.layers = nn.ModuleList(Sinks() for _ in range(2))
    model = HookedModel(module, TokenInput(N_VOCAB, 40))
    names = [f"blocks.1.attn.hook_{x}" for x in ("q", "k", "v", "attn_scores", "pattern", "z")]
    q, k, v, scores, pattern, z = model.run(TOKENS, read=names).values()
    allowed = torch.ones(12, 12, dtype=torch.bool).tril()
    expected = torch.einsum("bqhd,bkhd->bhqk", q, k)
    torch.testing.assert_close(scores, expected.masked_fill(~allowed, -torch.inf))
    total = scores.exp().sum(-1) + torch.linspace(-1, 1, HEADS)[:, None].exp()
    torch.testing.assert_close(pattern, scores.exp() / total[..., None])
    torch.testing.assert_close(z, torch.einsum("bhqk,bkhd->bqhd", pattern, v))
    plain = model.logits(TOKENS)
    for name in names:
        assert torch.equal(model.logits(TOKENS, {name: torch.clone}), plain)
        flipped = model.logits(TOKENS, {name: lambda t: t.flip(1 if t.shape[1] == HEADS else 2)})
        assert (flipped - plain).abs().max() > 1e-4, name
