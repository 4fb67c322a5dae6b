"""The options of circuits that are looked for: how, by what they are checked, and what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from circuits.cli import options
from circuits.cli.signatures import Within, circuit_name, not_empty, option
from circuits.discovery.finding import CheckOn
from circuits.discovery.pairs import LARGEST
from circuits.discovery.results import Ranking
from circuits.discovery.runs import Ablation
from circuits.discovery.scoring import STEPS, Method, Rule
from circuits.discovery.searching import Search
from circuits.experiments import N_RANDOM
from circuits.experiments.patched_runs import Direction

Ablating = Annotated[Ablation, option(
    "What edges outside the circuit carry: what they carry on each example's counterpart, or on another example of its "
    "length (resample); their mean over examples and positions, at each position of texts of one length "
    "(mean-by-position), or that over the examples of one template and length (mean-by-template); constants that are "
    "learned for the circuit on the find half (optimal); or nothing (zero)."
)]  # fmt: skip
Shift = Annotated[int, option(
    "By how many positions to roll the counterpart's position embedding, so that positions differ too.",
    check=Within(-1000, 1000),
)]  # fmt: skip
Other = Annotated[str, option(
    "Further saved circuits of the model to compare with, such as another task's: their names, separated by commas."
)]  # fmt: skip
Random = Annotated[int, option(
    "How many random circuits of the same size, layers and kinds of parts to compare with.", check=Within(0)
)]  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """How edges are scored and chosen, by the names that `discover` gives it."""

    method: Annotated[Method, option(
        "How to score edges: by patching each (exact), by gradients (eap, eap-ig, eap-ig-activations, "
        "clean-corrupted, relp), or, for comparison, by sizes (weights, activations) or at random."
    )] = "eap-ig"  # fmt: skip
    search: Annotated[Search, option(
        "How to choose edges: the highest scores (top), grown backwards from the output (greedy), from three times as "
        "many by exact effects (refine), from all, dropping what is not needed (acdc), or by learning a mask over all "
        "edges (pruning)."
    )] = "greedy"  # fmt: skip
    size: Annotated[int | None, option(
        "How many edges to keep. By default 50, or a quarter of a small model's.", check=Within(1)
    )] = None  # fmt: skip
    threshold: Annotated[float | None, option(
        "With --search acdc: how much worse the metric may get by dropping an edge.", check=Within(0)
    )] = None  # fmt: skip
    ranking: Annotated[Ranking, option("Rank edges by the size of their scores, or by sign.")] = (
        "absolute"
    )
    direction: Annotated[Direction, option(
        "With --method exact: patch the clean run (noising) or the corrupted one (denoising)."
    )] = "noising"  # fmt: skip
    steps: Annotated[
        int, option("The number of steps of integrated gradients.", check=Within(1))
    ] = STEPS
    rule: Annotated[Rule, option(
        "Where in each step the gradient is taken; left is what the authors of EAP-IG do."
    )] = "midpoint"  # fmt: skip
    ablation: Ablating = "counterpart"
    shift: Shift = 0
    pruning_steps: Annotated[int | None, option(
        "With --search pruning: how often the mask is changed. By default 300.", check=Within(1)
    )] = None  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """What a circuit is checked by, and compared with."""

    check: Annotated[int | None, option(
        "How many edges to patch exactly, to check approximate scores; 0 for none. By default 60.", check=Within(0)
    )] = None  # fmt: skip
    check_on: Annotated[CheckOn, option(
        "The half of the examples on which they are patched: that which was scored (find), or the other (test)."
    )] = "find"  # fmt: skip
    shuffled: Annotated[bool, option(
        "Also do the same in the model with shuffled weights (the numbers of each tensor permuted), and show both.",
        "--shuffled",
    )] = False  # fmt: skip
    random: Random = N_RANDOM
    rankings: Annotated[int | None, option(
        "How many random rankings of all edges to compare the curve by size with. By default 10, or 3 if there are "
        "more than 10,000 edges.",
        "--random-rankings", check=Within(0),
    )] = None  # fmt: skip
    other: Other = ""
    truth: Annotated[str, option(
        "A saved circuit whose edges are known to be true, to see how well the scores find them. Of models with "
        "weights written by hand they are known."
    )] = ""  # fmt: skip
    pairs: Annotated[int, option(
        "How many of the strongest edges to patch two at a time, to tell redundant pairs from those that work only "
        "together: at least 2, or 0 for none.",
        check=Within(0, LARGEST),
    )] = 0  # fmt: skip
    alternatives: Annotated[int, option(
        "How many further circuits to look for that are as good and share as few edges as possible.",
        check=Within(0, 20),
    )] = 0  # fmt: skip

    @property
    def settings(self) -> dict[str, Any]:
        """Those that `discover` takes as they are, by its names."""
        return {
            "check": self.check, "check_on": self.check_on, "n_random": self.random, "n_curves": self.rankings,
            "pairs": self.pairs, "alternatives": self.alternatives,
        }  # fmt: skip


@dataclass(frozen=True)
class Keeping:
    """What is kept of a circuit."""

    save: Annotated[str | None, option(
        "Save the circuit under this name; work that is stopped then goes on later.", check=circuit_name
    )] = None  # fmt: skip
    scores: Annotated[str | None, option(
        "Write the scores of all edges, and which are in the circuit, to this .json or .pt file, as MIB and EAP-IG do.",
        check=not_empty,
    )] = None  # fmt: skip
    note: options.Note = ""
