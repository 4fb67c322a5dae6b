"""A workspace in which everything that has a name has a hostile one: Markdown, HTML, addresses, scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from circuits.autoencoders import About, Autoencoder, save_autoencoder
from circuits.checks import seen
from circuits.claims import TESTS, CircuitSpec, Claim, ClaimFile, TaskSpec, write_claims
from circuits.claims.kept import claims_folder, report_folder
from circuits.claims.report import write_report
from circuits.concepts import name_unit
from circuits.families import Family, Member, save_family
from circuits.graph.saved import save_circuit
from circuits.harvesting import harvest
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.models.zoo.loading import load_model
from circuits.stimuli.images import to_image
from circuits.stimuli.sources import open_source
from circuits.units import Unit
from circuits.weights import build_graph
from circuits.workspace import ModelRecord, Workspace
from tests import canned

NAMES = (
    "![p](https:host.example?x=a.png)", "![p](https://host.example/a.png)", "https://a.example", "HTTP://A.example/b",
    "www.a.example", "see (www.a.example).", "x@a.example", "mailto:x@a.example", "[x](https://a.example)",
    "[x](javascript:window.hacked=1)", "<https://a.example>", "[x]: https://a.example", "<a href='https://a.example'>b</a>",
    "<img src='https://host.example/a.png' onerror='window.hacked=1'>", "<script>window.hacked=1</script>",
    "<svg onload=window.hacked=1>", "<iframe src=https://host.example></iframe>", "<s>", "<b>b</b>",
    "javascript:window.hacked=1", "**b** __c__ ~~d~~", "`c` ``d``", "$x^2$ $$y$$", ":red[b] :blue-badge[c]",
    ":smile: :material/home: :streamlit:", "# h", "1. one", "- one", "> q", "| a | b |", "a -> b -- c", "\u202eb\u200b",
    "\"'><img src=x onerror=window.hacked=1>", "{{window.hacked=1}}", "</script><script>window.hacked=1</script>",
    "&lt;img src=x&gt;", "data:text/html,<script>window.hacked=1</script>", "''+(window.hacked=1)+''",
    "a\nraise SystemExit  # b", "$(touch hacked); touch hacked",
)  # fmt: skip

_MODELS = """
from collections import OrderedDict
import torch
from torch import nn
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput

NAMES = {names!r}

def eyes():
    torch.manual_seed(0)
    layers = [("![p](https:host_example)", nn.Conv2d(3, 12, 5, 2)), ("<s>", nn.ReLU()), ("b", nn.Conv2d(12, 40, 3, 2)),
        ("c", nn.ReLU()), ("d", nn.AdaptiveAvgPool2d(1)), ("e", nn.Flatten()), ("f", nn.Linear(40, len(NAMES)))]
    known = {{"c": [*NAMES, "a", "b"]}}
    return HookedModel(nn.Sequential(OrderedDict(layers)), (3, 24, 24), NAMES[0], None, NAMES, known)

class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mlp, self.out = nn.Embedding(len(NAMES), 16), nn.Linear(16, 16), nn.Linear(16, len(NAMES))
        self.act = nn.ReLU()
    def forward(self, tokens):
        return self.out(self.act(self.mlp(self.embed(tokens))))

def words():
    torch.manual_seed(0)
    encoder = lambda text: [ord(c) % len(NAMES) for c in text[:30]]
    return HookedModel(Reads(), TokenInput(len(NAMES), 32, NAMES, encoder=encoder))
