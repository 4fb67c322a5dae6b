"""Making a shard: while a batch runs, the next ones are decoded and the previous shard is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from circuits.examples import Examples
from circuits.harvesting.observing import Observer
from circuits.hooks import Look
from circuits.models.adapter.flow import short_name
from circuits.models.adapter.hooked_model import HookedModel
from circuits.store.provenance import Provenance
from circuits.store.shards import Shard, StoreWriter
from circuits.store.summaries import Summary
from circuits.tensors import in_fewer_digits

AHEAD = 2
"""How many batches are decoded in advance; a limit, so that fast decoding does not fill the memory."""


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Let torch compute with one thread on a CPU inside the block."""
    # How many threads share a sum determines its order, and so its last bits: with one each, files do not depend on
    # the number of processes and threads.
    if device.type != "cpu":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, eq=False)
class ShardWork:
    """Everything that a process needs to make shards of a store.

    Attributes:
        model: the model.
        inputs: the data.
        provenance: the store's provenance.
        folder: the store's folder.
        skip_bad: whether examples that cannot be read are left out.
        manifest: the name of this process's manifest.
    """

    model: HookedModel
    inputs: Examples
    provenance: Provenance
    folder: Path
    skip_bad: bool
    manifest: str = "manifest.jsonl"

    @cached_property
    def channels_last(self) -> bool:
        """Whether channels are laid out last in memory: on a CPU, depthwise convolutions are twice as fast then.

        It follows from the model alone, since sums are rounded otherwise in the other layout.
        """
        model = self.model
        return model.device.type == "cpu" and any(
            short_name(op) == "conv2d" and op.argument(6, "groups", 1) > 1
            for op in model.program.operations
        )

    def forward(self, inputs: Tensor, looks: Mapping[str, Look]) -> None:
        """Run one forward pass up to the last site, in the store's precision."""
        kind, device = self.provenance.depth.precision, self.model.device.type
        if self.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        half = kind != "float32"
        if not half:
            self.model.observe(inputs, looks, self.model.last(looks))
            return

        def wide(look: Look) -> Look:
            def see(value: Tensor) -> None:
                with torch.autocast(
                    device, enabled=False
                ):  # statistics are computed in full precision
                    look(value)

            return see

        with in_fewer_digits(device, getattr(torch, kind)):
            seen = {name: wide(look) for name, look in looks.items()}
            self.model.observe(inputs, seen, self.model.last(looks), reference=True)

    def loaded(self, examples: range, size: int) -> Iterator[tuple[dict[int, str], Tensor | None]]:
        """Load examples in batches, decoding in a thread ahead of time.

        Yields:
            For each batch, the examples that cannot be read and why, and the rest as one input, None if there is none.
        """
        passes = iter(self.inputs.passes(examples, size))
        with ThreadPoolExecutor(1, "decode") as pool:
            waiting: list[Future[tuple[dict[int, str], Tensor | None]]] = []
            try:
                while True:
                    while len(waiting) < AHEAD and (batch := next(passes, None)) is not None:
                        # One thread: results come in the order of the batches.
                        waiting.append(pool.submit(self._load, batch))
                    if not waiting:
                        return
                    yield waiting.pop(0).result()
            finally:
                for future in waiting:
                    future.cancel()

    def _load(self, examples: range) -> tuple[dict[int, str], Tensor | None]:
        """Load one batch."""
        bad: dict[int, str] = {}
        good = []
        for i in examples:
            try:
                good.append(self.inputs.load(i))
            except (OSError, ValueError) as error:
                if not self.skip_bad:
                    raise
                bad[i] = str(error)
        return bad, self.inputs.joined(good) if good else None

    def make(self, shards: Sequence[int], told: Callable[[int], object]) -> None:
        """Make some shards, one after another; each is written while the next one is computed.

        Args:
            shards: the numbers of the shards.
            told: called with how many more examples are done.
        """
        writer = StoreWriter(self.folder, self.provenance, self.manifest)
        fixed, centers = writer.reference()
        with one_thread(self.model.device), ThreadPoolExecutor(1, "write") as pool:
            writing: Future[None] | None = None
            for index in shards:
                shard = self._compute(writer.shards[index], fixed, centers, told)
                if (
                    writing is not None
                ):  # at most two shards are in memory, and errors in writing are raised here
                    writing.result()
                writing = pool.submit(writer.add, index, shard)
            if writing is not None:
                writing.result()

    def _compute(
        self,
        examples: range,
        fixed: Mapping[str, np.ndarray],
        centers: Mapping[str, np.ndarray],
        told: Callable[[int], object],
    ) -> Shard:
        """Run the examples of one shard."""
        provenance = self.provenance
        summary = Summary.empty(len(examples), fixed)
        full = provenance.kept(provenance.depth.full)
        observers = {
            site.name: Observer(
                site,
                summary.of_units(provenance.places[site.name]),
                examples,
                provenance.depth,
                site.name in full,
                centers.get(site.name),
            )
            for site in provenance.stored
        }
        skipped: dict[int, str] = {}
        passes = self.inputs.passes(examples, provenance.batch)
        for batch, (bad, ready) in zip(
            passes, self.loaded(examples, provenance.batch), strict=True
        ):
            skipped |= bad
            if ready is not None:
                good = [i for i in batch if i not in bad]
                looks = {
                    name: lambda value, o=o, good=good: o.see(value, good)
                    for name, o in observers.items()
                }
                self.forward(ready, looks)
            told(len(batch))
        return Shard(
            summary,
            {name: o.full.part() for name, o in observers.items() if o.full},
            {name: o.covariance.part() for name, o in observers.items() if o.covariance},
            skipped,
        )
