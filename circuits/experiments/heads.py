"""What a head does to a metric, in all and directly, and what the rest of the model makes up for (layer 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.experiments.patched_runs import Direction, Options, Runs
from circuits.experiments.patching import LogitMetric, measured
from circuits.models.adapter import HookedModel
from circuits.models.paths import stream_of
from circuits.models.residual import Path, Receiver, Sender


@dataclass(frozen=True, eq=False)
class HeadEffects:
    """What replacing heads' outputs does to a metric, head x example, and by which ways.

    Each is the metric with a head replaced less the metric without.

    Attributes:
        heads: written `layer.head`.
        direction: as in `PathEffects`.
        total: everything behind the head recomputes.
        direct: only the logits read the change, behind the last normalisation, recomputed.
        direct_held: the same with the last normalisation held at its scale, as direct logit attribution has it.
        patched: the metric in the run that was patched.
        model_hash: of the weights.
    """

    heads: tuple[Sender, ...]
    direction: Direction
    total: Float[Tensor, "head example"]
    direct: Float[Tensor, "head example"]
    direct_held: Float[Tensor, "head example"]
    patched: Float[Tensor, " example"]
    model_hash: str

    @property
    def indirect(self) -> Float[Tensor, "head example"]:
        """Total less direct: what other heads and MLPs make of the change."""
        return self.total - self.direct

    @property
    def self_repair(self) -> Float[Tensor, "head example"]:
        """Total less what the head's own direct effect predicts, the last normalisation held.

        Of the opposite sign as `direct_held` where the rest of the model makes up for the head (McGrath et al. 2023,
        "The Hydra Effect"; Rushing and Nanda 2024, "Explorations of Self-Repair", who count the last
        normalisation's part as repair too).
        """
        return self.total - self.direct_held

    @property
    def repaired_by_norm(self) -> Float[Tensor, "head example"]:
        """The part of `self_repair` that the last normalisation's new scale makes up; `indirect` is the rest."""
        return self.direct - self.direct_held


def head_effects(
    model: HookedModel,
    clean: Int[Tensor, "example position"],
    corrupted: Int[Tensor, "counterpart place"],
    heads: str | Sender | Sequence[str | Sender],
    metric: LogitMetric,
    *,
    direction: Direction = "noising",
    clean_positions: Int[Tensor, "..."] | None = None,
    corrupted_positions: Int[Tensor, "..."] | None = None,
    rows: int | None = None,
) -> HeadEffects:
    """What a metric loses when heads put out what they do in the counterparts: in all, and directly.

    Args:
        model: a TransformerLens bridge.
        clean: tokens.
        corrupted: their counterparts, pair by pair.
        heads: written `layer.head`; any other sender will do as well (`mlp:0`).
        metric: one number an example from the logits.
        direction: `noising` replaces in the clean run, `denoising` in the corrupted one.
        clean_positions: as in `patch_paths`.
        corrupted_positions: as in `patch_paths`.
        rows: as in `patch_paths`.

    Raises:
        KeyError: if there is no such head.
        ValueError: if counterparts do not go with the clean tokens, or the metric is not a finite number an example.
    """
    stream = stream_of(model)
    chosen = [stream.sender(h) for h in ([heads] if isinstance(heads, str | Sender) else heads)]
    if not chosen:
        raise ValueError("heads name none: expected at least one, written layer.head")
    runs = Runs.of(stream, (clean, clean_positions), (corrupted, corrupted_positions), direction)
    direct = [frozenset({(head, Receiver("logits"))}) for head in chosen]
    total = [frozenset({(head, stream.behind(head))}) for head in chosen]
    base: list[Tensor] = []

    def effects(sets: Sequence[frozenset[Path]], hold_norms: bool = False) -> Tensor:
        found = []
        for patched, own, _ in runs.patched(sets, Options(hold_norms=hold_norms), rows):
            base.append(measured(metric, own, own))
            found.append(measured(metric, patched, own) - base[-1])
        return torch.stack(found)

    both = effects([*total, *direct])
    held = effects(direct, hold_norms=True)
    n = len(chosen)
    return HeadEffects(tuple(chosen), direction, both[:n], both[n:], held, base[0], model.hash)
