"""Live outputs: files that change, listeners that are slow, gone or never there, pictures for who watches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from cameras import Camera, free_port
from results import NO_TRACKS, ONE_TRACK, bgr_image, frame_of, frames_in, small_disk

from tracker.addresses import parse
from tracker.errors import ConfigError, SinkError
from tracker.sinks import open_sinks
from tracker.sinks.jsonl import format_line, named_line
from tracker.sinks.preview import Preview
from tracker.sinks.publish import LinePublisher, Mqtt, Outbox, standard_output
from tracker.sinks.push import RtspPush
from tracker.sinks.rotating import RotatingSink, Rotation
from tracker.types import Frame, Sink, Tracks

pytestmark = pytest.mark.alone


def live_frame(index: int, size: tuple[int, int] = (64, 48), age: float = 0.0) -> Frame:
    received = time.monotonic() - age
    return Frame(index=index, pts_seconds=index / 25, size=size, image=bgr_image(size), received=received)


def wait_for(condition: Callable[[], object], seconds: float = 6.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


# JSON lines


def test_a_live_line_says_how_old_its_frame_was() -> None:
    line = json.loads(format_line(live_frame(6, age=0.25), ONE_TRACK))
    assert line["frame"] == 7
    assert line["size"] == [64, 48]
    assert line["age_ms"] == pytest.approx(250, abs=50)
    assert line["received"] == pytest.approx(time.time() - 0.25, abs=0.1)
    assert line["tracks"][0]["id"] == 1


def test_a_file_has_no_age() -> None:
    assert set(json.loads(format_line(frame_of(0), ONE_TRACK))) == {"frame", "pts_seconds", "tracks"}


def test_lines_of_several_streams_are_told_apart() -> None:
    line = json.loads(named_line('the "gate"', live_frame(0), NO_TRACKS))
    assert line["stream"] == 'the "gate"'
    assert line["tracks"] == []


# Rotation


class Hand:
    """A clock that somebody turns."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def rotating(directory: Path, clock: Hand, rotation: str, kind: str = "jsonl") -> RotatingSink:
    def open_one(stem: str) -> Sink:
        return open_sinks([kind], directory, stem, frame_rate=25)[0]

    suffix = {"jsonl": ".jsonl", "mot": ".txt", "video": ".mp4"}[kind]
    return RotatingSink(
        directory, "cam", suffix, open=open_one, rotation=Rotation.parse(rotation), clock=clock
    )


@pytest.mark.parametrize("kind", ["jsonl", "mot", "video"])
def test_every_hour_is_a_whole_file(tmp_path: Path, kind: str) -> None:
    clock = Hand()
    sink = rotating(tmp_path, clock, "1h", kind)
    for minute in range(150):
        clock.now = 60.0 * minute
        sink.write(live_frame(minute), ONE_TRACK)
    sink.close(complete=True)
    files = sorted(tmp_path.iterdir())
    assert not [path for path in files if "partial" in path.name]
    assert sorted(frames_in(path) for path in files) == [30, 60, 60]
    assert sink.undelivered == 0


def test_a_file_that_is_large_enough_is_followed_by_another(tmp_path: Path) -> None:
    clock = Hand()
    sink = rotating(tmp_path, clock, "2kB")
    for second in range(60):
        clock.now = 1.5 * second
        sink.write(live_frame(second), ONE_TRACK)
    sink.close(complete=True)
    files = list(tmp_path.iterdir())
    assert len(files) > 2
    assert sum(map(frames_in, files)) == 60
    assert max(path.stat().st_size for path in files) < 2400


def test_a_restart_within_the_second_overwrites_nothing(tmp_path: Path) -> None:
    for _ in range(3):
        sink = rotating(tmp_path, Hand(), "never")
        sink.write(live_frame(0), ONE_TRACK)
        sink.close(complete=True)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_costs_rows_not_the_run_and_is_tried_again(tmp_path: Path) -> None:
    clock = Hand()
    with small_disk(tmp_path, "size=1m") as disk:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(1016 * 1024))
        sink = rotating(disk, clock, "never")
        for second in range(300):
            clock.now = second / 10
            sink.write(live_frame(second), ONE_TRACK)
        assert sink.undelivered > 0
        assert isinstance(sink.problem, SinkError)
        before = sink.undelivered
        ballast.unlink()
        for second in range(300, 1000):
            clock.now = second / 10
            sink.write(live_frame(second), ONE_TRACK)
        assert sink.problem is None
        sink.close(complete=True)
        written = sum(frames_in(path) for path in disk.glob("*.jsonl"))
        assert written + sink.undelivered == 1000
        assert sink.undelivered > before


