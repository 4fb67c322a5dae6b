"""Where heads of vision transformers look: numbers against a computation by hand, and what figures show of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from circuits import HookedModel
from circuits.cli.main import run
from circuits.figures import attention_figure, image_attention_figure, save_figure
from circuits.localization import attention_patterns, image_attention, query_names
from tests.conftest import seeded
from tests.specs import unlabelled, views
from tests.test_patches import Shifted
from tests.vision_transformer import VisionTransformer

PICTURE = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8), "RGB"
)


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return HookedModel(seeded(VisionTransformer(registers=2)), VisionTransformer.input_shape, "vit")


def pattern_by_hand(model: HookedModel, image: Tensor) -> Tensor:
    """The first block's pattern: head x query x key."""
    module = model.module
    seen: list[Tensor] = []
    with module.blocks[0].qkv.register_forward_hook(lambda *a: seen.append(a[2])), torch.no_grad():
        module(image[None])
    q, k, _ = seen[0].reshape(1, 15, 3, 2, 4).permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(-1, -2) / 2).softmax(-1)[0].double()


def test_shares_of_class_token_and_patches(model: HookedModel) -> None:
    found = image_attention(
        model, PICTURE, ["0.1"], ["class token", "1,2", "register 2", "patch 2,3", "4"]
    )
    pattern = pattern_by_hand(model, found.image)[1]
    for look, token in zip(found.looks, (0, 3 + 6, 2, 14, 4), strict=True):
        torch.testing.assert_close(look.shares, pattern[token], atol=1e-6, rtol=0)
        torch.testing.assert_close(look.patches.flatten(), look.shares[3:])
        assert list(look.others) == ["class token", "register 1", "register 2"]
        assert list(look.others.values()) == look.shares[:3].tolist()
        assert look.on_patches == pytest.approx(float(look.patches.sum()))
        assert look.uniform == 1 / 15
    assert [look.query for look in found.looks] == [
        "class token", "patch 1,2", "register 2", "patch 2,3", "patch 0,1"
    ]  # fmt: skip
    assert found.looks[0].at is None
    assert found.looks[1].at == (1, 2, 2, 3)
    usual = image_attention(model, PICTURE, ["blocks.0.attn.hook_z:1"])
    assert torch.equal(usual.looks[0].shares, found.looks[0].shares)
    assert query_names(model, "0.0")[:5] == [
        "class token",
        "register 1",
        "register 2",
        "0,0",
        "0,1",
    ]


def test_a_window_is_shown_in_its_part_of_the_image() -> None:
    model = HookedModel(seeded(Shifted(False)), (3, 8, 8))
    (look,) = image_attention(model, PICTURE, ["0.0"], ["1,1"]).looks
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[1:3, 1:3] = True
    assert torch.equal(look.patches.isfinite(), inside)
    torch.testing.assert_close(look.patches[1:3, 1:3].flatten(), look.shares)
    assert (look.others, look.uniform, look.query) == ({}, 0.25, "patch 1,1")
    (look,) = image_attention(model, PICTURE, ["0.0"]).looks
    assert look.query == "patch 2,2", "in the middle, without a class token"


def test_the_figure_shows_shares_and_the_baseline(model: HookedModel, tmp_path: Path) -> None:
    found = image_attention(model, PICTURE, ["0.1"], ["1,2"])
    figure = image_attention_figure(found)
    look = found.looks[0]
    seen = {row["patch"]: row["share"] for v in views(figure) for row in v.rows if "patch" in row}
    assert seen == {f"{y},{x}": float(look.patches[y, x]) for y in range(3) for x in range(4)}
    bars = {r["to"]: (r["share"], r["uniform"]) for v in views(figure) for r in v.rows if "to" in r}
    assert bars["register 1"] == (look.others["register 1"], 1 / 15)
    assert bars["12 patches"] == pytest.approx((look.on_patches, 12 / 15))
    framed = [r for v in views(figure) for r in v.rows if "left" in r and "patch" not in r]
    assert framed == [{"left": 2, "right": 3, "top": 1, "bottom": 2}]
    opacity = next(v.encoding["opacity"] for v in views(figure) if "opacity" in v.encoding)
    assert look.uniform in opacity["legend"]["values"]
    assert not unlabelled(figure)
    save_figure(figure, tmp_path / "looks.png")
    with Image.open(tmp_path / "looks.png") as image:
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 100


