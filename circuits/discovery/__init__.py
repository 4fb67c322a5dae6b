"""Circuits found: edges between parts of a model, their scores, searches, and how good a circuit is."""

from circuits.discovery.agreement import Checked, check_scores
from circuits.discovery.building import edge_graph
from circuits.discovery.comparing import Comparison, compare_circuits
from circuits.discovery.evaluating import Evaluation, evaluate
from circuits.discovery.found import Discovery, discover, edges_of, strongest
from circuits.discovery.graphs import Edge, EdgeGraph
from circuits.discovery.results import EdgeScores
from circuits.discovery.runs import Runs
from circuits.discovery.scoring import score_edges
from circuits.discovery.searching import acdc, greedy, refine, top

__all__ = [
    "Checked",
    "Comparison",
    "Discovery",
    "Edge",
    "EdgeGraph",
    "EdgeScores",
    "Evaluation",
    "Runs",
    "acdc",
    "check_scores",
    "compare_circuits",
    "discover",
    "edge_graph",
    "edges_of",
    "evaluate",
    "greedy",
    "refine",
    "score_edges",
    "strongest",
    "top",
]
