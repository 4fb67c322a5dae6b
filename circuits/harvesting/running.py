"""Planning a harvest, distributing it among processes, and merging what they wrote."""

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
from circuits.files import check_inside
from circuits.harvesting import kernels
from circuits.harvesting.ranks import Ranks
from circuits.harvesting.references import references
from circuits.harvesting.shardwork import ShardWork
from circuits.harvesting.workers import Send, share_out
from circuits.models.adapter.hooked_model import HookedModel
from circuits.progress import Progress
from circuits.stimuli.accounts import left_out
from circuits.stimuli.sources import Source
from circuits.store import ActivationStore, Provenance
from circuits.store.provenance import Depth, Layout, Precision, run_name
from circuits.store.shards import StoreWriter, locked
from circuits.units import Site
from circuits.workspace import ModelRecord, Workspace

LOOKED_AT = 2048
"""The least number of activations that a unit's histogram counts, if there are that many."""

FEWEST_POSITIONS = 8
"""The least number of positions of an example that histograms count, if there are that many."""

SHARD_EXAMPLES, MOST_SHARDS = 64, 1024
"""A shard has at most this many examples, unless there would be more shards than this."""

FULL_BYTES, SUMMARY_BYTES = 128 << 20, 64 << 20
"""The largest size of a shard, in whole activations and in summaries."""

MEMORY = 4 << 30
"""The default memory for activations, in bytes."""

