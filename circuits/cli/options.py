"""The options that commands share: each is defined once, alone or in a group with what it is good for.

A group is a frozen dataclass; `circuits.cli.signatures.command` makes typer read its fields as options. Here are the
groups: where results are kept, the model, examples, the task, an autoencoder, and how a result is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

from circuits.autoencoders import Autoencoder, load_autoencoder
from circuits.cli.choosing import labels_of, readable, usual_data
from circuits.cli.output import note, progress_bar, say, show_json, show_table, warn
from circuits.cli.signatures import Within, argument, option
from circuits.examples import LIMIT, Examples, whole
from circuits.factories import from_file
from circuits.files import check_writable
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput, TokenInput
from circuits.models.zoo.converting import convert_gguf
from circuits.models.zoo.loading import find_autoencoder, load_model, record_of
from circuits.models.zoo.placement import Precision
from circuits.progress import Progress
from circuits.specs import split_attached
from circuits.stimuli.images import read_image
from circuits.stimuli.sources import Source, open_source
from circuits.tables import Table
from circuits.tasks import Task
from circuits.tasks.builtin import STATED, load_task
from circuits.tasks.images import Kind
from circuits.tasks.spec import TaskSpec
from circuits.workspace import ModelRecord, Workspace


def check_out(path: Path | None, *endings: str, option: str = "--out") -> None:
    """Raise if a file that is to be written at the end cannot be: before anything is computed."""
    if path is None:
        return
    if endings and path.suffix not in endings:
        raise ValueError(f"{option} {str(path)!r} must end in {', '.join(endings)}")
    if path.is_dir():
        raise ValueError(f"{option} {str(path)!r} is a folder: expected a file")
    check_writable(path.parent, "folder")


# --- one by one ------------------------------------------------------------------------------------

UnitArgument = Annotated[str, argument("The unit, written SITE:INDEX, e.g. mixed3b:335.")]
UnitsArgument = Annotated[str, argument(
    "Units, written SITE:1,2,5-9. A site alone stands for all of its units. To name units of several sites, separate "
    "them by spaces and put the whole in quotes."
)]  # fmt: skip
WorkspaceFolder = Annotated[Path | None, option(
    "The folder where results, harvests and autoencoders are stored and looked up. By default $CIRCUITS_WORKSPACE "
    "or, if that is not set, ./cache.", "--workspace"
)]  # fmt: skip
Weights = Annotated[Path | None, option(
    "A weights file for the model, .safetensors or .pt; untrained (or untrained:SEED) for random weights. By default "
    "the model's own weights.", "--weights"
)]  # fmt: skip
Device = Annotated[str | None, option(
    "The device that computes, e.g. cuda or cuda:1. By default the CPU.", "--device"
)]  # fmt: skip
Dtype = Annotated[Precision | None, option(
    "The type to give the model's numbers. By default that of its weights.", "--dtype"
)]  # fmt: skip
Data = Annotated[str, option(
    "The dataset: photos, crops, curves, shapes, repeats, folder:PATH (images), tokens:PATH (text), npz:PATH[:KEY], "
    "hf:PATH[:COLUMN], python:MODULE:FACTORY or FILE.py:FUNCTION.", "--data"
)]  # fmt: skip
HarvestedData = Annotated[str, option(
    "The dataset whose harvest is used. By default the newest harvest that has the site.", "--data"
)]  # fmt: skip
TrainingData = Annotated[str, option(
    "The dataset (see `circuits harvest`). By default the one that the autoencoder was trained on."
)]  # fmt: skip
Take = Annotated[Literal["spread", "first", "random"], option(
    "Which examples of the dataset: spread evenly over it, the first ones, or drawn at random by --seed.", "--take"
)]  # fmt: skip
Limit = Annotated[int, option(
    "How many examples of the dataset to take.", "--limit", check=Within(1, 10**6)
)]  # fmt: skip
LimitOrAll = Annotated[int | None, option(
    "How many examples of the dataset to take. By default all of them.", "--limit", check=Within(1, 10**6)
)]  # fmt: skip
Labels = Annotated[str, option(
    "The class of each image of --data: FILE.json, FILE.csv, FILE.npz[:KEY] (in order, or by the images' names or "
    "paths), or `names` to read classes from the images' names (their folders).",
    "--labels",
)]  # fmt: skip
Text = Annotated[str, option("One text instead of a dataset, for language models.", "--text")]
Seed = Annotated[int, option(
    "The random seed.", "--seed", check=Within(0, 2**32 - 1)
)]  # fmt: skip
Random = Annotated[int, option(
    "How many random variants (other units, random edits) to measure for the null distribution.", "--random",
    check=Within(0),
)]  # fmt: skip
TOP = 10
Top = Annotated[int, option(
    "How many units, edges or rows of each kind to list, strongest first.", "--top", check=Within(1)
)]  # fmt: skip
Note = Annotated[str, option("A note on why you do this, stored with the result.", "--note")]
Author = Annotated[
    str, option("The author to record. By default the user who runs the command.", "--author")
]
Batch = Annotated[int, option(
    "How many inputs (examples and variants of them) to run in one pass: fewer take less memory.", "--batch",
    check=Within(1),
)]  # fmt: skip
MethodOptions = Annotated[list[str] | None, option(
    "An option of the method, written NAME=VALUE, e.g. samples=20; may be repeated.", "--option"
)]  # fmt: skip
Target = Annotated[str, option(
    "What to explain: top (each example's most likely answer), class:NAME, token:WORD or a unit SITE:INDEX; add "
    "@POSITION for one position.", "--target"
)]  # fmt: skip
Subtracted = Annotated[str, option(
    "A class or token whose logit is subtracted from the target's. By default none.", "--against"
)]  # fmt: skip
Quantity = Annotated[Literal["activation", "probability", "log_probability"], option(
    "Which quantity of the target to explain: its activation (for a class or token, its logit), or its probability "
    "or log probability.", "--quantity"
)]  # fmt: skip
Force = Annotated[bool, option(
    "Accept recipes that were written for other weights, if they fit this model.", "--force"
)]  # fmt: skip


# --- where, and which model ------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model, and the workspace in which it is looked at."""

    heading: ClassVar = "Model and workspace"

    spec: Annotated[str, argument(
        "The model: one that `circuits models` lists, e.g. shapes or tl:gpt2.", metavar="MODEL"
    )]  # fmt: skip
    weights: Weights = None
    workspace: WorkspaceFolder = None
    device: Device = None
    dtype: Dtype = None

    @property
    def place(self) -> Workspace:
        """The workspace."""
        return Workspace.default(self.workspace)

    def load(self) -> HookedModel:
        """The model itself."""
        _convert(self.spec)
        loaded = load_model(self.spec, self.weights, device=self.device, dtype=self.dtype)
        if outdated := self.place.recognise(loaded.identity):
            warn(outdated)
        return loaded

    def record(self, model: HookedModel) -> ModelRecord:
        """How the workspace finds the model again."""
        return record_of(self.spec, self.weights, model.identity, self.dtype or "")

    def register(self, model: HookedModel) -> None:
        """Note in the workspace how the model is found again, if it does not know yet."""
        self.place.register(self.record(model), replace=False)


