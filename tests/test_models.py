from __future__ import annotations

import itertools
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from circuits.cleanroom import induction
from circuits.edits import Recipe, bake, read_edit
from circuits.edits.recipes import save_baked
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.paths.receptive import receptive_field
from circuits.models.zoo.loading import BUILTIN, MODELS, load_model
from circuits.models.zoo.training import induction as induction_training
from circuits.models.zoo.training import shapes as shapes_training
from circuits.models.zoo.weights_files import read_weights
from circuits.stimuli.repeats import draw_repeats
from circuits.stimuli.shapes import CLASSES, draw_shapes
from tests.conftest import OwnNet, seeded

# --- built in ----------------------------------------------------------------------------------


def test_shapes_recognises_held_out_drawings() -> None:
    model = load_model("shapes")
    labels = torch.arange(400) % len(CLASSES)
    images = draw_shapes(labels, torch.Generator().manual_seed(31))
    accuracy = (model.logits(model.input.normalize(images)).argmax(1) == labels).float().mean()
    card = json.loads((BUILTIN / "shapes.log.jsonl").read_text().splitlines()[-1])
    assert card["held_out_accuracy"] > 0.9
    assert accuracy > card["held_out_accuracy"] - 0.05  # three standard errors of 400 draws


def test_induction_copies_and_says_by_which_heads() -> None:
    model = load_model("induction")
    tokens, repeated = draw_repeats(300, torch.Generator().manual_seed(32))
    hits = (model.logits(tokens)[:, :-1].argmax(-1) == tokens[:, 1:])[repeated[:, 1:]]
    assert hits.float().mean() > 0.95
    scores = induction_training.head_scores(model.module, n=50)
    assert max(scores["previous_token"][0]) > 0.5
    assert max(scores["prefix_matching"][1]) > 0.5
    assert max(scores["prefix_matching"][0]) < 0.2


def test_induction_needs_its_previous_token_head() -> None:
    model = load_model("induction")
    tokens, repeated = draw_repeats(100, torch.Generator().manual_seed(33))
    scores = induction_training.head_scores(model.module, n=50)["previous_token"][0]
    best = scores.index(max(scores))

    def accuracy(head: int | None) -> float:
        def without(z: torch.Tensor) -> torch.Tensor:
            z = z.clone()
            z[:, :, head] = 0
            return z

        edits = {} if head is None else {"blocks.0.attn.hook_z": without}
        right = model.logits(tokens, edits)[:, :-1].argmax(-1) == tokens[:, 1:]
        return right[repeated[:, 1:]].float().mean().item()

    assert accuracy(best) < 0.5 < 0.9 < accuracy(None)


@pytest.mark.parametrize("train", [shapes_training.train, induction_training.train])
def test_training_scripts_run_and_repeat(train, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shapes_training, "evaluate", lambda model, n: (0.0, []))
    weights = []
    for run in ("a", "b"):
        out = tmp_path / run
        out.mkdir()
        train(2, 7, out)
        (path,) = out.glob("*.safetensors")
        weights.append(load_file(path))
        assert json.loads(next(out.glob("*.jsonl")).read_text())["step"] == 2
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


# --- real weights ------------------------------------------------------------------------------


