"""Who may ask the viewer: requests that hold its token, by one of its own names, from its own page.

A page of another site can send requests to 127.0.0.1, too, and by DNS rebinding under the name of that site: the token
keeps the first out, the check of the Host header the second.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]

OPEN = "/page/"  # the page's own files, which are the same for everyone and hold no data
SHARED = "/zarr/"  # what other programs' pages may read, if they hold the token
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors {ancestors}"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
CROSS_ORIGIN = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Headers": "Authorization, Range",
    "Access-Control-Allow-Methods": "GET, HEAD",
    "Access-Control-Expose-Headers": "Content-Length",
    "Cross-Origin-Resource-Policy": "cross-origin",
}


class Guard:
    """Middleware that lets through what may ask, and adds the headers that keep the page to itself.

    Parameters
    ----------
    token
        What a request must hold, as `Authorization: Bearer TOKEN` or `?token=`.
    hosts
        Names that the Host header may give, without port; addresses are allowed where the server listens beyond this
        machine, as rebinding needs a name.
    ancestors
        Which pages may show this one in a frame, as the CSP takes them: a notebook's.
    """

    def __init__(self, app: App, token: str, hosts: frozenset[str], beyond: bool, ancestors: str = "'none'") -> None:
        self.app, self.token, self.hosts, self.beyond = app, token, hosts, beyond
        self.headers = {name: value.format(ancestors=ancestors) for name, value in HEADERS.items()}

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        shared = scope["path"].startswith(SHARED)

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in (self.headers | (CROSS_ORIGIN if shared else {})).items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refused = self._refusal(scope, Headers(scope=scope), shared)
        await (refused or self.app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope, headers: Headers, shared: bool) -> PlainTextResponse | None:
        host = headers.get("host", "")
        if not self._is_own(host):
            return PlainTextResponse("This is not the name that this server was started under.\n", 421)
        origin = headers.get("origin")
        if origin is not None and not shared and origin != f"http://{host}":
            return PlainTextResponse("Only the viewer's own page may ask this.\n", 403)
        if scope["path"].startswith(OPEN):
            return None
        if shared and scope["method"] == "OPTIONS":  # a browser asks so, without the token, whether it may ask
            return PlainTextResponse("", 204)
        if not self._holds_token(scope, headers):
            return PlainTextResponse("Open the whole address that stpath view printed: it ends in ?token=...\n", 401)
        return None

    def _is_own(self, host: str) -> bool:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        name = name.strip("[]").casefold()
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.beyond

    def _holds_token(self, scope: Scope, headers: Headers) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.casefold() != "bearer":
            given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        return hmac.compare_digest(given.encode(), self.token.encode())