@dataclass(frozen=True)
class Sae:
    """A sparse autoencoder, and the model that it belongs to."""

    heading: ClassVar = "Model and workspace"

    sae: Annotated[str, argument(
        "The autoencoder: its name in the workspace (NAME or NAME/VARIANT), or a path to it."
    )]  # fmt: skip
    spec: Annotated[str, option(
        "The model that it belongs to. By default the one that the workspace knows.", "--model"
    )] = ""  # fmt: skip
    weights: Weights = None
    workspace: WorkspaceFolder = None
    device: Device = None
    dtype: Dtype = None

    @property
    def place(self) -> Workspace:
        """The workspace."""
        return Workspace.default(self.workspace)

    def load(self) -> Autoencoder:
        """The autoencoder itself."""
        code = load_autoencoder(find_autoencoder(self.sae, self.place))
        code.about = replace(code.about, model_hash=self.place.present_hash(code.about.model_hash))
        return code

    def load_model(self, code: Autoencoder) -> HookedModel:
        """The model that it belongs to, without the autoencoder.

        Raises:
            ValueError: if the workspace does not know it, or it has other weights.
        """
        record = self.known(code.about.model_hash)
        if record is None:
            raise ValueError(
                f"autoencoder {code.about.name!r} is of model {code.about.model or 'unknown'!r}, which this workspace "
                "does not know: name it with --model"
            )
        if not self.spec:
            from_file(
                "model", record.spec, f"workspace {str(self.place.root)!r}", "name it with --model"
            )
        loaded = load_model(
            record.spec, record.weights, device=self.device, dtype=record.dtype or None
        )
        if code.about.model_hash and not loaded.has_hash(code.about.model_hash):
            raise ValueError(
                f"--model {record.spec}: its hash is {loaded.hash[:16]}, autoencoder {code.about.name!r} is of "
                f"{code.about.model_hash[:16]}"
            )
        return loaded

    def known(self, model_hash: str) -> ModelRecord | None:
        """How the model is loaded: as it was named or, if it was not, as the workspace knows it; None if neither."""
        if self.spec:
            return ModelRecord(self.spec, model_hash, _text(self.weights), dtype=self.dtype or "")
        found = next((r for r in self.place.models() if r.hash == model_hash), None)
        return found if found is None or not self.dtype else replace(found, dtype=self.dtype)


