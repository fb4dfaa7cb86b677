"""The page and its API: streams, counters, pictures and numbers for those who may; nothing for the others."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from browser import Browser
from cameras import Camera, free_port
from prometheus_client.parser import text_string_to_metric_families
from results import tracks_of
from test_cli import engine, make_clip
from test_live import Running

from tracker.errors import ConfigError
from tracker.live import LiveSession
from tracker.serve import access
from tracker.serve import app as serve_app
from tracker.serve.metrics import AGES
from tracker.serve.options import ServeOptions, take_options
from tracker.serve.server import Server
from tracker.session import options_from
from tracker.types import Frame

pytestmark = pytest.mark.alone

__all__ = ["engine"]  # a fixture

PASSWORD = "pl4nted-Secret"
TOKEN = "a token of more than sixteen"
LINE = {"kind": "line", "name": "gate", "points": [[0.1, 0.5], [0.9, 0.5]]}


class Client:
    """Asks one server, each time through a new connection."""

    def __init__(self, url: str, **headers: str) -> None:
        self._address = url.removeprefix("http://").rstrip("/")
        self._connection = HTTPConnection(self._address, timeout=10)
        self._headers = headers

    def __call__(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, Any, HTTPResponse]:
        """Status, the answer (parsed where it is JSON), and the response. Bytes are sent as they are."""
        sent = {"Content-Type": "application/json"} if body is not None else {}
        sent |= {key.replace("_", "-"): value for key, value in {**self._headers, **headers}.items()}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        self._connection.close()
        self._connection.request(method, path, data, sent)
        response = self._connection.getresponse()
        text = response.read()
        is_json = response.headers.get("content-type") == "application/json" and text
        return response.status, json.loads(text) if is_json else text, response

    def close(self) -> None:
        self._connection.close()


class Served:
    """A live run with its page."""

    def __init__(self, live: Running, server: Server, out: Path) -> None:
        self.live, self.out, self.url = live, out, server.url
        self.ask = Client(server.url)

    def until(self, condition: Callable[[], object], seconds: float = 8.0) -> None:
        self.live.until(condition, seconds)

    def status(self, name: str) -> dict[str, Any]:
        streams = self.ask("GET", "/streams")[1]["streams"]
        found: dict[str, Any] = next(stream for stream in streams if stream["name"] == name)
        return found


@pytest.fixture(scope="module")
def served(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two replays, "clip" and "a b", in a run whose API may add cameras of this machine."""
    folder = tmp_path_factory.mktemp("served")
    clips = [str(make_clip(folder / name)) for name in ("clip.mp4", "a b.mp4")]
    options = options_from(
        {
            "sources": clips,
            "engine": str(engine),
            "realtime": True,
            "loop": True,
            "save": ["jsonl", "mot"],
            "out": str(folder / "out"),
        }
    )
    live = Running(LiveSession(options, stay=True, allow_local=True))
    live.thread.start()
    try:
        live.until(lambda: live.done)
        with serving(live) as server:
            served = Served(live, server, folder / "out")
            yield served
            served.ask.close()
    finally:
        live.session.stop()
        live.thread.join(6)
    assert live.error is None
    assert not [text for text in live.told if text.startswith("page:")]
    assert PASSWORD not in "".join(live.told)


@contextmanager
def serving(live: Running, **options: Any) -> Iterator[Server]:
    with Server(ServeOptions(host="127.0.0.1", port=0, **options)) as server, server.shown(live.session):
        yield server


# Streams


