"""Addresses: what is let in, what is said of them, how files are called after them; and no password out."""

from __future__ import annotations

import random
import socket
import string

import pytest

from tracker.addresses import Address, check_reach, file_name, parse, redacted, scheme_of
from tracker.errors import ConfigError, SourceError, TrackerError

SECRET = "hunter2-Zq9"


@pytest.mark.parametrize(
    ("spec", "shown", "name"),
    [
        ("rtsp://camera/stream", "rtsp://camera/stream", "camera-stream"),
        (f"rtsp://admin:{SECRET}@camera:8554/a/b", "rtsp://***@camera:8554/a/b", "camera-a-b"),
        (f"RTSPS://u:{SECRET}@[fe80::1]/x", "rtsps://***@[fe80::1]/x", "fe80-1-x"),
        (f"http://cam/mjpg?user=u&pwd={SECRET}", "http://cam/mjpg?***", "cam-mjpg"),
        ("webcam:0", "webcam:0", "webcam-0"),
        ("rtsp://camera/../../etc/passwd", "rtsp://camera/../../etc/passwd", "camera-..-..-etc-passwd"),
    ],
)
def test_an_address_is_shown_without_its_secrets(spec: str, shown: str, name: str) -> None:
    address = parse(spec)
    assert (str(address), address.name) == (shown, name)
    assert SECRET not in repr(address)
    assert "/" not in address.name


@pytest.mark.parametrize(
    "spec",
    [
        "concat:a.mp4|b.mp4",
        "subfile:,,start,0,end,9,,:/etc/passwd",
        "file:///etc/passwd",
        "gopher://x/",
        "rtmp://x/y",
        "pipe:0",
        "udp://239.0.0.1:1234",
        "/etc/passwd",
        "webcam:front",
        "webcam:-1",
        "rtsp:camera",
        "rtsp://",
        f"rtsp://u:{SECRET}/@camera/",
        f"rtsp://u:{SECRET}@camera:port/",
        f"rtsp://u:{SECRET}@[::1/",
        f"rtsp://u:{SECRET}@camera/ x",
        f"rtsp://u:{SECRET}@camera/\r\nSETUP",
        f"rtsp://u:{SECRET}@camera/" + "x" * 3000,
        "",
    ],
)
def test_what_is_no_address_to_open_is_refused_without_repeating_it(spec: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(spec)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        f"cannot open rtsp://admin:{SECRET}@camera/stream: refused",
        f"'http://cam/x?password={SECRET}' and http://cam/y#{SECRET}",
        f"rtsp://a:b@{SECRET}@camera/",
        f"rtsp:/u:{SECRET}@camera",
        f"rtsp://u:p/{SECRET}@camera/x",
    ],
)
def test_texts_are_redacted(text: str) -> None:
    assert SECRET not in redacted(text)
    assert "***" in redacted(text)


def test_texts_without_addresses_stay_as_they_are() -> None:
    for text in ("C:/videos/clip.mp4", "who? me", "a@b.c", "rtsp://camera/stream: refused", "ratio 16:9 #1"):
        assert redacted(text) == text


@pytest.mark.parametrize("seed", range(20))
def test_any_text_is_an_address_or_an_error_and_its_name_is_a_file_name(seed: int) -> None:
    chance = random.Random(seed)
    letters = string.printable + "ä€\u202e\0"
    for _ in range(200):
        body = "".join(chance.choices(letters, k=chance.randrange(30)))
        spec = chance.choice(["rtsp://", "http://", "webcam:", "mqtt://", ""]) + body
        try:
            address = parse(spec)
        except ConfigError:
            continue
        assert address.name == file_name(address.name)
        assert not set(address.name) & set('/\\:*?"<>|\0 ')
        assert len(address.name) <= 64


@pytest.mark.parametrize("text", ["", "...", "///", "\0\0"])
def test_a_name_of_nothing_has_a_fallback(text: str) -> None:
    assert file_name(text) == "stream"


def test_names_of_devices_are_none() -> None:
    assert file_name("CON.txt") == "_CON.txt"


LOCAL = "127.0.0.1 localhost 169.254.169.254 [fe80::1] [::1] 0.0.0.0 224.0.0.1 2852039166 0x7f.1"


@pytest.mark.parametrize("host", [*LOCAL.split(), "[::ffff:169.254.169.254]", "[fd00:ec2::254]"])
def test_strangers_reach_neither_this_machine_nor_the_clouds_metadata(host: str) -> None:
    address = parse(f"rtsp://{host}/x")
    with pytest.raises(SourceError):
        check_reach(address, allow_local=False)
    check_reach(address, allow_local=True)


def test_strangers_reach_cameras_on_the_local_network() -> None:
    check_reach(parse("rtsp://192.168.1.20/stream"), allow_local=False)


def test_a_name_is_looked_up_before_every_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["192.168.1.20", "169.254.169.254"])
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(None, None, None, "", (next(answers), 554))]
    )
    address = parse("rtsp://camera.local/stream")
    check_reach(address, allow_local=False)
    with pytest.raises(SourceError, match="metadata"):
        check_reach(address, allow_local=False)


@pytest.mark.parametrize(
    ("text", "scheme"), [("C:\\clip.mp4", None), ("clip.mp4", None), ("RTSP://x", "rtsp"), ("a:b", None)]
)
def test_a_drive_is_no_scheme(text: str, scheme: str | None) -> None:
    assert scheme_of(text) == scheme


def test_a_secret_survives_in_the_address_alone() -> None:
    address = parse(f"mqtt://me:{SECRET}%21@broker/topic", schemes=("mqtt",))
    assert isinstance(address, Address)
    assert (address.user, address.password, address.port) == ("me", f"{SECRET}!", 1883)
    assert issubclass(ConfigError, TrackerError)
