"""Transformers written by hand: every answer right, and exactly the true edges do something."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from circuits.cleanroom import addition, induction
from circuits.models.zoo.loading import load_model
from circuits.stimuli.repeats import draw_repeats


class Parts:
    """A slow forward pass of a network without normalisation, edge by edge.

    Each target (a head's queries, keys or values, the MLP, the logits) reads the sum of all sources before it; a
    source can be another one's output for one target alone.
    """

    def __init__(self, weights: dict[str, Tensor], n_layers: int, n_heads: int, mlp: bool) -> None:
        self.w = {k: v.double() for k, v in weights.items()}
        self.n_layers, self.n_heads, self.mlp = n_layers, n_heads, mlp

    def targets(self) -> list[tuple[str, list[str]]]:
        sources, found = ["token", "position"], []
        for layer in range(self.n_layers):
            heads = [f"{layer}.{h}" for h in range(self.n_heads)]
            found += [(f"{h}.{part}", list(sources)) for h in heads for part in "qkv"]
            sources += heads
            if self.mlp:
                found.append(("mlp", list(sources)))
                sources.append("mlp")
        return [*found, ("logits", list(sources))]

    def run(
        self,
        tokens: Tensor,
        positions: Tensor,
        edge: tuple[str, str] | None = None,
        other: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        made = {
            "token": self.w["embed.weight"][tokens],
            "position": self.w["pos_embed.weight"][positions],
        }
        made["position"] = made["position"].expand_as(made["token"])

        def read(target: str) -> Tensor:
            parts = [
                (other or {})[name] if edge == (name, target) else value
                for name, value in made.items()
            ]
            return torch.stack(parts).sum(0)

        for layer in range(self.n_layers):
            name = f"blocks.{layer}.attn"
            size = len(self.w[f"{name}.q.weight"]) // self.n_heads
            heads = {}
            for h in range(self.n_heads):
                rows = slice(h * size, (h + 1) * size)
                q, k, v = (
                    read(f"{layer}.{h}.{p}") @ self.w[f"{name}.{p}.weight"][rows].T for p in "qkv"
                )
                scores = q @ k.transpose(1, 2) / math.sqrt(size)
                later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
                heads[f"{layer}.{h}"] = (
                    scores.masked_fill(later, -math.inf).softmax(-1)
                    @ v
                    @ self.w[f"{name}.o.weight"][:, rows].T
                )
            made |= heads
            if self.mlp:
                hidden = (read("mlp") @ self.w[f"blocks.{layer}.mlp.in.weight"].T).clamp_min(0)
                made["mlp"] = hidden @ self.w[f"blocks.{layer}.mlp.out.weight"].T
        return read("logits") @ self.w["unembed.weight"].T, made

    def effects(self, clean: Tensor, corrupted: Tensor, at: slice) -> dict[tuple[str, str], float]:
        """How much the logits change if one edge alone is patched from the corrupted run."""
        positions = torch.arange(clean.shape[1])
        base, _ = self.run(clean, positions)
        _, other = self.run(corrupted, positions.roll(1))
        found = {}
        for target, sources in self.targets():
            for source in sources:
                logits, _ = self.run(clean, positions, (source, target), other)
                found[source, target] = float((logits - base)[:, at].abs().max())
        return found


def test_exact_patching_finds_the_seven_edges_of_induction() -> None:
    model = load_model("induction-by-hand")
    generator = torch.Generator().manual_seed(5)
    clean, corrupted = (draw_repeats(3, generator)[0] for _ in range(2))
    n = min(clean.shape[1], corrupted.shape[1])
    clean, corrupted = clean[:, :n], corrupted[:, :n]
    n_vocab, n_ctx = model.input.n_vocab, model.input.n_ctx  # type: ignore[union-attr]
    parts = Parts(induction.weights(n_vocab, n_ctx), 2, 3, mlp=False)
    torch.testing.assert_close(
        parts.run(clean, torch.arange(n))[0].float(), model.logits(clean), rtol=1e-4, atol=1e-4
    )
    effects = parts.effects(clean, corrupted, slice(None))
    assert len(effects) == 71
    assert {edge for edge, size in effects.items() if size != 0} == set(induction.TRUE_EDGES)


def test_addition_is_right_for_all_pairs_and_each_frequency_adds_its_cosine() -> None:
    model = load_model("addition-by-hand")
    a, b = (
        v.flatten() for v in torch.meshgrid(torch.arange(113), torch.arange(113), indexing="ij")
    )
    tokens = torch.stack([a, b, torch.full_like(a, 113)], 1)
    logits = model.logits(tokens)[:, -1]
    assert (logits.argmax(-1) == (a + b) % 113).all()
    turn = torch.tensor(addition.FREQUENCIES).double() * 2 * math.pi / 113
    some = torch.arange(0, len(a), 97)
    strength = (turn * (a - b)[some, None] / 2).cos().abs()
    numbers = torch.arange(113)
    waves = (turn * ((a + b)[some, None, None] - numbers[:, None])).cos()
    wanted = (strength[:, None] * waves).sum(-1)
    found = logits[some, :113].double()
    scale = (found * wanted).sum() / (wanted * wanted).sum()
    # higher harmonics that nine phases let pass are a 200th part
    assert (found - scale * wanted).abs().max() < 0.03 * (scale * wanted).abs().max()


def test_exact_patching_finds_the_three_edges_of_addition() -> None:
    parts = Parts(addition.weights(113), 1, 2, mlp=True)
    clean, corrupted = (
        torch.tensor([[3, 99, 113], [50, 8, 113]]), torch.tensor([[70, 1, 113], [2, 31, 113]])
    )  # fmt: skip
    effects = parts.effects(clean, corrupted, slice(-1, None))
    assert len(effects) == 21
    found = {edge for edge, size in effects.items() if size != 0}
    assert found == {(a.removesuffix(":0"), b.removesuffix(":0")) for a, b in addition.TRUE_EDGES}