def test_streams_come_and_go_by_api(served: Served, camera: Camera) -> None:
    address = camera.url.replace("rtsp://", f"rtsp://viewer:{PASSWORD}@") + f"?key={PASSWORD}"
    status, answer, _ = served.ask("POST", "/streams", {"address": address, "name": "../gate 1"})
    assert (status, answer["name"]) == (201, "gate-1")
    assert PASSWORD not in str(answer)
    served.until(lambda: served.status("gate-1")["frames"]["tracked"] > 3)
    shown = served.status("gate-1")
    assert (shown["state"], shown["size"]) == ("live", [640, 360])
    assert len(shown["recent_age_ms"]) > 3
    assert PASSWORD not in str(served.ask("GET", "/streams")[1])
    assert PASSWORD.encode() not in served.ask("GET", "/metrics")[1]
    assert served.ask("DELETE", "/streams/gate-1")[0] == 204
    assert served.ask("DELETE", "/streams/gate-1")[0] == 404
    assert [stream["name"] for stream in served.ask("GET", "/streams")[1]["streams"]] == ["clip", "a b"]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("/etc/passwd", "a file is no live source"),
        ("file:///etc/passwd", "a file is no live source"),
        ("concat:a|b", "use rtsp"),
        ("subfile:,,start,0,end,1,,:/etc/passwd", "use rtsp"),
        ("webcam:0", "use rtsp"),
        (f"ftp://u:{PASSWORD}@x/", "use rtsp"),
        (f"rtsp://u:{PASSWORD}@x y/", "no spaces"),
        (f"rtsp://u:{PASSWORD}@:bad", "makes no sense"),
        ("rtsp://", "without a host"),
    ],
)
def test_addresses_that_are_not_for_strangers_are_refused(served: Served, address: str, words: str) -> None:
    status, answer, _ = served.ask("POST", "/streams", {"address": address})
    assert status == 400
    assert words in answer["error"]
    assert PASSWORD not in answer["error"]


def test_cameras_of_this_machine_are_for_those_who_allow_it(engine: Path, camera: Camera) -> None:
    live = Running(LiveSession(options_from({"sources": [], "engine": str(engine), "live": True}), stay=True))
    live.thread.start()
    try:
        live.until(lambda: hasattr(live.session, "pipeline"))
        live.session.streams.add(camera.url, name="inside", trusted=False)
        live.until(lambda: "loopback" in live.session.streams.statuses()[0].reason)
    finally:
        live.session.stop()
        live.thread.join(6)


# Counters


def test_a_line_drawn_counts_in_the_api_the_metrics_and_the_results(served: Served) -> None:
    status, answer, _ = served.ask("POST", "/streams/a%20b/counters", LINE)
    number = answer["number"]
    assert status == 201
    (counter,) = served.status("a b")["counters"]
    assert counter == {"number": number, **LINE, "in": 0, "out": 0, "by_class": {}}
    kept = served.out / "a b.counters.json"
    assert json.loads(kept.read_text()) == [LINE]

    # What this engine sees stands still: let somebody else walk through.
    for foot in (30, 70):
        walker = tracks_of((99, 60, foot - 20, 68, foot, 0.9, 0))
        frame = Frame(index=0, pts_seconds=0.0, size=(128, 96))
        served.live.session.streams.get("a b").counters.update(frame, walker)
    (counter,) = served.status("a b")["counters"]
    assert (counter["in"], counter["out"], counter["by_class"]) == (1, 0, {"person": {"in": 1, "out": 0}})

    def last_line() -> dict[str, Any]:
        (path,) = served.out.glob("a b-*.jsonl")
        line: dict[str, Any] = json.loads(path.read_text().splitlines()[-1])
        return line

    served.until(lambda: last_line().get("counts") == [{"name": "gate", "in": 1, "out": 0}])
    crossings = {
        sample.labels["direction"]: sample.value
        for sample in samples(served)
        if sample.name == "track_crossings_total"
    }
    assert crossings == {"in": 1, "out": 0}
    for line in next(served.out.glob("a b-*.txt")).read_text().splitlines():
        assert len(line.split(",")) == 10

    path = f"/streams/a%20b/counters/{number}"
    assert served.ask("PUT", path, {**LINE, "name": "door"})[0] == 204
    assert served.status("a b")["counters"][0]["name"] == "door"
    assert served.ask("DELETE", path)[0] == 204
    assert served.ask("DELETE", path)[0] == served.ask("PUT", path, LINE)[0] == 404
    assert served.ask("POST", "/streams/nobody/counters", LINE)[0] == 404
    assert json.loads(kept.read_text()) == []


