"""Tiny seeded models, the optional real ones, and how Hypothesis searches."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers
from torch import Tensor, nn

import circuits
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.zoo.inception import Concatenate
from circuits.models.zoo.transformers import native_bridge
from circuits.stimuli import sources
from circuits.stimuli.images import ImageSource

settings.register_profile(
    "gate",  # the same examples in every run, on any machine
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "fuzz",  # `make fuzz`: others for every seed, and twenty times as many
    derandomize=False,  # whatever Hypothesis makes of a variable CI in the environment
    database=None,  # a failure depends on the seed alone, not on failures before
    deadline=None,
    max_examples=20 * settings.default.max_examples,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("gate")


def examples(n: int) -> int:
    """`n` examples, for a test that needs fewer or more than usual; in the profile `fuzz` twenty times as many."""
    return n * settings.default.max_examples // settings.get_profile("gate").max_examples


@pytest.hookimpl(trylast=True)  # after Hypothesis's own
def pytest_sessionstart() -> None:
    """Fix the literals of our code among which Hypothesis draws.

    It takes them from whatever modules are loaded, so that examples would change with other tests and any
    change to the code. The gate does without them; a search takes those of the whole package.
    """
    literals = providers.Constants()
    if settings.get_current_profile_name() == "fuzz":
        for found in pkgutil.walk_packages(circuits.__path__, "circuits."):
            if not found.name.endswith("__main__"):
                importlib.import_module(found.name)
        literals = providers._get_local_constants()
    providers._get_local_constants = lambda: literals


DURATIONS = Path(__file__).parent / "durations.json"
"""Seconds that each test took when `make durations` was last run; those under 0.05 s are not listed."""

QUICK = 0.2
"""Seconds that a test may take, with all its parameters, to be run by `make check`."""


def _name(test: pytest.Item | pytest.TestReport) -> str:
    return test.nodeid.partition("[")[0]


def _module(name: str) -> str:
    return name.partition("::")[0]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help=f"run only tests that take less than {QUICK} s"
    )
    parser.addoption(
        "--measure", action="store_true", help=f"write what each test takes to {DURATIONS.name}"
    )


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what needs real models, leave out what is not quick, and order the rest.

    Modules that take longest come first: a worker gets whole modules, and none is to be left alone with a long one.
    """
    for item in items:
        if "assets" in getattr(item, "fixturenames", ()):
            item.add_marker("models")
    seconds: dict[str, float] = json.loads(DURATIONS.read_text())
    if config.getoption("--quick"):
        slow = [item for item in items if seconds.get(_name(item), 0) > QUICK]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if seconds.get(_name(item), 0) <= QUICK]
    modules: Counter[str] = Counter()
    for name in dict.fromkeys(
        _name(item) for item in items
    ):  # in one order, for all workers: sums round
        modules[_module(name)] += seconds.get(name, 0)
    items.sort(key=lambda item: -modules[_module(_name(item))])


_measured: Counter[str] = Counter()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _measured[_name(report)] += report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keep what tests took, those of other runs (real models, nightly ones) too."""
    if not session.config.getoption("--measure") or hasattr(session.config, "workerinput"):
        return
    known = json.loads(DURATIONS.read_text()) | dict.fromkeys(_measured, 0)
    known |= {name: round(seconds, 2) for name, seconds in _measured.items()}
    kept = {name: known[name] for name in sorted(known) if known[name] >= 0.05}
    DURATIONS.write_text(json.dumps(kept, indent=1) + "\n")


@pytest.fixture(scope="session", autouse=True)
def drawn_once() -> None:
    """Draw what `shapes` and `curves` hold once: each opened source, in each worker of a harvest, drew all anew."""
    for name in ("shapes", "curves"):
        sources._OPENERS[name] = cache(partial(_drawn, sources._OPENERS[name]))


def _drawn(opened: Callable[[], ImageSource]) -> ImageSource:
    source = opened()
    images = [source.image(i) for i in range(len(source))]
    return replace(source, image=images.__getitem__)


FEWER = {"shapes": range(0, 200, 2), "curves": range(0, 192, 4)}
"""Five of the ten drawings of every second class; curves at every 60 degrees instead of every 15."""


@pytest.fixture(scope="module")
def fewer_drawings() -> Iterator[None]:
    """`shapes` and `curves` with a fraction of their drawings, for tests that need any data."""
    with pytest.MonkeyPatch.context() as patch:
        for name, kept in FEWER.items():
            patch.setitem(sources._OPENERS, name, partial(_some, sources._OPENERS[name], kept))
        yield


def _some(opened: Callable[[], ImageSource], kept: range) -> ImageSource:
    source = opened()
    names = tuple(source.names[i] for i in kept)
    return ImageSource(
        source.spec, names, f"{len(kept)} {source.hash}", lambda i: source.image(kept[i])
    )


class Block(nn.Module):
    """A convolution and an in-place ReLU; returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.act(self.conv(x)), x.mean()


class OwnNet(nn.Module):
    """What a person brings: 5 channels, not square, a block used twice, in-place ReLUs."""

    input_shape = (5, 40, 56)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(5, 8, 5, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.block = Block()
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x, _ = self.block(x)
        y, _ = self.block(x)
        return self.fc((x + y).mean((2, 3)))


class Branches(nn.Module):
    """Concatenation, residual addition, batch norm, pooling, grouped and flattened layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.stem_relu = nn.ReLU()
        self.norm = nn.LocalResponseNorm(3)
        self.pool = nn.MaxPool2d(2)
        self.left = nn.Conv2d(6, 4, 3, padding=1, groups=2)
        self.left_relu = nn.ReLU()
        self.right = nn.Conv2d(6, 2, 1)
        self.right_relu = nn.ReLU()
        self.cat = Concatenate()
        self.inner = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.out_relu = nn.ReLU()
        self.fc = nn.Linear(6 * 4 * 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norm(self.stem_relu(self.stem(x))))
        x = self.cat(self.left_relu(self.left(x)), self.right_relu(self.right(x)))
        x = self.out_relu(self.bn(self.inner(x)) + x)
        return self.fc(x.flatten(1))


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with weights (and batch-norm statistics) drawn from a seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return module.eval()


@pytest.fixture
def own_net() -> HookedModel:
    return HookedModel(seeded(OwnNet()), OwnNet.input_shape)


@pytest.fixture
def branches() -> HookedModel:
    return HookedModel(seeded(Branches()), (3, 8, 10))


@pytest.fixture
def bridge() -> HookedModel:
    made = native_bridge(
        d_model=16, d_head=4, n_heads=4, n_layers=2, n_ctx=12, d_vocab=20, d_mlp=24, act_fn="gelu"
    )
    return HookedModel(made, TokenInput(20, 12), "tiny-bridge")


@pytest.fixture(scope="session")
def assets() -> Path:
    root = os.environ.get("CIRCUITS_ASSETS")
    if not root or not Path(root).is_dir():
        pytest.skip("CIRCUITS_ASSETS names no folder: no real weights and photographs to test with")
    return Path(root)
