"""Texts of different lengths in one batch: the numbers that each has alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from circuits.edits.activations import Scale, changes, scale, zero
from circuits.edits.recipes import edited
from circuits.examples import Examples
from circuits.experiments import Variant, run
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.adapter.padding import group_by_length, padded, unpadded
from circuits.models.zoo.loading import load_model
from circuits.models.zoo.transformers import native_bridge
from circuits.tasks import Question, Task, as_metric
from circuits.tasks.metrics import cross_entropy
from circuits.tasks.task import of_examples
from circuits.units import Site, Units
from tests.conftest import seeded
from tests.random_models import WORDS, booted

# other packages' own warnings, where a model is saved and loaded
pytestmark = pytest.mark.filterwarnings("ignore")

EQUAL = 1e-5


# --- models ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def boot(tmp_path_factory) -> Callable[[str], HookedModel]:
    made: dict[str, HookedModel] = {}

    def get(kind: str) -> HookedModel:
        if kind not in made:
            made[kind] = booted(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return get


class Attending(nn.Module):
    """One layer of attention, looking both ways; `attention_mask` hides tokens, `causal` what comes later."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.embed = nn.Embedding(20, 8)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 20)

    def attended(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(1, 2)
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask[:, None] == 0, -torch.inf)
        if self.causal:
            ahead = torch.ones_like(scores).triu(1).bool()
            scores = scores.masked_fill(ahead, -torch.inf)
        return x + scores.softmax(-1) @ v

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.attended(tokens, attention_mask))


class Deaf(Attending):
    """It cannot be told what to hide."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.attended(tokens, None))


class Zeros(Attending):
    """It hides token 0 of its own accord: filled up with 0, and only with 0, it is right."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.attended(tokens, (tokens != 0).long()))


class Ending(Attending):
    """It answers where the batch ends."""

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.attended(tokens, attention_mask)[:, -1])


class Fixed(nn.Module):
    """It takes texts of 6 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 4)
        self.head = nn.Linear(24, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).flatten(1))


def own(module: nn.Module, n_ctx: int = 12) -> HookedModel:
    return HookedModel(seeded(module), TokenInput(20, n_ctx))


def texts(n_vocab: int, lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(n_vocab, (n,), generator=generator) for n in lengths]


def some_lengths(n: int = 64, low: int = 3, high: int = 100) -> list[int]:
    drawn = torch.randint(low, high + 1, (n - 2,), generator=torch.Generator().manual_seed(1))
    return [high, low, *drawn.tolist()]


# --- the same numbers --------------------------------------------------------------------------------


def of_text(site: Site, value: Tensor, text: int, mask: Tensor) -> Tensor:
    """A text's part of a padded batch's tensor, by the names of the site's axes."""
    found = value[text]
    for axis, name in enumerate(site.axes[1:]):
        if name in ("position", "query", "key"):
            found = found.index_select(axis, mask[text].nonzero().flatten())
    return found


def compare(model: HookedModel, rows: list[Tensor]) -> None:
    """Every site of a padded batch against each text alone, as TransformerLens records it."""
    tokens, mask = model.pad(rows)
    assert not mask.all()
    names = [site.name for site in model.sites]
    cache = model.run(tokens, mask=mask, read=names)
    for site in model.sites:
        assert not cache[site].isnan().any(), site.name
    for i, row in enumerate(rows):
        with torch.no_grad():
            _, alone = model.module.run_with_cache(row[None])
        for site in model.sites:
            found, expected = of_text(site, cache[site], i, mask), alone[site.name][0]
            assert found.shape == expected.shape
            same = found == expected  # what is hidden from attention has scores of minus infinity
            gap = torch.where(same, 0, (found - expected).abs()).max().item()
            size = max(1, expected[expected.abs() < 1e30].abs().max().item())
            assert gap <= EQUAL * size, (site.name, i, gap, size)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox", "bert"])
def test_every_site_of_a_padded_batch_is_that_of_each_text_alone(boot, kind: str) -> None:
    model = boot(kind)
    compare(model, texts(len(WORDS), some_lengths()))


