"""Whom the app's server answers: pages of its own, asked for by a name that it was started for.

A page of another site can have its name resolved to this machine ("DNS rebinding") and would then be of the app's own
origin, for a browser; and any page can open a web socket to any address. The app can start jobs, so both are refused,
before anything of Streamlit's sees the request. Nor may another page show the app in a frame of its own, where a person
would click on what they do not see.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})

_UNFRAMED = (
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"content-security-policy", b"frame-ancestors 'self'"),
)
"""What tells a browser not to show an answer in another page's frame. The app's own pages have frames: components."""

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:/@\s]+)(:[0-9]{1,5})?", re.ASCII)
_ORIGIN = re.compile(r"https?://([^/@\s]+)", re.ASCII)


class Guard:
    """An ASGI application that answers requests for its hosts, and refuses all others with 403.

    All answers say that they are not to be framed by pages of another origin.

    Args:
        app: answers what is let through.
        host: what the server was told to listen on. Of an address that stands for all of this machine's (`0.0.0.0`),
            every address and the machine's own name are let through: only names can be made to lead elsewhere.
    """

    def __init__(self, app: Application, host: str) -> None:
        self._app = app
        addresses = {where[4][0] for where in socket.getaddrinfo(host, None)}
        self._any_address = any(ipaddress.ip_address(a).is_unspecified for a in addresses)
        mine = {socket.gethostname()} if self._any_address else {host, *addresses}
        self._names = LOOPBACK | {f"[{name}]" if ":" in name else name.lower() for name in mine}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""

        async def unframed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_UNFRAMED]}
            await send(message)

        if scope["type"] == "lifespan" or self.answers(scope["headers"]):
            await self._app(scope, receive, unframed)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # not accepted: the answer is 403
        else:
            told = [(b"content-type", b"text/plain; charset=utf-8")]
            await unframed({"type": "http.response.start", "status": 403, "headers": told})
            await unframed({"type": "http.response.body", "body": b"not a name of this app\n"})

    def answers(self, headers: list[tuple[bytes, bytes]]) -> bool:
        """Whether a request with these headers is for this app and comes from none of another's pages."""
        hosts = [v.decode("latin-1").lower() for k, v in headers if k.lower() == b"host"]
        origins = [v.decode("latin-1").lower() for k, v in headers if k.lower() == b"origin"]
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            return False
        # the app's pages are of the origin that they ask for, port and all; "null" is a page's without one
        found = [_ORIGIN.fullmatch(origin) for origin in origins]
        return all(match is not None and match[1] == hosts[0] for match in found)

    def _is_own(self, host: str) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        return match[1] in self._names or (self._any_address and _is_address(match[1]))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