@pytest.mark.parametrize(
    "body",
    [
        {**LINE, "points": [[0, 0]]},
        {**LINE, "points": [[0, 0], [1, 2]]},
        {**LINE, "points": [[0, 0], [0, 0]]},
        {**LINE, "kind": "ring"},
        {**LINE, "name": ""},
        {**LINE, "more": 1},
        b'{"kind":"line","name":"x","points":[[0,0],[NaN,1]]}',
        b"[" * 9000,
        b'{"kind":"line","name":"\\ud800","points":[[0,0],[1,1]]}',
        b"\xff\xfe",
        b"",
    ],
)
def test_a_shape_that_is_none_is_refused(served: Served, body: Any) -> None:
    status, answer, _ = served.ask("POST", "/streams/clip/counters", body)
    assert status in (400, 422)
    assert answer["error"]


# Numbers and probes


def samples(served: Served) -> Iterator[Any]:
    status, text, _ = served.ask("GET", "/metrics")
    assert status == 200
    for family in text_string_to_metric_families(text.decode()):
        yield from family.samples


def test_the_numbers_are_what_prometheus_reads(served: Served) -> None:
    served.until(lambda: served.status("clip")["frames"]["tracked"] > 2)
    found = {(each.name, tuple(sorted(each.labels.items()))): each.value for each in samples(served)}
    stream = ("stream", "clip")
    assert found["track_frames_total", (("fate", "tracked"), stream)] > 2
    assert found["track_stream_state", (("state", "live"), stream)] == 1
    assert found["track_objects", (("class", "car"), stream)] == 1
    buckets = [found["track_frame_age_seconds_bucket", (("le", str(bound)), stream)] for bound in AGES]
    assert buckets == sorted(buckets)
    assert buckets[-1] <= found["track_frame_age_seconds_count", (stream,)]
    assert found["track_loop_silent_seconds", ()] < 5
    assert found["process_resident_memory_bytes", ()] > 1e7