@pytest.mark.parametrize("text", ["", "1", "1y", "0h", "-1h", "1h;2MB", "h"])
def test_a_rotation_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="rotate"):
        Rotation.parse(text)


def test_rotations_are_times_sizes_or_both() -> None:
    assert Rotation.parse("1d,256MB") == Rotation(86400, 256_000_000)
    assert Rotation.parse("never") == Rotation()


# Standard output


def test_lines_come_out_of_a_pipe_in_order() -> None:
    reader, writer = os.pipe()
    box = standard_output(writer)
    publisher = LinePublisher(box, "cam")
    for index in range(50):
        publisher.write(live_frame(index), ONE_TRACK)
    box.close()
    os.close(writer)
    with os.fdopen(reader) as lines:
        assert [json.loads(line)["frame"] for line in lines] == list(range(1, 51))
    assert publisher.undelivered == 0


def test_a_reader_that_does_not_read_blocks_nobody_and_its_losses_are_counted() -> None:
    reader, writer = os.pipe()
    box = standard_output(writer)
    publisher = LinePublisher(box, "cam")
    begun = time.monotonic()
    for _ in range(5000):
        publisher.append(b"x" * 200 + b"\n")
    assert time.monotonic() - begun < 1.0
    box.close(timeout=0.1)
    assert publisher.undelivered > 3000
    os.close(reader)  # which wakes the thread that hangs in the pipe
    box._thread.join(2)
    os.close(writer)


def test_a_reader_that_is_gone_is_counted() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    box = standard_output(writer)
    publisher = LinePublisher(box, "cam")
    for _ in range(10):
        publisher.append(b"line\n")
    box.close()
    os.close(writer)
    assert publisher.undelivered == 10


def test_the_newest_lines_stay_when_the_box_is_full() -> None:
    gate, got = threading.Event(), []

    def send(name: str, line: bytes) -> bool:
        gate.wait(5)
        got.append(line)
        return True

    box = Outbox(send, limit=3)
    for number in range(10):
        box.put("cam", b"%d" % number)
        if number == 0:
            wait_for(lambda: not box._box)
    gate.set()
    box.close()
    assert got == [b"0", b"7", b"8", b"9"]
    assert box.lost == {"cam": 6}


