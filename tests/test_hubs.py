"""The loaders that usually reach for a network, on small models saved to a local folder."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import circuits
from circuits.models.adapter.inputs import ImageInput
from circuits.models.zoo.loading import load_model, record_of
from circuits.tasks.targets import output_site
from circuits.workspace import Workspace

VISION: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50,
    "max_position_embeddings": 20, "bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gpt2")
    words = {w: i for i, w in enumerate(["<s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", pad_token="<s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"vocab_size": 28, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**shape, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # other packages' own
def test_transformer_lens_from_a_folder(gpt2_folder: Path) -> None:
    model = load_model(f"tl:{gpt2_folder}")
    assert model.input.vocabulary[:3] == ("<s>", "<unk>", "a")
    assert model.input.encode("b a zz") == model.module.tokenizer.encode(
        "b a zz", add_special_tokens=False
    )
    a, s, b = (model.input.vocabulary.index(c) for c in "asb")
    assert model.input.encode("a <s> b") == [a, 1, s, 1, b], "text, not the token 0"
    assert model.site("blocks.1.attn.hook_z").n_units == 2
    x = model.input.example(2)
    before = model.logits(x)
    with circuits.edited(model, [circuits.edits.zero("blocks.1.attn.hook_z:1")]):
        assert not torch.equal(model.logits(x), before)
    assert torch.equal(model.logits(x), before)
    sources = {str(c.source) for c in circuits.weights.incoming(model, "blocks.1.attn.hook_z:1")}
    assert sources == {"blocks.0.attn.hook_z:0", "blocks.0.attn.hook_z:1"}
    for site in model.sites:  # every site that is offered matters
        noise = torch.Generator().manual_seed(1)
        edit = {site.name: lambda t, g=noise: t * 0.5 + torch.rand(t.shape, generator=g)}
        assert not torch.equal(model.logits(x, edit), before), site.name


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_image_classifier_from_a_folder(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=32, patch_size=8, num_labels=5,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path)
    stated = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.25]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    model = load_model(f"hf:{tmp_path}")
    assert (model.input.mean, model.input.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.25))
    site = next(s for s in model.sites if s.name.endswith("layers.1.mlp.fc1"))
    assert (site.n_units, site.axes) == (64, ("batch", "position", "unit"))
    assert len(model.classes) == 5
    picture = circuits.visualize(model, site.unit(3), steps=12)
    assert picture.activation > picture.start
    # the classifier reads one position of the last normalisation
    connection = circuits.weights.incoming(model, "classifier:2", top=1)[0]
    row = model.module.classifier.weight[2]
    assert connection.norm == pytest.approx(row.abs().max().item())
    assert torch.equal(connection.kernel, row[connection.source.index])
    x = model.input.example(2)
    before = model.logits(x)
    with circuits.edited(model, [circuits.edits.zero(site.unit(3))]):
        assert not torch.equal(model.logits(x), before)
    assert torch.equal(model.logits(x), before)


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_two_towers_is_loaded_by_one_of_them(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    config = CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=16)
    whole = CLIPModel(config).eval()
    whole.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"two towers: .* hf:{tmp_path}:vision or hf:.*:text"):
        load_model(f"hf:{tmp_path}")
    with pytest.raises(ValueError, match="tower 'txt': expected vision or text"):
        load_model(f"hf:{tmp_path}:txt")
    seen, read = load_model(f"hf:{tmp_path}:vision"), load_model(f"hf:{tmp_path}:text")
    x, tokens = seen.input.example(2), read.input.example(2)
    with torch.no_grad():
        torch.testing.assert_close(seen.logits(x), whole.get_image_features(x).pooler_output)
        torch.testing.assert_close(
            read.logits(tokens), whole.get_text_features(tokens).pooler_output
        )
    assert record_of(f"hf:{tmp_path}:text", None, read.identity).spec == f"hf:{tmp_path}:text"


@pytest.mark.filterwarnings("ignore")
def test_the_output_of_a_model_without_a_head_is_what_it_pools(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import Dinov2Config, Dinov2Model, SiglipConfig, SiglipModel

    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None}
    towers = SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT | ends)).eval()
    towers.save_pretrained(tmp_path / "siglip")
    plain = Dinov2Model(Dinov2Config(**VISION)).eval()
    plain.save_pretrained(tmp_path / "dino")
    capfd.readouterr()
    for spec, whole in (
        ("siglip:vision", lambda x: towers.get_image_features(x)),
        ("siglip:text", lambda x: towers.get_text_features(x)),
        ("dino", lambda x: plain(x)),
    ):
        model = load_model(f"hf:{tmp_path}/{spec}")
        printed = capfd.readouterr().err
        assert "UNEXPECTED" not in printed
        assert "Loading weights" not in printed
        x = model.input.example(2)
        with torch.no_grad():
            torch.testing.assert_close(model.logits(x), whole(x).pooler_output)
        end = output_site(model)
        assert end.shape == (32,)
        assert torch.equal(model.run(x, read=[end])[end], model.logits(x))
        made = circuits.attribute(model, x, "class:3", model.sites[0].name, check=0)
        assert made.target == f"{end.name}:3"


@pytest.mark.filterwarnings("ignore")
def test_the_class_that_a_folder_names_is_loaded_and_nothing_is_added(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    plain = Dinov2Model(Dinov2Config(**VISION)).eval()
    plain.save_pretrained(tmp_path)
    model = load_model(f"hf:{tmp_path}")
    assert set(model.module.state_dict()) == set(plain.state_dict())
    assert model.classes == ()
    stated = json.loads((tmp_path / "config.json").read_text())
    for named, message in (
        (["Dinov2ForImageClassification"], "its file lacks weights of .*: classifier.bias, cl"),
        (["GPT2LMHeadModel"], "takes input_ids and no images: language models load as tl:"),
        (["NoSuchModel"], "NoSuchModel are not in transformers"),
        ([], "names no class under `architectures`"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**stated, "architectures": named}))
        with pytest.raises(ValueError, match=message):
            load_model(f"hf:{tmp_path}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", ["hf:owner/no-such-model", "tl:owner/no-such-model"])
def test_without_a_network_a_name_is_one_line_at_once(spec: str, monkeypatch) -> None:
    """An address that refuses connections; the hub's own client would ask it 6 times, for half a minute."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(FileNotFoundError, match="neither a local folder nor available from"):
        load_model(spec)
    assert time.monotonic() - started < 20


