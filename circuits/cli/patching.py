"""`circuits patch`, `paths`, `keep`, `lens` and `probe`."""

from __future__ import annotations

from typing import Annotated

from typer import Typer

from circuits import localization
from circuits.cli import options
from circuits.cli.signatures import Within, argument, command, option
from circuits.experiments import N_RANDOM
from circuits.localization.cells import By
from circuits.localization.classifiers import Method
from circuits.localization.lens import Norm
from circuits.localization.patching import Directions
from circuits.localization.probing import Labels
from circuits.localization.subsets import Outside
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tasks import Task

app = Typer()

Sites = Annotated[str, option(
    "The sites, separated by commas: names, patterns (blocks.*.hook_mlp_out) or endings of names (resid_pre, z, "
    "attn_out). By default every site that suits the command."
)]  # fmt: skip
At = Annotated[str, option(
    "The positions to look at, separated by commas: indices (3,-1), names of the task's spans, or `spans` for all "
    "spans. By default every position."
)]  # fmt: skip
Pairs = Annotated[int, option(
    "As a control, also patch each place from this many other pairs, drawn at random.", check=Within(0)
)]  # fmt: skip
Direction = Annotated[Directions, option(
    "Which run to patch: the clean one, from the corrupted one (noising), the corrupted one, from the clean one "
    "(denoising), or each in turn (both)."
)]  # fmt: skip