def test_every_site_of_stories_is_that_of_each_text_alone(assets: Path) -> None:
    model = load_model("stories260k")
    assert model.padding == "right"
    compare(model, texts(512, some_lengths()))


def test_an_edited_head_of_grouped_queries_is_the_same_in_a_padded_batch(boot) -> None:
    model = boot("llama")
    assert model.site("blocks.1.attn.hook_k").n_units == 2  # of 4 heads of queries
    rows = texts(len(WORDS), [7, 30, 3, 12])
    tokens, mask = model.pad(rows)
    plain = model.logits(tokens, mask=mask)
    for unit in ("blocks.0.attn.hook_k:1", "blocks.1.attn.hook_v:0", "blocks.1.attn.hook_z:3"):
        with edited(model, [zero(unit)]):
            logits = model.logits(tokens, mask=mask)
            for i, row in enumerate(rows):
                expected = model.logits(row[None])[0]
                torch.testing.assert_close(logits[i, : len(row)], expected, rtol=0, atol=EQUAL)
                assert (expected - plain[i, : len(row)]).abs().max() > 1e-3


@pytest.mark.parametrize("module", [Attending(), Attending(causal=True), Ending()])
def test_own_modules_hold_the_numbers_of_each_text_alone(module: Attending) -> None:
    model = own(module)
    rows = texts(20, [5, 12, 1, 8])
    tokens, mask = model.pad(rows)
    names = [site.name for site in model.sites]
    cache = model.run(tokens, mask=mask, read=names)
    for i, row in enumerate(rows):
        alone = model.run(row[None], read=names)
        for name in names:
            real = of_text(model.site(name), cache[name], i, mask)
            torch.testing.assert_close(real, alone[name][0], rtol=0, atol=EQUAL)


def test_observing_a_padded_batch_is_reading_it(boot) -> None:
    model = boot("bert")
    tokens, mask = model.pad(texts(len(WORDS), [9, 4]))
    site = "blocks.1.attn.hook_z"
    found: list[Tensor] = []
    model.observe(tokens, {site: lambda value: found.append(value.clone())}, site, mask=mask)
    assert torch.equal(found[0], model.run(tokens, mask=mask, read=[site])[site])
    assert not torch.equal(found[0], model.run(tokens, read=[site])[site])


# --- what is found by trying ---------------------------------------------------------------------------


def test_how_a_model_is_padded_is_found_by_trying(boot) -> None:
    assert [boot(kind).padding for kind in ("gpt2", "llama", "neox", "bert")] == ["right"] * 4
    assert boot("gpt2").input.filler == WORDS.index("[SEP]")
    found = {
        name: own(module, 6).padding
        for name, module in (
            ("both ways", Attending()), ("causal", Attending(causal=True)), ("end", Ending()),
            ("deaf", Deaf()), ("zeros", Zeros()), ("fixed", Fixed()),
        )
    }  # fmt: skip
    assert found == {
        "both ways": "right", "causal": "right", "end": "left", "deaf": None, "zeros": None, "fixed": None,
    }  # fmt: skip


