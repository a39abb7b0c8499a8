"""Which requests the playground's server answers: those of its own page and HTTP API, on this machine."""

from __future__ import annotations

import re
from typing import Any

from starlette.responses import PlainTextResponse

HOST = "127.0.0.1"
_MOST_BYTES = 13 * 2**20  # of a request: a text of the largest size, with every character escaped in JSON
# What the page and its HTTP API need of gradio's routes. Uploads, files and proxies are not among them.
_ROUTES = re.compile(
    r"/|/(assets|static|svelte)/.*|/(theme\.css|favicon\.ico|config|manifest\.json)"
    r"|/gradio_api/((run|call|heartbeat)/.*|queue/(join|data)|cancel|info|startup-events)"
)
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self' data:; frame-ancestors 'none'; form-action 'none'"
)


class Guard:
    """ASGI middleware that answers requests of this page alone: its host, origin and routes, up to a size."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket, which gradio does not use
            await send({"type": "websocket.close"})
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        host, length = headers.get("host", ""), headers.get("content-length", "")
        refusal = None
        # A name of another site that resolves to 127.0.0.1 must not reach the page either.
        if not re.fullmatch(rf"({re.escape(HOST)}|localhost)(:\d+)?", host):
            refusal = (403, "this page is for 127.0.0.1 and localhost alone")
        elif "origin" in headers and headers["origin"] != f"http://{host}":
            refusal = (403, "another site cannot use this page")
        elif not _ROUTES.fullmatch(scope["path"]):
            refusal = (404, "there is no such page")
        elif scope["method"] == "POST" and not (length.isdecimal() and int(length) <= _MOST_BYTES):
            refusal = (413, f"a request needs a Content-Length of at most {_MOST_BYTES} bytes")
        if refusal:
            code, message = refusal
            await PlainTextResponse(message, code)(scope, receive, send)
            return

        async def send_with_policy(event: Any) -> None:
            if event["type"] == "http.response.start":
                event["headers"] = [
                    *event.get("headers", []),
                    (b"content-security-policy", _POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(event)

        await self.app(scope, receive, send_with_policy)
