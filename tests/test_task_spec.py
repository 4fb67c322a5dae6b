"""How a task is made, as data: what it says makes the same task again, from anywhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from circuits.claims.files import task_from_yaml
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.tasks.builtin import load_task, with_counterparts
from circuits.tasks.spec import TaskSpec


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return load_model("shapes")


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: HookedModel) -> Path:
    """A folder with images of two classes, their labels, and a dark version of each; it is the current folder."""
    generator, names = torch.Generator().manual_seed(0), [f"{i}.png" for i in range(8)]
    for folder in ("clean", "dark"):
        (tmp_path / folder).mkdir()
    for name in names:
        pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "clean" / name)
        Image.fromarray(pixels // 4).save(tmp_path / "dark" / name)
    labels = {name: model.classes[i % 2] for i, name in enumerate(names)}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("fields", [
    {"counterpart": "another", "labels": "labels.json"},
    {"counterparts": "folder:dark", "labels": "labels.json"},
    {"counterpart": "grey", "metric": "mixed3b:2", "most_active": 4, "take": "random", "examples": 6},
    {"one_class": "0", "other_class": "1", "labels": "labels.json", "seed": 3},
])  # fmt: skip
def test_a_task_of_images_is_made_again_from_another_folder(
    pictures: Path, model: HookedModel, monkeypatch: pytest.MonkeyPatch, fields: dict[str, object]
):
    if "one_class" in fields:
        fields = fields | {"one_class": model.classes[0], "other_class": model.classes[1]}
    task = task_from_yaml({"data": "folder:clean", **fields}).compile(model)
    elsewhere = pictures / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    again = task_from_yaml(json.loads(json.dumps(dict(task.spec)))).compile(model)
    assert (again.hash, again.spec) == (task.hash, task.spec)
    assert len(task) == fields.get("most_active", 8)


def test_labels_are_looked_for_in_the_folder_of_the_file(pictures: Path, model: HookedModel):
    (pictures / "claims").mkdir()
    (pictures / "labels.json").rename(pictures / "claims" / "own.json")
    spec = TaskSpec(data="folder:clean", labels="own.json", counterpart="another")
    assert spec.compile(model, pictures / "claims").spec["labels"] == str(
        pictures / "claims" / "own.json"
    )
    with pytest.raises(FileNotFoundError, match=re.escape("own.json")):
        spec.compile(model)


def test_it_is_the_task_that_its_parts_make(model: HookedModel):
    spec = TaskSpec("classes", 12, 5, data="shapes", counterpart="another")
    plain = with_counterparts(
        load_task(model, "classes", n=12, seed=5, data="shapes"), "another", 5
    )
    assert spec.compile(model).hash == plain.hash
    assert not plain.spec, "what a caller put together says nothing of how"
    assert spec.compile(model).test.spec == spec.to_dict()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (TaskSpec(one_class="a"), "one_class 'a', other_class '': expected both classes, and data with images of them"),
        (TaskSpec("classes", labels="names"), "labels 'names' are of images: expected data with images"),
        (TaskSpec("classes", data="shapes", counterpart="grey", counterparts="shapes"),
         "counterparts 'shapes' do not go with counterpart grey"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(model: HookedModel, spec: TaskSpec, said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        spec.compile(model)
