"""Heads of traced models with all that knows heads by their sites: verbs, detectors, edits, pages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from streamlit.testing.v1 import AppTest
from torch import nn

from circuits import HookedModel
from circuits.cli.main import run
from circuits.edits.attention import knock_out
from circuits.edits.recipes import edited
from circuits.environment import TRUST_PYTHON
from circuits.figures import attention_figure, heads_figure
from circuits.localization import (
    attention_patterns,
    patch_grid,
    score_heads,
    shown_pattern,
)
from circuits.models.adapter.inputs import TokenInput
from circuits.models.zoo.loading import load_model
from circuits.tasks.builtin import load_task
from circuits.units import Unit
from tests.attention_models import CASES, KNOWN
from tests.conftest import seeded
from tests.specs import svg_texts
from tests.test_app import page, read, text
from tests.test_patches import Shifted

_FILE = """
from circuits import HookedModel
from tests.attention_models import KNOWN
from tests.conftest import seeded
from tests.test_patches import Shifted
from tests.vision_transformer import VisionTransformer

def text():
    return HookedModel(KNOWN["induction"].make(), KNOWN["induction"].input, "plain")

def vision():
    return HookedModel(seeded(VisionTransformer(registers=2)), VisionTransformer.input_shape, "vit")

def windows():
    return HookedModel(seeded(Shifted(False)), (3, 8, 8), "windows")
