"""Scores of all edges compared with those of the authors' EAP-IG, on the same random GPT-2, Llama and Gemma 2.

Agreement: the largest difference over all edges, relative to the largest score, of EAP, EAP-IG (their own left sum, 5
steps), clean-corrupted, and EAP-IG-activations (5 steps). Time: of the processor, on one thread, the two in turns; the
ratio is the median over rounds. Two of their scores are not what ours are; for these, what they compute is computed
here too, from the same parts, and that has to agree:

- EAP-IG-activations: in a pass in which one layer's heads, or one MLP, are interpolated they count the gradient for the
  edges of all sources, and take the mean over passes. Ours counts it for the sources that are interpolated. In the pass
  that interpolates the input nothing before the first layer has a gradient in their code, unless a table of positions
  is added: its edges into the first layer's heads count 0 there.
- Gemma 2 normalises what attention puts out before it is added to the stream. They take the change of heads before this
  normalisation and the gradient behind it; ours takes both behind it.

The authors' code runs in an environment of its own (see `benchmarks/peer_eap_ig_worker.py`), never in this one:

    python -m venv /tmp/eapenv
    /tmp/eapenv/bin/pip install torch==2.13.0 transformer-lens==2.16.1 "numpy<2" "pyarrow<19" "pandas<3" "datasets<4"
    /tmp/eapenv/bin/pip install matplotlib
    git --git-dir=EAP-IG.git archive HEAD src | tar x -C /tmp/eap
    sed -i "s/device='cuda'/device='cpu'/" /tmp/eap/src/eap/*.py
    python -m benchmarks.peer_eap_ig --peer /tmp/eapenv/bin/python --source /tmp/eap/src

`--smollm2` does the same with the real weights of `smollm2` and pairs of the indirect-object task, EAP-IG over inputs
alone. `--fixture FILE` writes the peer's scores, rounded, for `tests/test_peer_scores.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from circuits.discovery import Runs, score_edges
from circuits.discovery.formats import Layout
from circuits.discovery.scoring import gradients_at
from circuits.discovery.streams import StreamGraph
from circuits.examples import Examples
from circuits.hooks import Change
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.paths.contributions import written_change
from circuits.models.zoo.loading import load_model
from circuits.tasks import Question, Task, as_metric
from circuits.tasks.builtin import load_task
from circuits.workspace import Workspace

STEPS = 5

TOLERANCE = 1e-4
"""Of the largest score."""

METHODS: dict[str, dict[str, Any]] = {
    "EAP": {"method": "eap"},
    "EAP-IG-inputs": {"method": "eap-ig", "steps": STEPS, "rule": "left"},
    "clean-corrupted": {"method": "clean-corrupted"},
    "EAP-IG-activations": {"method": "eap-ig-activations", "steps": STEPS, "rule": "right"},
}


@dataclass(frozen=True)
class Shape:
    """The size of a case: `batch` pairs of `length` tokens."""

    layers: int = 2
    heads: int = 4
    groups: int = 2
    width: int = 16
    vocabulary: int = 20
    batch: int = 3
    length: int = 7


SMALL = Shape()
LARGER = Shape(4, 8, 2, 128, 200, 16, 20)


def _common(shape: Shape) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the configurations of Llama and Gemma 2 share, and those of their HookedTransformers."""
    d_head = shape.width // shape.heads
    ours = {
        "vocab_size": shape.vocabulary, "hidden_size": shape.width, "num_hidden_layers": shape.layers,
        "intermediate_size": 2 * shape.width, "max_position_embeddings": 64, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups, "head_dim": d_head, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    theirs = {
        "n_layers": shape.layers, "d_model": shape.width, "n_ctx": 64, "d_head": d_head, "n_heads": shape.heads,
        "d_mlp": 2 * shape.width, "d_vocab": shape.vocabulary, "n_key_value_heads": shape.groups, "eps": 1e-6,
        "normalization_type": "RMS", "positional_embedding_type": "rotary", "rotary_dim": d_head,
        "rotary_base": 10000, "rotary_adjacent_pairs": False, "gated_mlp": True, "final_rms": True,
    }  # fmt: skip
    return ours, theirs


def _configs(family: str, shape: Shape) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The class and the settings of a model of transformers, and those of its HookedTransformer."""
    ours, theirs = _common(shape)
    if family == "llama":
        return "LlamaConfig", ours, theirs | {"act_fn": "silu"}
    if family == "gemma":
        more = {"query_pre_attn_scalar": ours["head_dim"], "sliding_window": 64}
        return "Gemma2Config", ours | more, theirs | {
            "act_fn": "gelu_pytorch_tanh", "use_normalization_before_and_after": True,
            "attn_scores_soft_cap": 50.0, "output_logits_soft_cap": 30.0,
        }  # fmt: skip
    own = {
        "vocab_size": shape.vocabulary, "n_positions": 64, "n_embd": shape.width, "n_layer": shape.layers,
        "n_head": shape.heads, "n_inner": 2 * shape.width, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    kept = ("n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_mlp", "d_vocab")
    return "GPT2Config", own, {k: theirs[k] for k in kept} | {
        "act_fn": "gelu_new", "normalization_type": "LN", "eps": 1e-5,
    }  # fmt: skip


FAMILIES = ("gpt2", "llama", "gemma")


@dataclass(frozen=True, eq=False)
class Case:
    """A random model with pairs of random texts, and a metric that weighs the last logits.

    Attributes:
        model: ours.
        task: the pairs.
        given: what the peer's process needs to build the same.
    """

    model: HookedModel
    task: Task
    given: Mapping[str, Any]


def case(family: str, shape: Shape = SMALL, seed: int = 0) -> Case:
    """A model of a family with all weights random, those of norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    kind, config, hooked = _configs(family, shape)
    module = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**config)
    ).eval()
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        # Gemma adds 1 to the gains of its norms.
        gain = parameter.ndim == 1 and name.endswith("weight") and family != "gemma"
        scale = 0.2 if parameter.ndim == 1 else shape.width**-0.5
        parameter.data.copy_(scale * drawn + gain)
    size = (2, shape.batch, shape.length)
    clean, corrupted = torch.randint(1, shape.vocabulary, size, generator=generator)
    weights = torch.randn(shape.vocabulary, generator=generator)

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1] @ weights.to(logits)

    model = HookedModel(module, TokenInput(shape.vocabulary, 64), f"random-{family}")
    asked = (Question((shape.length - 1,)),) * shape.batch
    source, other = (Examples.given(model, tokens) for tokens in (clean, corrupted))
    task = Task("pairs", source, asked, as_metric(metric), counterparts=other)
    given = {
        "family": family, "config_class": kind, "config": config, "hooked_config": hooked,
        "weights": module.state_dict(), "clean": clean, "corrupted": corrupted, "metric": weights,
    }  # fmt: skip
    return Case(model, task, given)


