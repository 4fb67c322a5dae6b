"""What tells models apart: their weights, and what is computed with them."""

import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuits.experiments.ablation import ablate
from circuits.harvesting import find_stores, harvest
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.program import Recorder, _text
from circuits.models.zoo.loading import load_model
from circuits.stimuli.images import ImageSource
from circuits.stimuli.sources import open_source
from circuits.units import Unit
from circuits.workspace import ModelRecord, Workspace

SIZE = (1, 6, 6)


class Net(nn.Module):
    def __init__(self, shift: float = 1.0, **settings: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, **{"padding": 1, **settings})
        self.act = nn.LeakyReLU(0.1)
        self.shift = torch.tensor(shift)  # a plain tensor: not in the state dict
        self.seen = torch.zeros(())
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.arange(p.numel()).reshape(p.shape) / 7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv(x))
        self.seen = y.sum()  # what a module notes while it runs is not part of it
        return self.last(y) + self.shift

    def last(self, y: Tensor) -> Tensor:
        return F.relu(y).mean((2, 3))


class Tanh(Net):
    def last(self, y: Tensor) -> Tensor:
        return torch.tanh(y).mean((2, 3))


class Scaled(Net):
    def last(self, y: Tensor) -> Tensor:
        return (F.relu(y) * 0.5).mean((2, 3))


class Crossed(Net):
    """The same functions in the same order on other tensors."""

    def last(self, y: Tensor) -> Tensor:
        return F.relu(self.conv.weight.mean() * y).mean((2, 3))


class Uncrossed(Net):
    def last(self, y: Tensor) -> Tensor:
        assert self.conv.bias is not None
        return F.relu(self.conv.bias.mean() * y).mean((2, 3))


class InNumpy(Net):
    """Computes what torch does not see."""

    factor = 1.0

    def last(self, y: Tensor) -> Tensor:
        return torch.from_numpy(self.factor * y.detach().numpy().mean((2, 3), dtype=np.float32))


class Listed(Net):
    def last(self, y: Tensor) -> Tensor:
        return y[[0, 0]].mean((2, 3))


class Pointed(Net):
    def last(self, y: Tensor) -> Tensor:
        return y[0, 0][:, None] * 1


Tanh.__qualname__ = Scaled.__qualname__ = Crossed.__qualname__ = Uncrossed.__qualname__ = "Net"


def hooked(module: nn.Module) -> HookedModel:
    return HookedModel(module, SIZE, "net")


def test_every_change_of_the_computation_is_another_model() -> None:
    changed = Net()
    changed.act.negative_slope = 0.2
    models = [
        Net(), Tanh(), Scaled(), Crossed(), Uncrossed(), Net(stride=2), Net(padding_mode="circular"),
        Net(dilation=2), Net(shift=2.0), changed,
    ]  # fmt: skip
    assert len({hooked(m).weights_hash for m in models}) == 1
    assert len({hooked(m).hash for m in models}) == len(models)
    again = hooked(Net())
    assert again.hash == hooked(Net()).hash
    before = again.hash
    again.run(torch.rand(1, *SIZE))
    assert again.hash == before  # `seen` has changed
    again.module.get_submodule("conv").__dict__["stride"] = (2, 2)
    assert again.hash != before
    assert len({hooked(m).hash for m in (Listed(), Pointed())}) == 2


def test_an_edited_weight_is_another_model_and_comes_back() -> None:
    model = hooked(Net())
    before = model.hash
    with model.rewriting({"conv.bias": torch.zeros(2)}):
        assert (model.hash != before, model.intact_hash, model.has_hash(before)) == (
            True,
            before,
            True,
        )
    assert model.hash == before


@pytest.mark.parametrize("spec", ["shapes", "induction-by-hand"])
def test_a_model_has_the_same_hash_in_another_process_and_on_another_processor(spec: str) -> None:
    code = f"import circuits; print(circuits.load_model({spec!r}).hash)"
    other = {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "2"}
    made = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | other,
        capture_output=True,
        text=True,
        check=True,
    )
    model = load_model(spec)
    assert made.stdout.strip() == model.hash
    # Wrapped once more: what a bridge keeps from a pass does not change what it is.
    assert HookedModel(model.module, model.input).hash == model.hash


