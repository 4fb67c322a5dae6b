"""The options that say between which parts of a model edges lead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from circuits.cli.signatures import Within, option
from circuits.discovery.building import chosen_latents, edge_graph, parse_sites
from circuits.discovery.graphs import LIMIT, Edge, EdgeGraph
from circuits.discovery.groups import parse_groups
from circuits.discovery.streams import KeysValues
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tasks import Task


@dataclass(frozen=True)
class Grain:
    """Which parts of a model edges lead between."""

    heading: ClassVar = "Parts"

    sites: Annotated[str, option(
        "Of a convolutional network: the sites between whose channels edges are wanted, in order, separated by commas; "
        "SITE:1,2,5-9 for some channels."
    )] = ""  # fmt: skip
    kv: Annotated[KeysValues, option(
        "Of a transformer: whether keys and values that heads share are one target for their group, or one a head."
    )] = "group"  # fmt: skip
    spans: Annotated[str, option(
        "Of a transformer: spans of positions whose edges are patched apart, separated by commas: ranges from 0 "
        "(0,1-4,5-; negative numbers count from the end), names that the task gives to parts of its texts, and rest."
    )] = ""  # fmt: skip
    neurons: Annotated[str, option(
        "Of a transformer: the layers whose MLPs are split into neurons, such as 3,5-7, or all."
    )] = ""  # fmt: skip
    neuron_targets: Annotated[str, option(
        "Of a transformer: the layers whose MLPs are targets neuron by neuron, such as 3,5-7, or all."
    )] = ""  # fmt: skip
    latents: Annotated[str, option(
        "Of a transformer with autoencoders (MODEL+sae/NAME): split what they code into latents and the error: active "
        "(the latents that are active on the task), all, or some, such as sae/NAME:1,2,5-9."
    )] = ""  # fmt: skip
    groups: Annotated[str, option(
        "Of a convolutional network: channels that are one node together, such as families: NAME=SITE:1,2,5-9, with ; "
        "between groups, or a .json file that `circuits families --json` wrote."
    )] = ""  # fmt: skip
    offsets: Annotated[bool, option(
        "Of a convolutional network: make each offset of a kernel an edge of its own (SITE:INDEX@y-1x+0 reads the "
        "source one pixel higher).", "--offsets"
    )] = False  # fmt: skip
    most_edges: Annotated[int, option(
        "The most edges that the graph may have. Each takes 8 bytes an example, and of channels 32 in a batch; where "
        "there are more than by default, gradient scores are written to files (in the workspace with --save, else "
        "temporary): 4 bytes of disk an example, and about 110 of memory.",
        check=Within(1, 10**8),
    )] = LIMIT  # fmt: skip

    def graph(
        self, model: HookedModel, task: Task | None = None, edges: tuple[Edge, ...] = ()
    ) -> EdgeGraph:
        """The graph of a model.

        Args:
            model: the model.
            task: the task on which latents are active.
            edges: edges that are to be in it, such as those of a saved circuit: their latents count as active.

        Raises:
            KeyError, ValueError: see `edge_graph` and `chosen_latents`.
        """
        latents = chosen_latents(model, self.latents, task, edges) if self.latents else ()
        return edge_graph(
            model, parse_sites(self.sites), self.kv, spans=self.spans, neurons=self.neurons,
            neuron_targets=self.neuron_targets, latents=latents,
            groups=parse_groups(self.groups) if self.groups else {}, offsets=self.offsets, limit=self.most_edges,
        )  # fmt: skip