@command(app)
def patch(
    model: options.Model,
    task: options.PairsTask,
    output: options.FigureOutput,
    sites: Sites = "",
    by: Annotated[By, option(
        "What to patch at a time: a whole site, one position of it, one head, one head at one position, or one unit."
    )] = "position",
    at: At = "",
    direction: Direction = "both",
    random: Pairs = 1,
    top: options.Top = options.TOP,
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Find which sites, heads or positions carry a task, by activation patching."""
    loaded = model.load()
    asked = task.compile(loaded, seed)
    with output.progress("patch") as progress:
        grid = localization.patch_grid(
            loaded, asked, sites or None, by=by, positions=at or None, direction=direction, n_random=random, seed=seed,
            progress=progress,
        )  # fmt: skip
    output.draw(lambda figures: figures.patch_grid_figure(grid))
    output.show(grid, grid.tables(top))


@command(app)
def paths(
    model: options.Model,
    task: options.PairsTask,
    output: options.FigureOutput,
    path: Annotated[list[str] | None, argument(
        "Direct paths, written SENDER,RECEIVER, e.g. 0.3,1.0.k or mlp:0,logits. By default every path."
    )] = None,
    heads: Annotated[str, option(
        "Instead of paths, show the total, direct and indirect effects of these heads: LAYER.HEAD, separated by "
        "commas, or `all`."
    )] = "",
    through_mlps: Annotated[bool, option(
        "Recompute the MLPs between the two ends of a path. By default they are frozen, as the attention heads "
        "always are.", "--through-mlps"
    )] = False,
    direction: Direction = "noising",
    random: Pairs = 1,
    top: options.Top = options.TOP,
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Find which direct paths of a transformer carry a task, by path patching."""
    if heads and (path or through_mlps):
        raise ValueError("--heads does not go with paths or --through-mlps")
    pairs = [_path(text) for text in path] if path else None
    loaded = model.load()
    asked = task.compile(loaded, seed)
    if heads:
        _heads(loaded, asked, heads, direction, random, top, seed, output)
        return
    with output.progress("paths") as progress:
        grid = localization.path_grid(
            loaded, asked, pairs, direction=direction, through_mlps=through_mlps, n_random=random, seed=seed,
            progress=progress,
        )  # fmt: skip
    output.draw(lambda figures: figures.patch_grid_figure(grid))
    output.show(grid, grid.tables(top))


def _path(text: str) -> tuple[str, str]:
    """A path in words."""
    sender, comma, receiver = text.partition(",")
    if not (sender and comma and receiver):
        raise ValueError(f"path {text!r} is not of the form SENDER,RECEIVER, such as 0.3,1.0.k")
    return sender.strip(), receiver.strip()


def _heads(
    model: HookedModel, task: Task, heads: str, direction: Directions, random: int, top: int, seed: int,
    output: options.FigureOutput,
) -> None:  # fmt: skip
    if direction == "both":
        raise ValueError("--heads goes with one --direction: noising or denoising")
    named = None if heads == "all" else heads.split(",")
    with output.progress("heads") as progress:
        found = localization.head_effects(
            model, task, named, direction=direction, n_random=random, seed=seed, progress=progress
        )
    output.draw(lambda figures: figures.head_effects_figure(found))
    output.show(found, found.tables(top))


@command(app)
def keep(
    model: options.Model,
    units: Annotated[str, argument(
        "What to keep: SITE:1,2,5-9, whole sites (hook_embed) or endings of names (mlp_out), separated by spaces and "
        "in quotes."
    )],
    task: options.AnsweredTask,
    output: options.FigureOutput,
    sites: Sites = "",
    how: Annotated[Outside, option(
        "What to replace everything else with: its activation on the example's counterpart, its mean over the "
        "examples (position_mean: separately at each position), or zero."
    )] = "counterpart",
    random: options.Random = N_RANDOM,
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Keep only some units, ablate all others, and show how well a task is still done."""
    if not units.strip():
        raise ValueError("UNITS is empty: expected what to keep, e.g. blocks.0.attn.hook_z:3")
    loaded = model.load()
    asked = task.compile(loaded, seed)
    with output.progress("keep") as progress:
        found = localization.sufficiency(
            loaded, units.split(), asked, sites or None, how=how, n_random=random, seed=seed, progress=progress
        )  # fmt: skip
    output.draw(lambda figures: figures.sufficiency_figure(found))
    output.show(found, found.tables())


@command(app)
def lens(
    model: options.Model,
    task: options.AnsweredTask,
    output: options.FigureOutput,
    tokens: Annotated[bool, option(
        "Instead, show the most probable next token at each depth and position of --text.", "--tokens"
    )] = False,
    held: Annotated[bool, option(
        "Freeze the scale of the final normalisation at its value after the last layer, so that the layers' "
        "contributions add up. By default it is recomputed at each depth.", "--held",
    )] = False,
    middle: Annotated[bool, option("Also stop between attention and MLP in each layer.", "--middle")] = False,
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Show what a transformer would predict if it stopped at each depth (logit lens)."""
    loaded = model.load()
    norm: Norm = "held" if held else "own"
    if tokens:
        if not task.text:
            raise ValueError("--tokens needs a text (--text)")
        options.say_if_cut(loaded, task.text)
        words = localization.lens_tokens(loaded, task.text, norm=norm, middle=middle)
        output.draw(lambda figures: figures.lens_tokens_figure(words))
        output.show(words, words.tables())
        return
    asked = task.compile(loaded, seed)
    with output.progress("lens") as progress:
        found = localization.logit_lens(
            loaded, asked, norm=norm, middle=middle, seed=seed, progress=progress
        )
    output.draw(lambda figures: figures.lens_figure(found))
    output.show(found, found.tables())


@command(app)
def probe(
    model: options.Model,
    task: options.PairsTask,
    output: options.FigureOutput,
    method: Annotated[Method, option(
        "How the direction is found: as the difference of the classes' means (contrastive directions), or by logistic "
        "regression."
    )] = "logistic",
    sites: Sites = "",
    at: At = "",
    labels: Annotated[Labels, option(
        "The label to predict: whether a text is an example or its counterpart (pair), its answer, or its template."
    )] = "pair",
    steer: Annotated[float, option(
        "Also add this multiple of the direction to the corrupted run, between -1e6 and 1e6; 0 turns this off.",
        check=Within(-1_000_000, 1_000_000),
    )] = 0.0,
    random: options.Random = N_RANDOM,
    top: options.Top = options.TOP,
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Show where a label can be read off by linear probes, tested on held-out examples."""
    loaded = model.load()
    asked = task.compile(loaded, seed)
    read = (
        localization.contrastive_directions if method == "mean_difference" else localization.linear_probes
    )  # fmt: skip
    with output.progress("probe") as progress:
        found = read(
            loaded, asked, sites or None, labels=labels, positions=at or None, n_random=random, seed=seed,
            progress=progress,
        )  # fmt: skip
    steered = []
    if steer:
        with output.progress("steer") as progress:
            grid = localization.steering_grid(
                loaded,
                asked,
                found,
                amount=steer,
                direction="denoising",
                seed=seed,
                progress=progress,
            )
        steered = grid.effects("denoising")
    output.draw(lambda figures: figures.readout_figure(found))
    moved = [{"share": e.normalised, "null": e.null, "p_value": e.p_value} for e in steered]
    output.show(found.to_dict() | ({"steered": moved} if steer else {}), found.tables(top, steered))
