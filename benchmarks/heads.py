"""What reading all heads' z of a traced model costs: over a plain pass, and TransformerLens on the same weights.

GPT-2 small's shape (12 layers of 12 heads, width 768) on 2 x 128 tokens, plain as the Hugging Face library has it, as
we trace it, and as a bridge of TransformerLens, whose `run_with_cache(names_filter=...)` reads the same tensors; and
ViT-B/16 on two images, for which TransformerLens has no bridge. Weights are random. The passes of a round follow each
other, in an order that changes; times are of the processor, on one thread, and ratios are medians over rounds. The
targets are 1.05 of a plain pass and 1 of the bridge.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput, TokenInput
from circuits.models.zoo.transformers import huggingface_bridge


def seconds(work: Callable[[], object]) -> float:
    """How much of the processor's time one call takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def plain(module: Any, inputs: Tensor) -> object:
    """A pass with nothing read."""
    with torch.no_grad():
        return module(inputs)


def cached(bridge: Any, inputs: Tensor, names: set[str]) -> object:
    """A pass of TransformerLens that keeps some hook points."""
    with torch.no_grad():
        return bridge.run_with_cache(inputs, names_filter=lambda name: name in names)


def interleaved(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, after two rounds that do not count."""
    shuffled, found = random.Random(0), {name: [] for name in ways}
    for n in range(rounds + 2):
        for name in shuffled.sample(list(ways), len(ways)):
            taken = seconds(ways[name])
            if n >= 2:
                found[name].append(taken)
    return found


def ratio(found: dict[str, list[float]], one: str, other: str) -> float:
    """The median over rounds of one way's time over another's."""
    pairs = zip(found[one], found[other], strict=True)
    return statistics.median(a / b for a, b in pairs)


def gpt2(rounds: int) -> dict[str, list[float]]:
    """GPT-2 small's shape: plain, ours, and a bridge of the same weights."""
    config = transformers.GPT2Config(attn_implementation="sdpa")
    module = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        bridge = huggingface_bridge(folder)
    model = HookedModel(module, TokenInput(config.vocab_size, config.n_positions))
    names = [f"blocks.{n}.attn.hook_z" for n in range(config.n_layer)]
    patterns = [name.replace("hook_z", "hook_pattern") for name in names]
    ours, (_, theirs) = model.run(tokens, read=names), cached(bridge, tokens, set(names))  # type: ignore[misc]
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)
    return interleaved(
        {
            "plain": lambda: plain(module, tokens),
            "run": lambda: model.run(tokens),
            "z": lambda: model.run(tokens, read=names),
            "bridge": lambda: cached(bridge, tokens, set(names)),
            "patterns": lambda: model.run(tokens, read=patterns),
            "bridge's patterns": lambda: cached(bridge, tokens, set(patterns)),
        },
        rounds,
    )


def vit(rounds: int) -> dict[str, list[float]]:
    """ViT-B/16: plain and ours."""
    module = transformers.ViTForImageClassification(transformers.ViTConfig()).eval()
    model = HookedModel(module, ImageInput(3, 224, 224))
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    names = [f"blocks.{n}.attn.hook_z" for n in range(module.config.num_hidden_layers)]
    patterns = [name.replace("hook_z", "hook_pattern") for name in names]
    return interleaved(
        {
            "plain": lambda: plain(module, images),
            "run": lambda: model.run(images),
            "z": lambda: model.run(images, read=names),
            "patterns": lambda: model.run(images, read=patterns),
        },
        rounds,
    )


def main() -> None:
    """Time all ways, print them, and one JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=20, help="rounds")
    rounds = parser.parse_args().n
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = {"gpt2": gpt2(rounds), "vit": vit(rounds)}
    for name, found in results.items():
        for way, taken in found.items():
            more = f"  {ratio(found, way, 'plain'):.3f} of plain"
            if way == "z" and "bridge" in found:
                more += f", {ratio(found, 'z', 'bridge'):.3f} of the bridge"
            print(f"{name:5} {way:18} {1e3 * statistics.median(taken):8.1f} ms{more}")
    text = results["gpt2"]
    print(
        json.dumps(
            {
                "name": "heads",
                "ours": statistics.median(text["z"]),
                "peer": statistics.median(text["bridge"]),
                "of_the_bridge": ratio(text, "z", "bridge"),
                "over_plain": {name: ratio(found, "z", "plain") for name, found in results.items()},
                "n": rounds,
            }
        )
    )


if __name__ == "__main__":
    main()
