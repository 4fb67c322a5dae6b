"""Which commands there are, and in which module each is found when it is called.

Loading all of them takes seconds (torch, scikit-learn, altair), so that `circuits --help` shows this table and
loads none. tests/test_start.py holds each line to the help of the command itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group


@dataclass(frozen=True)
class Entry:
    """A command, or a group of commands.

    Attributes:
        name: as it is typed.
        module: of `circuits.cli`; its `app` holds the command, or is the group.
        about: its help in a line.
        panel: under which heading it is listed.
        group: whether it is a group.
    """

    name: str
    module: str
    about: str
    panel: str
    group: bool

    def load(self) -> Any:
        """The command itself, ready to be run."""
        app: typer.Typer = import_module(f"circuits.cli.{self.module}").app
        group = get_group(app)
        return group if self.group else group.commands[self.name]


_GROUPS = ("edit", "sae", "store", "graph", "jobs", "claim")

_TABLE = {
    "Start here": (
        ("demo", "serving", "Build a demo workspace from the built-in models (works offline) and open the app on it."),
        ("app", "serving", "Start the app on a workspace."),
        ("models", "models", "List the models that can be loaded."),
        ("fetch", "models", "Get a published language model into the workspace: download, check and convert its weights, once."),
        ("sites", "models", "List a model's sites: the places where its tensors can be read and changed."),
        ("harvest", "harvesting", "Record unit activations on every example of a dataset. Run it again to resume."),
    ),
    "Look at units and their weights": (
        ("visualize", "pictures", "Make a feature visualization: an image (or embeddings) that excites a unit most."),
        ("examples", "tuning", "Show dataset examples across a unit's activation range, and how common each part is."),
        ("tune", "tuning", "Show tuning curves: how units respond as a drawn shape is rotated, bent or restyled."),
        ("weights", "weights", "Show the strongest weights into and out of a unit."),
        ("expand", "weights", "Show expanded weights (site to unit, through all layers between) and shuffled ones."),
        ("families", "families", "Find units that are rotated, mirrored, scaled or hue-shifted copies of each other."),
        ("basis", "families", "Test whether a site's units are a privileged basis: a higher kurtosis than random directions have."),
        ("heads", "texts", "Find previous-token, duplicate-token and induction heads on random repeated tokens."),
        (
            "attention", "texts",
            "Show attention patterns of heads on a text, raw and weighted by value norms, or over an image.",
        ),
    ),
    "Find what carries a behaviour": (
        ("ablate", "ablating", "Ablate units and show what changes, compared with random, equally active units."),
        ("attribute", "attributing", "Show which units of a site are responsible for a decision or for another unit's activation."),
        ("saliency", "saliency", "Show which pixels are responsible for a decision or for a unit's activation."),
        ("sanity", "saliency", "Test whether saliency methods depend on what the model learned: a card for each."),
        ("patch", "patching", "Find which sites, heads or positions carry a task, by activation patching."),
        ("paths", "patching", "Find which direct paths of a transformer carry a task, by path patching."),
        ("keep", "patching", "Keep only some units, ablate all others, and show how well a task is still done."),
        ("lens", "patching", "Show what a transformer would predict if it stopped at each depth (logit lens)."),
        ("probe", "patching", "Show where a label can be read off by linear probes, tested on held-out examples."),
    ),
    "Find circuits": (
        ("discover", "discovering", "Find the circuit of a task: score edges, search on one half of the examples, evaluate on the other."),
        ("evaluate", "discovering", "Measure how much of a behaviour a circuit carries, on the test half of a task, against random circuits."),
        ("compare", "discovering", "Compare two saved circuits (by name), a circuit over tasks, or over models: what is shared, what changed."),
    ),
    "Make claims and test them": (
        ("verify", "verifying", "Test the claims of a file and say what stands."),
        ("claim", "claims", "Write a claim file from a saved circuit or a recipe, and list the tests that could refute claims."),
    ),
    "Edit, name and rebuild": (
        ("edit", "editing", "Write recipes of edits, measure them, and keep edits in a ledger with undo and redo."),
        ("generate", "texts", "Continue texts with the unedited model and, with --edit, with the edited model too."),
        ("sae", "autoencoders", "Train sparse autoencoders, measure them, and name their latents."),
        ("case", "cases", "Run a case study and report its evidence as numbers and as a page. Run it again to resume."),
    ),
    "Manage the workspace": (
        ("store", "stores", "List, inspect, verify, export and delete activation stores."),
        ("graph", "graphs", "Store all weights of a model as a graph, and look for circuits in it."),
        ("publish", "publishing", "Write a static site of units, circuits and cases, which opens from a disk and from any web server."),
        ("jobs", "jobs", "Start, list and cancel work that runs in the background."),
    ),
}  # fmt: skip

ENTRIES = {
    name: Entry(name, module, about, panel, name in _GROUPS)
    for panel, rows in _TABLE.items()
    for name, module, about in rows
}


class Commands(TyperGroup):
    """The group `circuits`: lists commands by `ENTRIES`, and loads the one that is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {
            e.name: TyperCommand(name=e.name, help=e.about, rich_help_panel=e.panel)
            for e in ENTRIES.values()
        }

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else ENTRIES[name].load(), rest
