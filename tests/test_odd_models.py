"""Models without numbers, with bad numbers or with errors of their own: what is said of them, in one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from circuits import concepts, families, saliency, tuning, weights
from circuits.attribution import Target, attribute, direct_logit_attribution, relevance
from circuits.cli.main import run
from circuits.edits import read_edit
from circuits.effects import measure
from circuits.experiments.ablation import ablate
from circuits.featurevis import visualize
from circuits.graph import CircuitGraph, read_circuit, write_circuit
from circuits.models.adapter.calling import ForwardError
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.units import Unit
from tests import random_models

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


OF_WEIGHTS: dict[str, Callable[[HookedModel, Path], object]] = {
    "incoming": lambda m, _: weights.incoming(m, "2:1"),
    "outgoing": lambda m, _: weights.outgoing(m, "1:1"),
    "expand": lambda m, _: weights.expand_weights(m, "1", "2"),
    "graph": lambda m, path: weights.build_graph(m, path),
}


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_nan_in_the_weights_is_named_where_only_weights_are_looked_at(
    name: str, tmp_path: Path
) -> None:
    module = network()
    with torch.no_grad():
        module.get_parameter("2.weight")[1, 2, 0, 0] = torch.nan
    said = "weight 2.weight of model net: 1 of its 216 numbers are NaN or infinite"
    with pytest.raises(ValueError, match=said):
        OF_WEIGHTS[name](wrapped(module), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nan_in_the_weights_of_a_transformer_is_named(tmp_path: Path) -> None:
    model = random_models.booted(tmp_path, "gpt2")
    with torch.no_grad():
        name, weight = list(model.module.named_parameters())[-1]
        weight.view(-1)[3] = torch.inf
    said = f"weight {name} of model .*: 1 of its {weight.numel()} numbers are NaN or infinite"
    for verb in (
        lambda: weights.ov_circuit(model, "blocks.0.attn.hook_z:1"),
        lambda: weights.direct_logits(model, "blocks.0.mlp.hook_post:1"),
        lambda: weights.incoming(model, "blocks.1.mlp.hook_post:1"),
    ):
        with pytest.raises(ValueError, match=said):
            verb()


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


# --- single verbs on odd models --------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> HookedModel:
    return random_models.booted(tmp_path_factory.mktemp("gpt2"), "gpt2")


TOKENS = torch.randint(5, 31, (3, 7), generator=torch.Generator().manual_seed(0))


def test_integrated_gradients_of_heads_of_gpt2_sum_to_the_difference(gpt2: HookedModel) -> None:
    site = "blocks.1.attn.hook_z"
    found = attribute(
        gpt2, TOKENS, "top", site, "integrated_gradients", steps=64, tolerance=None, check=0
    )
    assert found.values.shape == (3, 7, 4, 8)
    # By completeness: the values sum to the target less what it is with all heads at zero.
    logits = gpt2.logits(TOKENS)[:, -1]
    without = gpt2.logits(TOKENS, {site: torch.zeros_like})[:, -1]
    top, rows = logits.argmax(1), torch.arange(3)
    torch.testing.assert_close(
        found.values.flatten(1).sum(1), logits[rows, top] - without[rows, top], rtol=0, atol=1e-3
    )


def test_a_target_may_have_another_counterpart_for_each_example(gpt2: HookedModel) -> None:
    site = "blocks.0.hook_resid_post"
    target = Target("hook_unembed", (6, 7, 8), against=(9, 10, 11))
    found = attribute(gpt2, TOKENS, target, site, batch=2, check=4)
    direct = direct_logit_attribution(gpt2, TOKENS, target)
    logits = gpt2.logits(TOKENS)[:, -1]
    right = torch.stack([logits[i, 6 + i] - logits[i, 9 + i] for i in range(3)])
    torch.testing.assert_close(found.target_values, right)
    torch.testing.assert_close(direct.logits, right)
    torch.testing.assert_close(direct.values.sum(1), right, rtol=1e-4, atol=1e-4)
    for i in range(3):
        alone = Target("hook_unembed", 6 + i, against=9 + i)
        same = attribute(gpt2, TOKENS[i : i + 1], alone, site, check=0).values
        torch.testing.assert_close(found.values[i : i + 1], same)
    with pytest.raises(ValueError, match="target has 2 units against for 3 examples: expected one"):
        attribute(gpt2, TOKENS, replace(target, against=(9, 10)), site)


def test_the_randomization_test_takes_models_of_three_layers() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten()
    model = wrapped(nn.Sequential(*layers, nn.Linear(576, 3)))
    maps = lambda m, x: saliency.saliency_map(m, x, "top", "gradient")  # noqa: E731
    found = saliency.randomization_test(model, IMAGES, maps)
    # One of three layers is not more than half of them.
    assert [stage.layers for stage in found.stages] == [1, 3]
    with pytest.raises(ValueError, match="stages 4 must be even, from 2 to 2: net has 3 layers"):
        saliency.randomization_test(model, IMAGES, maps, stages=4)
    one = wrapped(nn.Sequential(nn.Flatten(), nn.Linear(768, 3)))
    with pytest.raises(ValueError, match="model net has 1 layers with weights"):
        saliency.randomization_test(one, IMAGES, maps)


@pytest.mark.parametrize("number", [np.float32(0.5), torch.tensor(0.5), np.array(0.5)], ids=repr)
@pytest.mark.parametrize("ending", ["json", "graphml", "gexf"])
def test_numbers_of_numpy_and_torch_are_numbers_of_circuits(
    number: Any, ending: str, tmp_path: Path
) -> None:
    circuit = CircuitGraph()
    circuit.connect(Unit("a", 0), Unit("b", 1), "weight", sum=number, share=number)
    circuit.add_node(Unit("a", 0), mean=number)
    write_circuit(circuit, tmp_path / f"circuit.{ending}")
    read = read_circuit(tmp_path / f"circuit.{ending}")
    (edge,) = (data for *_, data in read.edges(data=True))
    assert [edge[name] for name in ("sum", "norm", "share")] == [0.5] * 3
    assert type(edge["sum"]) is float
    assert read.nodes[Unit("a", 0)]["mean"] == 0.5


def test_what_is_no_number_is_refused_as_one(tmp_path: Path) -> None:
    circuit = CircuitGraph()
    with pytest.raises(TypeError, match="sum of the edge a:0 -> b:1 is ndarray: expected a number"):
        circuit.connect(Unit("a", 0), Unit("b", 1), "weight", sum=np.ones(2))  # type: ignore[arg-type]
    circuit.add_node(Unit("a", 0), kernel=np.ones((2, 3)))
    with pytest.raises(
        TypeError, match=r"type ndarray and shape \(2, 3\) cannot be written: .*tolist"
    ):
        write_circuit(circuit, tmp_path / "circuit.json")


class Routed(nn.Module):
    """A mixture of two experts: bright images go to the first, dark ones to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(12, 4), nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        seen, bright = self.stem(x.flatten(1)), x.flatten(1).mean(1) >= 0
        made = torch.zeros_like(seen)
        for expert, mine in zip(self.experts, (bright, ~bright), strict=True):
            if mine.any():
                made[mine] = expert(seen[mine])
        return self.head(made)