class Blank(Ending):
    """Filled up on the left it holds NaN where a text has not begun."""

    def __init__(self) -> None:
        super().__init__(causal=True)
        self.mixed = nn.Identity()

    def attended(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self.mixed(super().attended(tokens, attention_mask))


def test_a_way_that_gives_nan_where_nothing_is_seen_is_not_taken() -> None:
    model = own(Blank())
    assert model.padding is None
    with pytest.raises(ValueError, match=r"padding on the left with attention_mask=: \S+ has NaN"):
        model.pad([[1, 2], [3]])


def test_padding_is_tried_without_the_edits_in_force(bridge: HookedModel) -> None:
    both_ways = {"blocks.0.hook_resid_mid": lambda value: value + value.mean(1, keepdim=True)}
    with bridge.intervening(both_ways):
        assert bridge.padding == "right"
    tokens, mask = padded([[1, 2, 3], [4]])
    expected = bridge.logits(torch.tensor([[4]]))[0, 0]
    torch.testing.assert_close(bridge.logits(tokens, mask=mask)[1, 0], expected, rtol=0, atol=EQUAL)


def test_threads_that_ask_for_the_embedding_do_not_wait_for_each_other(bridge: HookedModel) -> None:
    asked = threading.Thread(target=lambda: bridge.embedding, daemon=True)
    with bridge.intervening({}):
        asked.start()
        asked.join(0.2)  # by now it waits for the model
        assert bridge.embedding.name == "hook_embed"
    asked.join(60)
    assert not asked.is_alive()


def test_a_model_of_one_length_takes_a_mask_that_hides_nothing() -> None:
    model = own(Fixed(), 6)
    tokens = model.input.example(3)
    assert torch.equal(
        model.logits(tokens, mask=torch.ones_like(tokens).bool()), model.logits(tokens)
    )
    assert model.pad(tokens.tolist())[1].all()


# --- batches ---------------------------------------------------------------------------------------------

rows_of_tokens = st.lists(
    st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=5
)


@given(rows_of_tokens, st.sampled_from(["left", "right"]), st.integers(0, 9))
def test_what_is_padded_can_be_taken_apart_again(rows, side, filler) -> None:
    tokens, mask = padded(rows, side, filler)
    assert unpadded(tokens, mask) == rows
    assert (tokens[~mask] == filler).all()
    assert mask.sum().item() == sum(map(len, rows))


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(3, 40), st.integers(1, 100))
def test_groups_hold_each_text_once_in_company_and_are_not_too_large(lengths, rows, most) -> None:
    groups = group_by_length(lengths, rows, most)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) <= 3 or max(lengths[i] for i in group) * len(group) <= most
        assert len(group) <= rows
        assert len(group) > 1 or len(lengths) == 1


def test_what_a_mask_must_be(bridge: HookedModel, own_net: HookedModel) -> None:
    tokens = torch.tensor([[1, 2, 3], [4, 5, 0]])

    def refused(mask: list[list[bool]], text: str, model: HookedModel = bridge) -> None:
        with pytest.raises(ValueError, match=text):
            model.run(tokens, mask=torch.tensor(mask))

    refused([[True, True]], r"mask of shape \(1, 2\) does not fit inputs of shape \(2, 3\)")
    refused([[True] * 3, [False] * 3], "mask hides all of text 1")
    refused(
        [[True] * 3, [False, True, True]], "mask of text 1 hides tokens elsewhere than on the right"
    )
    refused(
        [[True, False, True], [True] * 3], "mask of text 0 hides tokens elsewhere than on the right"
    )
    deaf = own(Deaf())
    refused([[True] * 3, [True, True, False]], "takes only texts of one length in a batch", deaf)
    with pytest.raises(TypeError):
        bridge.run(tokens, mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="model OwnNet takes images: it takes no mask"):
        own_net.run(own_net.input.example(2), mask=torch.ones(2, 3).bool())
    with pytest.raises(ValueError, match="model OwnNet takes images: it needs no padding"):
        _ = own_net.padding


def test_texts_that_cannot_be_padded(bridge: HookedModel) -> None:
    with pytest.raises(ValueError, match="text 1 of rows is empty"):
        bridge.pad([[1], []])
    with pytest.raises(ValueError, match="rows are empty"):
        bridge.pad([])
    with pytest.raises(ValueError, match="takes only texts of one length"):
        own(Deaf()).pad([[1], [1, 2]])
    with pytest.raises(ValueError, match="does not run on texts of every length"):
        own(Fixed(), 6).pad([[1], [1, 2]])
    with pytest.raises(ValueError, match="filler 20 is not in the vocabulary: expected 0 to 19"):
        TokenInput(20, 12, filler=20)


# --- generation --------------------------------------------------------------------------------------------