def test_probes_say_whether_the_loop_turns(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert served.ask("GET", "/livez")[1]["alive"] is True
    assert served.ask("GET", "/readyz")[1] == {"ready": True, "streams": 2, "live": 2}
    monkeypatch.setattr(serve_app, "STUCK_SECONDS", -1.0)
    assert [served.ask("GET", path)[0] for path in ("/livez", "/readyz")] == [503, 503]


# Pictures


def parts(response: HTTPResponse) -> Iterator[tuple[str, bytes]]:
    """Stream and JPEG, as a page reads them."""
    assert response.readline() == b"--frame\r\n"
    while True:
        headers: dict[bytes, bytes] = {}
        while (line := response.readline()) != b"\r\n":
            key, _, value = line.partition(b": ")
            headers[key] = value.strip()
        jpeg = response.read(int(headers[b"Content-Length"]))
        assert response.read(11) == b"\r\n--frame\r\n"
        yield headers[b"X-Stream"].decode(), jpeg


def test_one_connection_shows_many_streams_and_only_while_watched(served: Served) -> None:
    previews = [stream.preview for stream in served.live.session.streams.all()]
    connection = HTTPConnection(served.url[7:-1], timeout=10)
    connection.request("GET", "/video?stream=clip&stream=a+b&fps=30")
    response = connection.getresponse()
    assert response.headers["content-type"] == "multipart/x-mixed-replace; boundary=frame"
    seen: dict[str, set[bytes]] = {"clip": set(), "a%20b": set()}
    for name, jpeg in parts(response):
        picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
        assert picture.shape == (96, 128, 3)
        seen[name].add(jpeg)
        if all(len(pictures) > 2 for pictures in seen.values()):
            break
    assert all(preview.watched for preview in previews)
    response.close()
    connection.close()
    served.until(lambda: not any(preview.watched for preview in previews), 3.0)


@pytest.mark.parametrize(
    ("query", "status"),
    [("", 422), ("stream=nobody", 404), ("stream=clip&fps=0", 422), ("stream=clip&fps=nan", 422)],
)
def test_pictures_of_nobody_are_refused(served: Served, query: str, status: int) -> None:
    assert served.ask("GET", f"/video?{query}")[0] == status


# Who may come in


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/streams", None, {"Host": "evil.example:8080"}, 421),  # a name that leads here
        ("GET", "/", None, {"Host": "evil.example"}, 421),
        ("GET", "/streams", None, {"Host": "localhost:9000"}, 200),  # through a tunnel
        ("GET", "/streams", None, {"Sec_Fetch_Site": "cross-site"}, 403),
        ("GET", "/", None, {"Sec_Fetch_Site": "cross-site"}, 200),  # a link from elsewhere
        ("POST", "/streams", {"address": "rtsp://x/"}, {"Sec_Fetch_Site": "cross-site"}, 403),
        ("POST", "/streams", {"address": "rtsp://x/"}, {"Origin": "http://evil.example"}, 403),
        ("POST", "/streams", {"address": "rtsp://x/"}, {"Origin": "null"}, 403),
        ("DELETE", "/streams/clip", None, {"Origin": "http://evil.example"}, 403),
        ("POST", "/streams", {"address": "rtsp://x/"}, {"Content_Type": "text/plain"}, 415),
        ("POST", "/streams", b" " * 20_000, {}, 413),
        ("POST", "/streams", b"{}", {"Content_Length": "99999"}, 413),
        ("GET", "/static/../app.py", None, {}, 404),
        ("GET", "/static/%2e%2e/app.py", None, {}, 404),
        ("GET", "/docs", None, {}, 404),
        ("PATCH", "/streams", None, {}, 405),
    ],
)
def test_requests_of_other_sites_and_shapes_are_refused(
    served: Served, method: str, path: str, body: Any, headers: dict[str, str], status: int
) -> None:
    ask = Client(served.url)
    assert ask(method, path, body, **headers)[0] == status
    ask.close()


def test_every_answer_tells_browsers_to_trust_nobody_else(served: Served) -> None:
    for path in ("/", "/streams", "/nothing", "/static/page.js"):
        headers = served.ask("GET", path)[2].headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers


def test_with_a_token_nothing_but_the_probes_is_open(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "LOGIN_SECONDS", 0.05)
    with serving(served.live, token=TOKEN) as server:
        ask = Client(server.url)
        for path in ("/streams", "/metrics", "/video?stream=clip", "/openapi.json", "/nothing"):
            assert ask("GET", path)[0] == 401
        assert ask("POST", "/streams", {"address": "rtsp://x/"})[0] == 401
        assert ask("GET", "/livez", Host="run.example")[0] == 200
        status, page, _ = ask("GET", "/")
        assert status == 401
        assert b"Log in" in page
        assert ask("GET", "/static/login.js")[0] == 200

        assert ask("GET", "/streams", Authorization=f"Bearer {TOKEN}")[0] == 200
        assert ask("GET", "/streams", Authorization=f"Bearer {TOKEN[:-1]}")[0] == 401
        assert ask("GET", "/streams", Authorization=f"Basic {TOKEN}")[0] == 401
        assert ask("GET", "/streams", Cookie=f"track={TOKEN}")[0] == 401

        for wrong in ({"token": "no"}, {"token": 7}, {}, [], b"{"):
            assert ask("POST", "/login", wrong)[0] in (400, 401)
        status, _, response = ask("POST", "/login", {"token": TOKEN})
        cookie = response.headers["set-cookie"]
        assert status == 200
        assert {"HttpOnly", "SameSite=Strict"} <= set(cookie.split("; "))
        assert TOKEN not in cookie
        assert ask("GET", "/", Cookie=cookie.split(";")[0])[0] == 200
        ask.close()