def _convert(spec: str) -> None:
    """Convert the file of a model `gguf:PATH` before it is loaded, with a bar, unless that was done."""
    path, *_ = split_attached(spec)
    if path.startswith("gguf:") and path != "gguf:":
        with progress_bar("convert to float32") as progress:
            convert_gguf(path, progress, note)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def attached(model: HookedModel, code: Autoencoder) -> HookedModel:
    """The model with the autoencoder in it."""
    about = code.about
    target = about.target if about.target != about.site else None
    return model.attach(code, about.name, about.site, target)


# --- examples --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """Some examples of a dataset."""

    heading: ClassVar = "Examples"

    data: Data = ""
    limit: Limit = LIMIT
    take: Take = "spread"

    def choose(self, model: HookedModel, seed: int) -> Examples:
        """The examples; without --data of photographs, or of repeated tokens."""
        data = self.data or usual_data(model)
        return readable(Examples(model, data, self.limit, how=self.take, seed=seed))


@dataclass(frozen=True)
class Images(Dataset):
    """Some examples of a dataset, or images by path."""

    image: Annotated[
        list[Path] | None, option("An image file instead of a dataset; may be repeated.")
    ] = None
    exact: Annotated[bool, option(
        "Refuse images that do not have the model's input size. By default they are fitted to it.", "--exact"
    )] = False  # fmt: skip

    def choose(self, model: HookedModel, seed: int) -> Examples:
        """The examples.

        Raises:
            FileNotFoundError: if an image does not exist.
            ValueError: if what is given does not fit the model, or does not go together.
        """
        if not self.image:
            return super().choose(model, seed)
        if self.data:
            raise ValueError(f"--data {self.data!r} does not go with --image or --text")
        if not isinstance(model.input, ImageInput):
            raise ValueError(
                f"--image {str(self.image[0])!r}: model {model.name} takes tokens: use --text or --data"
            )
        size, pictures = (
            (model.input.width, model.input.height),
            [read_image(p) for p in self.image],
        )
        for path, picture in zip(self.image, pictures, strict=True):
            if self.exact and picture.size != size:
                raise ValueError(
                    f"--image {str(path)!r} has {picture.width} x {picture.height} pixels: {model.name} takes "
                    f"{size[0]} x {size[1]} (leave out --exact to fit it)"
                )
        return Examples.pictures(model, pictures, [path.name for path in self.image])


@dataclass(frozen=True)
class Inputs(Images):
    """Some examples of a dataset, images by path, or one text."""

    text: Text = ""

    def choose(self, model: HookedModel, seed: int) -> Examples:
        """The examples.

        Raises:
            FileNotFoundError: if an image does not exist.
            ValueError: if what is given does not fit the model, or does not go together.
        """
        if not self.text:
            return super().choose(model, seed)
        if self.data:
            raise ValueError(f"--data {self.data!r} does not go with --image or --text")
        if isinstance(model.input, ImageInput):
            raise ValueError(f"--text {self.text!r}: model {model.name} takes images")
        say_if_cut(model, self.text)
        return Examples.texts(model, [self.text])


def say_if_cut(model: HookedModel, text: str) -> None:
    """Say of a text that is longer than the model's context that its end is not read."""
    spec = model.input
    if text and isinstance(spec, TokenInput) and (n := len(whole(spec, text))) > spec.n_ctx:
        note(f"--text has {n} tokens: the model takes {spec.n_ctx}, and the rest is not read")


@dataclass(frozen=True)
class LabelledDataset(Dataset):
    """Some examples of a dataset, and the class of each where classes are needed."""

    labels: Labels = ""

    def choose(self, model: HookedModel, seed: int) -> Examples:
        """The examples, with their classes if labels were named."""
        source = open_source(self.data or usual_data(model))
        known = labels_of(model, source, self.labels) if self.labels else None
        return readable(Examples(model, source, self.limit, how=self.take, seed=seed, labels=known))