def test_googlenet_equals_its_reference(assets: Path) -> None:
    model = load_model("googlenet")
    reference = np.load(assets / "weights/googlenet/reference.npz")
    photos = [Image.open(assets / "images/imagenet500" / name) for name in reference["files"]]
    images = torch.stack([model.input.load(photo) for photo in photos])
    x = model.input.normalize(images)
    assert np.array_equal(x[0].numpy(), reference["input_0"])
    sites = {
        "conv2__3x3": "conv2d2",
        "inception_3a__output": "mixed3a",
        "inception_3b__output": "mixed3b",
        "inception_4c__output": "inception_4c/output",
    }
    cache = model.run(x, read=sites.values())
    pairs = [(cache.output, reference["logits"])]
    for name, site in sites.items():
        pairs.append((cache[site].mean((2, 3)), reference[f"{name}_mean"]))
        pairs.append((cache[site].amax((2, 3)), reference[f"{name}_max"]))
    for ours, theirs in pairs:
        assert np.abs(ours.numpy() - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_googlenet_has_distills_names(assets: Path) -> None:
    model = load_model("googlenet")
    layers = json.loads((assets / "weights/googlenet/layers.json").read_text())["layers"]
    for layer in layers:
        site = model.site(layer["alias"])
        if layer["type"] in ("concat", "conv+relu"):
            assert site.n_units == layer.get("total", layer.get("weight_shape", [0])[0])
    assert receptive_field(model, model.site("conv2d0")).at((56, 56)) == (109, 109, 116, 116)


def test_cifar_resnet_recognises_cifar(assets: Path) -> None:
    model = load_model("cifar10-resnet20")
    data = np.load(assets / "images/cifar10_test_3000.npz")
    images = torch.tensor(data["images"]).permute(0, 3, 1, 2).float() / 255
    right = model.logits(model.input.normalize(images)).argmax(1).numpy() == data["labels"]
    # 73.4 % on this file, which holds three of the ten classes
    assert right.mean() == pytest.approx(0.734, abs=0.005)


def test_tutorial_transformers_do_what_they_are_known_for(assets: Path) -> None:
    model = load_model("modular-addition")
    a, b = torch.arange(113).repeat_interleave(113), torch.arange(113).repeat(113)
    tokens = torch.stack([a, b, torch.full_like(a, 113)], dim=1)
    assert (model.logits(tokens)[:, -1].argmax(-1) == (a + b) % 113).all()
    assert model.input.encode("1 12 =") == [1, 12, 113]

    model = load_model("induction-infinite")
    pattern = torch.randint(128, (32, 20), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([pattern] * 3, dim=1)
    surprise = -model.logits(tokens).log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    assert surprise[:, 21:].mean() < 0.5 * surprise[:, :19].mean()


def test_stories_model_tells_a_story(assets: Path) -> None:
    model = load_model("stories260k")
    tokens = [1]
    for _ in range(40):
        tokens.append(int(model.logits(torch.tensor([tokens]))[0, -1].argmax()))
    text = "".join(model.input.word(t) for t in tokens[1:])
    assert text.startswith(" Once upon a time, there was a little girl named Lily.")
    written = [1, *model.input.encode("Once upon a time, there was")]
    assert model.input.word(written[1]) == " Once", "the tokenizer puts a space in front"
    surprise = -model.logits(torch.tensor([written])).log_softmax(-1)[0]
    total = sum(surprise[i, t].item() for i, t in enumerate(written[1:]))
    assert total < 1, "nats, for the words that its stories begin with"


# --- receptive fields --------------------------------------------------------------------------


def test_receptive_field_by_hand() -> None:
    model = load_model("cleanroom")
    line = receptive_field(model, model.site("line"))
    # position 16 of a map of every fourth pixel reads 13 to 19 of it; these are two of every second pixel each,
    # 26 to 39; and those read 3 pixels around pixel 52 to 78
    assert line.at((16, 16)) == (49, 49, 82, 82)
    assert line.at((0, 31)) == (0, 109, 18, 128)
    assert receptive_field(model, model.site("strongest")).at((0, 0)) == (0, 0, 128, 128)


def test_receptive_field_without_padding_and_beyond_the_input() -> None:
    valid = torch.nn.Sequential(*(torch.nn.Conv2d(3, 3, 7) for _ in range(3)))
    model = HookedModel(seeded(valid), (3, 48, 40))
    field = receptive_field(model, model.site("2"))
    assert field.at((29, 21)) == (29, 21, 48, 40)
    assert field.at((0, 5)) == (0, 5, 19, 24)
    wide = torch.nn.Sequential(*(torch.nn.Conv2d(3, 3, 17, padding=8) for _ in range(4)))
    large = HookedModel(seeded(wide), (3, 32, 32))
    assert receptive_field(large, large.site("3")).at((0, 0)) == (0, 0, 32, 32)
    assert receptive_field(large, large.site("1")).at((0, 31)) == (0, 15, 17, 32)


@pytest.mark.parametrize("seed", range(8))
def test_receptive_fields_follow_from_kernels_strides_and_paddings(seed: int) -> None:
    draw = np.random.default_rng(seed)
    layers = []
    for _ in range(3):
        kernel, stride = draw.integers(1, 6, 2).tolist(), draw.integers(1, 3, 2).tolist()
        padding = [int(draw.integers(0, k)) for k in kernel]
        layers.append(torch.nn.Conv2d(3, 3, kernel, stride, padding))
    size = (int(draw.integers(40, 60)), int(draw.integers(40, 60)))
    model = HookedModel(seeded(torch.nn.Sequential(*layers)), (3, *size))
    field = receptive_field(model, model.site("2"))
    assert receptive_field(model, model.site("2")) is field
    last = [n - 1 for n in model.site("2").position_shape]

    def seen(axis: int, position: int) -> tuple[int, int]:
        """Backwards through the layers."""
        low = high = position
        for conv in reversed(layers):
            low = low * conv.stride[axis] - conv.padding[axis]
            high = high * conv.stride[axis] - conv.padding[axis] + conv.kernel_size[axis] - 1
        return max(0, low), min(size[axis], high + 1)

    for y, x in itertools.product((0, last[0] // 2, last[0]), (0, last[1] // 2, last[1])):
        (top, bottom), (left, right) = seen(0, y), seen(1, x)
        assert field.at((y, x)) == (top, left, bottom, right)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_receptive_fields_at_borders_that_are_not_zeros(mode: str) -> None:
    """Two layers of 3 with strides 2 and 1 see 7 pixels, 2 further for each position; over the border all is seen
    only where the map is a ring."""
    layers = [
        nn.Conv2d(2, 3, 3, 2, 1, padding_mode=mode),
        nn.Conv2d(3, 2, 3, 1, 1, padding_mode=mode),
    ]
    model = HookedModel(nn.Sequential(*layers), (2, 16, 20))
    field = receptive_field(model, model.site("1"))
    for y, x in itertools.product(range(8), range(10)):
        box = []
        for place, length in ((y, 16), (x, 20)):
            low, high = 2 * place - 3, 2 * place + 4
            over = low < 0 or high > length
            whole = over and mode == "circular"
            box.append((0, length) if whole else (max(0, low), min(length, high)))
        (top, bottom), (left, right) = box
        assert field.at((y, x)) == (top, left, bottom, right)


def test_receptive_field_with_strides_against_single_pixels() -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 5, 2, 1), torch.nn.MaxPool2d(3, 2, ceil_mode=True), torch.nn.Conv2d(2, 2, 3, 1, 1)
    )  # fmt: skip
    model = HookedModel(seeded(net), (1, 26, 26))
    field = receptive_field(model, model.site("2"))
    rows = model.site("2").position_shape[0]
    seen: dict[int, list[int]] = {p: [] for p in range(rows)}
    for row in range(26):
        x = torch.rand(1, 1, 26, 26)
        x[:, :, row] = torch.nan
        hit = model.run(x, read=["2"])["2"][0].isnan().any(0).any(1)
        for position in hit.nonzero()[:, 0].tolist():
            seen[position].append(row)
    for position, pixels in seen.items():
        top, _, bottom, _ = field.at((position, 0))
        assert (top, bottom) == (min(pixels), max(pixels) + 1)


# --- loading -----------------------------------------------------------------------------------


def test_every_listed_model_says_what_it_is() -> None:
    assert {"cleanroom", "shapes", "induction", "googlenet", "tl:", "torchvision:"} <= set(MODELS)
    assert all(entry.summary for entry in MODELS.values())


OWN = """
import torch
from tests.conftest import OwnNet, seeded

def make():
    return seeded(OwnNet())

def shapeless():
    return torch.nn.Conv2d(1, 1, 1)

def number():
    return 3

def fails():
    raise RuntimeError("on purpose")

def mismatched():
    net = make()
    net.input_shape = (4, 40, 56)
    return net
"""


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


def test_own_model_with_weights(own_file: Path, tmp_path: Path) -> None:
    model = load_model(f"python:{own_file}:make")
    assert model.site("stem").n_units == 8
    other = seeded(OwnNet(), seed=5)
    for path in (tmp_path / "w.safetensors", tmp_path / "w.pt"):
        if path.suffix == ".pt":
            torch.save({"state_dict": other.state_dict()}, path)
        else:
            save_file(other.state_dict(), path)
        assert load_model(f"python:{own_file}:make", path).hash != model.hash
        x = model.input.example(2)
        torch.testing.assert_close(
            load_model(f"python:{own_file}:make", path).logits(x), other(x).detach()
        )


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("gogglenet", KeyError, "did you mean googlenet"),
        ("python:{file}:maek", KeyError, "did you mean make"),
        ("python:{file}", ValueError, "python:MODULE:FACTORY"),
        ("python:no_such_module:f", ImportError, "no_such_module"),
        ("python:{file}:shapeless", ValueError, "input_shape"),
        ("python:{file}:number", TypeError, "returned int"),
        ("python:{file}:fails", ValueError, r"fails\(\) raised RuntimeError: on purpose"),
        ("python:{file}:mismatched", ValueError, "cannot run on an input of shape"),
        ("tl:", ValueError, "expected tl:NAME"),
        ("tl:/no/such/folder", FileNotFoundError, "neither a local folder"),
    ],
)
def test_bad_specs_say_what_would_be_right(spec, error, message, own_file: Path) -> None:
    with pytest.raises(error, match=message):
        load_model(spec.replace("{file}", str(own_file)))


