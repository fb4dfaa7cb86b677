"""Tracks for whoever listens: lines on standard output, messages to an MQTT broker.

A listener that is slow or gone holds up nobody: lines wait in a bounded box that a thread of its own empties,
the oldest make room for the newest, and what was lost is counted. Knows the two ways; not what is in a line.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from tracker.addresses import Address, redacted
from tracker.errors import ConfigError
from tracker.sinks.jsonl import named_line
from tracker.sinks.output import LinesOf
from tracker.types import Frame, Tracks

BOX_LINES = 1000
FLUSH_SECONDS = 1.0  # at the end, for what is still in the box
DEFAULT_TOPIC = "tracker"


class Outbox:
    """Lines of several streams on their way to one listener.

    send: takes a stream's name and a line, may wait, and says whether it went out; OSError is a no.
    lost: lines by stream that did not.
    """

    def __init__(self, send: Callable[[str, bytes], bool], *, limit: int = BOX_LINES) -> None:
        self._send, self._limit = send, limit
        self._box: deque[tuple[str, bytes]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.lost: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._empty, name="publish", daemon=True)
        self._thread.start()

    def put(self, name: str, line: bytes) -> None:
        with self._changed:
            if len(self._box) >= self._limit:
                self.lost[self._box.popleft()[0]] += 1
            self._box.append((name, line))
            self._changed.notify()

    def close(self, timeout: float = FLUSH_SECONDS) -> None:
        """Gives the rest that much time. A thread that hangs in a dead pipe ends with the process."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        with self._changed:
            self.lost.update(name for name, _ in self._box)
            self._box.clear()

    def _empty(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._box or self._closed)
                if not self._box:
                    return
                name, line = self._box.popleft()
            try:
                good = self._send(name, line)
            except OSError:
                good = False
            if not good:
                with self._changed:
                    self.lost[name] += 1


class Listener(Protocol):
    """Someone to publish to. lost: lines by stream that never got there."""

    @property
    def lost(self) -> Counter[str]: ...
    def put(self, name: str, line: bytes) -> None: ...
    def close(self) -> None: ...


class LinePublisher:
    """One stream's lines for a listener, which whoever made it closes. Implements `types.Sink`."""

    def __init__(self, listener: Listener, name: str) -> None:
        self._listener, self._name = listener, name
        self.lines_of: LinesOf = partial(named_line, name)

    @property
    def undelivered(self) -> int:
        return self._listener.lost[self._name]

    def write(self, frame: Frame, tracks: Tracks) -> None:
        self.append(self.lines_of(frame, tracks).encode())

    def append(self, lines: bytes) -> None:
        self._listener.put(self._name, lines)

    def close(self, *, complete: bool) -> None:
        pass


def standard_output(descriptor: int = 1) -> Outbox:
    """JSON lines to a file descriptor. One that was closed at the other end stays lost."""

    def send(name: str, line: bytes) -> bool:
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        return True

    return Outbox(send)


class Mqtt:
    """A broker: each stream has a topic below the address's path, `tracker` where it has none.

    Messages are sent with quality of service 1, and while the broker is away as many wait as fit into the
    box. Raises ConfigError where paho-mqtt is not installed. An unreachable broker is no error: it is tried
    again for ever, and the losses are counted.
    """

    def __init__(self, address: Address) -> None:
        try:
            import paho.mqtt.client as mqtt
            from paho.mqtt.enums import CallbackAPIVersion
        except ImportError as error:
            raise ConfigError("publishing to mqtt: needs paho-mqtt: install tracker[live]") from error
        self._topic = address.path.strip("/") or DEFAULT_TOPIC
        if any(character in self._topic for character in "+#\0"):
            raise ConfigError(f"{address}: the characters + and # cannot be in a topic to publish to")
        self._good = mqtt.MQTT_ERR_SUCCESS
        self._waits = mqtt.MQTT_ERR_NO_CONN  # in the client's own queue, until the broker is back
        self._under_way: dict[int, str] = {}
        self._early: set[int] = set()  # acknowledged before we knew their numbers
        self._lock = threading.Lock()
        self.error = ""
        self._client: Any = mqtt.Client(CallbackAPIVersion.VERSION2)
        self._client.max_queued_messages_set(BOX_LINES)
        self._client.reconnect_delay_set(min_delay=1, max_delay=30)
        self._client.on_publish = self._published
        self._client.on_connect = self._connected
        if address.user is not None:
            self._client.username_pw_set(address.user, address.password)
        if address.scheme == "mqtts":
            self._client.tls_set()
        self._client.connect_async(address.host or "", address.port or 1883)
        self._client.loop_start()
        self._box = Outbox(self._send)

    @property
    def lost(self) -> Counter[str]:
        return self._box.lost

    def put(self, name: str, line: bytes) -> None:
        self._box.put(name, line)

    def close(self) -> None:
        """What no broker has acknowledged within FLUSH_SECONDS is lost."""
        self._box.close()
        until = time.monotonic() + FLUSH_SECONDS
        while self._under_way and self._client.is_connected() and time.monotonic() < until:
            time.sleep(0.01)
        self._client.disconnect()
        self._client.loop_stop()
        with self._lock:
            self._box.lost.update(self._under_way.values())
            self._under_way.clear()

    def _send(self, name: str, line: bytes) -> bool:
        # Not under our lock: the client holds one of its own while it publishes, and while it tells us.
        sent = self._client.publish(f"{self._topic}/{name}", line.rstrip(b"\n"), qos=1)
        if sent.rc not in (self._good, self._waits):
            return False
        with self._lock:
            if sent.mid in self._early:
                self._early.remove(sent.mid)
            else:
                self._under_way[sent.mid] = name
        return True

    def _published(self, client: Any, data: Any, mid: int, *rest: Any) -> None:
        with self._lock:
            if self._under_way.pop(mid, None) is None:
                self._early.add(mid)

    def _connected(self, client: Any, data: Any, flags: Any, reason: Any, *rest: Any) -> None:
        self.error = redacted(reason) if reason.is_failure else ""