@dataclass(frozen=True)
class TrainingDataset:
    """Some examples of the dataset that an autoencoder was trained on, or of another."""

    heading: ClassVar = "Examples"

    data: TrainingData = ""
    limit: LimitOrAll = None
    take: Take = "spread"

    def source(self, code: Autoencoder) -> Source:
        """The dataset."""
        return open_source(training_data(code, self.data))


def training_data(code: Autoencoder, data: str) -> str:
    """The dataset that is named or, if none is, that of the autoencoder's training."""
    if not data and not code.about.data:
        raise ValueError(
            f"autoencoder {code.about.name!r} does not say on what it was trained: name examples with --data"
        )
    return data or from_file(
        "data", code.about.data, f"autoencoder {code.about.name!r}", "name it with --data"
    )


# --- tasks -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairsTask:
    """A task whose examples have counterparts: what is measured, and on which examples."""

    heading: ClassVar = "Task and examples"

    task: Annotated[str, option(
        "The task to measure the model on: its name or its file. By default the task that follows from --data or "
        "--text (such as predicting the next token) or, without those, the model's default task."
    )] = ""  # fmt: skip
    metric: Annotated[str, option(
        "The main metric, e.g. logit_difference, or a unit SITE:INDEX whose activation is measured. By default the "
        "task's own."
    )] = ""  # fmt: skip
    data: Data = ""
    text: Text = ""
    limit: Limit = LIMIT
    take: Take = "spread"

    def compile(self, model: HookedModel, seed: int) -> Task:
        """The task for a model: by name or file, what data or a text states by itself, or the model's own.

        Raises:
            KeyError: if there is no such task or metric.
            ValueError: if what is given does not go together, or does not fit the model.
        """
        self._check()
        source = open_source(self.data) if self.data else None
        say_if_cut(model, self.text)
        task = load_task(
            model, self.task, n=self.limit, seed=seed, how=self.take, data=source or "",
            texts=[self.text] if self.text else (), **self._asked(model, source),
        )  # fmt: skip
        if source is not None and task.examples.account:
            note(task.examples.account)
        return task

    def _check(self) -> None:
        """Raise ValueError if examples are named in two ways."""
        if self.data and self.text:
            raise ValueError(f"--data {self.data!r} does not go with --text")
        if self.task and self.task not in STATED and (self.data or self.text):
            raise ValueError(
                f"--task {self.task!r} has its own examples: leave out --data and --text"
            )

    def _asked(self, model: HookedModel, source: Source | None) -> dict[str, Any]:
        """More that `load_task` takes."""
        return {"metric": self.metric}


@dataclass(frozen=True)
class CounterpartTask(PairsTask):
    """A task, with counterparts made of images that have none."""

    counterpart: Annotated[Kind | None, option(
        "For the images of --data: what each one's counterpart is: an image of another class, or the image itself "
        "blurred, in grey, turned by 180 degrees, or with its middle taken from the next image."
    )] = None  # fmt: skip

    counterparts: Annotated[str, option(
        "For the images of --data: where the counterpart of each one is, under the same name: folder:PATH."
    )] = ""  # fmt: skip

    labels: Labels = ""
    one_class: Annotated[str, option(
        "With --other-class: a class (or several, NAME|NAME; FIRST-LAST for outputs by number). Images of --data that "
        "are of either are taken, each with one of the other as its counterpart; the metric is the logit of its own "
        "class less that of the other.", "--class"
    )] = ""  # fmt: skip
    other_class: Annotated[
        str, option("With --class: the class or classes that it is compared with.")
    ] = ""
    most_active: Annotated[int | None, option(
        "With --metric SITE:INDEX: of the images of --data (at most --limit), take as many as this, those on which the "
        "unit is most active.", check=Within(1)
    )] = None  # fmt: skip

    def compile(self, model: HookedModel, seed: int) -> Task:
        self._check()
        if self.one_class or self.other_class:
            self._check_against()
        task = TaskSpec(
            self.task, self.limit, seed, self.metric, self.data, self.text, self.take, self.labels, self.counterpart,
            self.counterparts, self.one_class, self.other_class, self.most_active or 0,
        ).compile(model)  # fmt: skip
        if self.data and task.examples.account:
            note(task.examples.account)
        return task

    def _check_against(self) -> None:
        """Raise ValueError unless two classes can be told apart."""
        if not (self.one_class and self.other_class and self.data):
            raise ValueError(
                f"--class {self.one_class!r}, --other-class {self.other_class!r}: expected both classes, and --data "
                "with images of them"
            )
        for name in ("task", "text", "counterpart", "counterparts", "most_active"):
            if getattr(self, name):
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)!r} does not go with --class and --other-class"
                )


