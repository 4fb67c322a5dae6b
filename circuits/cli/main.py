"""The `circuits` command (layer 7): the library's verbs for a shell."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from typing import Annotated, Any

import typer
from typer.exceptions import Abort, Exit, TyperException

from circuits.cli.arguments import (
    DataOption,
    JsonOption,
    ModelArgument,
    SaesOption,
    SeedOption,
    WeightsOption,
    WorkspaceOption,
    record_of,
)
from circuits.cli.attributing import ablate, attribute, saliency, sanity
from circuits.cli.cases import case
from circuits.cli.concepts import concepts
from circuits.cli.editing import edits
from circuits.cli.graphs import graphs
from circuits.cli.jobs import background
from circuits.cli.output import errors, progress_bar, show_json, show_table, warn
from circuits.cli.patching import keep, lens, patch, paths, probe
from circuits.cli.pictures import visualize
from circuits.cli.serving import check_port, serve_app
from circuits.cli.stores import show_store, stores
from circuits.cli.texts import attention, generate, heads
from circuits.cli.tuning import examples, tune
from circuits.cli.weights import expand, families, weights
from circuits.store.provenance import Layout, Precision
from circuits.workspace import ROOT, ModelRecord, Workspace

_INTERRUPTED = 130  # the exit code of what was stopped by Ctrl-C

app = typer.Typer(
    name="circuits",
    help="Reverse-engineer neural networks: look at units, at the weights between them, and edit them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(stores, name="store")
app.add_typer(graphs, name="graph")
app.add_typer(edits, name="edit")
app.add_typer(concepts, name="sae")
app.add_typer(background, name="jobs")
app.command()(visualize)
app.command()(weights)
app.command()(expand)
app.command()(families)
for _command in (
    tune, examples, ablate, patch, paths, keep, lens, probe, heads, attention, generate, attribute, saliency, sanity,
    case,
):  # fmt: skip
    app.command()(_command)


@app.command()
def models(json: JsonOption = False) -> None:
    """List the models that can be loaded."""
    from circuits.models.loading import MODELS

    if json:
        show_json(
            [{"name": e.name, "builtin": e.builtin, "summary": e.summary} for e in MODELS.values()]
        )
        return
    show_table(
        ("model", "comes with", "what it is"),
        [(e.name, "the package" if e.builtin else "", e.summary) for e in MODELS.values()],
    )


@app.command()
def sites(
    model: ModelArgument,
    weights: WeightsOption = None,
    workspace: SaesOption = None,
    json: JsonOption = False,
) -> None:
    """List a model's sites: the places where its tensors can be read and changed."""
    from circuits.models.loading import load_model

    loaded = load_model(model, weights)
    if json:
        show_json([{**asdict(s), "n_units": s.n_units} for s in loaded.sites])
        return
    show_table(
        ("site", "kind", "units", "shape of one example", "unit axis", "also called"),
        [
            (s.name, s.kind, s.n_units, " x ".join(map(str, s.shape)), s.axes[s.unit_axis], ", ".join(s.aliases))
            for s in loaded.sites
        ],
    )  # fmt: skip


