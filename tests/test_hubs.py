"""The loaders that usually reach for a network, on small models saved to a local folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import circuits
from circuits.models.zoo.loading import load_model


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
