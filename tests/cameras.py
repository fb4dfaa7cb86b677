"""Cameras for the tests: a real RTSP server, to be started, frozen and killed, and what it sends."""

from __future__ import annotations

import functools
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import pytest

SERVER = Path(__file__).with_name("rtsp_server.py")
PYTHON = "/usr/bin/python3"  # the one that Debian's packages install for
PACKAGES = (
    "python3-gi gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-base gstreamer1.0-plugins-good "
    "gstreamer1.0-plugins-bad"
)
ROOT = Path(__file__).resolve().parent.parent
DEMO, DEMO_ENGINE = ROOT / "videos" / "demo.mp4", ROOT / "engines" / "fairmot_demo.onnx"


@functools.cache
def missing_server() -> str | None:
    """Why there is no RTSP server here."""
    check = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"
    try:
        done = subprocess.run([PYTHON, "-c", check], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return f"no {PYTHON}"
    return None if done.returncode == 0 else f"no gst-rtsp-server here: apt-get install {PACKAGES}"


def needs_server() -> None:
    if why := missing_server():
        pytest.skip(why)


def write_feed(
    clip: Path,
    path: Path,
    *,
    size: tuple[int, int] | None = None,
    gop: int = 10,
    rate: int | None = None,
    frames: int | None = None,
) -> Path:
    """A video as what a camera sends: H.264 without reordering, a key frame each `gop` pictures."""
    pictures: list[bytes] = []
    with av.open(clip) as source:
        stream = source.streams.video[0]
        width, height = size or (stream.width, stream.height)
        nominal = float(stream.average_rate or 25)
        step = 1 if rate is None else max(1, round(nominal / rate))
        encoder = av.CodecContext.create("libx264", "w")
        encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
        encoder.time_base = Fraction(1, 90000)
        encoder.framerate = Fraction(round(nominal / step))
        encoder.gop_size = gop
        encoder.options = {
            "preset": "ultrafast",
            "tune": "zerolatency",
            "x264-params": "repeat-headers=1:scenecut=0:sliced-threads=0:threads=1",
        }
        for number, frame in enumerate(source.decode(video=0)):
            if number == frames:
                break
            if number % step:
                continue
            yuv = frame.reformat(width, height, "yuv420p", threads=1)
            yuv.pts, yuv.time_base = round(number / nominal * 90000), Fraction(1, 90000)
            pictures += [
                struct.pack("<?I", packet.is_keyframe, packet.size) + bytes(packet)
                for packet in encoder.encode(yuv)
            ]
        pictures += [
            struct.pack("<?I", packet.is_keyframe, packet.size) + bytes(packet)
            for packet in encoder.encode(None)
        ]
    path.write_bytes(struct.pack("<dI", nominal / step, len(pictures)) + b"".join(pictures))
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Camera:
    """An RTSP server in a process of its own, playing at `url`. Starting it again keeps port and scene."""

    def __init__(
        self,
        feed: Path,
        *extra: str,
        user: str = "",
        password: str = "",
        address: str = "127.0.0.1",
        prefix: tuple[str, ...] = (),
    ) -> None:
        """prefix: of the command that starts it."""
        self.port, self.feed, self.epoch = free_port(), feed, time.time()
        self._extra, self._prefix = [*extra, "--address", address], prefix
        if user:
            self._extra += ["--user", user, "--password", password]
        login = f"{user}:{password}@" if user else ""
        self.base = f"rtsp://{login}{address}:{self.port}"
        self.url = f"{self.base}/cam"
        self._process: subprocess.Popen[str] | None = None

    def start(self, feed: Path | None = None) -> None:
        self.feed = feed or self.feed
        command = [PYTHON, str(SERVER), str(self.port), str(self.feed), "--epoch", str(self.epoch)]
        self._process = subprocess.Popen(
            [*self._prefix, *command, *self._extra], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "listening\n"

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def freeze(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def __enter__(self) -> Camera:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


@pytest.fixture(scope="session")
def demo_feed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first twelve seconds of the demo scene, as a camera sends them."""
    needs_server()
    return write_feed(DEMO, tmp_path_factory.mktemp("feed") / "demo.feed", frames=300)


@pytest.fixture
def camera(demo_feed: Path) -> Iterator[Camera]:
    with Camera(demo_feed) as camera:
        yield camera


@pytest.fixture
def lossy_camera(demo_feed: Path) -> Iterator[Camera]:
    """A camera behind a network of its own that loses 5 % of what the camera sends."""
    name, peer = f"trk{os.getpid()}", "10.199.7.2"
    inside = ("ip", "netns", "exec", name)
    setup = [
        f"ip link add v{name} type veth peer name w{name}",
        f"ip link set w{name} netns {name}",
        f"ip addr add 10.199.7.1/30 dev v{name}",
        f"ip link set v{name} up",
        f"{' '.join(inside)} ip addr add {peer}/30 dev w{name}",
        f"{' '.join(inside)} ip link set w{name} up",
        f"{' '.join(inside)} ip link set lo up",
        f"{' '.join(inside)} nft add table ip loss",
        f"{' '.join(inside)} nft add chain ip loss out {{ type filter hook output priority 0 ; }}",
        f"{' '.join(inside)} nft add rule ip loss out numgen random mod 1000 < 50 drop",
    ]
    try:
        for command in (f"ip netns add {name}", *setup):
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"no network of one's own to be had here: {command}: {done.stderr.strip()}")
        with Camera(demo_feed, address=peer, prefix=inside) as camera:
            yield camera
    except FileNotFoundError as error:
        pytest.skip(f"no network of one's own to be had here: {error}")
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
