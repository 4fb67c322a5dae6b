"""The processes that `torchrun` started, and how they agree."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

PATIENCE = timedelta(days=7)
"""How long ranks wait for each other; `torchrun` ends them all when one dies."""

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The group of processes that a harvest is shared among; one, unless `torchrun` started it.

    Attributes:
        rank: which of them this is.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    @contextmanager
    def joined(cls) -> Iterator[Ranks]:
        """The group that this process belongs to."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if "TORCHELASTIC_RUN_ID" not in os.environ or size == 1:
            yield cls()
            return
        own = not dist.is_initialized()
        if own:
            # An optimizer imports this; imported when there is a group already, it holds on to the group for ever,
            # and threads of a group that is not destroyed end Python with an abort now and then (torch 2.13).
            import torch._dynamo  # noqa: F401

            dist.init_process_group("gloo", timeout=PATIENCE)
        try:
            yield cls(dist.get_rank(), dist.get_world_size())
        finally:
            if own:
                dist.destroy_process_group()

    def shared(self, value: T) -> T:
        """What rank 0 has."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def lead(self) -> Iterator[bool]:
        """Yields whether this is rank 0; an error that it raises inside is raised in every rank."""
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
        """An error that any rank raises inside is raised in every rank, once all have come to the end."""
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
