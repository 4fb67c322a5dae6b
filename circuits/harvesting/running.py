"""Planning a harvest, sharing it out among processes, and joining what they wrote."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from circuits.examples import Examples
from circuits.harvesting import kernels
from circuits.harvesting.ranks import Ranks
from circuits.harvesting.references import references
from circuits.harvesting.shardwork import ShardWork
from circuits.harvesting.workers import Send, share_out
from circuits.models.adapter.hooked_model import HookedModel
from circuits.progress import Progress
from circuits.stimuli.sources import Source
from circuits.store import ActivationStore, Provenance
from circuits.store.provenance import Depth, Layout, Precision, run_name
from circuits.store.shards import StoreWriter, locked
from circuits.units import Site
from circuits.workspace import ModelRecord, Workspace

LOOKED_AT = 2048
"""How many activations of a unit its histogram counts, at least, if there are so many."""

FEWEST_POSITIONS = 8
"""At how many positions of an example the histograms look, at least, if there are so many."""

SHARD_EXAMPLES, MOST_SHARDS = 64, 1024
"""Examples in a shard at most, until there would be more shards than this."""

FULL_BYTES, SUMMARY_BYTES = 128 << 20, 64 << 20
"""How large a shard may grow, in whole activations and in summaries."""

MEMORY = 4 << 30
"""How much memory a harvest takes for activations, unless told otherwise, in bytes."""

LARGEST_BATCH = 8
"""Examples in one forward pass at most, unless told otherwise: more leave the processor's cache."""