def test_a_head_whose_tokens_have_no_place_is_shown_as_a_matrix(tmp_path: Path) -> None:
    class Mixed(VisionTransformer):
        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            return self.head(self.norm(self.blocks((x + x.roll(1, 1)) / 2)).mean(1))

    model = HookedModel(seeded(Mixed()), VisionTransformer.input_shape)
    found = image_attention(model, PICTURE, ["0.0"])
    assert not found.looks
    (whole,) = found.unplaced
    assert whole.raw.shape == (1, 12, 12)
    assert "cannot be followed to its tokens" in whole.why
    figure = image_attention_figure(found)
    assert "cannot be followed" in json.dumps(figure.to_dict())
    save_figure(figure, tmp_path / "matrix.svg")
    with pytest.raises(ValueError, match="cannot be followed"):
        query_names(model, "0.0")


def test_what_does_not_fit_is_refused(model: HookedModel, bridge: HookedModel) -> None:
    with pytest.raises(ValueError, match="vit has 3 x 4 patches: expected 0,0 to 2,3"):
        image_attention(model, PICTURE, ["0.1"], ["3,0"])
    with pytest.raises(KeyError, match="unknown query of vit 'class': did you mean class token"):
        image_attention(model, PICTURE, ["0.1"], ["class"])
    with pytest.raises(KeyError, match=r"unknown head of vit '0\.2'"):
        image_attention(model, PICTURE, ["0.2"])
    with pytest.raises(ValueError, match="heads are empty"):
        image_attention(model, PICTURE, [])
    with pytest.raises(ValueError, match="takes tokens: expected an image model"):
        image_attention(bridge, PICTURE, ["0.1"])
    with pytest.raises(ValueError, match="image_attention shows where its heads look"):
        attention_patterns(model, "1 2", ["0.1"])


class Bidirectional(nn.Module):
    """One layer of attention over tokens to earlier and later ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = (
            nn.Embedding(9, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
        )
        self.out = nn.Linear(8, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.out(x + self.attention(x, x, x, need_weights=False)[0])


def test_attention_to_later_tokens_is_drawn() -> None:
    from circuits.models.adapter.inputs import TokenInput

    model = HookedModel(seeded(Bidirectional()), TokenInput(9, 8))
    figure = attention_figure(attention_patterns(model, [1, 2, 3], ["0.1"]))
    assert len(views(figure)[0].rows) == 9


_FILE = """
from tests.conftest import seeded
from tests.vision_transformer import VisionTransformer
from circuits import HookedModel
def make():
    return HookedModel(seeded(VisionTransformer(registers=2)), VisionTransformer.input_shape, "vit")
"""


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: HookedModel) -> None:
    (tmp_path / "own.py").write_text(_FILE)
    PICTURE.save(tmp_path / "picture.png")
    spec, picture = f"python:{tmp_path / 'own.py'}:make", str(tmp_path / "picture.png")
    figure = tmp_path / "looks.png"
    asked = [
        "attention",
        spec,
        "0.1",
        "--image",
        picture,
        "--query",
        "class token",
        "--query",
        "1,2",
    ]
    assert run([*asked, "--figure", str(figure), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    same = image_attention(model, PICTURE, ["0.1"], ["class token", "1,2"])
    assert found == json.loads(json.dumps(same.to_dict()))
    assert figure.is_file()
    assert run(asked) == 0
    said = capsys.readouterr().out
    assert "patches together" in said
    assert "would get 0.06667" in said
    for more, problem in (
        (["--image", picture, "--text", "1"], "--text '1' does not go with --image"),
        (["--query", "1,1"], "--query '1,1' goes with --image"),
        ([], "--text is empty: expected the text in which heads attend (--image for a"),
        (["--text", "1"], "takes images: expected a token model"),
    ):
        assert run(["attention", spec, "0.1", *more]) == 2
        assert problem in capsys.readouterr().err