def by_hand(model: HookedModel, row: list[int], n: int) -> list[int]:
    """The most likely tokens after one text, by its own module."""
    row = list(row)
    for _ in range(n):
        with torch.no_grad():
            logits = model.module(torch.tensor([row]))
        row.append(int(logits[0, -1].argmax()))
    return row


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox"])
def test_texts_continued_in_a_batch_are_those_continued_alone(boot, kind: str) -> None:
    model = boot(kind)
    rows = [row.tolist() for row in texts(len(WORDS), [5, 17, 1, 30])]
    tokens, mask = model.pad(rows)
    site = "blocks.0.hook_resid_post"
    edits = {site: lambda value: value * torch.linspace(-2, 2, value.shape[-1])}
    found = [row.tolist() for row in model.generate(tokens, 8, mask=mask)]
    changed = [row.tolist() for row in model.generate(tokens, 8, mask=mask, edits=edits)]
    assert found == [by_hand(model, row, 8) for row in rows]
    with model.intervening(edits):
        assert changed == [by_hand(model, row, 8) for row in rows]
        assert [r.tolist() for r in model.generate(tokens, 8, mask=mask)] == changed
    assert changed != found
    sampled = model.generate(tokens, 8, mask=mask, temperature=1.5, seed=3)
    for i, row in enumerate(rows):
        alone = model.generate(torch.tensor([row]), 8, temperature=1.5, seed=3 + i)[0]
        assert torch.equal(sampled[i], alone)
    assert len({tuple(row[-8:].tolist()) for row in sampled}) == 4


def test_stories_go_on_in_a_batch_as_alone(assets: Path) -> None:
    model = load_model("stories260k")
    spec = model.input
    rows = [[1, *spec.encode(text)] for text in ("Once upon a time", "Lily", "The dog ran to")]
    tokens, mask = model.pad(rows)
    found = [row.tolist() for row in model.generate(tokens, 10, mask=mask)]
    assert found == [by_hand(model, row, 10) for row in rows]
    assert "".join(spec.word(t) for t in found[0][1:]).startswith(
        " Once upon a time, there was a little girl"
    )


def test_draws_follow_the_probabilities(bridge: HookedModel) -> None:
    prompt = torch.tensor([[3, 7, 1]])
    temperature = 0.3
    drawn = bridge.generate(prompt.expand(500, -1), 1, temperature=temperature)
    counts = torch.stack([row[-1] for row in drawn]).bincount(minlength=20) / 500
    expected = (bridge.logits(prompt)[0, -1] / temperature).softmax(0)
    # four standard deviations of a share of 500 draws
    assert ((counts - expected).abs() <= 4 * (expected * (1 - expected) / 500).sqrt() + 1e-3).all()


def test_a_text_ends_at_its_own_stop(bridge: HookedModel) -> None:
    rows = [[3, 7, 1], [2], [9, 9]]
    tokens, mask = bridge.pad(rows)
    whole = [row.tolist() for row in bridge.generate(tokens, 6, mask=mask)]
    stop = whole[0][4]
    for row, full, prompt in zip(
        bridge.generate(tokens, 6, mask=mask, stop=[stop]), whole, rows, strict=True
    ):
        n = len(prompt)
        end = full.index(stop, n) + 1 if stop in full[n:] else len(full)
        assert row.tolist() == full[:end]


def test_a_text_with_nothing_hidden_needs_no_padding() -> None:
    model = own(Deaf())
    assert model.padding is None
    rows = [[1, 2, 3], [4, 5, 6]]
    made = model.generate(torch.tensor(rows), 4, stop=range(20))
    assert [row.tolist() for row in made] == [by_hand(model, row, 1) for row in rows]


