"""`circuits sae …`: autoencoders of a model's activations."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from typer import Typer

from circuits import sae as library
from circuits.autoencoders import FILE, About, Autoencoder, load_autoencoder, save_autoencoder
from circuits.autoencoders.autoencoder import autoencoders_table
from circuits.autoencoders.layouts import Layout, export_autoencoder, import_autoencoder
from circuits.checks import whole
from circuits.cli import options
from circuits.cli.choosing import labels_of, readable
from circuits.cli.latents import bottleneck, name_latents
from circuits.cli.output import leads, note, progress_bar, say, tell, warn
from circuits.cli.signatures import Within, argument, command, option
from circuits.examples import LIMIT, Examples
from circuits.files import check_inside
from circuits.locks import held
from circuits.models.adapter.attaching import check_name
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import find_autoencoder, list_autoencoders
from circuits.sae import (
    Hyperparameters,
    RowFilter,
    Schedule,
    TrainingProgress,
)
from circuits.sae.batches import RowSource, rows_of
from circuits.sae.learners import Architecture
from circuits.sae.training import LOCK, Precision, Report
from circuits.stimuli.accounts import account, left_out
from circuits.stimuli.sources import Source, open_source
from circuits.store.reading import newest_store
from circuits.workspace import Workspace

app = Typer(
    help="Train sparse autoencoders, measure them, and name their latents.", no_args_is_help=True
)

BY_COUNT = ("topk", "batchtopk", "matryoshka")
"""Architectures whose sparsity is a number of active latents."""

LATENTS, ACTIVE = 8, 32
"""Latents for each number of a row, and how many are active in a row, when nobody says."""


# --- training --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variants:
    """Which autoencoders are trained, together, from the same rows."""

    heading: ClassVar = "Which autoencoders"

    architecture: Annotated[Architecture, option(
        "The architecture. topk, batchtopk and matryoshka fix the number of active latents (--k); relu, gated and "
        "jumprelu have a sparsity penalty in the loss (--sparsity)."
    )] = "topk"  # fmt: skip
    latents: Annotated[list[int] | None, option(
        "The number of latents; may be repeated to train several sizes.", check=Within(1)
    )] = None  # fmt: skip
    expansion: Annotated[int, option(
        "Without --latents: the number of latents per dimension of the activations.", check=Within(1)
    )] = LATENTS  # fmt: skip
    k: Annotated[list[int] | None, option(
        f"How many latents are active in a row; may be repeated to train several. By default {ACTIVE}.", "--k",
        check=Within(1),
    )] = None  # fmt: skip
    sparsity: Annotated[list[float] | None, option(
        "The coefficient of the sparsity penalty in the loss, for rows scaled to a variance of 1 a unit; may be "
        "repeated to train several. By default 1.", check=Within(0, 1e6)
    )] = None  # fmt: skip
    seeds: Annotated[str, option(
        "The initialisation seeds, separated by commas: one autoencoder is trained from each."
    )] = "0"  # fmt: skip
    skip: Annotated[bool, option(
        "With --target: add a linear skip connection from SITE to --target.", "--skip"
    )] = False  # fmt: skip
    lr: Annotated[
        float | None,
        option(
            "The learning rate. By default 2e-4 / sqrt(latents / 2^14).", check=Within(1e-12, 1)
        ),
    ] = None
    bias: Annotated[Literal["mean", "median"], option(
        "What the decoder's bias is initialised to: the mean or the geometric median of the rows."
    )] = "mean"  # fmt: skip

    def __post_init__(self) -> None:
        given = {"--latents": self.latents, "--k": self.k, "--sparsity": self.sparsity}
        for name, values in given.items():
            if values and len(set(values)) < len(values):
                raise ValueError(f"{name} {' '.join(map(str, values))}: expected different ones")
        by_count = self.architecture in BY_COUNT
        if self.k and not by_count:
            raise ValueError(
                f"--k {self.k[0]} goes with topk, batchtopk and matryoshka, not {self.architecture}"
            )
        if self.sparsity and by_count:
            raise ValueError(
                f"--sparsity {self.sparsity[0]:g} goes with relu, gated and jumprelu, not {self.architecture}"
            )

    def settings(self, width: int) -> Hyperparameters | Mapping[str, Hyperparameters]:
        """As the library takes them, for rows of `width` numbers."""
        found = [
            Hyperparameters(
                self.architecture, n, k=k, sparsity=sparsity, lr=self.lr, bias=self.bias, skip=self.skip, seed=seed
            )
            for n in self.latents or [self.expansion * width]
            for k in self.k or [ACTIVE]
            for sparsity in self.sparsity or [1.0]
            for seed in _seeds(self.seeds)
        ]  # fmt: skip
        return found[0] if len(found) == 1 else {s.label(): s for s in found}


def _seeds(text: str) -> list[int]:
    parts = [whole(part.strip()) for part in text.split(",") if part.strip()]
    found = [part for part in parts if part is not None and 0 <= part < 2**32]
    if not found or len(set(found)) < len(parts):
        raise ValueError(f"--seeds {text!r} is not a list of different whole numbers, e.g. 0,1,2")
    return found


@dataclass(frozen=True)
class Training:
    """On which rows, and for how long."""

    heading: ClassVar = "Training"

    steps: Annotated[
        int, option("The number of training steps, of one batch each.", check=Within(1))
    ] = 2000
    batch: Annotated[
        int, option("The number of rows (activation vectors) in a batch.", check=Within(1))
    ] = 4096
    hold_out: Annotated[float, option(
        "The fraction of the examples that is held out for evaluation.", check=Within(0, 0.9999)
    )] = 0.1  # fmt: skip
    leave_first: Annotated[int | None, option(
        "How many tokens to leave out at the start of each text. By default 1.", check=Within(0)
    )] = None  # fmt: skip
    norms: Annotated[float, option(
        "Leave out rows whose norm is more than this many times the median; 0 leaves none out.", check=Within(0, 1e6)
    )] = 10.0  # fmt: skip
    precision: Annotated[Precision, option("The precision of the encoder's matrix product.")] = (
        "float32"
    )
    live: Annotated[bool, option(
        "Run the model to get activations. By default those of a harvest are used, if there is one.", "--live"
    )] = False  # fmt: skip
    every: Annotated[float, option("Seconds between checkpoints.", check=Within(0, 1e6))] = 60.0
    overwrite: Annotated[bool, option(
        "Start over, and overwrite what is there.", "--overwrite"
    )] = False  # fmt: skip
    seed: options.Seed = 0

    def rule(self, rows: RowSource, site: str) -> RowFilter:
        """Which rows are left out."""
        if self.leave_first is not None and not rows.tokens:
            raise ValueError(
                f"--leave-first {self.leave_first}: rows of site {site!r} are no positions of texts"
            )
        usual = 1 if rows.tokens else 0
        first = usual if self.leave_first is None else self.leave_first
        return RowFilter(first, self.norms, self.hold_out)


@command(app)
def train(
    model: options.Model,
    site: Annotated[str, argument("The site whose activations the autoencoder reads.")],
    name: Annotated[str, option("The autoencoder's name: letters, digits, _ and -.")],
    data: Annotated[str, option(
        "The dataset (see `circuits harvest`). If it was harvested with --full SITE, the harvest is used."
    )],
    variants: Variants,
    training: Training,
    output: options.Output,
    target: Annotated[str, option(
        "Train a transcoder, which predicts the activations of this site from those of SITE. By default SITE itself: "
        "an autoencoder."
    )] = "",
) -> None:  # fmt: skip
    """Train autoencoders on a site. Run it again to resume.

    Several sizes, sparsities and seeds are trained together, in one pass over the rows (activation vectors).
    """
    place = model.place.writable()
    check_name(name)
    if training.overwrite:
        check_inside(place.autoencoder_path(name), place.root)
    loaded = model.load()
    goal = loaded.site(target).name if target else None
    source = open_source(data)
    rows = _rows(place, loaded, loaded.site(site).name, goal, source, training.live)
    settings = variants.settings(int(rows.about["width"]))
    rule = training.rule(rows, site)
    schedule = Schedule(
        training.steps, training.batch, seed=training.seed, precision=training.precision
    )
    with _training_bar(f"train {name}", output.json) as report:
        made = library.train(
            rows, settings, schedule, place.autoencoder_path(name), rule=rule, every=training.every,
            overwrite=training.overwrite, report=report,
        )  # fmt: skip
    model.register(loaded)
    paths = {f"{name}/{variant}" if variant else name: code for variant, code in made.items()}
    path, code = next(iter(paths.items()))
    hint = f"latents are units: circuits harvest {model.spec}+sae/{path} --data {data} --sites sae/{code.about.name}"
    n, skipped = len(source) - len(rows.skipped), dict(rows.skipped)
    if told := account(source, n, "all that can be read", skipped):
        note(told)
    facts = {
        c.about.name: c.describe() | {"skipped": skipped, "left_out": left_out(source)}
        for c in made.values()
    }
    output.show(facts, [autoencoders_table(paths), hint])


def _rows(
    place: Workspace, model: HookedModel, site: str, target: str | None, source: Source, live: bool = False
) -> RowSource:  # fmt: skip
    """Rows of a harvest, if there is one at full depth; else of the model as it runs."""
    folders = [] if live else place.store_folders(model.hash)
    store = newest_store(folders, model.hash, site, source.spec)
    return rows_of(model, site, target, source, store)


@contextmanager
def _training_bar(what: str, quiet: bool) -> Iterator[Report]:
    """A progress bar; every tenth of the training it also says how good the autoencoders are."""
    told = -1
    with progress_bar(what, quiet) as move:

        def report(progress: TrainingProgress) -> None:
            nonlocal told
            tenth = progress.step * 10 // progress.steps
            if not quiet and tenth > told and leads():
                told = tenth
                tell(str(progress))
            move(progress.step, progress.steps)

        yield report


# --- looking at them -------------------------------------------------------------------------------


@command(app, "ls")
def ls(output: options.Output, workspace: options.WorkspaceFolder = None) -> None:
    """List the autoencoders of a workspace."""
    found: dict[str, Autoencoder] = {}
    for name, path in list_autoencoders(Workspace.default(workspace)).items():
        try:
            found[name] = load_autoencoder(path)
        except ValueError as error:
            warn(str(error))
    output.show(
        {name: code.describe() for name, code in found.items()}, [autoencoders_table(found)]
    )


@command(app, "eval")
def evaluate(
    sae: options.Sae,
    output: options.Output,
    data: options.TrainingData = "",
    labels: options.Labels = "",
    limit: options.Limit = LIMIT,
    take: options.Take = "spread",
    examples: Annotated[Literal["unseen", "all"], option(
        "The examples on which the model's behaviour is measured: those that were held out of training, or all."
    )] = "unseen",
    rows: Annotated[int, option(
        "The number of rows on which reconstruction is measured.", check=Within(2)
    )] = 65536,
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """How well codes describe rows, and what the model does with them, compared with nulls.

    What is found of an autoencoder of the workspace is kept with it: the app shows it.
    """
    place, code = sae.place, sae.load()
    file = find_autoencoder(sae.sae, place)
    file = file / FILE if file.is_dir() else file
    kept = file.resolve() in [path.resolve() for path in list_autoencoders(place).values()]
    if kept and not os.access(file.parent, os.W_OK):
        warn(f"what is found is shown and not kept: {str(file.parent)!r} is read-only")
        kept = False
    data = options.training_data(code, data)
    loaded = sae.load_model(code)
    source = open_source(data)
    target = code.about.target if code.about.target != code.about.site else None
    known = labels_of(loaded, source, labels) if labels else None
    among = library.unseen(code, source) if examples == "unseen" else None
    which = "held out of training" if among else ""
    if examples == "all":
        which = "those of the training too"
    taken = readable(
        Examples(loaded, source, limit, how=take, seed=seed, labels=known, among=among)
    )
    read = _rows(place, loaded, code.about.site, target, source)
    measured = library.reconstruction(code, read, rows=rows, seed=seed)
    behaved = library.behaviour(loaded, code, taken, seed=seed)
    found = library.as_evaluation(measured, behaved, which)
    if kept:
        library.save_evaluation(file, found)
    if not output.json:
        for name, m in behaved.measures.items():
            if m.warning:
                warn(f"{name}: {m.warning}")
    title = f"{code.about.name}: {code.n_latents} latents of {code.about.site}"
    tables = [*measured.tables(title), *behaved.tables(which)]
    output.show({"name": code.about.name, **found}, tables)


@command(app)
def compare(
    saes: Annotated[list[str], argument("The names of autoencoders; a run of several stands for all of its variants.")],
    output: options.Output,
    workspace: options.WorkspaceFolder = None,
    seed: options.Seed = 0,
) -> None:  # fmt: skip
    """Match the directions of autoencoders one to one: what another seed finds too."""
    place = Workspace.default(workspace)
    names = [variant for name in saes for variant in _variants(place, name)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"autoencoder {twice[0]!r} is named twice: expected different ones")
    codes = {name: load_autoencoder(find_autoencoder(name, place)) for name in names}
    found = library.stability(codes, seed)
    output.show(found, found.tables())


def _variants(place: Workspace, name: str) -> Sequence[str]:
    folder = place.autoencoder_path(name)
    several = sorted(p.stem for p in folder.glob("*.safetensors")) if folder.is_dir() else []
    return [f"{name}/{s}" for s in several if s not in ("sae", "checkpoint")] or [name]


command(app, "name")(name_latents)
command(app)(bottleneck)


# --- from and for other tools ----------------------------------------------------------------------


@command(app, "export")
def export_code(
    sae: Annotated[str, argument("The autoencoder: its name in the workspace, or a path to it.")],
    folder: Annotated[Path, argument("The folder to write: a new or an empty one.")],
    layout: Annotated[Layout, option("The tool that is to read the files.")] = "saelens",
    workspace: options.WorkspaceFolder = None,
) -> None:
    """Write an autoencoder as another tool reads it."""
    code = load_autoencoder(find_autoencoder(sae, Workspace.default(workspace)))
    say(f"written to {export_autoencoder(code, folder, layout)}")


@command(app, "import")
def import_code(
    folder: Annotated[Path, argument("A folder of SAELens, dictionary_learning or sparsify.")],
    name: Annotated[str, option("The name that the autoencoder gets here.")],
    model: Annotated[str, option("The model that it belongs to.")],
    site: Annotated[str, option("The site whose activations it encodes. By default what its files say.")] = "",
    target: Annotated[str, option("Of a transcoder: the site that it writes. By default what its files say.")] = "",
    weights: options.Weights = None,
    workspace: options.WorkspaceFolder = None,
) -> None:  # fmt: skip
    """Read another tool's autoencoder into the workspace."""
    owner = options.Model(model, weights, workspace)
    place = owner.place.writable()
    path = place.autoencoder_path(check_name(name)) / FILE
    with _new(path.parent, name):
        loaded = owner.load()
        code = import_autoencoder(folder, About(name))
        source = site or code.about.site
        if not source:
            raise ValueError(
                f"folder {str(folder)!r} does not say whose activations it encodes: name the site with --site"
            )
        said = code.about.target if code.about.target != code.about.site else ""
        read, written = loaded.site(source).name, loaded.site(target or said or source).name
        code.about = replace(
            code.about,
            name=name,
            site=read,
            target=written,
            model=loaded.name,
            model_hash=loaded.hash,
        )
        options.attached(loaded, code)  # whether it fits
        save_autoencoder(code, path)
    owner.register(loaded)
    say(f"{code.n_latents} latents of {read} as sae/{name}: written to {path}")


@contextmanager
def _new(place: Path, name: str) -> Iterator[None]:
    """Hold the folder of a name that no autoencoder has yet; removed at the end if nothing was written.

    Raises:
        BlockingIOError: if another process writes one of that name.
        FileExistsError: if there is one.
    """
    place.mkdir(parents=True, exist_ok=True)
    with held(place / LOCK, f"--name {name}: another process is writing it", tidy=True):
        if any(not file.name.startswith(LOCK) for file in place.iterdir()):
            raise FileExistsError(f"--name {name}: the workspace has an autoencoder of that name")
        yield