def real(n: int) -> Case:
    """`smollm2` on pairs of one length of the indirect-object task, with the difference of the two names' logits."""
    model = load_model("smollm2")
    task = max(load_task(model, "indirect-object", n=4 * n).batches(n), key=lambda b: len(b.inputs))
    counterparts, places = task.counterparts, task.places(task.inputs.shape[1])
    assert counterparts is not None, "the task has some"
    weights = torch.zeros(len(task.inputs), model.input.n_vocab)  # type: ignore[union-attr]
    rows = torch.arange(len(weights))
    weights[rows, places.wanted[:, 0]] = 1
    weights[rows, places.against[:, 0]] = -1

    def metric(logits: Tensor) -> Tensor:
        return (logits[:, -1] * weights.to(logits)).sum(-1)

    asked = (Question((task.inputs.shape[1] - 1,)),) * len(weights)
    source, other = (Examples.given(model, tokens) for tokens in (task.inputs, counterparts))
    own = Task("pairs", source, asked, as_metric(metric), counterparts=other)
    folder = Workspace.default().converted_folder("smollm2")
    module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ours, hooked = _common(Shape(30, 9, 3, 576, 49152, *task.inputs.shape))
    more = {
        "intermediate_size": 1536, "rms_norm_eps": module.config.rms_norm_eps, "tie_word_embeddings": True,
        "rope_theta": 100000.0,
    }  # fmt: skip
    changed = {
        "d_mlp": 1536,
        "eps": module.config.rms_norm_eps,
        "rotary_base": 100000,
        "act_fn": "silu",
    }
    given = {
        "family": "llama", "config_class": "LlamaConfig", "config": ours | more, "hooked_config": hooked | changed,
        "weights": module.state_dict(), "clean": task.inputs, "corrupted": counterparts, "metric": weights,
    }  # fmt: skip
    return Case(model, own, given)


