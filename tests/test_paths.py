"""Path patching: equal to runs by hand, exactly zero where nothing leads, exact for every kind of transformer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import circuits
from circuits.cleanroom import addition, induction
from circuits.examples import Examples
from circuits.experiments.patched_runs import (
    Options,
    at_positions,
    changes_of,
    patches_of,
    positions_of,
)
from circuits.experiments.patching import patch_paths
from circuits.hooks import Change
from circuits.localization import head_effects, path_grid
from circuits.models.adapter.hooked_model import ActivationCache, HookedModel
from circuits.models.adapter.inputs import ImageInput, TokenInput
from circuits.models.paths.residual import Sender, Stream
from circuits.models.paths.routes import paths, receivers, senders, stream_of
from circuits.models.zoo.loading import load_model
from circuits.models.zoo.transformers import huggingface_bridge, native_bridge
from circuits.stimuli.repeats import draw_repeats
from circuits.tasks import Item, Question, Task, as_metric, compile_task
from circuits.tasks.builtin import load_task
from tests.plain_transformer import Plain, of_native, of_neox
from tests.test_by_hand import Parts

SHAPE: dict[str, Any] = {"d_model": 8, "d_head": 4, "n_layers": 2, "n_ctx": 12, "d_vocab": 20}
"""Of the random models."""

Case = tuple[HookedModel, Plain]


def record_senders(
    model: HookedModel, tokens: Tensor, positions: Tensor | None = None
) -> ActivationCache:
    """A run with what every sender writes."""
    stream = stream_of(model)
    edits = at_positions(stream, positions_of(stream, tokens, positions))
    return model.run(tokens, read=stream.sender_sites(stream.senders), edits=edits)


def path_changes(
    model: HookedModel, source: Mapping[str, Tensor], group: Iterable[Any]
) -> dict[str, Change]:
    """Paths patched together from a recorded run, as changes of sites."""
    stream = stream_of(model)
    some = frozenset(stream.path(path) for path in group)
    other = {name: source[name] for name in stream.sender_sites({sender for sender, _ in some})}
    return changes_of(stream, patches_of(stream, [some]), other, Options())


def scrambled(module: torch.nn.Module) -> torch.nn.Module:
    """With all weights random, those of norms and biases too."""
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return module


def gpt2_like() -> Case:
    bridge = scrambled(
        native_bridge(**SHAPE, n_heads=2, d_mlp=12, act_fn="gelu", normalization_type="LN")
    )
    plain = Plain(of_native(bridge, 2), 2, 2, 2)
    return HookedModel(bridge, TokenInput(20, 12), "gpt2-like"), plain


def llama_like() -> Case:
    made = native_bridge(
        **SHAPE, d_mlp=12, n_heads=4, n_key_value_heads=2, act_fn="silu", gated_mlp=True, normalization_type="RMS",
        final_rms=True, positional_embedding_type="rotary",
    )  # fmt: skip
    bridge = scrambled(made)
    plain = Plain(of_native(bridge, 2), 2, 4, 2, "rms", "adjacent", 4, gated=True, act=F.silu)
    return HookedModel(bridge, TokenInput(20, 12), "llama-like"), plain


@pytest.fixture(scope="module", params=[gpt2_like, llama_like])
def case(request: pytest.FixtureRequest) -> Case:
    return request.param()


def drawn(n: int = 3, length: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    clean, corrupted = torch.randint(1, 20, (2, n, length), generator=generator)
    return clean, corrupted


def named(found: Any) -> list[tuple[str, str]]:
    return [(str(sender), str(receiver)) for sender, receiver in found]


def weighed(logits: Tensor) -> Tensor:
    """A metric in which every logit at every position has a weight of its own."""
    shape = logits.shape[1:]
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return (logits * weights.to(logits)).flatten(1).sum(1)


def pairs(model: HookedModel, clean: Tensor, corrupted: Tensor, metric: Any = weighed) -> Task:
    """Texts and their counterparts as a task."""
    asked = (Question((clean.shape[1] - 1,)),) * len(clean)
    source, other = (Examples.given(model, tokens) for tokens in (clean, corrupted))
    return Task("pairs", source, asked, as_metric(metric), counterparts=other)


# --- known truth -----------------------------------------------------------------------------------


def of_parts(parts: Parts, clean: Tensor, corrupted: Tensor, ids: Tensor) -> dict[Any, Tensor]:
    """The largest change of any logit of each example, by the slow pass of tests/test_by_hand.py."""
    here = torch.arange(clean.shape[1])
    base, _ = parts.run(clean, here)
    _, other = parts.run(corrupted, ids)
    return {
        (source, target): (parts.run(clean, here, (source, target), other)[0] - base).abs().amax((1, 2))
        for target, sources in parts.targets()
        for source in sources
    }  # fmt: skip


@pytest.mark.parametrize("rolled", [False, True])
def test_induction_has_exactly_its_true_edges(rolled: bool) -> None:
    model = load_model("induction-by-hand")
    generator = torch.Generator().manual_seed(5)
    clean, corrupted = (draw_repeats(3, generator)[0] for _ in range(2))
    n = min(clean.shape[1], corrupted.shape[1], 24)
    clean, corrupted = clean[:, :n], corrupted[:, :n]
    ids = torch.arange(n).roll(1) if rolled else torch.arange(n)
    found = circuits.patch_paths(
        model, clean, corrupted, corrupted_positions=ids if rolled else None
    )
    effects = {edge: found.effects[i] for i, edge in enumerate(named(p for (p,) in found.paths))}
    silent = {("position", "0.0.q"), ("position", "0.0.k")}
    assert len(effects) == 71
    assert {edge for edge, effect in effects.items() if effect.any()} == (
        set(induction.TRUE_EDGES) - (set() if rolled else silent)
    )
    assert isinstance(model.input, TokenInput)
    weights = induction.weights(model.input.n_vocab, model.input.n_ctx)
    wanted = of_parts(Parts(weights, 2, 3, mlp=False), clean, corrupted, ids)
    assert wanted.keys() == effects.keys()
    for edge, effect in effects.items():
        torch.testing.assert_close(effect.double(), wanted[edge], rtol=1e-4, atol=1e-9)


def test_addition_has_exactly_its_true_edges() -> None:
    model = load_model("addition-by-hand")
    clean = torch.tensor([[3, 99, 113], [50, 8, 113]])
    corrupted = torch.tensor([[70, 1, 113], [2, 31, 113]])
    found = patch_paths(model, clean, corrupted, paths(model))
    parts = Parts(addition.weights(113), 1, 2, mlp=True)
    wanted = of_parts(parts, clean, corrupted, torch.arange(3))
    assert len(found.paths) == len(wanted) == 21
    for edge, effect in zip(named(p for (p,) in found.paths), found.effects, strict=True):
        source, target = (name.removesuffix(":0") for name in edge)
        assert bool(effect.any()) == (tuple(edge) in addition.TRUE_EDGES)
        torch.testing.assert_close(effect.double(), wanted[source, target], rtol=1e-4, atol=1e-9)


# --- equal to runs by hand -------------------------------------------------------------------------


def check_each_edge(model: HookedModel, plain: Plain, through_mlps: bool) -> None:
    """Every edge of a model, in both directions, against the run by hand."""
    clean, corrupted = drawn()
    torch.testing.assert_close(
        model.logits(clean).double(), plain.run(clean)[0], rtol=1e-4, atol=1e-4
    )
    assert sorted(named(paths(model))) == sorted(plain.edges())
    ways = {"noising": (clean, corrupted), "denoising": (corrupted, clean)}
    for direction, (base, source) in list(ways.items())[: 1 if through_mlps else 2]:
        (before, _), (_, other) = plain.run(base), plain.run(source)
        found = patch_paths(
            model, clean, corrupted, paths(model), direction=direction, metric=weighed,
            through_mlps=through_mlps,
        )  # fmt: skip
        for (path,), values, effects in zip(found.paths, found.values, found.effects, strict=True):
            (edge,) = named([path])
            logits = (
                plain.through_mlps(base, edge, other)
                if through_mlps
                else plain.run(base, {edge}, other)[0]
            )
            wanted = weighed(logits)
            scale = float(wanted.abs().max())
            torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-5 * scale)
            torch.testing.assert_close(
                effects.double(), wanted - weighed(before), rtol=1e-4, atol=1e-5 * scale
            )


@pytest.mark.parametrize("through_mlps", [False, True])
def test_each_path_equals_a_run_by_hand(case: Case, through_mlps: bool) -> None:
    check_each_edge(*case, through_mlps)


def test_positions_are_a_sender_of_their_own() -> None:
    model, plain = gpt2_like()
    clean, corrupted = drawn()
    ids = torch.tensor([3, 1, 0, 2, 11, 5, 4])
    _, other = plain.run(corrupted, positions=ids)
    some = [("position", "0.1.k"), ("position", "logits"), ("0.0", "mlp:1")]
    found = patch_paths(model, clean, corrupted, some, corrupted_positions=ids, metric=weighed)
    for edge, values in zip(some, found.values, strict=True):
        wanted = weighed(plain.run(clean, {edge}, other)[0])
        torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-5)
    back = patch_paths(
        model,
        clean,
        corrupted,
        some,
        corrupted_positions=ids,
        metric=weighed,
        direction="denoising",
    )
    _, own = plain.run(clean)
    for edge, values in zip(some, back.values, strict=True):
        wanted = weighed(plain.run(corrupted, {edge}, own, positions=ids)[0])
        torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back.patched, found.source)


def test_several_paths_at_once_equal_a_run_by_hand(case: Case) -> None:
    model, plain = case
    clean, corrupted = drawn()
    _, other = plain.run(corrupted)
    generator = torch.Generator().manual_seed(1)
    sets = [
        [edge for edge in plain.edges() if torch.rand(1, generator=generator) < share]
        for share in (0.1, 0.5, 0.9)
    ]
    found = patch_paths(model, clean, corrupted, sets, metric=weighed)
    for edges, values in zip(sets, found.values, strict=True):
        wanted = weighed(plain.run(clean, set(edges), other)[0])
        torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-5)


# --- invariants --------------------------------------------------------------------------------------


def check_invariants(model: HookedModel) -> None:
    """What holds whatever the model is."""
    clean, corrupted = drawn()
    source, base, every = record_senders(model, corrupted), model.logits(clean), paths(model)
    assert path_changes(model, source, []) == {}
    with model.intervening(path_changes(model, source, every)):
        torch.testing.assert_close(
            model.logits(clean), model.logits(corrupted), rtol=1e-5, atol=1e-5
        )
    own = path_changes(model, record_senders(model, clean), every)
    assert torch.equal(model.logits(clean, own), base), "a run's own contributions change no bit"
    stream = stream_of(model)
    for sender in stream.senders:
        found = path_changes(model, source, [(sender, stream.stream_after(sender))])
        if sender.kind == "bias":
            assert found == {}, "a constant is the same in every run"
            continue
        torch.testing.assert_close(
            model.logits(clean, found),
            replaced(stream, clean, source, sender),
            rtol=1e-5,
            atol=1e-5,
        )


def replaced(stream: Stream, clean: Tensor, source: Any, sender: Sender) -> Tensor:
    """Logits with all that a sender writes from another run, by a hook at its output."""
    (site, *_) = stream.sender_sites([sender])

    def change(value: Tensor) -> Tensor:
        made = value.clone()
        if sender.kind == "head":
            made[:, :, sender.head] = source[site][:, :, sender.head]
        else:
            made[:] = source[site]
        return made

    return stream.model.logits(clean, {site: change})


def test_no_paths_all_paths_and_whole_senders(case: Case) -> None:
    check_invariants(case[0])


def test_all_senders_at_once_are_the_receivers_input_of_the_other_run(case: Case) -> None:
    model, _ = case
    clean, corrupted = drawn()
    source, stream = record_senders(model, corrupted), stream_of(model)
    names = {
        name for r in stream.receivers for name in (stream.input_site(r), stream.stream_site(r))
    }
    base, other = (model.run(tokens, read=names) for tokens in (clean, corrupted))
    for receiver in receivers(model, streams=True)[::2]:
        group = [(s, receiver) for s in stream.senders if stream.reaches(s, receiver)]
        site = stream.input_site(receiver)
        found = model.run(clean, read=[site], edits=path_changes(model, source, group))[site]
        wanted = other[site]
        if receiver.kind == "resid_mid":  # changed where attention adds to the stream
            before = stream.stream_site(receiver).replace("mid", "pre")
            wanted = wanted + other[before] - base[before]
        if receiver.kind in ("q", "k", "v"):
            rest = [h for h in range(found.shape[2]) if h != receiver.head]
            assert torch.equal(found[:, :, rest], base[site][:, :, rest]), "only this head reads it"
            found, wanted = found[:, :, receiver.head], wanted[:, :, receiver.head]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_batch_equals_a_loop(case: Case) -> None:
    model, _ = case
    clean, corrupted = drawn()
    some = [path for path in paths(model) if path[0].kind != "position"][::5]
    whole = patch_paths(model, clean, corrupted, some)
    for rows in (1, 10):
        part = patch_paths(model, clean, corrupted, some, rows=rows)
        torch.testing.assert_close(part.effects, whole.effects, rtol=1e-5, atol=1e-6)
    nothing = patch_paths(model, clean, corrupted, [some[0], [], some[1]], rows=6)
    assert not nothing.effects[1].any()
    assert nothing.effects[::2].all()


def test_a_sender_can_be_replaced_at_some_positions(case: Case) -> None:
    model, plain = case
    clean, corrupted = drawn()
    where = torch.zeros(clean.shape, dtype=torch.bool)
    where[0, 2] = where[1, 4:] = True
    found = patch_paths(model, clean, corrupted, [("0.1", "logits")], where=where)
    logits, own = plain.run(clean)
    _, other = plain.run(corrupted)
    mixed = own | {"0.1": torch.where(where[..., None], other["0.1"], own["0.1"])}
    wanted = (plain.run(clean, {("0.1", "logits")}, mixed)[0] - logits).abs().flatten(1).amax(1)
    torch.testing.assert_close(found.effects[0].double(), wanted, rtol=1e-4, atol=1e-6)
    assert found.effects[0, 2] == 0, "nothing was replaced in the third example"


def test_a_path_and_an_edit_are_in_force_together(case: Case) -> None:
    model, _ = case
    clean, corrupted = drawn()
    source = record_senders(model, corrupted)

    def without_head_1(z: Tensor) -> Tensor:
        return torch.cat([z[:, :, :1], torch.zeros_like(z[:, :, 1:2]), z[:, :, 2:]], 2)

    with model.intervening({"blocks.1.attn.hook_z": without_head_1}):
        base = model.logits(clean)
        removed = path_changes(model, source, [("0.0", "1.1.q")])
        assert torch.equal(model.logits(clean, removed), base)
        left = path_changes(model, source, [("0.0", "1.0.v")])
        assert not torch.equal(model.logits(clean, left), base)


def test_hooks_are_gone_and_the_model_is_as_it_was(case: Case) -> None:
    model, _ = case
    clean, corrupted = drawn()
    before, weights = model.logits(clean), model.hash
    with pytest.raises(ValueError, match="metric is nan on example 1: expected a finite number"):
        patch_paths(
            model, clean, corrupted, [("token", "logits")],
            metric=lambda logits: torch.tensor([0.0, torch.nan, 1.0]),
        )  # fmt: skip
    assert torch.equal(model.logits(clean), before)
    assert model.hash == weights


# --- on tasks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("through_mlps", [False, True])
def test_a_grid_of_paths_is_what_patching_each_gives(case: Case, through_mlps: bool) -> None:
    model, _ = case
    clean, corrupted = drawn()
    some = [
        ("token", "0.0.v"),
        ("0.1", "1.0.q"),
        ("mlp:0", "1.1.k"),
        ("0.0", "logits"),
        ("1.0", "mlp:1"),
    ]
    grid = path_grid(
        model, pairs(model, clean, corrupted), some, through_mlps=through_mlps, n_random=1
    )
    for way in ("noising", "denoising"):
        own = patch_paths(
            model, clean, corrupted, some, direction=way, through_mlps=through_mlps, metric=weighed
        )
        close = {"rtol": 1e-5, "atol": 1e-5 * float(own.values.abs().max())}
        side = grid.side(way)
        torch.testing.assert_close(torch.tensor(side.patched), own.values.double(), **close)
        torch.testing.assert_close(torch.tensor(side.base), own.patched.double(), **close)
        torch.testing.assert_close(torch.tensor(side.other), own.source.double(), **close)
        for i, path in enumerate(some):
            for k, partner in enumerate(others_of(grid, way, model, clean, corrupted)):
                mixed = (
                    (clean, corrupted[[partner]])
                    if way == "noising"
                    else (clean[[partner]], corrupted)
                )
                one = [t if len(t) == 1 else t[[k]] for t in mixed]
                drawn_by_hand = patch_paths(
                    model, *one, [path], direction=way, through_mlps=through_mlps, metric=weighed
                )  # fmt: skip
                assert side.random[0, i, k] == pytest.approx(
                    float(drawn_by_hand.values), abs=close["atol"]
                )
    assert grid.rows == ("token", "0.1", "mlp:0", "0.0", "1.0")
    assert grid.matrix("change").shape == (5, 5)
    assert [e.cell for e in grid.effects()][1] == "0.1 -> 1.0.q"


def test_a_grid_of_all_paths_is_what_patching_them_gives(case: Case) -> None:
    model, _ = case
    clean, corrupted = drawn()
    grid = path_grid(model, pairs(model, clean, corrupted), direction="noising", n_random=0)
    own = patch_paths(model, clean, corrupted, metric=weighed)
    assert [str(cell) for cell in grid.cells] == [name for name, _ in own.items()]
    close = {"rtol": 1e-5, "atol": 1e-5 * float(own.values.abs().max())}
    torch.testing.assert_close(torch.tensor(grid.side().patched), own.values.double(), **close)


def others_of(
    grid: Any, way: str, model: HookedModel, clean: Tensor, corrupted: Tensor
) -> list[int]:
    """Which pair stood in for each, as the grid drew it."""
    from circuits.localization.pairing import OtherPairs

    task = pairs(model, clean, corrupted)
    source = task.counterparts if way == "noising" else task.examples
    assert source is not None
    return OtherPairs(model, task, source, [], 1, grid.record.seed).partners[0]


def test_paths_of_texts_of_other_lengths_are_those_of_each_alone(case: Case) -> None:
    model, _ = case
    texts = [((1, 2, 3, 4), (4, 2, 3, 4)), ((5, 6), (7, 6)), ((8, 9, 1, 2, 3), (2, 9, 1, 2, 3))]
    items = [Item(a, answers=((3,),), against=((4,),), corrupted=b) for a, b in texts]
    task, some = (
        compile_task(model, items),
        [("token", "0.0.v"), ("0.1", "1.0.k"), ("1.1", "logits")],
    )
    together = path_grid(model, task, some, n_random=0)
    for i in range(len(items)):
        alone = path_grid(model, task.subset([i]), some, n_random=0)
        for way in ("noising", "denoising"):
            assert together.side(way).patched[:, i] == pytest.approx(
                alone.side(way).patched[:, 0], abs=1e-5
            )


def test_induction_heads_keys_read_the_previous_token_head() -> None:
    """Wang et al.'s finding on the model whose mechanism is known: K-composition carries copying."""
    model = load_model("induction")
    task = load_task(model, n=32)
    if task.counterparts is None:
        pytest.fail("the model's own task has no counterparts")
    grid = path_grid(
        model, task, [("0.3", "1.0.k"), ("0.3", "1.0.q"), ("0.3", "1.0.v"), ("0.0", "1.0.k")], direction="noising"
    )  # fmt: skip
    shares = [e.normalised for e in grid.effects("noising")]
    assert shares[0] == max(shares)