def test_what_cannot_be_continued(boot, bridge: HookedModel, own_net: HookedModel) -> None:
    tokens, mask = bridge.pad([[1, 2, 3], [4]])

    def refused(text: str, model: HookedModel = bridge, n: int = 2, **more: object) -> None:
        with pytest.raises(ValueError, match=text):
            model.generate(tokens, n, mask=mask, **more)

    refused(
        "n_tokens 10 after the 3 of text 0 would pass the model's context of 12: expected at most 9",
        n=10,
    )
    refused("n_tokens 0 must be at least 1", n=0)
    refused("temperature -1.0 must be a finite number of at least 0", temperature=-1.0)
    refused("temperature nan must be", temperature=float("nan"))
    refused("stop 20 is not a token: expected 0 to 19", stop=[20])
    refused("is not causal: earlier positions depend on later tokens", boot("bert"))
    nan = {"blocks.0.hook_resid_mid": lambda value: value * torch.nan}
    refused("logits after a text are NaN", edits=nan)
    with pytest.raises(
        ValueError, match=r"returns a tensor of shape \(2, 20\) for \(2, 3\) tokens"
    ):
        own(Ending()).generate(tokens, 2)
    with pytest.raises(ValueError, match="model OwnNet takes images: it continues no texts"):
        own_net.generate(torch.ones(1, 2, dtype=torch.int64), 2)


# --- gradients of tokens -------------------------------------------------------------------------------------


