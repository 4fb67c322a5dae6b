"""Tasks of image models made of labelled photographs, and of those that activate a unit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuits.experiments.running import run
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.stimuli.images import ImageSource
from circuits.tasks.builtin import load_task
from circuits.tasks.contrasts import class_against_class, most_active, parse_classes
from circuits.tasks.metrics import UnitActivation, logit_difference
from tests.conftest import seeded


class Tiny(nn.Module):
    """A convolution and four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture
def model() -> HookedModel:
    return HookedModel(seeded(Tiny()), (3, 6, 6), "tiny")


N = 11
LABELS = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]


@pytest.fixture
def source() -> ImageSource:
    images = torch.rand(N, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return ImageSource("tiny", tuple(f"photo {i}" for i in range(N)), "", images.__getitem__)


def test_photographs_of_two_classes_are_each_others_counterparts(
    model: HookedModel, source: ImageSource
) -> None:
    task = class_against_class(model, source, LABELS, "0", "1|3", n=100, seed=1)
    assert len(task) == 6  # three photographs of class 0
    own = dict(zip(source.names, LABELS, strict=True))
    assert task.counterparts is not None
    for i, question in enumerate(task.questions):
        first = own[task.examples.names[i]] == 0
        sides = [((0,),), ((1,), (3,))]
        assert (question.answers, question.against) == tuple(sides if first else sides[::-1])
        other = i ^ 1
        assert torch.equal(task.counterparts.load(i), task.examples.load(other))
        assert question.group == task.questions[other].group
        number = source.names.index(task.examples.names[i])
        image = source.image(number)
        assert isinstance(image, Tensor)
        torch.testing.assert_close(task.examples.load(i), image)
    assert len({q.group for q in task.questions}) == 3
    # The metric: the mean logit of the own classes less that of the others.
    (part,) = task.batches(99)
    logits = model.logits(part.inputs)
    wanted = logits[:, 0] - logits[:, [1, 3]].mean(1)
    wanted = wanted * torch.tensor([1.0, -1.0]).repeat(3)
    found = run(model, [], task, measures=[logit_difference]).of("logit_difference")
    torch.testing.assert_close(torch.from_numpy(found).float(), wanted)
    assert len(class_against_class(model, source, LABELS, "0", "1", n=4)) == 4


def test_classes_are_named_or_numbered(model: HookedModel) -> None:
    assert parse_classes(model, "2|0|2") == (2, 0)
    assert parse_classes(model, "1-3") == (1, 2, 3)
    shapes = load_model("shapes", "untrained")
    name = shapes.classes[1]
    assert parse_classes(shapes, f"{name}|0") == (1, 0)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("0", "0-2", "class 0 is both in '0' and in '0-2'"),
        ("0", "3-1", "classes 3-1: expected FIRST-LAST"),
        ("0", "2-9", "target 'class:9' is out of range: expected class:0 to 3"),
    ],
)
def test_classes_that_make_no_task(
    model: HookedModel, source: ImageSource, first: str, second: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        class_against_class(model, source, LABELS, first, second, n=10)


def test_a_class_without_photographs_is_refused(model: HookedModel, source: ImageSource) -> None:
    with pytest.raises(ValueError, match=r"class '3': no image of tiny is of it"):
        class_against_class(model, source, [0, 1] * 5 + [2], "0", "3", n=10)


def test_the_images_that_activate_a_unit_most(model: HookedModel, source: ImageSource) -> None:
    task = load_task(model, n=N, data=source, metric="conv:2")
    (part,) = task.batches(99)
    peaks = model.run(part.inputs, read=["conv"])["conv"][:, 2].flatten(1).amax(1)
    best = set(peaks.topk(4).indices.tolist())
    found = most_active(task, 4)
    assert set(found.examples.names) == {task.examples.names[i] for i in best}
    assert len(found.find) + len(found.test) == 4
    assert most_active(task, 99).examples.names == task.examples.names
    with pytest.raises(ValueError, match="most active 4: metric logit_of_first is not the"):
        most_active(
            task.with_metric(load_task(model, data=source, metric="logit_of_first").metric), 4
        )
    assert isinstance(task.metric, UnitActivation)
    with pytest.raises(ValueError, match="most active 0 must be at least 1"):
        most_active(task, 0)