# --- heads -----------------------------------------------------------------------------------------


def test_head_effects_equal_runs_by_hand(case: Case) -> None:
    model, plain = case
    clean, corrupted = drawn()
    (before, own), (_, other) = plain.run(clean), plain.run(corrupted)
    task = pairs(model, clean, corrupted)
    found = head_effects(model, task, ["0.1", "1.0"])
    for i, head in enumerate(("0.1", "1.0")):
        everywhere = {(head, target) for target, sources in plain.targets() if head in sources}
        total = weighed(plain.run(clean, everywhere, other)[0]) - weighed(before)
        direct = weighed(plain.run(clean, {(head, "logits")}, other)[0]) - weighed(before)
        # the last normalisation held: linear in the stream, at the scale that it has in the clean run
        stream, change = torch.stack(list(own.values())).sum(0), other[head] - own[head]
        if plain.norm == "ln":
            stream, change = (x - x.mean(-1, keepdim=True) for x in (stream, change))
        scale = (stream.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        held = weighed(change / scale * plain.w["ln_final"] @ plain.w["unembed"].T)
        close = {"rtol": 1e-4, "atol": 1e-5 * float(weighed(before).abs().max())}
        expected = {
            "total": total, "direct": direct, "direct_held": held, "self_repair": total - held,
            "indirect": total - direct,
        }  # fmt: skip
        for name, value in expected.items():
            torch.testing.assert_close(torch.tensor(getattr(found, name)[i]), value, **close)
        (effect,) = head_effects(model, task, ["0.1", "1.0"][i], n_random=0).effects()
        assert effect.total.value == pytest.approx(float(total.mean()), abs=1e-3)
        assert effect.total.low <= effect.total.value <= effect.total.high
    repaired = found.indirect + found.repaired_by_norm
    assert found.self_repair == pytest.approx(repaired, abs=1e-5)
    base = torch.tensor(found.grid.side().base)
    torch.testing.assert_close(base, weighed(before).double(), rtol=1e-5, atol=1e-5)
    assert [e.head for e in head_effects(model, task, n_random=0).effects()][:2] == ["0.0", "0.1"]


def backup() -> HookedModel:
    """y = a + relu(b - a): head 0 writes a, head 1 writes b, an MLP makes up for head 0 where it is missing.

    The stream is a and b as the token has them, a and b as heads write them (the answer lies where head 0 writes).
    """
    made = native_bridge(
        d_model=4, d_head=2, n_heads=2, n_layers=1, n_ctx=3, d_vocab=3, d_mlp=1, act_fn="relu",
        normalization_type=None,
    )  # fmt: skip
    state = {name: torch.zeros_like(value) for name, value in made.state_dict().items()}
    state["embed.weight"][1, :2] = 1  # token 1 has a and b, token 0 neither
    for head in range(2):
        state["blocks.0.attn.v.weight"][2 * head, head] = 1
        state["blocks.0.attn.o.weight"][2 + head, 2 * head] = 1
    state["blocks.0.mlp.in.weight"][0] = torch.tensor([0.0, 0, -1, 1])
    state["blocks.0.mlp.out.weight"][2, 0] = 1
    state["unembed.weight"][0, 2] = 1
    made.load_state_dict(state)
    return HookedModel(made, TokenInput(3, 3), "backup")


def test_a_backup_repairs_all_that_the_head_did() -> None:
    model = backup()
    both = torch.tensor([[1]]), torch.tensor([[0]])
    task = pairs(model, *both, metric=lambda logits: logits[:, 0, 0])
    found = head_effects(model, task, ["0.0", "0.1"])
    assert found.grid.side().base.tolist() == [1]
    assert found.direct.tolist() == [[-1], [0]]
    assert found.total.tolist() == [[0], [0]]
    assert found.self_repair.tolist() == [[1], [0]], "all of the direct effect is made up for"
    back = head_effects(model, task, ["0.0", "0.1"], direction="denoising")
    assert back.total.tolist() == [[1], [1]], "each of the two is enough"
    assert back.direct.tolist() == [[1], [0]], "the backup acts through the MLP alone"


# --- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        (("0.9", "logits"), KeyError, "unknown sender of gpt2-like '0.9': did you mean 0."),
        (("tokens", "logits"), KeyError, "did you mean token"),
        (("token", "1.0.z"), KeyError, "unknown receiver of gpt2-like '1.0.z': did you mean 1.0.v"),
        (("token", "mlp"), KeyError, "did you mean mlp:1, mlp:0"),
        (("mlp:1", "0.0.q"), ValueError, "path mlp:1 -> 0.0.q leads backwards: .* reaches is resid_post:1"),
        (("0.0", "0.1.q"), ValueError, "path 0.0 -> 0.1.q leads backwards: .* reaches is resid_mid:0"),
    ],
)  # fmt: skip
def test_bad_paths_are_one_clear_line(path: Any, error: type[Exception], words: str) -> None:
    model, _ = gpt2_like()
    with pytest.raises(error, match=words):
        patch_paths(model, *drawn(), [path])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"corrupted": drawn()[1][:, 1:]}, r"corrupted has shape \(3, 6\): expected that of clean, \(3, 7\)"),
        ({"corrupted": drawn()[1] + 20}, "token .* is not in the vocabulary"),
        ({"paths": []}, "paths are empty"),
        ({"corrupted_positions": torch.arange(7) + 6}, "position 12 of gpt2-like must be from 0 to 11"),
        ({"corrupted_positions": torch.arange(3)}, r"positions of shape \(3,\) do not fit tokens of shape \(3, 7\)"),
        ({"where": torch.ones(3, 6, dtype=torch.bool)}, r"where has shape \(3, 6\): expected .* \(3, 7\)"),
        ({"metric": lambda logits: logits.mean()}, r"metric returned shape \(\): expected one number for each of 3"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(change: dict[str, Any], words: str) -> None:
    model, _ = gpt2_like()
    clean, corrupted = drawn()
    given = {"clean": clean, "corrupted": corrupted, "paths": [("token", "logits")]} | change
    with pytest.raises(ValueError, match=words):
        patch_paths(model, **given)


def test_a_model_whose_stream_is_not_the_sum_of_its_senders_is_refused() -> None:
    images = HookedModel(torch.nn.Conv2d(3, 4, 1), ImageInput(3, 8, 8), "conv")
    with pytest.raises(ValueError, match="conv has no residual stream"):
        senders(images)
    model, _ = gpt2_like()
    doubled = model.module.blocks[1].mlp.register_forward_hook(lambda *parts: parts[-1] * 2)  # type: ignore[union-attr, index]
    with pytest.raises(
        ValueError, match=r"blocks.1.hook_resid_post differs by .* sum of its senders"
    ):
        senders(model)
    doubled.remove()
    assert [str(s) for s in senders(model)[:3]] == ["token", "position", "0.0"]
    rotary, _ = llama_like()
    assert Sender("position") not in senders(rotary)
    with pytest.raises(ValueError, match="llama-like adds no position embedding"):
        record_senders(rotary, drawn()[0], torch.arange(7))


# --- other kinds of transformers -------------------------------------------------------------------


def saved(folder: Path, kind: str) -> tuple[HookedModel, Any]:
    """A small random model of transformers as a bridge, and the model itself."""
    import transformers

    shape = {
        "vocab_size": 20, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2,
        "intermediate_size": 24, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    if kind == "GPTNeoX":
        config = transformers.GPTNeoXConfig(**shape, rotary_pct=0.5)
    elif kind == "Gemma2":
        config = transformers.Gemma2Config(**shape, num_key_value_heads=2, head_dim=4)
    else:
        config = transformers.GPT2Config(
            vocab_size=20, n_embd=16, n_head=4, n_layer=2, n_positions=12, bos_token_id=0, eos_token_id=0
        )  # fmt: skip
    inner: Any = scrambled(transformers.AutoModelForCausalLM.from_config(config)).eval()
    inner.save_pretrained(folder)
    return HookedModel(huggingface_bridge(str(folder)), TokenInput(20, 12), kind), inner


@pytest.mark.filterwarnings("ignore")  # other packages' own
@pytest.mark.parametrize("kind", ["GPT2", "GPTNeoX", "Gemma2"])
def test_models_of_transformers(kind: str, tmp_path: Path) -> None:
    model, inner = saved(tmp_path, kind)
    check_invariants(model)
    if kind == "GPTNeoX":  # attention and MLP of a layer read the same stream
        plain = Plain(of_neox(inner, 4), 2, 4, 4, rotary="half", rotary_dims=2, parallel=True)
        for through_mlps in (False, True):
            check_each_edge(model, plain, through_mlps)
