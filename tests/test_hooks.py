from __future__ import annotations

import gc
import resource
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from circuits.hooks import Tap, intervene, record, trace
from circuits.models.adapter.hooked_model import HookedModel
from tests.conftest import OwnNet, seeded


def n_hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def by_hand(net: OwnNet, x: Tensor) -> dict[str, Tensor]:
    """OwnNet's tensors, computed without hooks and without in-place steps."""
    weight = nn.functional.conv2d
    stem = weight(x, net.stem.weight, net.stem.bias, 2)
    a = stem.relu()
    conv0 = weight(a, net.block.conv.weight, net.block.conv.bias, 1, 1)
    b = conv0.relu()
    conv1 = weight(b, net.block.conv.weight, net.block.conv.bias, 1, 1)
    return {
        "stem": stem,
        "relu": a,
        "block.conv@0": conv0,
        "block.conv@1": conv1,
        "block.act@1": conv1.relu(),
    }


def test_records_every_call_before_it_is_overwritten(own_net: HookedModel) -> None:
    x = own_net.input.example(3)
    with torch.no_grad():
        expected = by_hand(own_net.module, x)
    cache = own_net.run(x, read=expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(cache[name], tensor, msg=name)
    assert (cache["stem"] < 0).any(), "the in-place ReLU must not have reached the record"


def test_intervention_reaches_the_output_and_is_undone(own_net: HookedModel) -> None:
    x = own_net.input.example(2)
    before = own_net.logits(x)
    with own_net.intervening({"block.conv@1": torch.zeros_like}):
        inside = own_net.module(x)
    with torch.no_grad():
        b = by_hand(own_net.module, x)["block.conv@0"].relu()
        expected = own_net.module.fc(b.mean((2, 3)))
    torch.testing.assert_close(inside, expected)
    assert torch.equal(own_net.logits(x), before)


def test_record_inside_an_intervention_sees_it(own_net: HookedModel) -> None:
    x = own_net.input.example(2)
    cache = own_net.run(x, read=["relu", "block.conv@0"], edits={"relu": lambda t: t * 0})
    assert not cache["relu"].any()
    bias = own_net.module.block.conv.bias[:, None, None]
    torch.testing.assert_close(cache["block.conv@0"], bias.expand_as(cache["block.conv@0"]))


def test_nested_interventions_apply_in_order(own_net: HookedModel) -> None:
    x = own_net.input.example(1)
    with (
        own_net.intervening({"relu": lambda t: t + 1}),
        own_net.intervening({"relu": lambda t: t * 2}),
    ):
        both = own_net.run(x, read=["relu"])["relu"]
    plain = own_net.run(x, read=["relu"])["relu"]
    torch.testing.assert_close(both, (plain + 1) * 2)


def test_stops_after_the_last_site(own_net: HookedModel) -> None:
    called = []
    handle = own_net.module.fc.register_forward_hook(lambda *_: called.append(1))
    cache = own_net.run(own_net.input.example(1), read=["stem", "relu"], until="relu")
    handle.remove()
    assert set(cache) == {"stem", "relu"}
    assert cache.output is None
    assert not called


def test_an_inner_stop_does_not_end_an_outer_record(own_net: HookedModel) -> None:
    taps = {"stem": Tap(own_net.module.stem)}
    x = own_net.input.example(1)
    reached = []
    with record(own_net.module, taps) as outer:
        with record(own_net.module, taps, until="stem"):
            own_net.module(x)
            reached.append("not here")
        reached.append("after")
    assert reached == ["after"]
    assert "stem" in outer


def test_hooks_are_gone_after_an_exception_and_the_users_stay(own_net: HookedModel) -> None:
    module = own_net.module
    seen = []
    handle = module.relu.register_forward_hook(lambda *_: seen.append(1))
    before = n_hooks(module)

    def fails(_: Tensor) -> Tensor:
        raise RuntimeError("from an edit")

    for edits in ({"block.act@0": fails}, {"stem": fails}):
        with pytest.raises(RuntimeError, match="from an edit"):
            own_net.run(own_net.input.example(1), read=["relu"], edits=edits)
    assert n_hooks(module) == before
    own_net.run(own_net.input.example(1))
    assert seen
    handle.remove()


def test_users_changes_come_before_ours(own_net: HookedModel) -> None:
    handle = own_net.module.relu.register_forward_hook(lambda m, a, out: out + 5)
    cache = own_net.run(own_net.input.example(1), read=["relu"])
    handle.remove()
    assert cache["relu"].min() >= 5


def test_thousand_runs_leave_no_hook_and_no_memory(own_net: HookedModel) -> None:
    x = own_net.input.example(4)
    before = n_hooks(own_net.module)

    def fails(_: Tensor) -> Tensor:
        raise RuntimeError("one run in ten")

    def runs(n: int) -> None:
        for i in range(n):
            edits = {"block.act@1": fails} if i % 10 == 0 else {"relu": lambda t: t * 2}
            try:
                own_net.run(x, read=[s.name for s in own_net.sites], edits=edits)
            except RuntimeError:
                continue

    runs(200)
    gc.collect()
    objects, peak = len(gc.get_objects()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    runs(1000)
    gc.collect()
    assert n_hooks(own_net.module) == before
    assert len(gc.get_objects()) < objects + 200
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 20_000, f"peak memory grew by {grown} KiB"


class Outputs(nn.Module):
    """Puts out a mapping with a nested pair."""

    def forward(self, x: Tensor) -> dict[str, object]:
        return {"logits": x * 2, "hidden": (x + 1, x + 2), "loss": None}


@dataclass(frozen=True)
class Put:
    hidden: tuple[Tensor, Tensor]
    logits: Tensor
    loss: Tensor | None = None


class Records(nn.Module):
    """Puts out a dataclass."""

    def forward(self, x: Tensor) -> Put:
        return Put((x + 1, x + 2), x * 2)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        if isinstance(out, Put):
            return out.logits + out.hidden[1]
        return out["logits"] + out["hidden"][1]


def test_outputs_that_are_dataclasses_are_read_and_written() -> None:
    model = HookedModel(seeded(Wrapped(Records())), (1, 2, 2))
    names = [s.name for s in model.sites]
    assert names == ["inner[hidden][0]", "inner[hidden][1]", "inner[logits]", "output"]
    x = torch.ones(1, 1, 2, 2)
    changed = model.run(
        x, edits={"inner[hidden][1]": lambda t: t * 10, "inner[logits]": lambda t: t + 1}
    )
    assert changed.output.eq(33).all()
    assert model.logits(x).eq(5).all()
    assert HookedModel(Records(), (1, 2, 2)).logits(x).eq(2).all()


@pytest.mark.nightly  # compiling imports half of torch once more
def test_compiled_models_are_used_as_they_were_written(monkeypatch) -> None:
    net = seeded(OwnNet())
    x = torch.rand(1, 5, 40, 56)
    plain = HookedModel(net, (5, 40, 56))
    wrapped = HookedModel(torch.compile(net, backend="eager"), (5, 40, 56))  # type: ignore[arg-type]
    assert [s.name for s in wrapped.sites] == [s.name for s in plain.sites]
    zeroed = wrapped.run(x, edits={"fc": torch.zeros_like}).output
    assert torch.equal(zeroed, plain.run(x, edits={"fc": torch.zeros_like}).output)
    inside = nn.Sequential(torch.compile(nn.ReLU(), backend="eager"))
    with pytest.raises(ValueError, match="module '0' is compiled"):
        HookedModel(inside, (1, 2, 2))
    net.compile(backend="eager")
    with pytest.raises(ValueError, match="module OwnNet is compiled"):
        HookedModel(net, (5, 40, 56))


def test_nested_outputs_are_read_and_written() -> None:
    model = HookedModel(seeded(Wrapped(Outputs())), (1, 2, 2))
    x = torch.ones(1, 1, 2, 2)
    names = [s.name for s in model.sites]
    assert names == ["inner[logits]", "inner[hidden][0]", "inner[hidden][1]", "output"]
    cache = model.run(x, read=["inner[hidden][1]"], edits={"inner[hidden][1]": lambda t: t * 10})
    assert cache["inner[hidden][1]"].eq(30).all()
    assert cache.output.eq(32).all()
    assert model.logits(x).eq(5).all()


def test_trace_names_and_marks_overwritten_tensors() -> None:
    net = seeded(OwnNet())
    traces = trace(
        net, {"stem": net.stem, "act": net.block.act}, lambda: net(torch.rand(2, 5, 40, 56))
    )
    assert [t.name for t in traces] == ["stem", "act@0", "act@1"]
    assert [t.tap.overwritten for t in traces] == [True, False, False]
    assert n_hooks(net) == 0


def test_intervene_on_a_bare_module() -> None:
    net = seeded(OwnNet())
    x = torch.rand(1, 5, 40, 56)
    with intervene(net, [(Tap(net.fc), lambda t: t + 1)]):
        changed = net(x)
    torch.testing.assert_close(changed, net(x) + 1)


def test_until_must_be_recorded() -> None:
    net = seeded(OwnNet())
    with pytest.raises(KeyError, match="not among the taps"), record(net, {}, until="stem"):
        pass


def test_a_stopped_pass_keeps_nothing_alive(own_net: HookedModel) -> None:
    """No cycle through the exception that stops a pass: what was seen is freed at once."""
    gc.disable()
    try:
        seen: list[weakref.ref] = []
        holder = [torch.zeros(3)]
        seen.append(weakref.ref(holder[0]))
        own_net.observe(
            own_net.input.example(1), {"stem": lambda value, kept=holder: None}, until="stem"
        )
        del holder
        assert seen[0]() is None
    finally:
        gc.enable()


def test_a_pass_at_another_size_does_not_change_those_that_follow() -> None:
    """Hugging Face's Swin shrinks its windows for good when it sees a small image."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.window = nn.Conv2d(3, 4, 3, padding=1), 4

        def forward(self, x: Tensor) -> Tensor:
            self.window = min(self.window, x.shape[-1])
            return nn.functional.avg_pool2d(self.conv(x), self.window)

    net = Windows()
    model = HookedModel(net, (3, 8, 8))
    x = model.input.example(2)
    before = model.logits(x)
    assert model.logits(x[..., :2, :2]).shape[-1] == 1
    assert model.logits(x).equal(before)
    assert net.window == 4
