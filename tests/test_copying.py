"""Copies of modules: nothing in a copy leads to its original, whatever hooks close over."""

from __future__ import annotations

import gc
import weakref
from collections import deque
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from circuits.autoencoders import About, save_autoencoder
from circuits.models.adapter.copying import deep_copy
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.paths.randomizing import randomized
from circuits.models.zoo.loading import load_model
from circuits.models.zoo.transformers import native_bridge
from tests.random_models import booted
from tests.test_attaching import code_of


def own_parts(module: nn.Module) -> list[object]:
    return [*module.modules(), *module.parameters(), *module.buffers()]


def reached(start: object, goals: Iterable[object]) -> list[str]:
    """The ways along which references of any kind, weak ones too, lead from an object to others."""
    wanted, ways = {id(goal) for goal in goals}, []
    seen, waiting = {id(start)}, deque([(start, type(start).__name__)])
    while waiting:
        each, way = waiting.popleft()
        if id(each) in wanted:
            ways.append(way)
            continue
        if isinstance(each, weakref.ReferenceType):
            held = [each()]
        elif type(each) in weakref.ProxyTypes:
            held = [each.__reduce_ex__.__self__]  # type: ignore[attr-defined]
        else:
            held = gc.get_referents(each)
        if isinstance(each, FunctionType):  # not the names of its whole module
            held = [h for h in held if h is not each.__globals__]
        for other in held:
            if id(other) not in seen and not isinstance(other, type | ModuleType):
                seen.add(id(other))
                waiting.append((other, f"{way} > {type(other).__name__}"))
    return ways


def state(module: nn.Module) -> dict[str, Any]:
    """What the modules of a model hold: tensors by version and address, all else by identity."""
    found: dict[str, Any] = {}
    for name, each in module.named_modules():
        for key, value in vars(each).items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            for at, part in parts:
                version = part._version if isinstance(part, Tensor) else 0
                found[f"{name}.{key}.{at}"] = (id(part), version)
    return found


# --- hooks of any kind -----------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Any
    second: Any


def plain(module: nn.Module, args: object) -> None:
    """A hook that refers to nothing."""


