"""Sharing out work among processes of this machine.

Processes are forked: they have the model and the data at once, share the weights' memory, and each
computes with one thread. That is faster than one process with all threads, whose layers are too small
to be cut up well, and it makes no demand on the model: a forward pass may write to the model itself.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

_TRIM_EVERY = 6
"""Shards after which freed memory goes back to the system: doing so costs time."""

_ARENA_MAX = -8  # M_ARENA_MAX of glibc's mallopt
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux' prctl


class WorkerLostError(RuntimeError):
    """A worker ended before its work was done, and could not say why."""


Send = Callable[[Any], object]
"""Says something to the process that shared the work out."""

Job = Callable[[int | None, Sequence[int], Send], object]
"""Does some items: which process it is (None: the one that shares out), its items, how to speak."""


def share_out(items: Sequence[int], workers: int, job: Job, heard: Send) -> None:
    """Do some items, with so many processes; with this one alone where that is one or none can be.

    Args:
        items: numbers of what is to be done.
        workers: how many processes.
        job: does some of them; what it sends must not be None.
        heard: called in this process with all that is sent, in no particular order.

    Raises:
        WorkerLostError: if a worker was killed.
    """
    n = min(workers, len(items))
    if n <= 1 or sys.platform != "linux":
        job(None, items, heard)
        return
    context = get_context("fork")
    channels: dict[Connection, BaseProcess] = {}
    try:
        for i in range(n):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_work, args=(job, i, list(items[i::n]), theirs, os.getpid()), daemon=True
            )
            with warnings.catch_warnings():
                # from Python 3.12: workers do nothing with what other threads might hold
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()
            channels[ours] = process
        _listen(channels, heard)
    finally:
        for channel, process in channels.items():
            process.kill()
            process.join()
            channel.close()


def _listen(channels: dict[Connection, BaseProcess], heard: Send) -> None:
    """Pass on what workers say until all are done."""
    open_channels = set(channels)
    while open_channels:
        for channel in wait(list(open_channels)):
            assert isinstance(channel, Connection)
            try:
                said = channel.recv()
            except EOFError:
                channels[channel].join()
                code = channels[channel].exitcode or 0
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                raise WorkerLostError(
                    f"a worker of the harvest {how} (out of memory?): what was finished is kept; run "
                    "the same harvest again, with a smaller --memory or --workers"
                ) from None
            if isinstance(said, BaseException):
                raise said
            if said is None:
                open_channels.discard(channel)
            else:
                heard(said)


def _work(job: Job, process: int, items: list[int], channel: Connection, parent: int) -> None:
    """What a worker does; its only way to speak is the channel: news, an error, or None at the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    libc = ctypes.CDLL(None)
    libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    libc.mallopt(_ARENA_MAX, 1)  # the writing thread gives back to where the computing one takes
    gc.freeze()  # collecting would touch, and so copy, all that is shared with the parent
    if os.getppid() != parent:
        os._exit(1)

    told = itertools.count(1)

    def tell(news: object) -> None:
        channel.send(news)
        if next(told) % _TRIM_EVERY == 0:
            libc.malloc_trim(0)  # a long harvest takes no more memory than a short one

    try:
        job(process, items, tell)
        channel.send(None)
    except BaseException as error:  # noqa: BLE001 - it is raised again in the parent
        try:
            channel.send(error)
        except Exception:  # noqa: BLE001 - an error that cannot be pickled, e.g. with a frame inside
            channel.send(RuntimeError(f"{type(error).__name__}: {error}"))