@pytest.mark.filterwarnings("ignore")
def test_untrained_weights_are_named_as_such(tmp_path: Path, gpt2_folder: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config: Any = ViTConfig
    ViTForImageClassification(config(**VISION, num_labels=5)).save_pretrained(tmp_path)
    for spec in ("shapes", "induction", f"hf:{tmp_path}", f"tl:{gpt2_folder}"):
        state = torch.get_rng_state()
        made = [load_model(spec, "untrained", seed=s) for s in (1, 1, 2)]
        assert torch.equal(state, torch.get_rng_state()), "the caller's generator is left alone"
        assert made[0].name == f"{spec} (untrained, seed 1)"
        assert made[0].hash == made[1].hash != made[2].hash
        assert load_model(spec, "untrained:2").hash == made[2].hash != load_model(spec).hash
        assert load_model(spec, "untrained").name == f"{spec} (untrained, seed 0)"
    record = record_of("shapes", "untrained:2", load_model("shapes", "untrained:2").identity)
    Workspace(tmp_path / "w").register(record)
    [known] = Workspace(tmp_path / "w").models()
    assert known.name == "shapes (untrained:2)"
    assert load_model(known.spec, known.weights).hash == known.hash
    assert eval(known.code).hash == known.hash


@pytest.mark.parametrize(
    ("spec", "weights", "seed", "message"),
    [
        ("cleanroom", "untrained", None, "written by hand and was never trained"),
        ("shapes", "untrained:x", None, "seed 'x' is not a whole number from 0"),
        ("shapes", None, 3, "seed 3 is for untrained weights: expected weights 'untrained', got"),
        ("shapes", "untrained:1", 3, "seed 3 is for untrained weights"),
        ("shapes", "untrained", -1, "seed '-1' is not a whole number"),
    ],
)
def test_what_cannot_be_untrained_is_refused(
    spec: str, weights: str | None, seed: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(spec, weights, seed)


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_optional_packages_say_how_to_install_them(package: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"{package}.models", raising=False)
    with pytest.raises(ImportError, match=f"needs {package}.*`pip install {package}`"):
        load_model(f"{package}:resnet18")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["googlenet", "lraspp_mobilenet_v3_large"])
def test_a_file_of_torchvision_is_built_as_its_published_weights_are(
    name: str, tmp_path: Path, monkeypatch
) -> None:
    zoo: Any = pytest.importorskip("torchvision.models")
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *a, **k: 1 / 0)
    torch.manual_seed(0)
    # GoogLeNet's published file has the auxiliary heads that the published model drops, and scales its input.
    options = {"init_weights": False} if name == "googlenet" else {"weights_backbone": None}
    tensors = zoo.get_model(name, weights=None, **options).state_dict()
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "w.safetensors")
    model = load_model(f"torchvision:{name}", tmp_path / "w.safetensors")
    plain = zoo.get_model(name, weights=None, **options)
    plain.load_state_dict(tensors)
    plain.eval()
    x = model.input.example(1)
    if name == "googlenet":
        plain.transform_input = True
    with torch.no_grad():
        expected = plain(x)
    torch.testing.assert_close(
        model.logits(x), expected if name == "googlenet" else expected["out"]
    )
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=f"other.safetensors' do not fit torchvision:{name}: "):
        load_model(f"torchvision:{name}", tmp_path / "other.safetensors")


def test_models_of_torchvision_without_one_tensor_for_a_batch_are_refused() -> None:
    pytest.importorskip("torchvision")
    for name in ("fasterrcnn_resnet50_fpn", "raft_small", "r3d_18", "quantized_resnet18"):
        with pytest.raises(ValueError, match="expected a classifier or segmentation model"):
            load_model(f"torchvision:{name}", "untrained")


@pytest.mark.filterwarnings("ignore")
def test_timm_with_a_file_and_untrained(tmp_path: Path, monkeypatch) -> None:
    timm: Any = pytest.importorskip("timm")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    torch.manual_seed(0)
    module = timm.create_model("test_vit", pretrained=False).eval()
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    model = load_model("timm:test_vit", tmp_path / "w.safetensors")
    stated = timm.data.resolve_model_data_config(module)
    assert isinstance(model.input, ImageInput)
    assert (model.input.channels, model.input.height, model.input.width) == stated["input_size"]
    assert (model.input.mean, model.input.std) == (stated["mean"], stated["std"])
    x = model.input.example(2)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(x), module(x))
    assert load_model("timm:test_vit", "untrained").name == "timm:test_vit (untrained, seed 0)"
    with pytest.raises(FileNotFoundError, match="pass --weights FILE, or --weights untrained"):
        load_model("timm:test_vit")
    with pytest.raises(KeyError, match="did you mean test_vit"):
        load_model("timm:tset_vit")