# MQTT


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[tuple[int, Callable[[], None], Callable[[], None]]]:
    """Port, start and stop of a real one."""
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
    if program is None:
        pytest.skip("no mosquitto here: apt-get install mosquitto")
    port = free_port()
    config = tmp_path / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    running: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        running.append(
            subprocess.Popen(
                [program, "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        )

    def stop() -> None:
        while running:
            process = running.pop()
            process.kill()
            process.wait()

    start()
    yield port, start, stop
    stop()


def test_messages_reach_a_broker_and_survive_its_restart(
    broker: tuple[int, Callable[[], None], Callable[[], None]],
) -> None:
    import paho.mqtt.client as mqtt
    from paho.mqtt.enums import CallbackAPIVersion

    port, start, stop = broker
    got: list[tuple[str, int]] = []
    ready = threading.Event()
    listener = mqtt.Client(CallbackAPIVersion.VERSION2)
    listener.reconnect_delay_set(min_delay=1, max_delay=1)
    listener.on_connect = lambda client, *_: client.subscribe("site/#", qos=1)
    listener.on_subscribe = lambda *_: ready.set()
    listener.on_message = lambda _, __, message: got.append(
        (message.topic, json.loads(message.payload)["frame"])
    )
    listener.connect_async("127.0.0.1", port)
    listener.loop_start()
    assert ready.wait(5)
    publisher = Mqtt(parse(f"mqtt://127.0.0.1:{port}/site", schemes=("mqtt",)))
    sink = LinePublisher(publisher, "cam")
    for index in range(5):
        sink.write(live_frame(index), ONE_TRACK)
    wait_for(lambda: len(got) == 5)
    ready.clear()
    stop()
    sink.write(live_frame(5), ONE_TRACK)
    start()
    assert ready.wait(5)
    sink.write(live_frame(6), ONE_TRACK)
    wait_for(lambda: ("site/cam", 7) in got)
    publisher.close()
    listener.disconnect()
    listener.loop_stop()
    assert set(got) >= {("site/cam", number) for number in (1, 2, 3, 4, 5, 7)}


def test_acknowledgements_may_come_while_more_is_sent(
    broker: tuple[int, Callable[[], None], Callable[[], None]],
) -> None:
    """The client holds a lock of its own while it publishes and while it tells of what has arrived."""
    port, _, _ = broker
    publisher = Mqtt(parse(f"mqtt://127.0.0.1:{port}/site", schemes=("mqtt",)))
    for _ in range(1000):
        publisher.put("cam", b"{}\n")
        time.sleep(0.0002)
    wait_for(lambda: not publisher._under_way and publisher._client.is_connected())
    begun = time.monotonic()
    publisher.close()
    assert time.monotonic() - begun < 3
    assert publisher.lost["cam"] == 0


def test_no_broker_is_no_error_and_everything_is_lost() -> None:
    publisher = Mqtt(parse("mqtt://u:pl4nted@127.0.0.1:9/site", schemes=("mqtt",)))
    sink = LinePublisher(publisher, "cam")
    for index in range(10):
        sink.write(live_frame(index), ONE_TRACK)
    begun = time.monotonic()
    publisher.close()
    assert time.monotonic() - begun < 3
    assert sink.undelivered == 10


# RTSP


def test_annotated_video_is_pushed_to_a_media_server(demo_feed: Path, tmp_path: Path) -> None:
    recorded = tmp_path / "recorded.h264"
    with Camera(demo_feed, "--record", str(recorded)) as server:
        push = RtspPush(parse(f"{server.base}/recorded"), "clip", frame_rate=25)
        size = (160, 120)
        for index in range(60):
            push.write(live_frame(index, size), ONE_TRACK)
            time.sleep(0.02)
        sent = 60 - push.undelivered
        push.close(complete=True)
        assert sent > 30, push.problem
        wait_for(lambda: recorded.stat().st_size > 0)
        time.sleep(0.3)
    with av.open(recorded, format="h264") as film:
        pictures = [frame.to_ndarray(format="bgr24") for frame in film.decode(video=0)]
    assert len(pictures) > sent / 2
    assert pictures[0].shape == (120, 160, 3)
    assert np.abs(pictures[-1].astype(int) - bgr_image(size).planes[0]).max() > 60  # there is a box on it


def test_a_media_server_that_is_gone_blocks_nobody() -> None:
    push = RtspPush(parse("rtsp://u:pl4nted@127.0.0.1:9/x"), "cam", frame_rate=25)
    begun = time.monotonic()
    for index in range(50):
        push.write(live_frame(index), ONE_TRACK)
    assert time.monotonic() - begun < 0.5
    wait_for(lambda: push.problem)
    push.close(complete=True)
    assert time.monotonic() - begun < 5
    assert push.undelivered > 40
    assert "pl4nted" not in push.problem


# The preview


def test_nobody_watching_nothing_is_held_or_drawn() -> None:
    preview = Preview(frame_rate=25)
    preview.offer(live_frame(0), ONE_TRACK)
    assert preview._newest is None
    with preview.watch() as watch:
        assert preview.watched
        assert watch.next(0.01) is None
    assert not preview.watched


def test_trails_are_of_the_last_seconds_however_rarely_somebody_looks() -> None:
    preview = Preview(frame_rate=25)
    with preview.watch() as watch:
        for index in range(0, 250, 25):  # a picture each second
            preview.offer(live_frame(index), ONE_TRACK)
            assert watch.next(1.0) is not None
        assert len(preview._painter.trails) == 2


def test_two_watchers_share_one_drawing() -> None:
    preview = Preview(frame_rate=25, width=80)
    drawings = 0
    draw = preview._draw

    def counted(frame: Frame, tracks: Tracks) -> bytes:
        nonlocal drawings
        drawings += 1
        return draw(frame, tracks)

    preview._draw = counted  # type: ignore[method-assign]
    with preview.watch() as one, preview.watch() as other:
        preview.offer(live_frame(0, (160, 120)), ONE_TRACK)
        first = one.next(1.0)
        assert first is not None
        assert other.next(1.0) == first
        assert one.next(0.01) is None
        assert cv2.imdecode(np.frombuffer(first, np.uint8), cv2.IMREAD_COLOR).shape == (60, 80, 3)
    assert drawings == 1
    assert preview._newest is None