def test_the_gradient_at_the_embedding_is_that_of_the_embedding_matrix() -> None:
    module = native_bridge(
        d_model=16, d_head=4, n_heads=4, n_layers=2, n_ctx=12, d_vocab=20, d_mlp=24, act_fn="gelu"
    )
    model = HookedModel(module, TokenInput(20, 12))
    assert model.embedding.name == "hook_embed"
    tokens, mask = model.pad([[3, 1, 4, 1], [5, 9]])
    cache = model.run(tokens, mask=mask, read=["hook_embed", "blocks.1.hook_resid_mid"], grad=True)
    loss = cache.output[0, -1, 2] + cache.output[1, 1, 7]
    embedded, later = cache["hook_embed"], cache["blocks.1.hook_resid_mid"]
    assert embedded.is_leaf
    gradient, behind = torch.autograd.grad(loss, [embedded, later])
    # by plain autograd: what a token's row of the matrix gets is the sum over where the token is
    weight = module.embed.weight
    plain = module(tokens[:1])[0, -1, 2] + module(tokens[1:, :2])[0, 1, 7]
    (expected,) = torch.autograd.grad(plain, weight)
    found = torch.zeros_like(weight).index_add(0, tokens.flatten(), gradient.flatten(0, 1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not gradient[~mask].any()
    assert behind[mask].abs().max() > 0
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


class InPlace(nn.Module):
    """It adds positions to the embedding in place, after a site that has no token in it."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Linear(1, 8)
        self.embed = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1]).float().expand(len(tokens), -1)
        where = self.positions(places[..., None])
        x = self.embed(tokens)
        x += where
        return self.head(x * x)


def test_an_embedding_that_is_overwritten_has_its_gradient_too() -> None:
    model = own(InPlace())
    assert model.embedding.name == "embed"
    tokens = torch.tensor([[3, 1, 4]])
    cache = model.run(tokens, read=["embed", "positions"], grad=True)
    (gradient,) = torch.autograd.grad(cache.output[0, :, 5].sum(), cache["embed"])
    x = cache["embed"] + cache["positions"]
    torch.testing.assert_close(gradient, 2 * x * model.module.head.weight[5])
    torch.testing.assert_close(cache.output, model.logits(tokens), rtol=0, atol=0)


def test_an_edit_of_the_embedding_comes_before_its_gradient(bridge: HookedModel) -> None:
    tokens = torch.tensor([[3, 1, 4]])
    halved = {"hook_embed": lambda value: value / 2}
    cache = bridge.run(tokens, read=["hook_embed"], edits=halved, grad=True)
    plain = bridge.run(tokens, read=["hook_embed"])["hook_embed"]
    torch.testing.assert_close(cache["hook_embed"].detach(), plain / 2)
    own_leaf = plain.clone().requires_grad_(True)
    replaced = bridge.run(
        tokens, read=["hook_embed"], edits={"hook_embed": lambda _: own_leaf * 1}, grad=True
    )
    (gradient,) = torch.autograd.grad(replaced.output[0, -1, 0], own_leaf)
    assert gradient.abs().max() > 0


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.ones(*tokens.shape, 1))


def test_a_model_that_does_not_depend_on_its_tokens_has_no_gradient() -> None:
    model = own(Constant())
    with pytest.raises(ValueError, match="no site of Constant depends on its tokens"):
        model.run(model.input.example(1), grad=True)


def test_edits_at_positions_mean_those_of_each_text(bridge: HookedModel) -> None:
    texts = [[1, 2, 3], [4, 5], [2, 1], [3, 3, 3], [5, 4, 3, 2]]
    edit = Scale(Units("blocks.0.hook_resid_pre", (0, 3)), factor=0.0, at=(-1,))
    wanted = {"changed": Variant("changed", (edit,))}
    ragged = of_examples(Examples.texts(bridge, texts))
    found = run(bridge, wanted.values(), ragged).values["kl"][1]
    for i, text in enumerate(texts):
        alone = of_examples(Examples.texts(bridge, [text]))
        own = run(bridge, wanted.values(), alone).values["kl"][1]
        assert found[i] == pytest.approx(own[0], abs=1e-6)
    tokens, mask = bridge.pad(texts)
    change = changes(bridge, [edit])
    with pytest.raises(ValueError, match="expected texts of one length"):
        bridge.run(tokens, mask=mask, edits=change)
    with bridge.intervening(change), pytest.raises(ValueError, match="edits name positions"):
        bridge.generate(tokens, 2, mask=mask)


def test_examples_are_in_their_order_whatever_batch_they_were_in(bridge: HookedModel) -> None:
    texts = [[1] * 9, [2, 3], [4] * 5, [5, 6, 7], [1, 2], [3] * 9]
    task = of_examples(Examples.texts(bridge, texts))
    variants = [Variant("less", (scale("blocks.1.hook_mlp_out:2", 0.5),))]
    found = run(bridge, variants, task, batch=2)
    for i in range(len(texts)):
        own = run(bridge, variants, task.subset([i]))
        for name, values in found.values.items():
            assert values[:, i] == pytest.approx(own.values[name][:, 0], abs=1e-5)
    assert [len(b) for b in Examples.texts(bridge, [[1, 2]] * 33).batches()] == [16, 17]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox"])
def test_batches_of_other_lengths_each_begin_with_their_own(boot, kind: str) -> None:
    """A pass of a later batch is run on a text of its own length; the first has one token, which fits anywhere."""
    model = boot(kind)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, 30, (n,), generator=generator).tolist() for n in (1, 6, 7, 8)]
    asked = tuple(Question((len(text) - 1,), answers=((7,),)) for text in texts)
    task = Task("next", Examples.texts(model, texts), asked, cross_entropy)
    head = Units("blocks.0.attn.hook_z", (1,))
    for edit, batch in ((Scale(head, factor=-3.0, at=(-1,)), 32), (Scale(head, factor=0.0), 1)):
        found = run(model, [Variant("less", (edit,))], task, batch=batch).of(
            "cross_entropy", "less"
        )
        for i, text in enumerate(texts):
            change = changes(model, [edit])
            logits = model.logits(torch.tensor([text]), change)[0, -1].double()
            assert found[i] == pytest.approx(float(-logits.log_softmax(-1)[7]), abs=1e-5)


def test_a_persons_own_metric_sees_texts_of_one_length(bridge: HookedModel) -> None:
    texts = [[1, 2, 3, 4], [5, 6], [7, 8]]
    asked = tuple(Question((len(text) - 1,)) for text in texts)
    task = Task("own", Examples.texts(bridge, texts), asked, as_metric(lambda out: out[:, -1, 5]))
    found = run(bridge, [], task).of("<lambda>")
    for i, text in enumerate(texts):
        own = bridge.logits(torch.tensor([text]))[0, -1, 5]
        assert found[i] == pytest.approx(float(own), abs=1e-5)