# --- ours --------------------------------------------------------------------------------------------


class BeforeNorm(StreamGraph):
    """A graph whose heads' changes are those before the normalisation after attention, as the authors have them."""

    def _written(
        self, clean: Mapping[str, Tensor], other: Mapping[str, Tensor], *_: Any, **__: Any
    ) -> Tensor:
        stream = self.stream
        sites = dict.fromkeys(stream.output_site(s) for s in stream.senders if s.kind != "bias")
        made = [
            written_change(stream, s, clean[s][None], other[s][None])[0].transpose(0, 1)
            for s in sites
        ]
        return torch.cat(made, 1)


def for_all_sources(graph: StreamGraph, task: Task, steps: int) -> np.ndarray:
    """EAP-IG-activations as the authors count it: each gradient for the edges of all sources."""
    (pair,) = (runs := Runs(graph, task)).pairs()
    total, n = torch.zeros(len(task), len(graph)), 0
    positions = "position" in graph.sources or graph.stream.parts.adds_positions
    first = [i for i, (_, target) in enumerate(graph.edges) if target.startswith("0.")]
    for sites, _ in graph.source_sites():
        for k in range(1, steps + 1):
            mixed = {s: torch.lerp(pair.other[s], pair.clean[s], k / steps) for s in sites}
            edits: dict[str, Change] = {s: lambda _, v=v: v * 1 for s, v in mixed.items()}
            with torch.enable_grad():
                cache, gradients = gradients_at(runs, pair, edits)
            pulled = graph.pulled(cache, gradients)
            made = graph.contracted(pair.clean, pair.other, pulled)
            if sites == graph.input_sites and not positions:
                made[:, first] = 0
            total += made
            n += 1
    return (total / n).mean(0).double().numpy()


def ours(found: Case, graph: StreamGraph, method: str, as_theirs: bool = False) -> np.ndarray:
    """The mean score of each edge."""
    if as_theirs and method == "EAP-IG-activations":
        return for_all_sources(graph, found.task, STEPS)
    return score_edges(graph, found.task, **METHODS[method]).mean


def named_scores(graph: StreamGraph, scores: np.ndarray) -> dict[str, float]:
    """Scores by the names that the authors give edges."""
    return {f"{a}->{b}": float(scores[at].sum()) for (a, b), at in Layout(graph).edges.items()}


def difference(own: Mapping[str, float], peer: Mapping[str, float]) -> float:
    """The largest difference of two sets of scores, of the largest of the second."""
    assert own.keys() == peer.keys(), "the graphs have the same edges"
    return max(abs(own[e] - peer[e]) for e in peer) / max(map(abs, peer.values()))


# --- the peer ----------------------------------------------------------------------------------------


