"""Every verb on models in bfloat16, float16 and float64: what it gives in float32, up to the type's own rounding.

The float32 model has the same weights, already rounded to the type, so that only the computation differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from circuits import (
    attribution,
    concepts,
    edits,
    effects,
    families,
    featurevis,
    localization,
    saliency,
    tuning,
    unit_maps,
    weights,
)
from circuits.attribution import Passes, attribute
from circuits.cli.commands import ENTRIES
from circuits.cli.main import run
from circuits.examples import Examples
from circuits.graph.store import GraphStore
from circuits.harvesting.running import harvest
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.models.zoo.loading import load_model
from circuits.stimuli.datasets import from_dataset
from circuits.tasks import of_examples
from circuits.tuning.responding import responses
from circuits.workspace import Workspace
from tests import random_models

SPACING = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-6}
"""Half a spacing of numbers around 1 (bfloat16), one spacing (float16), and the rounding of float32 (float64)."""

KINDS = [
    pytest.param(k, id=str(k), marks=[pytest.mark.nightly] * (k == torch.float16)) for k in SPACING
]
"""Half precision has the paths of bfloat16, in more digits."""

ROUNDED = 4
"""Numbers are rounded once in each layer, so that errors may be a few times a spacing of the largest number."""

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(5, 31, (4, 10), generator=torch.Generator().manual_seed(1))
UNITS, NEURONS, HEADS = "3", "blocks.0.mlp.hook_post", "blocks.1.attn.hook_z"


def smooth_cnn() -> nn.Module:
    """Without kinks: a number that is rounded across that of a ReLU would have another gradient."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Softplus(), nn.AvgPool2d(2),
        nn.Conv2d(8, 6, 3, padding=1), nn.Softplus(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip


@cache
def cnn(kind: torch.dtype, rounded: torch.dtype) -> HookedModel:
    module = smooth_cnn().to(rounded).to(kind)
    return HookedModel(module, ImageInput(3, 16, 16), "net", classes=tuple("abcd"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., HookedModel]:
    base = random_models.booted(tmp_path_factory.mktemp("gpt2"), "gpt2")

    @cache
    def made(kind: torch.dtype, rounded: torch.dtype) -> HookedModel:
        from circuits.models.adapter.copying import deep_copy

        module = deep_copy(base.module).to(rounded).to(kind)
        return HookedModel(module, base.input, "gpt2")

    return made


Numbers = Tensor | np.ndarray | float
Verb = Callable[[HookedModel, Path], Iterable[Numbers]]


def _attributed(method: Any, inputs: Tensor, site: str, model: HookedModel, _: Path) -> Any:
    found = attribute(model, inputs, "top", site, method, steps=8, tolerance=None, check=0)
    # What ablation loses is a small difference of two large numbers: the second of them is compared.
    return [found.target_values[:, None] - found.values if method == "ablation" else found.values]


def _relevance(rule: Any, model: HookedModel, _: Path) -> Any:
    return [attribution.relevance(model, IMAGES, "top", "4", rule=rule).values]


def _saliency(method: Any, options: dict[str, Any], model: HookedModel, _: Path) -> Any:
    return [saliency.saliency_map(model, IMAGES[:2], "top", method, **options).values]


def _harvested(data: Any, site: str, model: HookedModel, folder: Path) -> Any:
    store = harvest(model, data, [site], Workspace(folder), full=[site], covariance=[site])
    found = store.summary(site)
    return [found.maximum, found.mean, found.minimum]


def _graph(model: HookedModel, folder: Path) -> Any:
    weights.build_graph(model, folder)
    unit = "4:1" if isinstance(model.input, ImageInput) else f"{NEURONS}:1"
    with GraphStore(folder) as store:
        return [sorted(e["norm"] for *_, e in store.neighbourhood(unit).edges(data=True))]


PICTURES: dict[str, Verb] = {
    **{
        f"attribute {m}": partial(_attributed, m, IMAGES, UNITS)
        for m in ("activation_x_gradient", "integrated_gradients", "ablation", "relevance")
    },
    **{f"relevance {r}": partial(_relevance, r) for r in ("gradient", "epsilon", "gamma", "z_plus")},
    **{
        f"saliency {m}": partial(_saliency, m, o)
        for m, o in {
            "gradient": {}, "smoothgrad": {"samples": 4}, "integrated_gradients": {"steps": 8},
            "grad_cam": {}, "grad_cam_plus_plus": {}, "rise": {"samples": 30}, "smoothgrad_squared": {"samples": 4},
        }.items()
    },
    "channels": lambda m, _: [saliency.extremal_channels(m, IMAGES, "top", UNITS, steps=3).masks],
    "groups": lambda m, _: [
        attribution.channel_groups(Passes(m, IMAGES, "top", "4"), k=2).effects
    ],
    "harvest": partial(_harvested, from_dataset(list(IMAGES), "pictures", layout="channels_first"), UNITS),
    "graph": _graph,
    "raw weights": lambda m, _: [w.weight for w in weights.raw_weights(m, "1", "3")],
    "expanded": lambda m, _: [weights.expand_weights(m, "1", "3").weight],
    "responses": lambda m, _: [responses(m, UNITS, [IMAGES])],
    "family": lambda m, _: [families.measure_family(m, ["1:0", "1:1"], permutations=2).score],
    "tuning": lambda m, _: [t.mean for t in tuning.radial_tuning(m, ["3:1"], step=45)],
    "heat map": lambda m, _: [
        h.responses for h in tuning.heat_map(m, ["3:1"], step=90, curvatures=[0.0, 0.1])
    ],
    "visualize": lambda m, _: [featurevis.visualize(m, "3:2", steps=2, size=16).activation],
    "map": lambda m, _: [np.abs(unit_maps.weight_map(m, "3", method="pca").xy)],
    "pooled": lambda m, _: [concepts.pooled(m, UNITS, IMAGES)],
    "means": lambda m, _: [edits.means(m, f"{UNITS}:1", IMAGES).values],
    "predictions": lambda m, _: [p.probability for p in effects.predictions(m, IMAGES[:1])],
}  # fmt: skip

TEXTS: dict[str, Verb] = {
    **{
        f"attribute {m}": partial(_attributed, m, TOKENS, NEURONS)
        for m in ("activation_x_gradient", "integrated_gradients", "ablation", "relevance")
    },
    "attribute to heads": partial(_attributed, "activation_x_gradient", TOKENS, HEADS),
    "harvest": partial(_harvested, from_dataset(TOKENS.tolist(), "texts"), NEURONS),
    "graph": _graph,
    "qk": lambda m, _: [weights.qk_circuit(m, f"{HEADS}:1").matrix],
    "ov": lambda m, _: [weights.ov_circuit(m, f"{HEADS}:1").matrix],
    "composition": lambda m, _: [c.kernel for c in weights.incoming(m, f"{HEADS}:1")],
    "direct logits": lambda m, _: [weights.direct_logits(m, f"{NEURONS}:1")],
    "logit attribution": lambda m, _: [attribution.direct_logit_attribution(m, TOKENS, "top").logits],
    "lens": lambda m, _: [localization.logit_lens(m, of_examples(Examples.given(m, TOKENS))).values],
    "patterns": lambda m, _: [
        p.raw for p in localization.attention_patterns(m, TOKENS[0].tolist(), [f"{HEADS}:0"]).patterns
    ],
    "losses": lambda m, _: [effects.token_losses(m, TOKENS)],
    "dream": lambda m, _: [featurevis.dream(m, f"{NEURONS}:2", steps=1).embeddings],
    "moment": lambda m, _: [edits.second_moment(m, m.matrices[-1].name, TOKENS)],
}  # fmt: skip


class Halved(nn.Module):
    """A dictionary of float32 that reconstructs half of each row, from latents that are the row itself."""

    def encode(self, rows: Tensor) -> Tensor:
        return rows.float()

    def decode(self, latents: Tensor) -> Tensor:
        return latents / 2


def _attached(model: HookedModel, _: Path) -> Any:
    with_code = model.attach(Halved(), "half", NEURONS)
    changed = {"sae/half": lambda latents: latents * 0}
    logits = with_code.logits(TOKENS, changed)
    return [logits.double(), attribute(with_code, TOKENS, "top", "sae/half", check=0).values]


TEXTS["autoencoder"] = _attached


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PICTURES)
def test_a_verb_on_images_gives_what_it_gives_in_float32(
    name: str, kind: torch.dtype, tmp_path: Path, fewer_drawings: object
) -> None:
    check(PICTURES[name], cnn, kind, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEXTS)
def test_a_verb_on_texts_gives_what_it_gives_in_float32(
    name: str, kind: torch.dtype, tmp_path: Path, gpt2: Callable[..., HookedModel]
) -> None:
    check(TEXTS[name], gpt2, kind, tmp_path)


def check(verb: Verb, model: Callable[..., HookedModel], kind: torch.dtype, folder: Path) -> None:
    right = [as_array(x) for x in verb(model(torch.float32, kind), folder / "right")]
    found = [as_array(x) for x in verb(model(kind, kind), folder / "found")]
    assert len(found) == len(right) > 0
    for one, other in zip(found, right, strict=True):
        assert np.isfinite(other).all()
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(
            one, other, rtol=0, atol=ROUNDED * SPACING[kind] * np.abs(other).max()
        )


def as_array(x: Numbers) -> np.ndarray:
    if isinstance(x, Tensor):
        assert x.element_size() >= 4, "results have at least float32"
        return x.detach().double().numpy()
    return np.asarray(x, dtype=np.float64)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_the_check_of_an_attribution_does_not_take_losses_in_half_precision_for_rounding(
    kind: torch.dtype,
) -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8 * 4, 2)).to(kind)
    model = HookedModel(linear, ImageInput(3, 2, 2), "linear")
    # Of a linear function what ablating a unit loses is activation x gradient, summed over its positions.
    found = attribute(model, IMAGES[:, :, :2, :2], "top", "0", check=8).check
    assert found is not None
    assert found.correlation > 0.9


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
def test_training_in_half_precision_is_refused(kind: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"parameter 0.weight of net has the type {kind}.*float32"):
        effects.fine_tune(cnn(kind, kind), IMAGES, 0)