def harvest(
    model: HookedModel,
    source: Source,
    sites: Sequence[str],
    workspace: Workspace,
    record: ModelRecord | None = None,
    batch: int | None = None,
    progress: Progress | None = None,
    *,
    full: Sequence[str] = (),
    covariance: Sequence[str] = (),
    layout: Layout = "blocks",
    compress: bool = False,
    precision: Precision = "float32",
    positions: int | None = None,
    memory: int = MEMORY,
    workers: int | None = None,
    skip_bad: bool = False,
    anew: bool = False,
    seed: int = 0,
) -> ActivationStore:
    """Record what the units of some sites do on every example; resume if it was interrupted.

    On a CPU as many processes work as torch has threads, one thread each: files do not depend on how
    many there are. Under `torchrun` every rank takes its share of the shards.

    Args:
        model: the model.
        source: the data.
        sites: names of sites of which summaries are kept.
        workspace: where the store goes.
        record: how the model is loaded, for the app; its name if it is not given.
        batch: examples in one forward pass; as many as `memory` allows, up to `LARGEST_BATCH`, if not
            given. Results do not depend on it beyond float rounding; a run that goes on keeps its first.
        progress: told the number of examples done and in all.
        full: those of which the whole tensor is kept too.
        covariance: those of which the units' covariance is kept too.
        layout: of whole tensors: `blocks` of 4096 rows and 64 units, or whole `rows`.
        compress: compress whole tensors (lzf) if a probe says that it pays.
        precision: what the forward pass computes in.
        positions: at how many positions of an example the histograms look (a seeded sample; all else
            is exact); if not given, so many that each counts `LOOKED_AT` activations; 0 is all.
        memory: bytes that the activations of all processes may take in a forward pass (the shards that
            they gather come on top: at most two a process, of `FULL_BYTES` each, in float32).
        workers: processes, if `memory` is enough for so many; 1 is none but this.
        skip_bad: leave out examples that cannot be read, and list them; they stop the harvest else.
        anew: throw away what an earlier run left.
        seed: of the choice of positions.

    Returns:
        The finished store; at once if it was finished before.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if the model cannot take the data, or an example cannot be read.
        StaleCacheError: if what is there was made from something else.
        BlockingIOError: if another process is writing the same store.
        OSError: if the workspace cannot be written or has too little space left.
    """
    chosen = _chosen(model, [*sites, *full, *covariance])
    if batch is not None and batch < 1:
        raise ValueError(f"batch {batch} must be at least 1")
    if workers is not None and workers < 1:
        raise ValueError(f"workers {workers} must be at least 1")
    if seed < 0:
        raise ValueError(f"seed {seed} must be 0 or more")
    if positions is not None and positions < 0:
        raise ValueError(f"positions {positions} must be 0 (all) or more")
    inputs = Examples(model, source, None, skip_bad=skip_bad)
    chosen = [inputs.fitted(site) for site in chosen]
    if positions is None:
        positions = max(FEWEST_POSITIONS, math.ceil(LOOKED_AT / len(source)))
    depth = Depth(
        full=tuple(dict.fromkeys(model.site(n).name for n in full)),
        covariance=tuple(dict.fromkeys(model.site(n).name for n in covariance)),
        layout=layout,
        compress=compress,
        precision=precision,
        positions=positions or 2**31,
        seed=seed,
    )
    kernels.prepare()
    first = _first_readable(inputs, skip_bad)
    fitting = _fitting(model, inputs, first, memory)
    provenance = Provenance(
        model=record.spec if record else model.name,
        model_hash=model.hash,
        data=source.spec,
        data_hash=source.hash,
        sites=tuple(chosen),
        examples=source.names,
        input=model.input.describe(),
        version=version("circuits-workbench"),
        depth=depth,
        batch=batch or min(LARGEST_BATCH, fitting),
        shard=_shard(len(source), chosen, depth),
        same=_same(model, chosen),
    )
    run = run_name(provenance.version, chosen, depth)
    folder = workspace.writable().store_folder(provenance.model_hash, source.hash, run)
    if not anew and (folder / "provenance.json").exists():
        provenance = replace(provenance, batch=Provenance.read(folder).batch)
    count = min(_workers(model, workers), max(1, fitting // provenance.batch))
    plain = ModelRecord(model.name, provenance.model_hash)
    if not folder.exists():
        _check_space(provenance, folder, 1.0)  # before anything is written
    work = ShardWork(model, inputs, provenance, folder, skip_bad)
    with Ranks.joined() as ranks:
        with ranks.lead() as lead:
            if lead:
                workspace.register(record or plain, replace=record is not None)
        _harvest(work, ranks, count, progress, anew)
    return ActivationStore.open(folder, provenance.model_hash, source.hash)


def _chosen(model: HookedModel, names: Sequence[str]) -> list[Site]:
    chosen = list(dict.fromkeys(model.site(name) for name in names))
    if not chosen:
        raise ValueError("sites is empty: name at least one site")
    if model.edited:
        raise ValueError(f"model {model.name} is edited: harvest it outside the edit")
    return chosen


def _workers(model: HookedModel, workers: int | None) -> int:
    """How many processes; other devices than CPUs are kept busy by one."""
    if model.device.type != "cpu":
        return 1
    return workers or torch.get_num_threads()


def _harvest(
    work: ShardWork, ranks: Ranks, workers: int, progress: Progress | None, anew: bool
) -> None:
    """Make what is missing of a store, whose folder rank 0 holds alone."""
    provenance, folder = work.provenance, work.folder
    total = len(provenance.examples)
    writer = StoreWriter(folder, provenance)
    missing: list[int] = []
    finished = False
    with ExitStack() as stack:
        with ranks.lead() as lead:
            if lead:
                stack.enter_context(locked(folder, provenance, anew))
                missing, finished = _prepared(work, writer, workers)
        missing, finished = ranks.shared((missing, finished))
        done = total - sum(len(writer.shards[i]) for i in missing)
        if progress and ranks.rank == 0:
            progress(done, total)
        if finished:
            return

        def make(process: int | None, shards: Sequence[int], told: Send) -> None:
            name = f"manifest-{ranks.rank}" + ("" if process is None else f"-{process}")
            replace(work, manifest=f"{name}.jsonl").make(shards, told)

        with ranks.together():
            scale = ranks.size if ranks.rank == 0 else 0  # rank 0 speaks for all
            told = _told(progress, done, total, scale)
            share_out(missing[ranks.rank :: ranks.size], workers, make, told)
        with ranks.lead() as lead:
            if lead:
                writer.finish()
                if progress:
                    progress(total, total)


def _told(progress: Progress | None, before: int, total: int, scale: int) -> Callable[[int], None]:
    seen = before

    def told(n: int) -> None:
        nonlocal seen
        seen = min(total, seen + n * scale)
        if progress and scale:
            progress(seen, total)

    return told


def _prepared(work: ShardWork, writer: StoreWriter, workers: int) -> tuple[list[int], bool]:
    """The shards that are missing, once all that they share is there; whether nothing is."""
    there = writer.intact()
    names = [f"shard-{i:05d}.h5" for i in range(len(writer.shards))]
    missing = [i for i, name in enumerate(names) if name not in there]
    if "statistics.h5" in there:
        return [], True
    _check_space(work.provenance, writer.folder, len(missing) / len(names))
    if "reference.h5" not in there:
        writer.add_reference(*references(work, workers))
    return missing, False


def _bytes_per_example(sites: Sequence[Site], depth: Depth) -> tuple[int, int]:
    """What an example takes in summaries and in whole activations."""
    summary = sum(12 * site.n_units for site in sites)
    whole = [site for site in sites if site.name in depth.full]
    return summary, sum(2 * math.prod(s.position_shape) * s.width for s in whole)


def _shard(n: int, sites: Sequence[Site], depth: Depth) -> int:
    """Examples in a shard: several for every process, few enough that memory does not follow `n`."""
    summary, whole = _bytes_per_example(sites, depth)
    most = min(SUMMARY_BYTES // max(1, summary), FULL_BYTES // max(1, whole))
    wanted = min(max(16, -(-n // 8)), max(SHARD_EXAMPLES, n // MOST_SHARDS))
    return max(1, min(most, wanted))


def _check_space(provenance: Provenance, folder: Path, share: float) -> None:
    n, stored = len(provenance.examples), provenance.stored
    summary, whole = _bytes_per_example(stored, provenance.depth)
    chosen = provenance.kept(provenance.depth.covariance)
    products = sum(8 * site.width**2 for site in stored if site.name in chosen)
    shards = -(-n // provenance.shard)
    needed = int(share * (n * (summary + whole) + shards * products)) + n * summary
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise OSError(
            f"activation store {str(folder)!r} needs about {needed / 1e6:.1f} MB, and the disk has "
            f"{free / 1e6:.1f} MB left: free space, or name fewer sites"
        )


def _first_readable(inputs: Examples, skip_bad: bool) -> Tensor:
    """The first example that can be read, as the model takes it."""
    for i in range(len(inputs)):
        try:
            first = inputs.batch([i]).inputs
        except (OSError, ValueError):
            if not skip_bad or i == len(inputs) - 1:
                raise
            continue
        inputs.model.check(first)
        return first
    raise ValueError(f"data {inputs.source.spec!r} is empty")


def _fitting(model: HookedModel, inputs: Examples, first: Tensor, memory: int) -> int:
    """How many examples fit into the memory, all of a model's activations counted."""
    sites = [inputs.fitted(site) for site in model.sites]
    each = 4 * sum(math.prod(site.shape) for site in sites) + 4 * first.numel()
    if each > memory:
        raise ValueError(
            f"memory {memory} bytes is too little: one example of {model.name} takes about {each}"
        )
    return memory // each


def _same(model: HookedModel, sites: Sequence[Site]) -> dict[str, str]:
    """Sites whose tensor is that of an earlier one: TransformerLens shows many under two names."""
    cache = model.run(model.input.example(2), read=sites, until=model.last(sites))
    known: dict[object, str] = {}
    same = {}
    for site in sites:
        value = cache[site]
        place = (
            value.data_ptr(),
            value.shape,
            value.stride(),
            value.dtype,
            site.axes,
            site.unit_axis,
        )
        if value.numel() and known.setdefault(place, site.name) != site.name:
            same[site.name] = known[place]
    return same


def find_stores(workspace: Workspace, model_hash: str) -> Iterator[ActivationStore]:
    """The finished stores of a model; unfinished and damaged ones are left out (see `unusable_stores`)."""
    for folder in workspace.store_folders(model_hash):
        try:
            yield ActivationStore.open(folder, model_hash)
        except (FileNotFoundError, ValueError):
            continue


def unusable_stores(workspace: Workspace, model_hash: str) -> Iterator[str]:
    """What is wrong with each store of a model that is not finished, or damaged, and what to do."""
    for folder in workspace.store_folders(model_hash):
        try:
            ActivationStore.open(folder, model_hash)
        except (FileNotFoundError, ValueError) as error:
            yield str(error)