@pytest.mark.parametrize(
    ("values", "environment", "words"),
    [
        ({"serve": "0.0.0.0:8080"}, {}, "demands a token"),
        ({"serve": "[::]:8080"}, {}, "demands a token"),
        ({"serve": "camera.example:8080"}, {}, "demands a token"),
        ({"serve": "0.0.0.0:8080"}, {"TRACK_TOKEN": "short"}, "16 printable"),
        ({"serve": "127.0.0.1:1", "serve_token_env": "NAME"}, {}, "NAME is not set"),
        ({"serve": "8080"}, {}, "HOST:PORT"),
        ({"serve": "127.0.0.1:99999"}, {}, "between 0 and 65535"),
        ({"serve_allow_local": True}, {}, "are for --serve"),
        ({"serve": "127.0.0.1:1", "serve_allow_local": "yes"}, {}, "true or false"),
    ],
)
def test_a_door_that_should_not_be_open_is_not(
    values: dict[str, Any], environment: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        take_options(values, environment)


def test_loopback_needs_no_token_and_a_network_gets_one() -> None:
    rest = {"engine": "x"}
    assert take_options(rest, {}) is None
    for where in ("127.0.0.1:0", "localhost:8080", "[::1]:8080"):
        assert take_options({"serve": where}, {}) is not None
    values = {"serve": "0.0.0.0:80", "serve_token_env": "NAME", "engine": "x"}
    options = take_options(values, {"NAME": TOKEN})
    assert options is not None
    assert options.token == TOKEN
    assert TOKEN not in repr(options)
    assert values == rest


def test_an_address_that_is_taken_is_said_before_anything_is_loaded() -> None:
    with Server(ServeOptions(host="127.0.0.1", port=0)) as server:
        port = int(server.url.rstrip("/").rpartition(":")[2])
        with (
            pytest.raises(ConfigError, match="cannot listen"),
            Server(ServeOptions(host="127.0.0.1", port=port)),
        ):
            pass


# Whatever may come


def test_garbage_is_answered_and_changes_nothing(served: Served) -> None:
    chance = random.Random(7)
    seeds = [
        json.dumps({"address": f"rtsp://u:{PASSWORD}@camera/x?{PASSWORD}", "name": "gate"}).encode(),
        json.dumps(LINE).encode(),
    ]
    pieces = [
        b"{",
        b"}",
        b"[",
        b'"',
        b"\x00",
        b"\xff",
        b"\\ud800",
        b"1e999",
        b"-0",
        b"null",
        b"9" * 400,
        b",",
    ]
    values: list[Any] = [None, True, -1, 1e308, "", "x" * 5000, "\x00", "é\u202e", [], {}, [[]], {"a": {}}]
    targets = [("POST", "/streams"), ("POST", "/streams/clip/counters"), ("PUT", "/streams/clip/counters/1")]
    for turn in range(300):
        seed = chance.choice(seeds)
        if turn % 3 == 0:
            value = json.loads(seed)
            value[chance.choice([*value, "extra", PASSWORD])] = chance.choice(values)
            body = json.dumps(value).encode()
        else:
            mutated = bytearray(seed)
            for _ in range(chance.randint(1, 6)):
                at = chance.randrange(len(mutated) + 1)
                mutated[at : at + chance.randint(0, 3)] = chance.choice(pieces)
            body = bytes(mutated)
        method, path = chance.choice(targets)
        status, answer, _ = served.ask(method, path, body)
        assert status in (201, 400, 404, 415, 422), (status, body)
        if status != 201:
            assert PASSWORD not in json.dumps(answer), (answer, body)
        elif path == "/streams":
            assert served.ask("DELETE", f"/streams/{answer['name']}")[0] == 204
    for number in range(40):
        host, _, port = served.url[7:-1].partition(":")
        with socket.create_connection((host, int(port)), timeout=5) as raw:
            path = bytes(chance.randrange(256) for _ in range(number))
            raw.sendall(b"GET /" + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert b" 500 " not in raw.recv(4096)[:20]
    for stream in served.ask("GET", "/streams")[1]["streams"]:
        for counter in stream["counters"]:
            served.ask(
                "DELETE", f"/streams/{stream['name'].replace(' ', '%20')}/counters/{counter['number']}"
            )
    assert served.status("clip")["state"] == "live"


# The command, and the page in a browser


def test_the_command_serves_and_leaves_in_time_with_somebody_watching(engine: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "tracker", "--serve", f"127.0.0.1:{port}", "--engine", str(engine)]
    environment = {**os.environ, "TRACK_TOKEN": TOKEN}
    with subprocess.Popen(
        [*command, str(make_clip(tmp_path / "clip.mp4")), "--realtime", "--loop", "--save", ""],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == f"track: the page is at http://127.0.0.1:{port}/\n"
        connection = HTTPConnection(f"127.0.0.1:{port}", timeout=10)
        connection.request("GET", "/video?stream=clip", headers={"Authorization": f"Bearer {TOKEN}"})
        response = connection.getresponse()
        assert next(parts(response))[0] == "clip"
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(6) == 130
        assert time.monotonic() - begun < 4
        assert TOKEN not in process.stderr.read()
        connection.close()


def test_the_page_shows_moving_pictures_and_takes_lines_by_mouse_and_keys(
    served: Served, tmp_path: Path
) -> None:
    with Browser(tmp_path / "profile") as page:
        page.open(served.url)
        page.until("document.querySelectorAll('.tile').length === 2")
        page.until("[...document.querySelectorAll('.tile')].every((tile) => tile.dataset.pictures > 3)")
        first = page.run("document.querySelector('.tile canvas').toDataURL()")
        page.until(f"document.querySelector('.tile canvas').toDataURL() !== {json.dumps(first)}")
        assert page.run("document.querySelector('.tile .state').textContent") == "live"
        assert page.run("document.querySelector('.tile .objects').textContent") == "car 1 · person 1"
        assert page.run("document.querySelector('.tile .curve path').getAttribute('d').length") > 20

        page.click(".tile .line")
        page.drag(".tile .stage", (0.25, 0.5), (0.75, 0.5))
        page.until("document.querySelectorAll('.tile .counters tbody tr').length === 1")
        (line,) = served.status("clip")["counters"]
        assert np.allclose(line["points"], [[0.25, 0.5], [0.75, 0.5]], atol=0.005)

        page.click(".tile .zone")
        for key in ("Enter", *["ArrowRight"] * 3, "Enter", *["ArrowDown"] * 3, "Enter"):
            page.key(key, shift=key != "Enter")
        page.click(".tile .done")
        page.until("document.querySelectorAll('.tile .counters tbody tr').length === 2")
        zone = served.status("clip")["counters"][1]
        assert np.allclose(zone["points"], [[0.5, 0.5], [0.65, 0.5], [0.65, 0.65]], atol=0.005)

        page.click(".tile .flip")
        served.until(lambda: served.status("clip")["counters"][0]["points"] == line["points"][::-1])
        for _ in range(2):
            page.click(".tile .delete")
            count = "document.querySelectorAll('.tile .counters tbody tr').length"
            page.until(f"{count} < 2")
        page.until(f"{count} === 0")

        page.run("document.querySelector('#adding').open = true")
        page.until("document.activeElement.name === 'address'")
        page.type("concat:a")
        page.key("Enter")
        page.until("document.querySelector('#add-error').textContent.includes('use rtsp')")
        served.ask("POST", "/streams", {"address": "rtsp://127.0.0.1:9/x", "name": "gone"})
        page.until("document.querySelector('[data-name=gone] .away')?.hidden === false")
        served.ask("DELETE", "/streams/gone")
        page.until("document.querySelector('[data-name=gone]') === null")
        assert [each for each in page.console if "status of 400" not in each] == []