"""
HEAD = "blocks.1.attn.hook_z:1"
"""A head of the built-in model, whose weights a plain module has here."""


def case(name: str) -> HookedModel:
    return HookedModel(CASES[name].make(), CASES[name].input, name)


@pytest.fixture(scope="module")
def nano() -> HookedModel:
    return case("nanogpt")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A workspace with what a text and a vision transformer of a person's own have done."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.py").write_text(_FILE)
    for name, data in (("text", "repeats"), ("vision", "shapes"), ("windows", "shapes")):
        asked = ["harvest", f"python:{folder / 'own.py'}:{name}", "--data", data, "--sites"]
        layer = int(name == "text")
        sites = f"blocks.{layer}.attn.hook_z,blocks.{layer}.attn.hook_pattern"
        assert run([*asked, sites, "--workspace", str(folder / "ws")]) == 0
    return folder


# --- the library ---------------------------------------------------------------------------------


def test_patterns_are_the_oracles(nano: HookedModel) -> None:
    tokens = [1, 5, 2, 7, 5, 2]
    oracle = CASES["nanogpt"].oracle(nano.module, torch.tensor([tokens]))
    for head in ("1.2", "blocks.1.attn.hook_z:2", Unit("blocks.1.attn.hook_pattern", 2)):
        (found,) = attention_patterns(nano, tokens, [head]).patterns
        expected = oracle["blocks.1.attn.hook_pattern"][0, 2]
        torch.testing.assert_close(found.raw, expected.double(), atol=1e-5, rtol=0)
        lengths = oracle["blocks.1.attn.hook_v"][0, :, 2].double().norm(dim=-1)
        weighted = expected.double() * lengths
        weighted /= weighted.sum(1, keepdim=True)
        torch.testing.assert_close(found.weighted, weighted, atol=1e-5, rtol=0)


def test_heads_of_an_encoder_and_a_decoder() -> None:
    bart = case("bart")
    name = "decoder_blocks.1.cross_attn"
    tokens = [3, 5, 4, 7, 5]
    oracle = CASES["bart"].oracle(bart.module, torch.tensor([tokens]))
    found = attention_patterns(bart, tokens, [f"{name}.hook_z:1", "encoder_blocks.0.attn.hook_q:0"])
    crossed, encoded = (p.raw for p in found.patterns)
    for raw, site, index in ((crossed, name, 1), (encoded, "encoder_blocks.0.attn", 0)):
        expected = oracle[f"{site}.hook_pattern"][0, index].double()
        torch.testing.assert_close(raw, expected, atol=1e-5, rtol=0)
    drawn = {words for *_, words in svg_texts(attention_figure(found))}
    assert {"decoder 1 cross.1: attention", "encoder 0.0: attention"} <= drawn
    scores = score_heads(bart, n=4)
    assert len({head.site for head in scores.heads}) == 6
    heads_figure(scores)
    with pytest.raises(
        KeyError, match=r"head of bart '0\.1': expected one of encoder_blocks\.0\.attn\.h"
    ):
        attention_patterns(bart, tokens, ["0.1"])


def test_keys_that_heads_share_are_no_heads() -> None:
    llama = case("llama")
    assert shown_pattern(llama, Unit("blocks.0.attn.hook_k", 1)) is None
    assert shown_pattern(llama, Unit("blocks.0.attn.hook_q", 1)) == Unit(
        "blocks.0.attn.hook_pattern", 1
    )
    assert shown_pattern(llama, llama.sites[0].unit(0)) is None


def test_a_traced_model_finds_what_its_bridge_finds() -> None:
    bridge = load_model("induction")
    plain = HookedModel(KNOWN["induction"].make(), bridge.input, "plain")
    grids, scores = [], []
    for model in (plain, bridge):
        task = load_task(model, "repeats", n=4)
        grid = patch_grid(model, task, by="head", direction="noising", n_random=0)
        grids.append({str(e.cell): e.change for e in grid.effects("noising")})
        scores.append(score_heads(model, n=4))
    assert grids[0] == pytest.approx(grids[1], abs=1e-4)
    assert scores[0].heads == scores[1].heads
    np.testing.assert_allclose(scores[0].scores, scores[1].scores, atol=1e-4)


def test_attention_is_knocked_out_in_every_window() -> None:
    model = HookedModel(seeded(Shifted(False)), (3, 8, 8))
    site, inputs = "blocks.0.attn.hook_pattern", model.input.example(2)
    plain = model.run(inputs, read=[site])[site]
    with edited(model, [knock_out(f"{site}:1", queries=[0, -1], keys=[2])]):
        found = model.run(inputs, read=[site])[site]
    expected = plain.clone()
    expected[:, :, 1, [0, 3], 2] = 0
    assert torch.equal(found, expected)
    with edited(model, [knock_out(f"{site}:*", keys=[0, 1], renormalise=True)]):
        found = model.run(inputs, read=[site])[site]
    expected = plain.clone()
    expected[..., :2] = 0
    torch.testing.assert_close(found, expected / expected.sum(-1, keepdim=True))
    everything = knock_out(f"{site}:*", keys=range(4), renormalise=True)
    with (
        edited(model, [everything]),
        pytest.raises(ValueError, match="position 0 of head 0 keeps no key"),
    ):
        model.run(inputs)


# --- verbs ---------------------------------------------------------------------------------------


def test_verbs(made: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    spec, few = f"python:{made / 'own.py'}:text", ["--limit", "4"]
    knock = "knock_out units=blocks.0.attn.hook_pattern:0 queries=5 keys=0,1"
    at = ["--workspace", str(tmp_path)]
    for verb, *more in (
        ("sites",),
        ("ablate", HEAD, "--task", "repeats", "--random", "2", *few),
        ("patch", "--task", "repeats", "--by", "head_position", "--at", "5", "--random", "0", *few),
        ("keep", HEAD, "--task", "repeats", "--sites", "z", "--random", "1", *few),
        ("keep", f"{HEAD} hook_embed", "--task", "repeats", "--random", "1", *few),
        ("paths", "0.3,1.0.k", "token,1.0.v", "--task", "repeats", "--random", "0", *few),
        ("probe", "--task", "repeats", "--sites", "z", "--at", "5", "--random", "1", *few),
        ("heads", "--texts", "4"),
        ("attention", "0.3", "--text", "1 2 3"),
        ("edit", "apply", knock, "--task", "repeats", "--random", "2", *few),
        ("edit", "apply", f"zero {HEAD}", "--task", "repeats", "--random", "2", *few),
    ):
        first, rest = ([verb, more[0]], more[1:]) if verb == "edit" else ([verb], more)
        where = [] if verb in ("sites", "heads", "attention") else at
        assert run([*first, spec, *rest, *where]) == 0, verb
        out = capsys.readouterr().out
        assert "blocks." in out or verb in ("ablate", "paths"), out


def test_the_harvest_of_patterns(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["examples", f"python:{made / 'own.py'}:vision", "blocks.0.attn.hook_pattern:1"]
    assert run([*asked, "--workspace", str(made / "ws"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


# --- the app -------------------------------------------------------------------------------------


def shown(made: Path, monkeypatch, view: str = "unit", **query: str) -> AppTest:
    from circuits.workspace import Workspace

    monkeypatch.setenv(TRUST_PYTHON, "1")
    name = query.pop("model")
    test = page(
        Workspace(made / "ws"), monkeypatch, view, model=f"python:{made / 'own.py'}:{name}", **query
    )
    assert not test.exception
    return test


def charts(test: AppTest) -> list[str]:
    return [e.proto.spec for e in test.main if e.type == "vega_lite_chart"]


def test_the_page_of_a_text_models_head(made: Path, monkeypatch) -> None:
    test = shown(made, monkeypatch, model="text", site="blocks.1.attn.hook_z", unit="1")
    assert read(test.title[0]) == HEAD
    assert "head 1 of 4" in text(test)
    for heading in ("Examples that excite it most", "How active it is", "Where it looks"):
        assert heading in text(test)
    assert any("times value norms" in chart for chart in charts(test))
    test.toggle(key="ablate").set_value(True).run()
    effects = next(d.value for d in test.dataframe if "measure" in d.value).set_index("measure")
    assert effects.loc["cross_entropy", "change"] > 0
    test = shown(made, monkeypatch, model="text", site="blocks.1.attn.hook_pattern", unit="1")
    assert "Where it looks" in text(test)


def test_the_page_of_a_vision_transformers_head(made: Path, monkeypatch) -> None:
    test = shown(made, monkeypatch, model="vision", site="blocks.0.attn.hook_z", unit="1")
    assert "Where it looks" in text(test)
    asked = next(s for s in test.selectbox if s.label == "Attention of")
    assert asked.options[:4] == ["class token", "register 1", "register 2", "0,0"]
    assert any("attention of the class token" in chart for chart in charts(test))
    asked.select("1,2").run()
    assert not test.exception
    assert any("attention of the patch 1,2" in chart for chart in charts(test))
    test = shown(made, monkeypatch, model="windows", site="blocks.0.attn.hook_pattern", unit="1")
    assert any("attention of the patch 2,2" in chart for chart in charts(test))


def test_the_page_of_all_heads(made: Path, monkeypatch) -> None:
    test = shown(made, monkeypatch, "site", model="vision", site="blocks.0.attn.hook_z")
    assert "2 units (head)" in text(test)


class TwoPowers(nn.Module):
    """A softmax that computes its exponential twice."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Parameter(torch.randn(20, 16, generator=generator))
        self.qkv = nn.Parameter(0.3 * torch.randn(3, 2, 16, 8, generator=generator))
        self.out = nn.Parameter(0.3 * torch.randn(2, 8, 16, generator=generator))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed[tokens]
        q, k, v = torch.einsum("bpd,chde->cbhpe", x, self.qkv)
        scores = q @ k.transpose(-1, -2) / 8**0.5
        pattern = scores.exp() / scores.exp().sum(-1, keepdim=True)
        return (x + torch.einsum("bhpe,hed->bpd", pattern @ v, self.out)) @ self.embed.T


def test_a_softmax_may_compute_its_exponential_twice() -> None:
    model = HookedModel(TwoPowers().eval(), TokenInput(20, 12), "two powers")
    scores, pattern = "blocks.0.attn.hook_attn_scores", "blocks.0.attn.hook_pattern"
    tokens = torch.arange(12).reshape(2, 6)
    found = model.run(tokens, read=[scores, pattern])
    torch.testing.assert_close(found[pattern], found[scores].softmax(-1))
    # Scores that are put in reach both exponentials.
    drawn = torch.randn(found[scores].shape, generator=torch.Generator().manual_seed(1))
    made = model.run(tokens, read=[pattern], edits={scores: lambda _: drawn})[pattern]
    torch.testing.assert_close(made, drawn.softmax(-1))
