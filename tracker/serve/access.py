"""Who is let in, and with what: the outermost layer of the server, an ASGI application around another.

Without a token only this machine is listened to; then a page of somebody else's that runs in a browser here
is the danger. It could send requests to us (stopped by Sec-Fetch-Site and Origin), or have its own name lead
to 127.0.0.1 (DNS rebinding; stopped by Host). Knows requests, not what they ask for.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import urlsplit

from tracker.addresses import redacted
from tracker.serve.options import is_loopback

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

COOKIE = "track"
MAX_BODY = 16_384  # bytes: a zone with all its corners has 2000
BODY_SECONDS = 10.0
LOGIN_SECONDS = 0.5  # a wrong token takes so long
_COOKIE_SECONDS = 30 * 24 * 3600
_PROBES = ("/livez", "/readyz")
_CHANGING = ("POST", "PUT", "DELETE", "PATCH")
_HEADERS = [
    (b"content-security-policy", b"default-src 'none'; script-src 'self'; style-src 'self'; "
     b"img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'self'; "
     b"frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]  # fmt: skip


class RefusedError(Exception):
    """status: of HTTP. The words are for whoever asked."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class Access:
    """Lets through who may come in; answers the others, and whatever goes wrong inside.

    login_page: what to show at / to who has no token yet. report: told of a bug, in one line.
    """

    def __init__(
        self, inner: Application, *, token: str | None, login_page: bytes, report: Callable[[str], None]
    ) -> None:
        self._inner, self._token = inner, token
        self._login_page, self._report = login_page, report
        # The cookie proves that its owner once had the token; who steals it does not have the token.
        self._cookie = (
            None if token is None else hmac.new(token.encode(), b"page", hashlib.sha256).hexdigest()
        )

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._inner(scope, receive, send)
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        try:
            await self._answer(scope, receive, answer)
        except RefusedError as error:
            await _send(answer, error.status, {"error": str(error)})
        except Exception as error:  # a bug, which must neither end the server nor show what it was about
            self._report(f"page: {scope['method']} {type(error).__name__}: {redacted(error)[:200]}")
            logging.getLogger(__name__).debug("in the server", exc_info=True)
            if not started:
                await _send(answer, 500, {"error": "something went wrong here; the run's own log says what"})
        return None

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        method, path = scope["method"], scope["path"]
        self._check_browser(method, path, headers)
        if method in _CHANGING:
            receive = await _whole_body(headers, receive)
        if path == "/login" and method == "POST" and self._token is not None:
            return await self._log_in(scope, receive, send)
        is_open = self._token is None or path in _PROBES or path.startswith("/static/")
        if not is_open and not self._knows(headers):
            if path == "/" and method == "GET":
                return await _send(send, 401, self._login_page)
            raise RefusedError(401, "a token is needed: send it as Authorization: Bearer …, or log in at /")
        return await self._inner(scope, receive, send)

    def _check_browser(self, method: str, path: str, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
            origin = urlsplit(headers.get("origin", "")).netloc
        except ValueError:
            raise RefusedError(400, "a Host or Origin that makes no sense") from None
        if self._token is None and not is_loopback(name):
            raise RefusedError(
                421, "without a token only localhost is served here: call it 127.0.0.1 or localhost"
            )
        site = headers.get("sec-fetch-site")
        if site in ("cross-site", "same-site") and not (method == "GET" and path == "/"):
            raise RefusedError(403, "requests from other sites are not taken")
        if method in _CHANGING and site is None and "origin" in headers and origin != host:
            raise RefusedError(403, "requests from other origins are not taken")

    def _knows(self, headers: dict[str, str]) -> bool:
        assert self._token is not None and self._cookie is not None
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and _same(token.strip(), self._token):
            return True
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return morsel is not None and _same(morsel.value, self._cookie)

    async def _log_in(self, scope: Message, receive: Receive, send: Send) -> None:
        assert self._token is not None
        try:
            given = json.loads((await receive())["body"])["token"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise RefusedError(400, 'send {"token": "…"}') from None
        if not isinstance(given, str) or not _same(given, self._token):
            await asyncio.sleep(LOGIN_SECONDS)
            raise RefusedError(401, "this is not the token")
        secure = "; Secure" if scope.get("scheme") == "https" else ""
        cookie = f"{COOKIE}={self._cookie}; HttpOnly; SameSite=Strict; Path=/; Max-Age={_COOKIE_SECONDS}"
        await _send(send, 200, {"ok": True}, [(b"set-cookie", (cookie + secure).encode())])


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode())


async def _whole_body(headers: dict[str, str], receive: Receive) -> Receive:
    """The body, read in bounded time and size, and then handed on."""
    declared = headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared[:20]) > MAX_BODY:
        raise RefusedError(413, f"a body has at most {MAX_BODY} bytes")
    # A form of another site's cannot send this kind, nor can its scripts without being asked about first.
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RefusedError(400, "the body did not come")
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > MAX_BODY:
                    raise RefusedError(413, f"a body has at most {MAX_BODY} bytes")
    except TimeoutError:
        raise RefusedError(408, f"the body did not come within {BODY_SECONDS:g} s") from None
    if body and kind != "application/json":
        raise RefusedError(415, "a body is JSON, and its Content-Type application/json")
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return replay


async def _send(
    send: Send, status: int, content: Any, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    is_page = isinstance(content, bytes)
    body = content if is_page else json.dumps(content).encode()
    kind = b"text/html; charset=utf-8" if is_page else b"application/json"
    own = [
        (b"content-type", kind),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *(headers or ())]})
    await send({"type": "http.response.body", "body": body})