class Noting(nn.Module):
    """Lets go of a tensor that it keeps, whose memory another may get, and makes one that torch does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        del self.seen
        return torch.from_numpy(x.numpy() * 2) + 1


def test_a_tensor_in_the_place_of_another_has_not_its_name() -> None:
    for _ in range(50):
        x = torch.ones(1)
        with torch.no_grad(), Recorder(module := Noting(), [x]) as recorder:
            module(x)
        assert list(recorder.program.sources.values()) == ["input", "unseen"]


def test_what_no_operation_shows_is_noticed_by_the_outputs(tmp_path: Path) -> None:
    place = Workspace(tmp_path)
    model = hooked(InNumpy())
    place.register(ModelRecord.of("python:net.py:f", model.identity))
    assert place.recognise(hooked(InNumpy()).identity) == ""
    other = InNumpy()
    other.factor = 1.5
    assert hooked(other).hash == model.hash
    with pytest.raises(
        ValueError,
        match=r"python:net.py:f computes something else .* differ by more than 0\.\d+ of",
    ):
        place.recognise(hooked(other).identity)
    other.factor = 1.0001  # rounding, on another machine
    assert place.recognise(hooked(other).identity) == ""


def test_what_an_earlier_version_made_is_named_and_what_people_wrote_is_taken_over(
    tmp_path: Path,
) -> None:
    place, model = Workspace(tmp_path), hooked(Net())
    before, now = model.weights_hash, model.hash
    place.register(ModelRecord("python:net.py:f", before))
    data = place.database
    data.save("family", before, "a", {"of": before}, author="ann")
    data.save("family", before, "a", {"of": before, "n": 2}, author="bob")
    data.save("family", before, "b", None)
    data.save("circuit", now, "a", {"own": True})
    data.save("circuit", before, "a", {"own": False})
    for _ in range(2):  # the second time there is nothing left to do
        line = place.recognise(model.identity)
        assert f"what '{tmp_path / before[:16]}' holds is not used" in line
        assert "circuits harvest python:net.py:f" in line
    found = data.history("family", now, "a")
    assert [(r.version, r.author, r.body) for r in found] == [
        (1, "ann", {"of": now}),
        (2, "bob", {"of": now, "n": 2}),
    ]
    assert len(data.history("family", before, "a")) == 2
    assert [r.body for r in data.history("circuit", now, "a")] == [{"own": True}]
    assert data.latest("family", now)[0].name == "a"


class Noisy(Net):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.norm = nn.BatchNorm2d(2, track_running_stats=False)

    def last(self, y: Tensor) -> Tensor:
        if self.how == "dropout":
            return F.dropout(y, 0.5).mean((2, 3))
        if self.how == "draws":
            return (y + torch.rand_like(y)).mean((2, 3))
        if self.how == "batch":
            return self.norm(y).square().mean((2, 3))
        weight = F.batch_norm(self.conv.weight, None, None, training=True)  # standardised weights
        y = y + F.conv2d(y[:, :1], weight, padding=1)
        return F.dropout(F.dropout(y, 0.0), 0.5, self.training).mean((2, 3))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("dropout", "batch: dropout is on in evaluation mode"),
        ("draws", "batch: rand_like draws random numbers"),
        ("batch", "batch: batch_norm in norm normalises by the batch's own statistics"),
        ("", ""),
    ],
)
def test_a_model_without_steady_numbers_is_named(how: str, expected: str, caplog) -> None:
    model = hooked(Noisy(how))
    assert bool(model.identity.outputs) == (not expected)
    lines = [r.getMessage() for r in caplog.records]
    assert [expected in line for line in lines] == ([True] if expected else [])


class Counting(Net):
    """Changes its state in every pass, or only keeps what need not be computed twice."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls, self.past = how, 0, []
        self.size, self.table = None, torch.zeros(0)  # a cache
        self.average = torch.ones(())
        self.register_buffer("ema", torch.full((2, 1, 1), 0.5))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def last(self, y: Tensor) -> Tensor:
        mean = y.mean((0, 2, 3)).reshape(-1, 1, 1)
        match self.how:
            case "ema":
                self.ema.mul_(0.9).add_(0.1 * mean)
                y = y * self.ema
            case "count":
                self.count += 1
            case "calls":
                self.calls += 1
                y = y + self.calls
            case "average":
                self.average = 0.9 * self.average + 0.1 * mean.sum()
                y = y * self.average
            case "past":
                self.past.append(mean)
                y = y + len(self.past)
            case "cache":
                if self.size != y.shape[-1]:
                    self.size, self.table = y.shape[-1], torch.arange(float(y.shape[-1]))
                y = y * self.table
        return y.mean((2, 3))


