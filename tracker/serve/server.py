"""The thread in which page and API run, beside the tracking."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from tracker.errors import ConfigError
from tracker.serve.options import ServeOptions

if TYPE_CHECKING:
    from tracker.live import LiveSession

# Pictures are drawn in as many threads, for all watchers together: tracking comes first.
DRAWING_THREADS = 2
MAX_CONNECTIONS = 256
_LEAVE_SECONDS = 1


class Server:
    """Enter to take the address, serve a session while it is `shown`, leave to give the address back.

    The address is taken before an engine is loaded: that it is not free shows at once, and who asks meanwhile
    is answered afterwards. url: where it is.
    Raises ConfigError for an address that cannot be had, or where the extra is missing.
    """

    url: str

    def __init__(self, options: ServeOptions) -> None:
        self._options = options

    def __enter__(self) -> Self:
        try:
            import fastapi  # noqa: F401
            import prometheus_client  # noqa: F401
            import uvicorn  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"serve needs {error.name}: install tracker[serve]") from error
        host, port = self._options.host, self._options.port
        try:
            self._socket = _listen(host, port)
        except OSError as error:
            raise ConfigError(
                f"cannot listen at {host}:{port}: {error.strerror or error}; choose another with --serve"
            ) from error
        place = f"[{host}]" if ":" in host else host
        self.url = f"http://{place}:{self._socket.getsockname()[1]}/"
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    @contextmanager
    def shown(self, session: LiveSession) -> Iterator[None]:
        """Serve this session, which must be entered, for so long. Once."""
        import uvicorn

        from tracker.serve.access import Access
        from tracker.serve.app import STATIC, make_app

        stopping = threading.Event()
        drawing = ThreadPoolExecutor(DRAWING_THREADS, thread_name_prefix="draw")
        app = Access(
            make_app(session, drawing=drawing, stopping=stopping),
            token=self._options.token,
            login_page=(STATIC / "login.html").read_bytes(),
            report=session.note,
        )
        config = uvicorn.Config(
            app,
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_LEAVE_SECONDS,
            limit_concurrency=MAX_CONNECTIONS,
            ws="none",
        )
        server = uvicorn.Server(config)

        def serve() -> None:
            try:
                server.run(sockets=[self._socket])
            except BaseException as error:  # the run goes on without its page, but not in silence
                session.note(f"page: it is gone: {type(error).__name__}: {error}")

        thread = threading.Thread(target=serve, name="serve", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            server.should_exit = True
            thread.join(2 * _LEAVE_SECONDS)
            drawing.shutdown(wait=False, cancel_futures=True)


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    # Said to be TCP, or asyncio leaves Nagle's algorithm on, which costs 40 ms an answer.
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener
