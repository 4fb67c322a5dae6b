"""Processes of their own for tests that kill them: forked from one that has imported what they need.

A new Python takes seconds to import torch; a fork takes milliseconds. It must not come from the process of the tests:
after a backward pass torch refuses to run another one in a fork. So a server is asked that has done nothing but import.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "circuits.cli.main",
        "circuits.effects",
        "circuits.figures",
        "circuits.harvesting",
        "circuits.models.zoo.loading",
        "circuits.sae",
        "circuits.featurevis",
    ]
)


class Forked:
    """A process that runs some Python.

    Args:
        code: what it runs.
        arguments: its `sys.argv[1:]`.
        environment: variables on top of this process'.
        out: the file that takes what it prints, on both streams.
    """

    def __init__(
        self,
        code: str,
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        out: Path | None = None,
    ) -> None:
        given = {**os.environ, **(environment or {})}
        words = [str(a) for a in arguments]
        if out is not None:
            out.touch()
        self._process = _CONTEXT.Process(target=_run, args=(code, words, given, out))
        # The child would run this process' main module again, which may be a page that was tested before.
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            self._process.start()
        finally:
            sys.modules["__main__"] = main

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def running(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        """Kill it as `kill -9` does, and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self, timeout: float = 120) -> int:
        """Its exit code, negative if a signal ended it.

        Raises:
            TimeoutError: if it has not ended by then.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} has not ended after {timeout} s")
        return self._process.exitcode


COMMAND_LINE = "from circuits.cli.main import main; main()"


def command_line(*words: object, **options: object) -> Forked:
    """`circuits WORDS` in a process of its own."""
    return Forked(COMMAND_LINE, *words, **options)  # type: ignore[arg-type]


def ranks(n: int, code: str, *arguments: object, folder: Path) -> list[int]:
    """The exit codes of `n` processes that share work as `torchrun` would have them do; logs are kept in `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
        "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0", "GROUP_RANK": "0",
    }  # fmt: skip
    started = [
        Forked(
            code, *arguments, environment={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, out=folder / f"rank{r}.log"
        )
        for r in range(n)
    ]  # fmt: skip
    return [process.wait() for process in started]


def _run(code: str, words: list[str], environment: dict[str, str], out: Path | None) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["circuits", *words]
    where = os.open(out or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(where, stream)
    exec(compile(code, "<forked>", "exec"), {"__name__": "__main__"})