class Peer:
    """The authors' code in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.places: dict[str, list[int]] = self._answer()["edges"]

    def _answer(self) -> Any:
        assert self.process.stdout is not None, "it is a pipe"
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the peer's process ended; its message is above")
        return json.loads(line)

    def scores(self, method: str) -> tuple[dict[str, float], float]:
        """The score of each edge, and the seconds that it took."""
        assert self.process.stdin is not None, "it is a pipe"
        self.process.stdin.write(json.dumps({"method": method, "steps": STEPS}) + "\n")
        self.process.stdin.flush()
        said = self._answer()
        return {e: said["scores"][i][j] for e, (i, j) in self.places.items()}, said["seconds"]


@contextmanager
def peer(python: str, source: str, found: Case) -> Iterator[Peer]:
    """Start the peer on a case."""
    worker = Path(__file__).with_name("peer_eap_ig_worker.py")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.pt"
        torch.save(dict(found.given), path)
        process = subprocess.Popen(
            [python, str(worker), source, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield Peer(process)
        finally:
            process.kill()
            process.wait()


def agreement(found: Case, theirs: Peer) -> Iterator[dict[str, Any]]:
    """How far scores differ, by method: ours, and what the authors compute from the same parts."""
    graph, before = (kind(found.model, "head") for kind in (StreamGraph, BeforeNorm))
    for method in METHODS:
        scores, _ = theirs.scores(method)
        own = named_scores(graph, ours(found, graph, method))
        same = named_scores(before, ours(found, before, method, as_theirs=True))
        yield {
            "method": method, "ours": difference(own, scores), "as_theirs": difference(same, scores),
        }  # fmt: skip


def times(
    found: Case, theirs: Peer, rounds: int, methods: Iterable[str] = METHODS
) -> Iterator[dict[str, Any]]:
    """Seconds of both by method, in turns after a first round that does not count."""
    graph = StreamGraph(found.model, "head")
    for method in methods:
        own, other = list[float](), list[float]()
        for n in range(rounds + 1):
            start = time.process_time()
            scores = ours(found, graph, method)
            taken = time.process_time() - start
            peers, seconds = theirs.scores(method)
            if n:
                own.append(taken)
                other.append(seconds)
        ratio = statistics.median(a / b for a, b in zip(own, other, strict=True))
        yield {
            "method": method, "ours": statistics.median(own), "peer": statistics.median(other), "ratio": ratio,
            "difference": difference(named_scores(graph, scores), peers),
        }  # fmt: skip


def main() -> None:
    """Print how far both agree and what they cost; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True, help="Python of the peer's environment")
    parser.add_argument("--source", required=True, help="the folder that holds the snapshot's eap")
    parser.add_argument(
        "--rounds", type=int, default=5, help="of measuring time; 0 for agreement alone"
    )
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument(
        "--smollm2", type=int, default=0, help="how many pairs of it; no families then"
    )
    parser.add_argument("--fixture", help="write the peer's scores of the small cases to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    kept: dict[str, dict[str, dict[str, float]]] = {}
    if args.smollm2:
        largest = real(args.smollm2)
        with peer(args.peer, args.source, largest) as theirs:
            rows = list(times(largest, theirs, args.rounds, ["EAP-IG-inputs"]))
        print(json.dumps({"name": "peer_eap_ig smollm2", "n": len(largest.task), "found": rows}))
        return
    for family in args.families:
        small = case(family)
        with peer(args.peer, args.source, small) as theirs:
            found[family] = {"agreement": list(agreement(small, theirs))}
            kept[family] = {
                m: {e: float(f"{x:.6g}") for e, x in theirs.scores(m)[0].items()} for m in METHODS
            }
        found[family]["times"] = []
        if args.rounds:
            larger = case(family, LARGER)
            with peer(args.peer, args.source, larger) as theirs:
                found[family]["times"] = list(times(larger, theirs, args.rounds))
        for row in found[family]["agreement"] + found[family]["times"]:
            print(family, row)
    if args.fixture:
        Path(args.fixture).write_text(json.dumps(kept, indent=0) + "\n")
    rows = [row for made in found.values() for row in made["times"]]
    print(json.dumps({
        "name": "peer_eap_ig", "ours": sum(r["ours"] for r in rows), "peer": sum(r["peer"] for r in rows),
        "ratio": statistics.median(r["ratio"] for r in rows) if rows else None, "n": args.rounds, "found": found,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