LARGEST_BATCH = 8
"""The most examples in a forward pass by default: the activations of more leave the processor's cache."""


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
    overwrite: bool = False,
    seed: int = 0,
) -> ActivationStore:
    """Record the activations of some sites on every example; resume an interrupted harvest.

    On a CPU there are as many processes as torch has threads, with one thread each; files do not depend on how many
    there are. Under `torchrun` every rank takes its share of the shards.

    Args:
        model: the model.
        source: the data.
        sites: names of the sites whose summaries are kept. Of a site with a ceiling (after ReLU6), the site before it
            is kept too, which puts in order the examples that are equal at the ceiling.
        workspace: the workspace for the store.
        record: how the model is loaded, for the app; by default its name.
        batch: examples in a forward pass; by default as many as `memory` allows, up to `LARGEST_BATCH`. Results do
            not depend on it beyond float rounding; a resumed harvest keeps its first batch size.
        progress: called with the number of examples done and in all.
        full: names of the sites whose whole tensors are kept too.
        covariance: names of the sites whose covariance of units is kept too.
        layout: of whole tensors: `blocks` of 4096 rows and 64 units, or whole `rows`.
        compress: compress whole tensors (lzf) if that pays for a first block.
        precision: the precision of the forward pass.
        positions: how many positions of an example histograms count (a random sample; all other statistics use every
            position). By default enough for each histogram to count `LOOKED_AT` activations; 0 means all of them.
        memory: bytes for the activations of all processes in a forward pass (the shards that they gather come on
            top: at most two for each process, of `FULL_BYTES` each, in float32).
        workers: the number of processes, if `memory` is enough for that many; 1 uses only this process.
        skip_bad: leave out and list examples that cannot be read, instead of stopping at them.
        overwrite: delete what an earlier harvest of the same kind has written, and start over.
        seed: the seed of the choice of positions.

    Returns:
        The finished store; at once if it is finished already.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if the model cannot take the data, an example cannot be read, or a symbolic link leads to what
            is to be overwritten.
        StaleCacheError: if the store that is there was made from something else.
        BlockingIOError: if another process is writing the same store.
        OSError: if the workspace cannot be written or has too little space left.
    """
    chosen = _chosen(model, [*sites, *full, *covariance])
    _check_options(batch, workers, seed, positions)
    inputs = Examples(model, source, None, skip_bad=skip_bad)
    chosen = [inputs.fitted(site) for site in chosen]
    if positions is None:
        # Few examples need more positions each for the same number of counts.
        positions = max(FEWEST_POSITIONS, math.ceil(LOOKED_AT / len(source)))
    depth = Depth(
        full=tuple(dict.fromkeys(model.site(n).name for n in full)),
        covariance=tuple(dict.fromkeys(model.site(n).name for n in covariance)),
        layout=layout,
        compress=compress,
        precision=precision,
        # 0 means all: more than any example has.
        positions=positions or 2**31,
        seed=seed,
    )
    kernels.prepare()
    fitting = _fitting(model, inputs, _first_readable(inputs, skip_bad), memory)
    name = record.name if record else model.name
    provenance = _provenance(inputs, name, chosen, depth, batch or min(LARGEST_BATCH, fitting))
    run = run_name(provenance.version, chosen, depth)
    folder = workspace.writable().store_folder(provenance.model_hash, source.hash, run)
    if overwrite:
        check_inside(folder, workspace.root)
    if not overwrite and (folder / "provenance.json").exists():
        # Another batch size would round differently: the files would not be those of an uninterrupted harvest.
        provenance = replace(provenance, batch=Provenance.read(folder).batch)
    # As many processes as have room for one batch each.
    count = min(_workers(model, workers), max(1, fitting // provenance.batch))
    if not folder.exists():  # otherwise the check comes when it is known what is missing
        _check_space(provenance, folder, 1.0)
    work = ShardWork(model, inputs, provenance, folder, skip_bad)
    with Ranks.joined() as ranks:
        with ranks.lead() as lead:
            if lead:
                plain = record or ModelRecord.of(model.name, model.identity)
                workspace.register(plain, replace=record is not None)
        _harvest(work, ranks, count, progress, overwrite)
    return ActivationStore.open(folder, provenance.model_hash, source.hash)


def _check_options(
    batch: int | None, workers: int | None, seed: int, positions: int | None
) -> None:
    """Raise ValueError if a number is out of range."""
    for name, value in (("batch", batch), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    if seed < 0:
        raise ValueError(f"seed {seed} must be 0 or more")
    if positions is not None and positions < 0:
        raise ValueError(f"positions {positions} must be 0 (all) or more")


def _provenance(
    inputs: Examples, name: str, sites: Sequence[Site], depth: Depth, batch: int
) -> Provenance:
    """What the store will be made from."""
    model, source = inputs.model, inputs.source
    return Provenance(
        model=name,
        model_hash=model.hash,
        data=source.spec,
        data_hash=source.hash,
        sites=tuple(sites),
        examples=source.names,
        input=model.input.describe(),
        version=version("circuits-workbench"),
        depth=depth,
        batch=batch,
        shard=_shard(len(source), sites, depth),
        same=_same(model, sites),
        left_out=left_out(source),
    )


def _chosen(model: HookedModel, names: Sequence[str]) -> list[Site]:
    """The sites to record, each once, with those that tell apart what is equal at a site's ceiling."""
    asked = [model.site(name) for name in names]
    chosen = list(dict.fromkeys(s for site in asked for s in (site, model.before_ceiling(site))))
    if not chosen:
        raise ValueError("sites is empty: expected at least one site")
    if model.edited:
        raise ValueError(f"model {model.name} is edited: harvest it outside the edit")
    return chosen


def _workers(model: HookedModel, workers: int | None) -> int:
    """The number of processes; a GPU is kept busy by one."""
    if model.device.type != "cpu":
        return 1
    return workers or torch.get_num_threads()


def _harvest(
    work: ShardWork, ranks: Ranks, workers: int, progress: Progress | None, overwrite: bool
) -> None:
    """Make what is missing of a store, while rank 0 holds the lock of its folder."""
    provenance, folder = work.provenance, work.folder
    total = len(provenance.examples)
    writer = StoreWriter(folder, provenance)
    missing: list[int] = []
    finished = False
    with ExitStack() as stack:
        with ranks.lead() as lead:
            if lead:
                stack.enter_context(locked(folder, provenance, overwrite))
                missing, finished = _prepared(work, writer, workers)
        missing, finished = ranks.shared((missing, finished))
        done = total - sum(len(writer.shards[i]) for i in missing)
        if progress and ranks.rank == 0:
            progress(done, total)
        if finished:
            return

        def make(process: int | None, shards: Sequence[int], told: Send) -> None:
            # Each process has a manifest of its own, since lines of several writers could mix.
            name = f"manifest-{ranks.rank}" + ("" if process is None else f"-{process}")
            replace(work, manifest=f"{name}.jsonl").make(shards, told)

        with ranks.together():
            scale = (
                ranks.size if ranks.rank == 0 else 0
            )  # rank 0 reports as if all ranks were equally fast
            told = _progress_by_news(progress, done, total, scale)
            # Every size-th shard: ranks get early and late ones alike, should the data grow harder.
            share_out(missing[ranks.rank :: ranks.size], workers, make, told)
        with ranks.lead() as lead:
            if lead:
                writer.finish()
                if progress:
                    progress(total, total)


def _progress_by_news(
    progress: Progress | None, before: int, total: int, scale: int
) -> Callable[[int], None]:
    """A function that adds up the examples that workers report, and calls `progress`."""
    seen = before

    def told(n: int) -> None:
        nonlocal seen
        seen = min(total, seen + n * scale)
        if progress and scale:
            progress(seen, total)

    return told


def _prepared(work: ShardWork, writer: StoreWriter, workers: int) -> tuple[list[int], bool]:
    """Write what all shards have in common, if it is missing; return the missing shards, and whether the store is
    finished.
    """
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
    """The bytes of an example in summaries and in whole activations."""
    # Maximum (float32), argmax (int32) and mean (float32) for each unit; whole activations in float16.
    summary = sum(12 * site.n_units for site in sites)
    whole = [site for site in sites if site.name in depth.full]
    return summary, sum(2 * math.prod(s.position_shape) * s.width for s in whole)


def _shard(n: int, sites: Sequence[Site], depth: Depth) -> int:
    """Examples in a shard: few enough that every process gets several and memory does not grow with `n`."""
    summary, whole = _bytes_per_example(sites, depth)
    most = min(SUMMARY_BYTES // max(1, summary), FULL_BYTES // max(1, whole))
    # At least eight shards where there are 128 examples or more, of 64 examples at most until there would be more than
    # 1024.
    wanted = min(max(16, -(-n // 8)), max(SHARD_EXAMPLES, n // MOST_SHARDS))
    return max(1, min(most, wanted))


def _check_space(provenance: Provenance, folder: Path, share: float) -> None:
    """Raise OSError if the disk has too little space for a share of the shards and the merged statistics."""
    n, stored = len(provenance.examples), provenance.stored
    summary, whole = _bytes_per_example(stored, provenance.depth)
    chosen = provenance.kept(provenance.depth.covariance)
    # Every shard keeps a matrix of float64 for each covariance.
    products = sum(8 * site.width**2 for site in stored if site.name in chosen)
    shards = -(-n // provenance.shard)
    needed = int(share * (n * (summary + whole) + shards * products)) + n * summary
    # The folder itself may not be there yet: the nearest one above it is on the same disk.
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise OSError(
            f"activation store {str(folder)!r} needs about {needed / 1e6:.1f} MB, and the disk has "
            f"{free / 1e6:.1f} MB left: free space, or choose fewer sites"
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
    """How many examples fit into the memory, counting the activations of all sites."""
    sites = [inputs.fitted(site) for site in model.sites]
    # As if all sites were alive at once: more than is needed, since torch frees them as it goes.
    each = 4 * sum(math.prod(site.shape) for site in sites) + 4 * first.numel()
    if each > memory:
        raise ValueError(
            f"memory {memory} bytes is too little: one example of {model.name} takes about {each}"
        )
    return memory // each


def _same(model: HookedModel, sites: Sequence[Site]) -> dict[str, str]:
    """Sites that have the same tensor as an earlier one: TransformerLens has many under two names."""
    cache = model.run(model.input.example(2), read=sites, until=model.last(sites))
    known: dict[object, str] = {}
    same = {}
    for site in sites:
        value = cache[site]
        # The same memory read in the same way; two equal but separate tensors are two sites.
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
    """For each store of a model that is unfinished or damaged, what is wrong and what to do."""
    for folder in workspace.store_folders(model_hash):
        try:
            ActivationStore.open(folder, model_hash)
        except (FileNotFoundError, ValueError) as error:
            yield str(error)
