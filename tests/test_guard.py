"""Whom the app's server answers: raw sockets on a server that runs."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import pytest

from apps.guard import Guard
from circuits.cli.serving import serve_app
from tests.commands import refused

PATHS = (
    "/", "/unit?model=a", "/_stcore/health", "/_stcore/host-config", "/static/js/x.js", "/media/x.png",
    "/component/x/index.html", "/_stcore/upload_file/a/b", "/_stcore/stream", "/no/such/page",
)  # fmt: skip
UPGRADE = (
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


def free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    found = free()
    command = [
        sys.executable,
        "-c",
        f"from apps.__main__ import serve; serve('127.0.0.1', {found})",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while (
        process.poll() is None
        and time.monotonic() < deadline
        and answer(found, "/_stcore/health", "localhost") != 200
    ):
        time.sleep(0.1)
    yield found
    process.terminate()
    process.wait(timeout=20)


def answer(port: int, path: str, *hosts: str, method: str = "GET", more: str = "") -> int:
    """The status of a request with these `Host` headers, 0 if there was none."""
    head = "".join(f"Host: {host}\r\n" for host in hosts)
    close = "" if "Upgrade" in more else "Connection: close\r\n"
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=10) as to:
        to.sendall(f"{method} {path} HTTP/1.1\r\n{head}{close}{more}\r\n".encode("latin-1"))
        words = to.recv(100).decode("latin-1").split()
        return int(words[1]) if len(words) > 1 else 0
    return 0


def head(port: int, path: str, host: str) -> str:
    """The head of the answer to a request."""
    request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as to:
        to.sendall(request.encode())
        said = b"".join(iter(lambda: to.recv(1 << 16), b""))
    return said.partition(b"\r\n\r\n")[0].decode("latin-1") + "\r\n"


@pytest.mark.parametrize("path", PATHS)
def test_a_rebound_name_reaches_nothing(port: int, path: str) -> None:
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "localhost.evil.example",
        "10.0.0.1",
        "[::2]",
    ):
        for method in ("GET", "PUT", "POST", "DELETE", "OPTIONS", "HEAD"):
            assert answer(port, path, host, method=method) == 403, (host, method)
        assert answer(port, path, host, more=UPGRADE) == 403, "a web socket"
    for host in ("", "localhost@evil.example", "localhost:80:80", "localhost/", "127.0.0.1 evil"):
        assert answer(port, path, host) in (400, 403), host
    assert answer(port, path, "localhost", "evil.example") in (400, 403)
    assert answer(port, path) in (400, 403), "no name at all"


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST"])
def test_the_apps_own_names_reach_page_and_web_socket(port: int, name: str) -> None:
    for host in (name, f"{name}:{port}", f"{name}:9000"):  # as a tunnel's other end has it
        assert answer(port, "/", host) == 200
        assert answer(port, "/_stcore/health", host, more=f"Origin: http://{host}\r\n") == 200
        assert (
            answer(port, "/_stcore/stream", host, more=UPGRADE + f"Origin: http://{host}\r\n")
            == 101
        )


def test_no_page_of_another_can_frame_or_steer_the_app(port: int) -> None:
    for path in PATHS:
        for host in (f"localhost:{port}", "evil.example"):
            told = head(port, path, host).lower()
            assert "\r\nx-frame-options: sameorigin\r\n" in told, (path, host)
            assert "\r\ncontent-security-policy: frame-ancestors 'self'\r\n" in told
    with urlopen(f"http://localhost:{port}/_stcore/host-config") as told:
        assert json.load(told)["allowedOrigins"] == []


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://localhost:1", "http://127.0.0.1", "file://", "http://localhost@evil.example"],
)  # fmt: skip
def test_pages_of_others_reach_nothing(port: int, origin: str) -> None:
    more = f"Origin: {origin}\r\n"
    for path in PATHS:
        assert answer(port, path, f"localhost:{port}", more=more) == 403
    assert answer(port, "/_stcore/stream", f"localhost:{port}", more=UPGRADE + more) == 403
    assert (
        answer(port, "/_stcore/upload_file/a/b", f"localhost:{port}", method="PUT", more=more)
        == 403
    )


# --- the address ---------------------------------------------------------------------------------


async def nobody(*_: object) -> None:
    raise AssertionError("not asked")


@pytest.mark.parametrize(
    ("host", "answered", "not_answered"),
    [
        ("127.0.0.1", ("localhost:8501", "127.0.0.1"), ("10.1.2.3", "evil.example", "localhost.")),
        ("0.0.0.0", ("10.1.2.3:80", "[fe80::1]", socket.gethostname(), "localhost"), ("evil.example", "1.2.3.4.evil")),
        ("10.1.2.3", ("10.1.2.3", "localhost"), ("10.1.2.4", "evil.example")),
        ("::1", ("[::1]:8501",), ("[::2]", "::1")),
    ],
)  # fmt: skip
def test_names_of_what_it_listens_on(
    host: str, answered: tuple[str, ...], not_answered: tuple[str, ...]
) -> None:
    guard = Guard(nobody, host)
    assert all(guard.answers([(b"host", name.encode())]) for name in answered)
    assert not any(guard.answers([(b"host", name.encode())]) for name in not_answered)


@pytest.mark.parametrize(
    "host", ["", " ", "a..b", "no such name", "unix:///tmp/a", "x" * 300, "1.2.3.4.5", "\x00"]
)
def test_an_address_that_is_none_is_refused(host: str, capsys, tmp_path: Path) -> None:
    message = f"host {host[:80]!r} is not valid: expected an address or a name of this machine"
    refused(capsys, message, "app", "--workspace", str(tmp_path), "--host", host)


class _StartedError(Exception):
    """Ends a command where the server would take its place."""


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("localhost", True), ("127.1", True), ("0.0.0.0", False), ("0", False)],
)
def test_an_address_that_others_reach_is_started_with_a_warning(
    host: str, alone: bool, capsys, tmp_path: Path, monkeypatch
) -> None:
    def started(_: str, arguments: list[str], __: object) -> None:
        assert arguments[-2:] == [host, str(port)]
        raise _StartedError

    monkeypatch.setattr("os.execve", started)
    port = free()
    with pytest.raises(_StartedError):
        serve_app(tmp_path, port, host)
    said = capsys.readouterr().out
    assert f"http://{host}:{port}" in said
    assert ("Whoever reaches this address can start jobs" in said) is not alone
