"""Annotated pictures of any number of streams through one connection, as they come: MJPEG.

A browser opens six connections to a server and no more, so a page with a connection for each tile stops at
the sixth. Hence one response for all: multipart/x-mixed-replace whose parts name their stream in X-Stream. Of
one stream it is what cameras send, good for <img> and players too.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from urllib.parse import quote

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tracker.errors import ConfigError, SinkError
from tracker.streams import Streams

BOUNDARY = b"frame"
_STALLED_SECONDS = 20.0  # who takes nothing for so long is gone


class Video(Response):
    """Sends the newest picture of each stream, at most so many a second, until the watcher leaves, `stopping`
    is set, or the last of the streams is gone. A slow watcher gets fewer pictures, never older ones.

    drawing: where pictures are drawn, for all watchers together.
    """

    media_type = "multipart/x-mixed-replace"

    def __init__(
        self,
        streams: Streams,
        names: Sequence[str],
        *,
        rate: float,
        drawing: Executor,
        stopping: threading.Event,
    ) -> None:
        super().__init__()
        self._streams, self._names = streams, names
        self._interval = 1 / rate
        self._drawing, self._stopping = drawing, stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = b"%s; boundary=%s" % (self.media_type.encode(), BOUNDARY)
        headers = [(b"content-type", kind), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        left = asyncio.ensure_future(_left(receive))
        try:
            await self._show(send, left)
        except TimeoutError:
            return  # nobody is there to be told of the end
        finally:
            left.cancel()
        await send({"type": "http.response.body", "body": b""})

    async def _show(self, send: Send, left: asyncio.Future[None]) -> None:
        loop = asyncio.get_running_loop()
        with ExitStack() as stack:
            watches = {}
            for stream in self._streams.all():
                if stream.name in self._names:
                    watches[stream.name] = stream, stack.enter_context(stream.preview.watch())
            await _part(send, b"--%s\r\n" % BOUNDARY)
            while watches and not left.done() and not self._stopping.is_set():
                due = loop.time() + self._interval
                for name, (stream, watch) in tuple(watches.items()):
                    if not self._has(name, stream):
                        del watches[name]
                        continue
                    try:
                        jpeg = await loop.run_in_executor(self._drawing, watch.next, 0.0)
                    except (SinkError, RuntimeError):  # a picture that cannot be shown; or the server ends
                        continue
                    if jpeg is not None:
                        await _part(send, _worded(name, jpeg))
                await asyncio.wait([left], timeout=max(0.0, due - loop.time()))

    def _has(self, name: str, stream: object) -> bool:
        try:
            return self._streams.get(name) is stream
        except ConfigError:
            return False


def _worded(name: str, jpeg: bytes) -> bytes:
    # The boundary follows at once: browsers show a picture when they see that it is over.
    return b"Content-Type: image/jpeg\r\nContent-Length: %d\r\nX-Stream: %s\r\n\r\n%s\r\n--%s\r\n" % (
        len(jpeg),
        quote(name).encode(),
        jpeg,
        BOUNDARY,
    )


async def _part(send: Send, data: bytes) -> None:
    async with asyncio.timeout(_STALLED_SECONDS):
        await send({"type": "http.response.body", "body": data, "more_body": True})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
