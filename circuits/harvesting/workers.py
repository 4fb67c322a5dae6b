"""Distributing work among processes of this machine.

Processes are forked, so that they have the model and the data at once, share the memory of the weights, and compute
with one thread each. That is faster than one process with many threads, since most layers are too small to be divided
well. It is also safe for any model: a forward pass may even write to the model.
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
"""Messages after which a worker returns freed memory to the system, which takes some time."""

_ARENA_MAX = -8  # M_ARENA_MAX of glibc's mallopt
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux' prctl


class WorkerLostError(RuntimeError):
    """A worker ended before its work was done, and could not say why."""


Send = Callable[[Any], object]
"""Sends a message to the process that distributed the work."""

Job = Callable[[int | None, Sequence[int], Send], object]
"""Does some items, given the number of the process (None: the one that distributes), the items, and how to send."""


def share_out(items: Sequence[int], workers: int, job: Job, heard: Send) -> None:
    """Do items in several processes; in this process if only one is asked for, or the system has no fork to rely on.

    Args:
        items: the numbers of what is to be done.
        workers: the number of processes.
        job: does some items; what it sends must not be None.
        heard: called in this process with every message, in no particular order.

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
            # Every n-th item from i on, so that all get through the data at the same pace.
            process = context.Process(
                target=_work, args=(job, i, list(items[i::n]), theirs, os.getpid()), daemon=True
            )
            with warnings.catch_warnings():
                # Python 3.12 and later warn of forking a process with threads, whose locks may be held. Workers use
                # nothing that other threads of this process hold.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()  # so that the channel ends when the worker does
            channels[ours] = process
        _listen(channels, heard)
    finally:
        for channel, process in channels.items():
            # Also after an error: a worker that goes on would write shards that nobody waits for.
            process.kill()
            process.join()
            channel.close()


def _listen(channels: dict[Connection, BaseProcess], heard: Send) -> None:
    """Pass on messages of workers until all are done."""
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
    """The main function of a worker, which sends messages, an error, or None at the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the parent ends its workers
    libc = ctypes.CDLL(None)
    libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    # One arena for all threads: memory that the writing thread frees can then be used by the computing one.
    libc.mallopt(_ARENA_MAX, 1)
    gc.freeze()  # a collection would write to, and so copy, all objects shared with the parent
    if os.getppid() != parent:  # the parent ended before the signal of its death was set up
        os._exit(1)

    told = itertools.count(1)

    def tell(news: object) -> None:
        channel.send(news)
        if next(told) % _TRIM_EVERY == 0:
            libc.malloc_trim(0)  # else the memory of a long harvest would grow

    try:
        job(process, items, tell)
        channel.send(None)
    except BaseException as error:  # noqa: BLE001 - it is raised again in the parent
        try:
            channel.send(error)
        except Exception:  # noqa: BLE001 - an error that cannot be pickled: its text is sent
            channel.send(RuntimeError(f"{type(error).__name__}: {error}"))