class Counting(nn.Module):
    """Counts in `total` how many times it ran, through every kind of reference that there is to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.total: list[str] = []
        weak, reference, me = weakref.proxy(self), weakref.ref(self), self
        self.proxy, self.reference = weak, reference

        def closing(module: nn.Module, args: object) -> None:
            me.total.append("closure")

        def weakly(module: nn.Module, args: object) -> None:
            weak.total.append("proxy")

        def referring(module: nn.Module, args: object) -> None:
            own = reference()
            assert own is not None
            own.total.append("reference")

        def by_default(module: nn.Module, args: object, own: Any = me, *, also: Any = weak) -> None:
            own.total.append("default")
            also.total.append("keyword")

        def through(closed: Pair, module: nn.Module, args: object) -> None:
            closed.first.append("partial")
            closed.second["own"]().total.append("nested")

        circular: list[Any] = [self]
        circular.append(circular)

        def recursive(depth: int = 2) -> None:
            assert circular[1] is circular
            me = circular[0]
            me.total.append("recursive")
            if depth > 1:
                recursive(depth - 1)

        def replaced(own: Counting, x: Tensor) -> Tensor:
            me.total.append("forward")
            return own.linear(x)

        count = 0

        def adding(module: nn.Module, args: object) -> None:
            nonlocal count
            count += 1
            me.total.append("shared")

        def telling(module: nn.Module, args: object) -> None:
            me.total.append(f"count {count}")

        nested = partial(through, Pair(self.total, {"own": reference}))
        for hook in (closing, weakly, referring, by_default, nested, adding, telling, plain):
            self.linear.register_forward_pre_hook(hook)
        self.linear.register_forward_pre_hook(lambda module, args: recursive())
        self.linear.register_forward_pre_hook(self.noting)
        self.known, self.several = {closing}, (closing, [plain])
        object.__setattr__(self, "forward", MethodType(replaced, self))

    def noting(self, module: nn.Module, args: object) -> None:
        self.total.append("method")


RUN = [
    "forward", "closure", "proxy", "reference", "default", "keyword", "partial", "nested", "shared", "count 1",
    "recursive", "recursive", "method",
]  # fmt: skip


def test_a_copy_runs_its_own_hooks_on_its_own_parts() -> None:
    original = Counting()
    copies = [deep_copy(original), *deep_copy((original, original))]
    assert copies[1] is copies[2]
    copies[2] = deep_copy(copies[0])
    before = state(original)
    for copied in copies:
        copied(torch.ones(1, 2))
        assert copied.total == RUN, "what was shared between hooks is shared between the copy's"
        assert not reached(copied, [*own_parts(original), original.total])
    assert original.total == []
    assert state(original) == before
    original(torch.ones(1, 2))
    assert original.total == RUN
    first = copies[0]
    assert first.proxy.__reduce_ex__.__self__ is first
    assert first.reference() is first
    hooks = list(first.linear._forward_pre_hooks.values())
    assert first.several[0] in first.known
    assert first.several[0] is hooks[0]
    assert hooks[7] is plain, "what leads to no part of the original is shared"
    del original, before
    gc.collect()
    copies[2](torch.ones(1, 2))
    assert len(copies[2].total) == 2 * len(RUN)


def test_what_a_module_kept_of_a_pass_with_gradients_is_copied() -> None:
    """Attention patterns of TransformerLens, caches of LeViT."""
    module = nn.Linear(2, 2)
    module.kept = module(torch.ones(1, 2))
    made: Any = deep_copy(module)
    assert torch.equal(made.kept, module.kept)  # type: ignore[arg-type]
    assert made.kept.grad_fn is None


# --- bridges ---------------------------------------------------------------------------------------


def base(kind: str, folder: Path) -> HookedModel:
    if kind != "native":
        return booted(folder, kind)
    shape = {
        "d_model": 16,
        "d_head": 4,
        "n_heads": 4,
        "n_layers": 2,
        "n_ctx": 12,
        "d_vocab": 20,
        "d_mlp": 24,
    }
    more = {"gated_mlp": True, "act_fn": "silu", "normalization_type": "RMS", "final_rms": True}
    bridge = native_bridge(**shape, **more, positional_embedding_type="rotary")
    return HookedModel(bridge, TokenInput(20, 12), kind)


@pytest.mark.filterwarnings("ignore")  # other packages' own
@pytest.mark.parametrize("kind", ["native", "gpt2", "gemma", "opt"])
def test_autoencoders_on_a_bridge_outlive_its_base(kind: str, tmp_path: Path) -> None:
    model = base(kind, tmp_path)
    x, sites = model.input.example(2), [s.name for s in model.sites]
    lower, upper = "blocks.0.mlp.hook_out", "blocks.1.mlp.hook_out"
    intact = model.logits(x)
    before = state(model.module)
    one = model.attach(code_of(model, lower), "x", lower)
    twin = model.attach(code_of(model, lower), "x", lower)
    both = one.attach(code_of(model, upper), "y", upper)
    shuffled = randomized(model)
    for copied in (one, twin, both):
        assert [s.name for s in copied.sites if not s.name.startswith("sae/")] == sites
        assert [s.aliases for s in copied.sites if s.name in sites] == [
            s.aliases for s in model.sites
        ]
        assert torch.equal(copied.logits(x), intact)
        copied.run(x, read=copied.sites, edits={"sae/x": torch.zeros_like})
    assert state(model.module) == before
    for here, there in ((one, model), (one, twin), (both, one), (shuffled, model)):
        assert not reached(here.module, own_parts(there.module))
    known = one.run(x, read=["sae/x"])["sae/x"]
    del model, one, twin, copied, here, there
    gc.collect()
    assert torch.equal(both.logits(x), intact)
    assert torch.equal(both.run(x, read=["sae/x"])["sae/x"], known)
    assert not torch.equal(both.logits(x, edits={"sae/y": torch.zeros_like}), intact)
    assert not torch.equal(shuffled.logits(x), intact)


def test_a_real_language_model_is_loaded_with_its_autoencoder(assets: Path, tmp_path: Path) -> None:
    site = "blocks.2.hook_resid_post"
    model = load_model("stories260k")
    code = code_of(model, site)
    code.about = About("s2", site, site, "stories260k", model.hash)
    file = save_autoencoder(code, tmp_path / "s2")
    x = model.input.example(2)
    intact, codes = model.logits(x), code.encode(model.run(x, read=[site])[site])
    del model
    gc.collect()
    own = load_model(f"stories260k+{file}")
    assert torch.equal(own.logits(x), intact)
    torch.testing.assert_close(own.run(x, read=["sae/s2"])["sae/s2"], codes)