@pytest.mark.parametrize("how", ["ema", "count", "calls", "average", "past"])
def test_every_pass_starts_from_the_same_state(how: str, tmp_path: Path, caplog) -> None:
    net = Counting(how)
    digest = hooked(Counting(how)).hash
    caplog.clear()
    model = hooked(net)
    assert [f"changes `{how}` in every pass" in r.getMessage() for r in caplog.records] == [True]
    x = torch.rand(3, 1, 6, 6)
    fresh = Counting(how)(x)
    # The gradient needs the average as it was in the pass.
    wanted, expected = (x.clone().requires_grad_() for _ in range(2))
    model.run(wanted, grad=True).output.sum().backward()
    Counting(how)(expected).sum().backward()
    torch.testing.assert_close(wanted.grad, expected.grad, rtol=0, atol=0)
    for size in (6, 4, 6):
        model.logits(x[..., :size])
    seen: list[Tensor] = []
    model.observe(x, {"act": seen.append}, "act")
    assert model.logits(x).equal(fresh)
    assert model.hash == digest == hooked(net).hash
    assert (net.calls, net.past, net.count.item(), net.average.item()) == (0, [], 0, 1)
    assert net.ema.flatten().tolist() == [0.5, 0.5]

    few, many = (ablate(model, ["act:0"], x, labels=[0, 1, 0], n_random=n) for n in (2, 4))
    assert [e.changed for e in few.effects.values()] == [e.changed for e in many.effects.values()]
    source = open_source("shapes")
    part = ImageSource("shapes", source.names[:8], "8", source.image)
    harvest(model, part, ["act"], Workspace(tmp_path))
    found = find_stores(Workspace(tmp_path), model.hash)
    assert [len(store.top_examples(Unit("act", 0), 3)) for store in found] == [3]


def test_caches_are_kept_and_are_no_state(caplog) -> None:
    net = Counting("cache")
    model = hooked(net)
    x = torch.rand(2, 1, 6, 6)
    assert net.size == 6
    assert not caplog.records
    for size in (6, 4, 6):
        assert model.logits(x[..., :size]).equal(Counting("cache")(x[..., :size]))


def test_numbers_that_are_read_off_tensors_and_devices_are_no_part_of_a_model() -> None:
    class Reading(Net):
        scale = 1.0

        def last(self, y: Tensor) -> Tensor:
            return (y * float(y.abs().max() * self.scale)).mean((2, 3)).to(self.where)

    one, other = Reading(), Reading()
    one.where, other.where = "cpu", torch.device("cpu")  # type: ignore[assignment]
    other.conv.register_forward_hook(lambda *a: a[-1] * (1 + 1e-7))
    first, second = ([*hooked(m).program.describe()] for m in (one, other))
    assert len(second) == len(first) + 1  # the hook
    for lines in (first, second):
        assert sum("a number read off a tensor" in line for line in lines) == 1
        assert sum("device" in line for line in lines) == 1


def test_a_tensor_that_grows_while_the_model_runs_is_no_other_model() -> None:
    class Growing(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(6.0), persistent=False)

        def last(self, y: Tensor) -> Tensor:
            if y.shape[-1] > len(self.table):
                self.table = torch.arange(float(y.shape[-1]))
            return (y * self.table[: y.shape[-1]]).mean((2, 3))

    model = hooked(Growing())
    before = model.hash
    model.run(torch.rand(1, 1, 6, 12))
    assert (len(model.module.table), model.hash) == (6, before)  # type: ignore[arg-type]
    model.module(torch.rand(1, 1, 6, 12))
    assert (len(model.module.table), model.hash) == (12, before)  # type: ignore[arg-type]
    other = Growing()
    other.table = torch.arange(6.0) + 1
    assert hooked(other).hash != before