# --- where a model is, and of which type ---------------------------------------------------------


def test_models_are_loaded_in_a_type_and_found_again_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fewer_drawings: object
) -> None:
    plain, short = load_model("shapes"), load_model("shapes", dtype="bfloat16", device="cpu")
    assert (plain.dtype, short.dtype) == (torch.float32, torch.bfloat16)
    assert plain.hash != short.hash
    first = next(plain.module.parameters())
    assert torch.equal(next(short.module.parameters()), first.to(torch.bfloat16))
    command = ("harvest", "shapes", "--data", "shapes", "--sites", "mixed3a", "--dtype", "bfloat16")
    assert run([*command, "--device", "cpu", "--workspace", str(tmp_path)]) == 0
    capsys.readouterr()
    (record,) = Workspace(tmp_path).models()
    assert (record.hash, record.dtype) == (short.hash, "bfloat16")
    assert load_model(record.spec, dtype=record.dtype).hash == record.hash


def test_a_folder_keeps_the_type_of_its_weights_unless_another_is_asked_for(tmp_path: Path) -> None:
    random_models.booted(tmp_path, "gpt2")
    import transformers

    stored = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    stored.save_pretrained(tmp_path)
    model, single = (load_model(f"tl:{tmp_path}", dtype=d) for d in (None, "float32"))
    assert (model.dtype, single.dtype) == (torch.bfloat16, torch.float32)
    right = stored(TOKENS).logits
    torch.testing.assert_close(model.logits(TOKENS), right, rtol=0, atol=0.1)
    # Rounded once, when it was stored: float32 holds the same weights.
    for short, same in zip(model.parameters.values(), single.parameters.values(), strict=True):
        assert torch.equal(short.float(), same)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:7"}, "device 'cuda:7' is not there on this machine: expected one of cpu"),
        ({"device": "cpu:7"}, "device 'cpu:7' is not there on this machine: expected one of cpu"),
        ({"device": ""}, "device '' is not there on this machine: expected one of cpu"),
        ({"device": "moon"}, "device 'moon' is not there"),
        ({"device": "meta"}, "device 'meta' is not there"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of float32, float64, bfloat16, float16"),
    ],
)
def test_devices_and_types_that_are_not_there_are_refused(
    options: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        load_model("shapes", **options)
    ((name, value),) = options.items()
    assert run(["sites", "shapes", f"--{name}", value]) == 2
    assert f"{name} {value!r}" in (said := capsys.readouterr().err) or repr(value) in said


def test_every_command_with_a_model_takes_its_device_and_type() -> None:
    for entry in ENTRIES.values():
        for command in getattr(entry.load(), "commands", {entry.name: entry.load()}).values():
            names = {p.name for p in command.params}
            if "weights" in names and "workspace" in names and {"spec", "sae"} & names:
                assert {"device", "dtype"} <= names, command.name
