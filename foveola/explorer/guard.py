"""Who may ask: whoever knows the token, by a name of this machine, from the page itself."""

import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = MutableMapping[str, Any]
Call = Callable[..., Awaitable[Any]]

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address to listen at."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Guard:
    """Stands in front of the application: refuses foreign Host headers (400), requests without the
    token (403), and those that another site's page sends (403); adds headers that bind the page to itself.

    The token comes in the address of the page, once, and from then on in a cookie that scripts cannot read
    and other sites do not send. On loopback the Host is localhost or a loopback address, of any port (a
    tunnel may have another one); elsewhere it is an address or a name of this machine. So a name that is made
    to point here ("DNS rebinding") leads nowhere.
    """

    def __init__(self, application: Call, token: str, host: str, cookie: str = "foveola") -> None:
        self.application, self.token, self.cookie = application, token, cookie
        self.local = is_loopback(host)
        own = {host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
        self.names = {"localhost"} if self.local else {"localhost", *own}

    async def __call__(self, scope: Scope, receive: Call, send: Call) -> None:
        if scope["type"] == "lifespan":
            await self.application(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if not self._is_ours(host):
            await _refuse(send, 400, "This page is not known by that name.")
            return
        came = scope["path"] == "/" and self._same(_token_of(scope))
        if not came and not self._same(_cookie_of(headers.get("cookie", ""), self.cookie)):
            await _refuse(send, 403, "Open the whole address that foveola explore printed, with its token.")
            return
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD") and origin is not None and urlsplit(origin).netloc != host:
            await _refuse(send, 403, "Another page may not ask here.")
            return

        async def answer(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_encoded(HEADERS)]
                if came:
                    value = f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict"
                    message["headers"].append((b"set-cookie", value.encode()))
            await send(message)

        await self.application(scope, receive, answer)

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header is a name of this machine."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if name in self.names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return not self.local or address.is_loopback

    def _same(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self.token.encode())


def _token_of(scope: Scope) -> str:
    query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
    return query.get("token", [""])[-1]


def _cookie_of(header: str, name: str) -> str:
    try:
        found = SimpleCookie(header).get(name)
    except CookieError:
        return ""
    return found.value if found else ""


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


async def _refuse(send: Call, status: int, text: str) -> None:
    headers = {"content-type": "text/plain; charset=utf-8", "cache-control": "no-store", **HEADERS}
    await send({"type": "http.response.start", "status": status, "headers": _encoded(headers)})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})