"""


def hostile(root: Path) -> Workspace:
    """A workspace with two models whose every name is hostile, and with what people keep about them."""
    folder = root / "![p](https:host.example?x=a.png) <s> www.a.example"
    images = folder / "images $x$ x@a.example"
    images.mkdir(parents=True)
    for i, name in enumerate(NAMES):
        pixels = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(i))
        to_image(pixels).save(images / f"{name.replace('/', '_')}.png")
    texts = folder / "texts <b> https:host.txt"
    texts.write_text("\n".join(f"{name} {name}" for name in NAMES))
    file = folder / "models.py"
    file.write_text(_MODELS.format(names=NAMES))
    place = Workspace(root / "workspace <s> www.a.example")
    code = Autoencoder(
        torch.eye(16)[:4], torch.zeros(4), torch.eye(16)[:4], torch.zeros(16),
        about=About("x", "act", "act", NAMES[0], "", NAMES[4], NAMES[2]),
    )  # fmt: skip
    save_autoencoder(code, place.root / "saes" / "x")
    for function, data, sites in (
        ("eyes", f"folder:{images}", ["c"]),
        ("words", f"tokens:{texts}", ["act"]),
    ):
        spec = f"python:{file}:{function}"
        model = load_model(spec)
        harvest(model, open_source(data), sites, place, ModelRecord.of(spec, model.identity))
        _keep(place, model, sites[0])
        _claims(place, model, spec)
    for i, name in enumerate(NAMES[:9]):
        place.register(ModelRecord(name, f"{i}" * 64))
    _jobs(place.root / "jobs")
    return place


def _keep(place: Workspace, model: HookedModel, site: str) -> None:
    """Names, families and circuits, as people keep them."""
    graph = None  # of weights: a transformer's are found only in TransformerLens' form
    if isinstance(model.input, ImageInput):
        store = build_graph(model, place.model_folder(model.hash))
        graph = store.neighbourhood(f"{site}:1", 1, 5)
    for i, name in enumerate(NAMES):
        for unit in Unit(site, 1), Unit(site, i):
            name_unit(place.database, model.hash, unit, name, name, author=name)
        if i % 8 == 0:
            if graph is not None:
                save_circuit(place.database, name, graph, name, author=name)
            members = tuple(Member(float(k), Unit(site, k), 1.0) for k in (1, 2))
            family = Family(
                name, site, "rotation", 180.0, members, 0.5, 0.1, name, 9, model.hash, name, 0
            )
            save_family(place.database, family)


def _claims(place: Workspace, model: HookedModel, spec: str) -> None:
    """Claims, with a report, and files that are none."""
    test = "faithfulness"
    claims = tuple(
        Claim(name, "sufficient", test, TESTS[test].settings({}, test), name, "refuted", name)
        for name in map(seen, NAMES)
    )
    file = ClaimFile(
        f"claims of {spec}", spec, model.hash, claims, TaskSpec(NAMES[0]), CircuitSpec(saved=NAMES[1]),
        roles=dict(zip(NAMES, NAMES, strict=True)), about=" ".join(NAMES[:20]),
    )  # fmt: skip
    folder = claims_folder(place)
    folder.mkdir(exist_ok=True)
    write_claims(folder / f"{len(list(folder.iterdir()))} [x](www.a.example) <s>.yaml", file)
    report = canned.claims_report(file, " ".join(NAMES[20:30]))
    write_report(report, report_folder(place, file.name))
    (folder / "[y](www.a.example).yaml").write_text(f"circuits_claims: {NAMES[0]!r}")


def _jobs(folder: Path) -> None:
    for i, name in enumerate(NAMES):
        job = folder / f"2026-01-01T00-00-{i:02}"
        job.mkdir(parents=True)
        asked = {"argv": ["harvest", name], "title": name, "started": name}
        (job / "job.json").write_text(json.dumps(asked))
        (job / "log").write_text(f"{name}\n")


def pages(place: Workspace) -> Iterator[tuple[str, dict[str, str]]]:
    """Every page with what the workspace has: each page first of the model that takes images."""
    eyes, words = (r.spec for r in place.models() if r.spec.startswith("python:"))
    yield "home", {}
    yield "compare", {"model": eyes, "unit": "c:1", "other_model": words, "other": "act:1"}
    yield "concepts", {"sae": "x"}
    yield "case", {}
    yield "claims", {"model": eyes, "claim": NAMES[2]}
    yield "heads", {"model": words}
    yield "prompts", {"model": words, "clean": NAMES[2], "answer": NAMES[3]}
    for model, site in ((eyes, "c"), (words, "act")):
        here = {"model": model, "site": site}
        yield "unit", {**here, "unit": "1"}
        yield "site", {**here, "as": "table"}
        yield "circuit", {"model": model, "circuit": NAMES[0]}
        yield "edits", {"model": model, "on": NAMES[0]}
        yield "yours", {**here, "text": NAMES[1]}
        yield "jobs", {**here, "do": "harvest"}
        yield "find", {**here, "sites": NAMES[2], "task": NAMES[3], "size": NAMES[4]}
    yield "claims", {"model": words, "claim": NAMES[3]}
    yield "site", {"model": eyes, "site": "c", "as": "map"}
    yield "site", {"model": eyes, "site": "c", "as": "sheet"}


def asked() -> Iterator[tuple[str, dict[str, str]]]:
    """Every page with words in the URL that the workspace has nothing for."""
    for view, parameters in (
        ("unit", "model site unit data"), ("site", "model site as data"), ("compare", "unit other model other_model"),
        ("circuit", "unit"), ("circuit", "circuit version"), ("edits", "on watch from"), ("yours", "from text site"),
        ("concepts", "sae"), ("jobs", "model do site"), ("circuit", "circuit"),
        ("find", "model task method search seed sites"),
        ("prompts", "model task example clean corrupted answer against patch head"), ("claims", "file claim"),
    ):  # fmt: skip
        yield view, {name: NAMES[(i + len(view)) % 9] for i, name in enumerate(parameters.split())}
