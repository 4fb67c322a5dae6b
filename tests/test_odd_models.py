"""Models without numbers, with bad numbers or with errors of their own: what is said of them, in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from circuits import concepts, families, saliency, tuning
from circuits.attribution import attribute, relevance
from circuits.cli.main import run
from circuits.edits import read_edit
from circuits.effects import measure
from circuits.experiments.ablation import ablate
from circuits.featurevis import visualize
from circuits.models.adapter.calling import ForwardError
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(576, 3),
    )


def wrapped(module: nn.Module) -> HookedModel:
    return HookedModel(module, ImageInput(3, 16, 16), "net")


# --- without numbers -------------------------------------------------------------------------------


def test_a_model_on_the_meta_device_is_refused_at_the_door() -> None:
    said = r"tensor 0.weight of model net is on torch's meta device.*to_empty\(device='cpu'\)"
    with torch.device("meta"), pytest.raises(ValueError, match=said):
        wrapped(network())
    part = network()
    part[2] = part[2].to("meta")
    with pytest.raises(ValueError, match=r"tensor 2\.weight"):
        wrapped(part)


def test_a_model_that_moves_to_the_meta_device_later_is_refused_too() -> None:
    model = wrapped(network())
    model.module.to("meta")
    with pytest.raises(
        ValueError, match=r"tensor 0\.weight of model net is on torch's meta device"
    ):
        model.logits(IMAGES)


# --- bad numbers -----------------------------------------------------------------------------------

COMPUTING: dict[str, Callable[[HookedModel, Tensor], object]] = {
    "attribute": lambda m, x: attribute(m, x, "top", "1"),
    "relevance": lambda m, x: relevance(m, x, "top"),
    "saliency": lambda m, x: saliency.saliency_map(m, x, "top", "gradient"),
    "ablate": lambda m, x: ablate(m, ["1:0"], x, n_random=1),
    "effects": lambda m, x: measure(m, [read_edit(m, "zero 1:0")], x, n_random=1),
    "pooled": lambda m, x: concepts.pooled(m, "3", x, batch=2),
}
DRAWING: dict[str, Callable[[HookedModel, Tensor], object]] = {
    "visualize": lambda m, _: visualize(m, "3:1", steps=1, size=16),
    "tuning": lambda m, _: tuning.radial_tuning(m, ["3:1"], step=90),
    "heat map": lambda m, _: tuning.heat_map(m, ["3:1"], step=90, curvatures=[0.0]),
    "families": lambda m, _: families.find_families(m, "3", permutations=1),
}


@pytest.mark.parametrize("name", [*COMPUTING, *DRAWING])
def test_nan_in_the_weights_is_located(name: str) -> None:
    module = network()
    with torch.no_grad():
        module.get_parameter("2.weight")[1, 2, 0, 0] = torch.nan
    said = r"the first site with NaN or infinity is 2, on example \d \(1 of 216 numbers of 2.weight are so\)"
    with pytest.raises(ValueError, match=said):
        (COMPUTING | DRAWING)[name](wrapped(module), IMAGES)


@pytest.mark.parametrize("name", COMPUTING)
def test_a_pixel_that_is_infinite_is_located(name: str) -> None:
    images = IMAGES.clone()
    images[3, 1, 5, 5] = torch.inf  # in the second batch of two
    with pytest.raises(ValueError, match=r"1 of 768 numbers in the input of example 3 are so"):
        COMPUTING[name](wrapped(network()), images)


def test_a_gradient_that_does_not_exist_is_no_result() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            # The root of 0 has an infinite slope; times the factor 0 that is NaN.
            return (self.conv(x) * 0).flatten(2).sum(2).sqrt()

    with pytest.raises(ValueError, match=r"the gradient of .* at the input is NaN or infinite"):
        saliency.saliency_map(wrapped(Root()), IMAGES, "class:0", "gradient")


# --- errors of the model's own ---------------------------------------------------------------------


class Failing(nn.Module):
    """Fails in its forward pass with an error of some kind."""

    def __init__(self, fail: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.fail = nn.Conv2d(3, 4, 3), fail

    def forward(self, x: Tensor) -> Tensor:
        return self.fail(self.conv(x))


def missing(x: Tensor) -> Tensor:
    return {"logits": x}["output"]


def asserting(x: Tensor) -> Tensor:
    assert x.shape[1] == 5, "five channels"
    return x


@pytest.mark.parametrize(
    ("fail", "kind", "said"),
    [
        (lambda x: x @ torch.ones(3, 3), RuntimeError, "cannot be multiplied"),
        (missing, KeyError, "KeyError: 'output'"),
        (asserting, AssertionError, "five channels"),
        (lambda x: x(), TypeError, "not callable"),
    ],
)
def test_an_error_inside_a_model_names_the_model_and_its_input(
    fail: Callable[[Tensor], Tensor], kind: type[Exception], said: str
) -> None:
    with pytest.raises(
        ValueError, match=rf"cannot run on an input of shape \(3, 3, 16, 16\): .*{said}"
    ) as error:
        wrapped(Failing(fail))
    assert isinstance(error.value.__cause__, kind)


@pytest.mark.parametrize("verb", ["logits", "run", "attribute"])
def test_an_error_that_comes_later_does_so_too(verb: str) -> None:
    model, larger = wrapped(network()), torch.rand(2, 3, 20, 20)
    verbs: dict[str, Callable[[], object]] = {
        "logits": lambda: model.logits(larger),
        "run": lambda: model.run(larger, read=["1"]),
        "attribute": lambda: attribute(model, larger, "top", "1", size="keep"),
    }
    with pytest.raises(
        ForwardError, match=r"model net cannot run on an input of shape \(2, 3, 20, 20\)"
    ) as error:
        verbs[verb]()
    assert "cannot be multiplied" in str(error.value.__cause__)


def test_errors_of_edits_are_not_the_models() -> None:
    def edit(value: Tensor) -> Tensor:
        raise KeyError("of the edit")

    with pytest.raises(KeyError, match="of the edit"):
        wrapped(network()).logits(IMAGES, {"1": edit})


def test_the_command_line_says_it_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "import torch\nclass Net(torch.nn.Module):\n    input_shape = (3, 8, 8)\n"
        "    def forward(self, x, y): return x\n"
    )
    assert run(["sites", f"{path}:Net"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot run on an input of shape" in line
    assert "missing 1 required positional argument: 'y'" in line
