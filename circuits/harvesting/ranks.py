"""The processes started by `torchrun`, and how they exchange values and errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

PATIENCE = timedelta(days=7)
"""How long ranks wait for each other: without a practical limit, since `torchrun` ends all when one dies."""

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The group of processes that share a harvest; a single one, unless `torchrun` started it.

    Attributes:
        rank: the number of this process.
        size: the number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    @contextmanager
    def joined(cls) -> Iterator[Ranks]:
        """Join the group that this process belongs to, inside the block."""
        # WORLD_SIZE alone may be left over from something else; torchrun sets both.
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if "TORCHELASTIC_RUN_ID" not in os.environ or size == 1:
            yield cls()
            return
        own = not dist.is_initialized()
        if own:
            # Torch's optimizers import this module. If that happens once there is a group, it keeps the group alive
            # for ever; and threads of a group that is not destroyed sometimes abort Python at its end (torch 2.13).
            import torch._dynamo  # noqa: F401

            dist.init_process_group("gloo", timeout=PATIENCE)
        try:
            yield cls(dist.get_rank(), dist.get_world_size())
        finally:
            if own:
                dist.destroy_process_group()

    def shared(self, value: T) -> T:
        """The value that rank 0 has."""
        if self.size == 1:
            return value
        # Rank 0's value overwrites the others' in place.
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def lead(self) -> Iterator[bool]:
        """Yield whether this is rank 0; an error that rank 0 raises inside the block is raised on every rank."""
        # Else the other ranks would wait for it, in their next exchange, until the timeout.
        error: Exception | None = None
        try:
            yield self.rank == 0
        except Exception as raised:  # noqa: BLE001 - it is raised again at the end
            error = raised
        error = self.shared(error)
        if error is not None:
            raise error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise an error of any rank inside the block on every rank, once all have reached the end of the block."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:  # noqa: BLE001 - it is raised again at the end
            error = raised
        errors: list[Exception | None] = [error]
        if self.size > 1:
            errors = [None] * self.size
            dist.all_gather_object(errors, error)
        for found in errors:
            if found is not None:
                raise found