@app.command()
def harvest(
    model: ModelArgument,
    data: DataOption,
    sites: Annotated[
        str, typer.Option("--sites", help="Sites, separated by commas; patterns like mixed* too.")
    ] = "",
    full: Annotated[str, typer.Option(help="Sites of which to keep the whole tensor.")] = "",
    covariance: Annotated[
        str, typer.Option(help="Sites of which to keep the units' covariance.")
    ] = "",
    weights: WeightsOption = None,
    workspace: WorkspaceOption = None,
    batch: Annotated[
        int | None, typer.Option(help="Examples in one forward pass (default: what memory allows).")
    ] = None,
    layout: Annotated[
        Layout, typer.Option(help="Of whole tensors: rows are faster to read at random.")
    ] = "blocks",
    compress: Annotated[
        bool, typer.Option("--compress", help="Compress whole tensors where it pays.")
    ] = False,
    precision: Annotated[
        Precision, typer.Option(help="What the forward pass computes in.")
    ] = "float32",
    memory: Annotated[float, typer.Option(help="GiB that activations may take.")] = 4.0,
    workers: Annotated[
        int | None, typer.Option(help="Processes (default: one a CPU thread).")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="List examples that cannot be read, and go on.")
    ] = False,
    positions: Annotated[
        int | None,
        typer.Option(help="Positions of an example that histograms look at, drawn; 0 is all."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--anew", help="Go on where a run stopped, or begin anew.")
    ] = True,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Record what units do on every example of a dataset. Run it again to resume.

    Under `torchrun --nproc-per-node N -m circuits harvest …` N processes share the work.
    """
    from circuits.harvesting import harvest as run
    from circuits.models.loading import load_model
    from circuits.models.selecting import select_sites
    from circuits.stimuli.sources import open_source

    place = Workspace.default(workspace).writable()
    loaded = load_model(model, weights)
    source = open_source(data)
    record = record_of(model, weights, loaded.hash)
    lead = "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0"
    if lead:
        _note_stale(place, record, source)
    with progress_bar(f"harvest {model} on {data}", quiet=json or not lead) as progress:
        store = run(
            loaded,
            source,
            [s.name for s in select_sites(loaded, sites)],
            place,
            record,
            batch,
            progress,
            full=[s.name for s in select_sites(loaded, full)],
            covariance=[s.name for s in select_sites(loaded, covariance)],
            layout=layout,
            compress=compress,
            precision=precision,
            positions=positions,
            memory=_bytes(memory),
            workers=workers,
            skip_bad=skip_bad,
            anew=not resume,
            seed=seed,
        )
    if lead:
        show_store(store, json)


def _bytes(memory: float) -> int:
    if not 0 < memory < 2**20:
        raise ValueError(f"memory {memory} must be a number of GiB above 0")
    return int(memory * 2**30)


def _note_stale(place: Workspace, record: ModelRecord, source: Any) -> None:
    """Say so if the same names led to other weights or other data before: nothing old is reused."""
    from circuits.store import Provenance

    for folder in place.all_store_folders():
        try:
            known = Provenance.read(folder)
        except (OSError, ValueError):
            continue
        if (known.model, known.data) != (record.spec, source.spec):
            continue
        for what, before, now in (
            ("model", known.model_hash, record.hash),
            ("data", known.data_hash, source.hash),
        ):
            if before != now:
                name = known.model if what == "model" else known.data
                warn(
                    f"{what} {name} has changed since {str(folder)!r} was made "
                    f"({before[:16]}, now {now[:16]}): a new store is made"
                )
                return


@app.command()
def demo(
    workspace: WorkspaceOption = None,
    port: Annotated[int, typer.Option(help="Port of the app.")] = 8501,
    serve: Annotated[
        bool, typer.Option("--serve/--no-serve", help="Start the app at the end.")
    ] = True,
    json: JsonOption = False,
) -> None:
    """Build the workspace of the built-in models, without a network, and open the app on it."""
    from circuits.demo import build

    check_port(port)
    place = Workspace.default(workspace).writable()
    with progress_bar("demo", quiet=json) as progress:
        rows = build(place, progress)
    if json:
        show_json([asdict(row) for row in rows])
    else:
        show_table(
            ("model", "what", "result", "where"),
            [(r.model, r.what, r.result, r.where) for r in rows],
        )
    if serve:
        serve_app(place.root, port)


@app.command(name="app")
def open_app(
    workspace: WorkspaceOption = None,
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8501,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    trust_python: Annotated[
        bool,
        typer.Option("--trust-python", help="Run the code of python: models in the workspace."),
    ] = False,
) -> None:
    """Start the app on a workspace."""

    serve_app(Workspace.default(workspace).root, port, host, trust_python)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; bad input is one line on stderr and exit code 2.

    With `CIRCUITS_DEBUG=1` in the environment errors keep their traceback.
    """
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with _workspace_of(given):
            code = app(args=given, prog_name="circuits", standalone_mode=False)
        if code == _INTERRUPTED:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
    except Exit as exit_:
        return exit_.exit_code
    except (Abort, KeyboardInterrupt):
        return _fail("stopped; run the same command again to go on", _INTERRUPTED)
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except TyperException as error:
        message = getattr(error, "format_message", lambda: str(error))()
        return _fail(message, 2) if message else 2  # no command: the help has been shown
    except Exception as error:
        if os.environ.get("CIRCUITS_DEBUG"):
            raise
        return _fail(_message(error), 2)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code if isinstance(code, int) else 0  # what `Exit` was raised with


@contextmanager
def _workspace_of(arguments: Sequence[str]) -> Iterator[None]:
    """What `--workspace` names is the workspace of the whole command: autoencoders are looked up there."""
    named = [b for a, b in pairwise(arguments) if a == "--workspace"]
    named += [a.partition("=")[2] for a in arguments if a.startswith("--workspace=")]
    before = os.environ.get(ROOT)
    try:
        if named and named[-1]:
            os.environ[ROOT] = named[-1]
        yield
    finally:
        if before is None:
            os.environ.pop(ROOT, None)
        else:
            os.environ[ROOT] = before


def _message(error: Exception) -> str:
    """An error in a line; what we did not raise ourselves says its kind and how to see more."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, ValueError | KeyError | TypeError | OSError | ImportError):
        return text
    return f"{type(error).__name__}: {text} (CIRCUITS_DEBUG=1 shows where)"


def _fail(message: str, code: int) -> int:
    """Say why in a line, once for all ranks of `torchrun`, which fail together."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0":
        return code
    line = " ".join(message.split())
    errors.print(f"circuits: {line}", markup=False, highlight=False, style="red")
    return code


if __name__ == "__main__":
    main()