def test_the_same_computation_by_other_functions_takes_over_what_people_wrote(
    tmp_path: Path,
) -> None:
    class Before(Net):
        def last(self, y: Tensor) -> Tensor:
            return torch.relu(y).sum((2, 3)) / y[0, 0].numel()

    Before.__qualname__ = "Net"
    place, old, new = Workspace(tmp_path), hooked(Before()), hooked(Net())
    assert old.hash != new.hash
    place.register(ModelRecord.of("python:net.py:f", old.identity))
    place.database.save("circuit", old.hash, "mine", {"of": old.hash})
    assert place.recognise(new.identity) == ""
    assert place.database.load("circuit", new.hash, "mine").body == {"of": new.hash}
    place.recognise(hooked(Tanh()).identity)
    assert place.database.latest("circuit", hooked(Tanh()).hash) == []


def test_outputs_that_are_not_finite_or_random_are_not_compared(tmp_path: Path) -> None:
    class Masked(Net):
        def last(self, y: Tensor) -> Tensor:
            return y.mean((2, 3)) + torch.tensor([0.0, -torch.inf])

    class Unseen(Net):
        def last(self, y: Tensor) -> Tensor:
            return y.mean((2, 3)) + torch.from_numpy(np.random.default_rng().normal(size=2)).float()

    place = Workspace(tmp_path)
    for module, n in ((Masked(), 2), (Unseen(), 0)):
        model = hooked(module)
        assert len(model.identity.outputs) == n
        place.register(ModelRecord.of("python:net.py:f", model.identity))
        assert place.recognise(model.identity) == ""


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_script_is_refused_and_leaves_no_hook() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 1), torch.jit.script(nn.ReLU()))
    with pytest.raises(ValueError, match="module '1' is a script"):
        HookedModel(module, SIZE)
    assert not module[0]._forward_hooks


def test_functions_that_operations_are_given_are_part_of_a_model() -> None:
    def times(factor: float) -> Any:
        return lambda value: value * factor

    def default(value: float, factor: float = 2.0) -> float:
        return value * factor

    def other(value: float, factor: float = 3.0) -> float:
        return value * factor

    other.__qualname__ = default.__qualname__
    given = [
        times(2.0), times(3.0), lambda value: value * 2, lambda value: value + 2, default, other,
        partial(default, factor=4.0), partial(default, factor=5.0),
    ]  # fmt: skip
    texts = [_text(function) for function in given]
    assert len(set(texts)) == len(given)
    assert _text(times(2.0)) == texts[0], "the same function made again"


class Mixed(Net):
    """Casts by itself."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            return super().forward(x).float()


def test_autocast_is_part_of_a_model_where_its_own_code_asks_for_it() -> None:
    x = torch.rand(2, *SIZE)
    plain = hooked(Net())
    assert len({m.hash for m in (hooked(Mixed(torch.bfloat16)), hooked(Mixed(torch.float16)))}) == 2
    with torch.autocast("cpu", torch.bfloat16):
        inside = hooked(Net())
        assert inside.module(x).dtype != torch.float32, "torch itself casts"
        found = plain.logits(x)
        assert inside.hash == plain.hash
    torch.testing.assert_close(found, plain.logits(x), rtol=0, atol=0)


def test_another_thread_that_runs_the_module_does_not_disturb_a_trace() -> None:
    net = Net()
    expected = [op.module for op in hooked(Net()).program.operations]
    started, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            started.set()
            go_on.wait(10)

    net.conv.register_forward_pre_hook(wait)
    other = threading.Thread(target=lambda: net(torch.rand(1, *SIZE)))
    recorder, x = Recorder(net, []), torch.rand(1, *SIZE)
    with recorder:
        other.start()
        assert started.wait(10)
        net(x)
        go_on.set()
        other.join()
    assert [op.module for op in recorder.program.operations] == expected
