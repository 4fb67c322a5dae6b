"""Activation patching over a grid, against the same loop with TransformerLens' `run_with_hooks`.

A random GPT-2-like bridge, pairs of random tokens, the logit difference after the last token: the residual stream by
layer and position, or heads' outputs by layer and head. The peer's loop is TransformerLens' own way to do it: one
forward pass a cell, with the corrupted run's cache. Rounds are interleaved, CPU time of the process is taken (the
machine may be shared), and the median of each is compared; both have to give the same numbers to 1e-6.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from circuits.localization import patch_grid
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.zoo.transformers import native_bridge
from circuits.tasks import Item, Task, compile_task

N_CTX = 64


def gpt2(layers: int, width: int, vocabulary: int) -> HookedModel:
    """A random model of GPT-2's kind."""
    bridge = native_bridge(
        d_model=width, d_head=width // 8, n_heads=8, n_layers=layers, n_ctx=N_CTX, d_vocab=vocabulary,
        d_mlp=4 * width, act_fn="gelu", normalization_type="LN",
    )  # fmt: skip
    return HookedModel(bridge, TokenInput(vocabulary, N_CTX), "random GPT-2")


def pairs(model: HookedModel, n: int, length: int) -> tuple[Task, Tensor, Tensor]:
    """A task of random pairs, and its tokens."""
    generator = torch.Generator().manual_seed(0)
    shape, most = (2, n, length), model.input.n_vocab  # type: ignore[union-attr]
    clean, corrupted = torch.randint(most, shape, generator=generator)
    items = [
        Item(tuple(a), ((1,),), ((2,),), tuple(b), group=str(i))
        for i, (a, b) in enumerate(zip(clean.tolist(), corrupted.tolist(), strict=True))
    ]
    return compile_task(model, items), clean, corrupted


def by_hooks(model: HookedModel, clean: Tensor, corrupted: Tensor, by: str) -> Tensor:
    """Each cell by a pass of its own, with hooks."""
    bridge: Any = model.module
    layers, length, heads = bridge.cfg.n_layers, clean.shape[1], bridge.cfg.n_heads
    found = []
    with torch.no_grad():
        _, cache = bridge.run_with_cache(corrupted)
        for layer in range(layers):
            name = (
                f"blocks.{layer}.hook_resid_pre"
                if by == "position"
                else f"blocks.{layer}.attn.hook_z"
            )
            for i in range(length if by == "position" else heads):

                def put(value: Tensor, hook: object, name: str = name, i: int = i) -> Tensor:
                    if by == "position":
                        value[:, i] = cache[name][:, i]
                    else:
                        value[:, :, i] = cache[name][:, :, i]
                    return value

                logits = bridge.run_with_hooks(clean, fwd_hooks=[(name, put)])
                found.append(logits[:, -1, 1] - logits[:, -1, 2])
    return torch.stack(found).double()


def seconds(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """CPU seconds of this process, and what came out."""
    start = time.process_time()
    made = work()
    return time.process_time() - start, made


def main() -> None:
    """Time both in turn and print a line each and one of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--by", default="position", choices=("position", "head"))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = gpt2(options.layers, options.width, options.vocabulary)
    task, clean, corrupted = pairs(model, options.examples, options.length)

    def ours() -> Tensor:
        grid = patch_grid(model, task, by=options.by, direction="noising", n_random=0)
        return torch.from_numpy(grid.side().patched)

    def theirs() -> Tensor:
        return by_hooks(model, clean, corrupted, options.by)

    times: dict[str, list[float]] = {"ours": [], "peer": []}
    gap = 0.0
    for _ in range(options.rounds + 1):
        mine, own = seconds(ours)
        other, peer = seconds(theirs)
        times["ours"].append(mine)
        times["peer"].append(other)
        gap = max(gap, float((own - peer).abs().max()))
    mine, other = (statistics.median(times[who][1:]) for who in ("ours", "peer"))
    cells = len(own)
    print(
        f"{cells} cells by {options.by}, {options.examples} examples: patch_grid {mine:.2f} s, "
        f"run_with_hooks {other:.2f} s ({mine / other:.2f} of its time), largest difference {gap:.1e}"
    )
    if gap > 1e-6:
        raise SystemExit("the numbers differ by more than 1e-6")
    print(
        json.dumps({
            "name": f"patch grid by {options.by}", "ours": mine, "peer": other, "ratio": other / mine, "n": cells,
            "share": mine / other, "largest_gap": gap,
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
