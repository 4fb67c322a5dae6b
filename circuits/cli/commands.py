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


_GROUPS = ("edit", "sae", "store", "graph", "jobs")

_TABLE = {
    "Begin here": (
        ("demo", "serving", "Build the workspace of the built-in models, without a network, and open the app on it."),
        ("app", "serving", "Start the app on a workspace."),
        ("models", "models", "List the models that can be loaded."),
        ("sites", "models", "List a model's sites: the places where its tensors can be read and changed."),
        ("harvest", "harvesting", "Record what units do on every example of a dataset. Run it again to resume."),
    ),
    "Look at units and their weights": (
        ("visualize", "pictures", "Make the image that excites a unit most or, for a language model, the embeddings that do."),
        ("examples", "tuning", "Show examples from a unit's whole range of activation, and how often each part of it occurs."),
        ("tune", "tuning", "Show how units respond as a drawn shape is turned, bent or painted differently."),
        ("weights", "weights", "Show the strongest weights into and out of a unit."),
        ("expand", "weights", "Show a site's weights on a unit through everything between them, next to shuffled weights."),
        ("families", "families", "Find groups of units that are one unit turned, mirrored, scaled or hue-shifted, and save them."),
        ("heads", "texts", "Find previous-token, duplicate-token and induction heads on random repeated tokens."),
        ("attention", "texts", "Show where heads attend in a text, raw and weighted by the length of the values."),
    ),
    "Find what carries a behaviour": (
        ("ablate", "ablating", "Ablate units and show what changes, compared with random units that are as active."),
        ("attribute", "attributing", "Show which units of a site are responsible for a decision or for another unit's activation."),
        ("saliency", "saliency", "Show which pixels are responsible for a decision or for a unit's activation."),
        ("sanity", "saliency", "Test whether attribution methods depend on what this model has learned: a card for each."),
        ("patch", "patching", "Patch sites, heads or positions from the other run of each pair: which of them carry a task?"),
        ("paths", "patching", "Patch direct paths of a transformer from the other run of each pair: what reads what for a task?"),
        ("keep", "patching", "Keep only some units, replace everything else, and show how much of a task is left."),
        ("lens", "patching", "Show what a transformer would answer if it stopped at each depth (logit lens)."),
        ("probe", "patching", "Show where a label can be read off linearly, on held-out examples."),
    ),
    "Edit, name and rebuild": (
        ("edit", "editing", "Edit circuits: recipes, what they do, and a ledger in which everything can be undone."),
        ("generate", "texts", "Continue texts with the model as it is and, with --edit, as it is edited."),
        ("sae", "autoencoders", "Train sparse autoencoders, measure them, and name their latents."),
        ("case", "cases", "Run a case study: all of its evidence, as numbers and as one page. Finished stages are kept."),
    ),
    "Look after the workspace": (
        ("store", "stores", "Look after activation stores."),
        ("graph", "graphs", "Store all weights of a model as a graph, and look for circuits in it."),
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