def known_labels(model: HookedModel, source: Source | None, labels: str) -> list[int] | None:
    """The class of each image of a source; None if no labels were named.

    Raises:
        ValueError: if labels were named of texts, or of no data.
    """
    if labels and source is None:
        raise ValueError(f"--labels {labels!r} goes with --data")
    if labels and not isinstance(model.input, ImageInput):
        raise ValueError(f"--labels {labels!r}: of texts the next token is what is right")
    return labels_of(model, source, labels) if source and labels else None


@dataclass(frozen=True)
class AnsweredTask(PairsTask):
    """A task: what is measured, where, and on which examples."""

    positions: Annotated[str, option(
        "The positions at which answers are read: last, all, the name of one of the task's spans, or indices from 0, "
        "separated by commas, e.g. 3,5. By default the task's own."
    )] = ""  # fmt: skip
    answer: Annotated[str, option(
        "The right answer for all examples: a token or class. By default each example's own."
    )] = ""  # fmt: skip
    against: Annotated[str, option(
        "The wrong answer to compare the right one with. By default each example's own, if it has one."
    )] = ""  # fmt: skip

    def _asked(self, model: HookedModel, source: Source | None) -> dict[str, Any]:
        more = {"positions": self.positions, "answer": self.answer, "against": self.against}
        return super()._asked(model, source) | more


@dataclass(frozen=True)
class LabelledTask(AnsweredTask):
    """A task, with the classes of the images that it is measured on."""

    labels: Labels = ""

    def _asked(self, model: HookedModel, source: Source | None) -> dict[str, Any]:
        return super()._asked(model, source) | {"labels": known_labels(model, source, self.labels)}

    @property
    def examples(self) -> LabelledDataset:
        """The examples alone."""
        return LabelledDataset(self.data, self.limit, self.take, self.labels)


# --- showing results -------------------------------------------------------------------------------


@runtime_checkable
class Result(Protocol):
    """What can be shown as JSON."""

    def to_dict(self) -> Any:
        """As JSON has it."""
        ...


@dataclass(frozen=True)
class Output:
    """How a command shows its result: as tables, or as JSON."""

    heading: ClassVar = "Output"

    json: Annotated[bool, option("Print the result as JSON instead of tables.", "--json")] = False

    def progress(self, what: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """A progress bar; if JSON is printed, only a line a minute."""
        return progress_bar(what, quiet=self.json)

    @contextmanager
    def stages(self) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
        """A progress bar for each stage of some work, one after the other; yields what begins a stage by its name."""
        with ExitStack() as stack:

            def begin(what: str) -> Callable[[int, int], None]:
                stack.close()
                return stack.enter_context(self.progress(what))

            yield begin

    @staticmethod
    def announced(begin: Callable[[str], Progress]) -> Callable[[str], Progress]:
        """What begins a stage and first says what it is, on a line of its own; its name ends at the first colon."""

        def announce(what: str) -> Progress:
            note(what)
            return begin(what.partition(":")[0])

        return announce

    def show(self, facts: Any, parts: Iterable[Table | str] = ()) -> None:
        """Print `facts` (a result, a list of results, JSON values) as JSON, or else the tables and lines in `parts`."""
        if self.json:
            show_json(_plain(facts))
            return
        self.show_parts(parts)

    def show_parts(self, parts: Iterable[Table | str]) -> None:
        """Print tables and lines, of which JSON has a part at the end: nothing yet if that is wanted."""
        for part in () if self.json else parts:
            if isinstance(part, str):
                say(part)
            else:
                show_table(part)


def _plain(facts: Any) -> Any:
    if isinstance(facts, Result):
        return facts.to_dict()
    return [_plain(one) for one in facts] if isinstance(facts, list | tuple) else facts


@dataclass(frozen=True)
class FigureOutput(Output):
    """How a command shows its result, with a figure if one is wanted."""

    figure: Annotated[Path | None, option(
        "Also save a figure of the result to this file, .png or .svg."
    )] = None  # fmt: skip

    def __post_init__(self) -> None:
        if self.figure is not None:
            _figures().check_figure_path(self.figure)
            check_writable(self.figure.parent, "folder")

    def draw(self, make: Callable[[ModuleType], Any]) -> None:
        """Save the figure that `make` makes with the module `circuits.figures`, if one is wanted."""
        if self.figure is not None:
            _figures().save_figure(make(_figures()), self.figure)


def _figures() -> ModuleType:
    """Loaded only when something is drawn: altair takes longer than most commands."""
    from circuits import figures

    return figures