def test_an_expert_with_some_of_the_rows_is_refused_and_never_misaligned() -> None:
    torch.manual_seed(0)
    # Images of 0..1, as the model is traced with, are all bright.
    model = HookedModel(Routed(), ImageInput(3, 2, 2), "routed")
    x = torch.rand(4, 3, 2, 2)
    assert model.run(x, read=["experts.0"])["experts.0"].shape == (4, 4)
    x[1] -= 5
    said = "site experts.0 of routed holds 3 rows for 4 examples: .*router"
    verbs: dict[str, Callable[[], object]] = {
        "run": lambda: model.run(x, read=["experts.0"]),
        "pooled": lambda: concepts.pooled(model, "experts.0", x),
        "attribute": lambda: attribute(model, x, "experts.0:1", "stem", check=0),
        "ablate": lambda: ablate(model, ["experts.0:1"], x, n_random=1),
    }
    for verb in verbs.values():
        with pytest.raises(ValueError, match=said):
            verb()
    with pytest.raises(KeyError, match=r"module 'experts\.1' of routed is no site: .*router"):
        model.site("experts.1")
    # The layers around the experts have a row for each example.
    assert attribute(model, x, "top", "stem", check=0).values.shape == (4, 4)


class Detector(nn.Module):
    """Returns boxes, labels and scores for each image, as torchvision's detection models do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.boxes = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        made = self.boxes(self.body(x)).flatten(2).movedim(1, 2)
        return [{"boxes": one, "scores": one[:, 0]} for one in made]


def test_detection_models_have_sites_and_no_logits() -> None:
    torch.manual_seed(0)
    model = wrapped(Detector())
    said = "model net returns a list with a record for each example.*SITE:INDEX"
    verbs: dict[str, Callable[[], object]] = {
        "logits": lambda: model.logits(IMAGES),
        "top": lambda: attribute(model, IMAGES, "top", "body"),
        "ablate": lambda: ablate(model, ["body:0"], IMAGES, n_random=1),
        "saliency": lambda: saliency.saliency_map(model, IMAGES, "class:1", "gradient"),
    }
    for verb in verbs.values():
        with pytest.raises(ValueError, match=said):
            verb()
    assert model.identity.outputs == ()
    # A unit of a site is a target like any other: its boxes are linear in the site before them.
    found = attribute(model, IMAGES, "boxes:1@0,0", "body", check=4)
    body = model.run(IMAGES, read=["body"])["body"]
    weight = model.parameters["boxes.weight"][1, :, 0, 0]
    torch.testing.assert_close(found.values[:, :, 0, 0], body[:, :, 0, 0] * weight)
    assert found.check is not None


class Member(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.norm = nn.Linear(4, 5), nn.Linear(4, 5), nn.LayerNorm(5)
        self.down, self.shift = nn.Linear(5, 3), nn.Parameter(torch.randn(5))

    def forward(self, h: Tensor) -> Tensor:
        mixed = self.norm(self.up(h)).tanh() * self.gate(h).sigmoid() + self.shift + 0.3
        return self.down(nn.functional.gelu(mixed)) / 1.5


class Transformed(nn.Module):
    """A part that is called for each example, for each of three sets of weights, or as its own derivative's value."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.conv, self.member = how, nn.Conv2d(3, 4, 3, padding=1), Member()
        self.scales = nn.Parameter(torch.tensor([1.0, 0.5, -0.7]))

    def _scaled(self, scale: Tensor, h: Tensor) -> Tensor:
        own = {name: p * scale for name, p in self.member.named_parameters()}
        return torch.func.functional_call(self.member, own, (h,))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).relu().mean((2, 3))
        match self.how:
            case "examples":
                return torch.func.vmap(self.member)(h)
            case "weights":
                return torch.func.vmap(self._scaled, (0, None))(self.scales, h).mean(0)
            case "weights, plain":
                return torch.stack([self._scaled(s, h) for s in self.scales]).mean(0)
            case "vjp":
                return torch.func.vjp(self.member, h)[0]
        return self.member(h) + 0


@pytest.mark.parametrize(
    ("how", "plain"), [("examples", "plain"), ("weights", "weights, plain"), ("vjp", "plain")]
)
def test_parts_inside_a_transform_are_no_sites_and_are_followed(how: str, plain: str) -> None:
    model, other = wrapped(Transformed(how)), wrapped(Transformed(plain))
    assert [site.name for site in model.sites] == ["conv", "output"]
    with pytest.raises(
        KeyError, match=r"'member.up' of net is no site: it is inside torch.func.vmap"
    ):
        model.run(IMAGES, read=["member.up"])
    for rule in ("gradient", "epsilon", "gamma", "z_plus"):
        one, two = (relevance(m, IMAGES, "output:1", "conv", rule=rule) for m in (model, other))
        torch.testing.assert_close(one.values, two.values, rtol=1e-4, atol=1e-8)
        for name, part in two.parts.items():
            torch.testing.assert_close(one.parts[name], part, rtol=1e-4, atol=1e-6)
        assert one.residual is not None
        assert rule == "gradient" or one.residual.abs().max() < 1e-6
    one, two = (
        weights.expand_weights(m, "conv", "output", mode="example", examples=IMAGES).weight
        for m in (model, other)
    )
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-8)