def test_missing_weights_say_how_to_name_them(monkeypatch) -> None:
    monkeypatch.delenv("CIRCUITS_ASSETS", raising=False)
    with pytest.raises(FileNotFoundError, match="pass --weights PATH/bvlc_googlenet"):
        load_model("googlenet")


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    whole = (BUILTIN / "shapes.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_model("shapes", cut)

    tensors = load_file(BUILTIN / "shapes.safetensors")
    cases = {
        "lack 1 tensors, the first of them 'logits.bias'": {
            k: v for k, v in tensors.items() if k != "logits.bias"
        },
        "have 1 unknown tensors, the first of them 'extra'": {**tensors, "extra": torch.zeros(1)},
        "'logits.bias' has shape": {**tensors, "logits.bias": torch.zeros(3)},
        "'logits.bias' is of type int64, expected float32": {
            **tensors,
            "logits.bias": torch.ones(40, dtype=torch.int64),
        },
        "'logits.bias' is of type complex64": {
            **tensors,
            "logits.bias": torch.ones(40, dtype=torch.complex64),
        },
        "that are infinite in the model's type, float32": {
            **tensors,
            "logits.bias": torch.full((40,), 1e300, dtype=torch.float64),
        },
        "'logits.bias' holds NaN": {**tensors, "logits.bias": torch.full((40,), torch.nan)},
    }
    for message, changed in cases.items():
        path = tmp_path / "changed.safetensors"
        save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            load_model("shapes", path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.to_sparse(), "has layout sparse_coo, expected strided"),
        (lambda w: w.reshape(4, -1).to_sparse_csr(), "has layout sparse_csr, expected strided"),
        (lambda w: torch.nested.nested_tensor([w, w]), "has layout nested, expected strided"),
        (lambda w: w.to("meta"), "is on device meta, expected cpu"),
        (lambda w: w.to(torch.float8_e4m3fn), "is of type float8_e4m3fn, expected one of float16"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # these layouts are prototypes
def test_odd_tensors_are_one_line(change, said: str, tmp_path: Path) -> None:
    tensors = load_file(BUILTIN / "shapes.safetensors")
    path = tmp_path / "w.pt"
    torch.save(tensors | {"logits.bias": change(tensors["logits.bias"])}, path)
    with pytest.raises(ValueError, match=rf"weights '.*w\.pt': tensor 'logits\.bias' {said}"):
        load_model("shapes", path)


def test_weights_baked_from_another_model_are_refused(tmp_path: Path) -> None:
    base = load_model("induction-by-hand")
    edit = read_edit(base, "scale_weights into=blocks.1.attn.hook_v:0 factor=0.5")
    made, path = bake(base, [edit]), tmp_path / "w.safetensors"
    save_baked(made, path, base, Recipe((edit,)))
    assert load_model("induction-by-hand", path).hash == made.hash
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        about = file.metadata() | {"circuits.model": "other", "circuits.hash": "0" * 64}
    save_file(tensors, path, metadata=about)
    with pytest.raises(
        ValueError, match=r"were baked from 'other', .* expected the model that they"
    ):
        load_model("induction-by-hand", path)


def test_published_weights_in_other_shapes_are_one_line(assets: Path, tmp_path: Path) -> None:
    tensors = load_file(assets / "weights/tiny/induction_head_infinite.safetensors")
    save_file({name: t.flatten() for name, t in tensors.items()}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="have tensors of other shapes than the model's"):
        load_model("induction-infinite", tmp_path / "w.safetensors")


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="weights_only"):
        load_model("shapes", path)
    assert not (tmp_path / "ran").exists()


def test_a_packed_weights_file_is_measured_before_it_is_unpacked(tmp_path: Path) -> None:
    whole, packed = tmp_path / "whole.pt", tmp_path / "packed.pt"
    torch.save({"a": torch.zeros(2_000_000)}, whole)
    with (
        zipfile.ZipFile(whole) as read,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as made,
    ):
        for member in read.namelist():
            made.writestr(member, read.read(member))
    assert read_weights(whole)["a"].shape == (2_000_000,)
    with pytest.raises(ValueError, match=r"packed.pt' has 8 MB packed into 0.0 MB: expected"):
        read_weights(packed)


def test_hand_written_induction_heads_copy() -> None:
    """Right wherever copying can be right but where a token of the prefix stands before too."""
    model = load_model("induction-by-hand")
    tokens, _ = draw_repeats(1000, torch.Generator().manual_seed(3))
    logits = model.logits(tokens)
    checked = 0
    best, height = logits.argmax(-1).tolist(), logits.amax(-1).tolist()
    for row, given in enumerate(tokens.tolist()):
        for at in range(2, len(given) - 1):
            after = [given[j] for j in range(1, at + 1) if given[j - 1] == given[at]]
            if len(set(after)) == 1:
                checked += 1
                assert best[row][at] == after[0]
                assert height[row][at] > 19
    assert checked > 10_000
    edges = 3 * 3 * 2 + 3 * 3 * 5 + 8
    assert (edges, len(induction.TRUE_EDGES)) == (71, 7)


def test_only_the_true_edges_do_something() -> None:
    model = load_model("induction-by-hand")
    tokens, _ = draw_repeats(4, torch.Generator().manual_seed(3))
    base = model.logits(tokens)
    for layer, head in itertools.product(range(2), range(3)):

        def silenced(z: torch.Tensor, head: int = head) -> torch.Tensor:
            z = z.clone()
            z[:, :, head] = 0
            return z

        same = torch.equal(
            model.logits(tokens, edits={f"blocks.{layer}.attn.hook_z": silenced}), base
        )
        assert same == (head != 0)
