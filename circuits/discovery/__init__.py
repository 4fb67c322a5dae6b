"""Circuits found: edges between parts of a model, their scores, searches, and how good a circuit is."""

from circuits.discovery.agreement import Checked, check_scores
from circuits.discovery.alternatives import Alternatives, find_alternatives
from circuits.discovery.building import edge_graph
from circuits.discovery.comparing import Comparison, compare_circuits
from circuits.discovery.contrasts import Contrast, contrast
from circuits.discovery.evaluating import Evaluation, evaluate
from circuits.discovery.finding import discover
from circuits.discovery.found import Discovery, edges_of, strongest_circuit
from circuits.discovery.graphs import Edge, EdgeGraph
from circuits.discovery.pairs import EdgePair, EdgePairs, pair_edges, strongest
from circuits.discovery.planning import MemoryPlan, memory_plan
from circuits.discovery.pruning import prune
from circuits.discovery.results import EdgeScores
from circuits.discovery.runs import Runs
from circuits.discovery.scoring import score_edges
from circuits.discovery.searching import acdc, greedy, refine, top
from circuits.discovery.series import ModelSeries, compare_models
from circuits.discovery.splitting import active_latents
from circuits.discovery.stability import SearchStability
from circuits.discovery.truth import Recovered, recovered

__all__ = [
    "Alternatives",
    "Checked",
    "Comparison",
    "Contrast",
    "Discovery",
    "Edge",
    "EdgeGraph",
    "EdgePair",
    "EdgePairs",
    "EdgeScores",
    "Evaluation",
    "MemoryPlan",
    "ModelSeries",
    "Recovered",
    "Runs",
    "SearchStability",
    "acdc",
    "active_latents",
    "check_scores",
    "compare_circuits",
    "compare_models",
    "contrast",
    "discover",
    "edge_graph",
    "edges_of",
    "evaluate",
    "find_alternatives",
    "greedy",
    "memory_plan",
    "pair_edges",
    "prune",
    "recovered",
    "refine",
    "score_edges",
    "strongest",
    "strongest_circuit",
    "top",
]
