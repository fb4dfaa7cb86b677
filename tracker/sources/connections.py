"""One connection to a live source: pictures as they arrive, until it breaks.

Knows FFmpeg's network protocols, webcams, and files that are replayed at their own pace. A connection is a
generator that opens, reads and closes in the thread that runs it, because FFmpeg bears no other. Whatever is
raised here is a SourceError without a secret in it: FFmpeg's own errors repeat addresses, so none is chained.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import av
import cv2
import numpy as np
import torch
from av.error import FFmpegError, HTTPForbiddenError, HTTPUnauthorizedError

from tracker.addresses import Address, check_reach, redacted
from tracker.errors import SourceError
from tracker.sources.file import nominal_rate
from tracker.sources.limits import check_size
from tracker.sources.live_pictures import CpuPictures, NvdecPictures, UnfitError, frame_around
from tracker.sources.nvdec import Look, NvdecFile
from tracker.types import Frame, Image, Source

if TYPE_CHECKING:
    from av.container import InputContainer

# What an address may lead to. No playlists (HLS, DASH, SDP): they name further addresses to open.
_PROTOCOLS = {
    "rtsp": "rtsp,rtp,srtp,tcp,udp",
    "rtsps": "rtsp,rtsps,rtp,srtp,tcp,udp,tls",
    "http": "http,tcp",
    "https": "https,http,tls,tcp",
}
_HTTP_FORMATS = "mpjpeg,mjpeg,mpegts"
# Packets are dropped up to a key frame once they have come so late for so long: then it is not a burst after
# a stall, which is soon caught up with, but a decoder that is too slow.
_LATE_SECONDS, _LATE_FOR_SECONDS = 0.5, 1.0
_WAITED_SECONDS = 0.002  # what lies in the socket already is there in microseconds
# A camera that sends packets and never a good picture is as gone as one that sends nothing. Key frames of
# some come only every ten seconds.
_BLIND_SECONDS = 30.0
_LOSSY = "packets get lost over UDP, and NVDEC does not say which pictures suffer"


class RefusedError(SourceError):
    """The server knows us and says no: asking again at once would only lock the account."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A picture that came.

    frame: None for one that is damaged; its number, time and source are the reader's to give.
    dropped: why it was not decoded, if it was not. pts_seconds: by the source's clock; None if it has none.
    received: when its last byte had come, by `time.monotonic`. frame_rate: nominal; None if nobody knows.
    """

    frame: Frame | None
    pts_seconds: float | None
    received: float
    frame_rate: float | None = None
    dropped: str = ""


class Connect(Protocol):
    """Makes connections to one source. ends: whether its end is no fault. decoder: for people."""

    ends: bool

    @property
    def decoder(self) -> str: ...
    def __call__(self, stop: threading.Event) -> Generator[Arrival]:
        """Pictures until the connection breaks: with a SourceError, or in silence."""
        ...


def _own(surface: torch.Tensor) -> torch.Tensor:
    return surface.clone()


class Nvdec:
    """How a connection's pictures get onto a GPU.

    device: None for pictures on the host. strict: raise `UnfitError` where NVDEC cannot decode them, instead
    of decoding on the CPU. keep: see `Surfaces`. turning: whether pictures are put upright here, or later by
    whoever knows `look`. look: once a picture has come.
    """

    def __init__(self, device: torch.device | None = None, *, strict: bool = False) -> None:
        self.device, self.strict = device, strict
        self.keep: Callable[[torch.Tensor], torch.Tensor] = _own
        self.turning = True
        self.look: Look | None = None


class Network:
    """RTSP, RTSPS, or MJPEG and MPEG-TS over HTTP.

    allow_local: whether loopback and link-local hosts may be reached. nvdec: where pictures are decoded. The
    other settings are those of `live.LiveSettings`.
    """

    ends = False

    def __init__(
        self,
        address: Address,
        *,
        rtsp_transport: str,
        open_seconds: float,
        silence_seconds: float,
        verify_tls: bool,
        max_pixels: int,
        allow_local: bool = True,
        nvdec: Nvdec | None = None,
    ) -> None:
        self.nvdec = nvdec or Nvdec()
        self.decoder = "CPU" if self.nvdec.device is None else "NVDEC"
        self._address, self._allow_local = address, allow_local
        self._timeout = (open_seconds, silence_seconds)
        self._max_pixels = max_pixels
        self._lossy = address.scheme == "rtsp" and rtsp_transport == "udp"
        self._options = {
            "protocol_whitelist": _PROTOCOLS[address.scheme],
            "timeout": str(round(open_seconds * 1_000_000)),
            "analyzeduration": "100000",
            "max_pixels": str(2 * max_pixels),  # FFmpeg counts padding
            "tls_verify": str(int(verify_tls)),
        }
        if address.scheme in ("rtsp", "rtsps"):
            self._options |= {"rtsp_transport": rtsp_transport, "allowed_media_types": "video"}
            if address.scheme == "rtsp":
                self._options["format_whitelist"] = "rtsp"
        else:
            # A redirection would lead past the check of where the address leads.
            self._options |= {"max_redirects": "0", "format_whitelist": _HTTP_FORMATS}

    def __call__(self, stop: threading.Event) -> Generator[Arrival]:
        check_reach(self._address, allow_local=self._allow_local)
        try:
            with self._open() as container:
                yield from self._read(container)
        except (HTTPUnauthorizedError, HTTPForbiddenError):
            raise RefusedError(f"{self._address}: the server refuses this user name and password") from None
        except FFmpegError as error:
            raise SourceError(f"{self._address}: {_words(error, self._timeout)}") from None

    def _open(self) -> InputContainer:
        return av.open(
            self._address.secret,
            format="rtsp" if self._address.scheme in ("rtsp", "rtsps") else None,
            options=self._options,
            timeout=self._timeout,
            metadata_errors="replace",
        )

    def _read(self, container: InputContainer) -> Generator[Arrival]:
        stream = container.streams.best("video")
        if not isinstance(stream, av.VideoStream) or stream.codec_context is None:
            raise SourceError(f"{self._address}: no video that FFmpeg can decode in it")
        decoder = stream.codec_context
        check_size(self._address, decoder.width, decoder.height, self._max_pixels)
        decode = self._pictures(stream)
        rate, tick = nominal_rate(stream), float(stream.time_base or 0)
        backlog = _Backlog()
        seen = time.monotonic()
        started = False
        packets = container.demux(stream)
        while True:
            asked = time.monotonic()
            packet = next(packets, None)
            received = time.monotonic()
            if packet is None:
                return
            if not packet.size:
                continue
            # FFmpeg answers its first timeout with what it still has, and would wait once more.
            if received - asked > self._timeout[1]:
                raise SourceError(f"{self._address}: silent for {self._timeout[1]:g} s")
            if received - seen > _BLIND_SECONDS:
                raise SourceError(f"{self._address}: no good picture for {_BLIND_SECONDS:.0f} s")
            # Without its references a picture is garbage, and decoders do not always say so.
            started = started or packet.is_keyframe
            if not started:
                continue
            ticks = packet.pts if packet.dts is None else packet.dts
            if backlog.drops(packet, None if ticks is None else ticks * tick, asked, received):
                yield Arrival(frame=None, pts_seconds=None, received=received, dropped="late")
                continue
            for shown in decode(packet):
                if shown is None:
                    yield Arrival(frame=None, pts_seconds=None, received=received)
                    continue
                seen = received
                if isinstance(decode, NvdecPictures):
                    self.nvdec.look = decode.look
                    self.decoder = f"CPU, because {decode.unfit}" if decode.unfit else "NVDEC"
                yield Arrival(
                    frame=shown.frame,
                    pts_seconds=None if shown.pts is None else shown.pts * tick,
                    received=received,
                    frame_rate=rate,
                )

    def _pictures(self, stream: av.VideoStream) -> CpuPictures | NvdecPictures:
        nvdec = self.nvdec
        if nvdec.device is None or (self._lossy and not nvdec.strict):
            if self._lossy and nvdec.device is not None:
                self.decoder = f"CPU, because {_LOSSY}"
            return CpuPictures(self._address, stream, self._max_pixels)
        if self._lossy:
            raise UnfitError(self._address, _LOSSY)
        return NvdecPictures(
            self._address,
            stream,
            self._max_pixels,
            nvdec.device,
            keep=nvdec.keep,
            turning=nvdec.turning,
            strict=nvdec.strict,
        )


class _Backlog:
    """Notices that packets are read later and later after they came.

    A packet that had to be waited for is read in time; what does so less and less is measured by time stamps.
    """

    def __init__(self) -> None:
        self._in_time: float | None = None  # arrival of a punctual packet, less its time stamp
        self._late_since: float | None = None
        self._dropping = False

    def drops(self, packet: av.Packet[Any], seconds: float | None, asked: float, now: float) -> bool:
        """seconds: the packet's time stamp. asked: since when it was waited for."""
        start = now - (seconds or 0.0)
        waited = now - asked > _WAITED_SECONDS
        if self._in_time is None or waited or seconds is None or start < self._in_time:
            self._in_time, self._late_since = start, None
            self._dropping = self._dropping and not packet.is_keyframe
        elif start - self._in_time > _LATE_SECONDS:
            self._late_since = self._late_since or now
            self._dropping = self._dropping or now - self._late_since > _LATE_FOR_SECONDS
        return self._dropping


class Webcam:
    """A camera of this machine, through OpenCV. One that hangs is noticed after OpenCV's own 10 s."""

    ends = False

    def __init__(self, address: Address, *, max_pixels: int, decoder: str = "CPU (OpenCV)") -> None:
        self.decoder = decoder
        self._address, self._max_pixels = address, max_pixels

    def __call__(self, stop: threading.Event) -> Generator[Arrival]:
        number = self._address.port
        assert number is not None
        log = cv2.utils.logging
        before = log.setLogLevel(log.LOG_LEVEL_SILENT)  # what it prints about a missing camera, we say
        try:
            camera = cv2.VideoCapture(number)
        finally:
            log.setLogLevel(before)
        try:
            if not camera.isOpened():
                where = f"/dev/video{number}" if sys.platform == "linux" else f"camera {number}"
                raise SourceError(f"{self._address}: cannot open {where}: it is missing, in use or forbidden")
            camera.set(cv2.CAP_PROP_BUFFERSIZE, 1)
            rate = camera.get(cv2.CAP_PROP_FPS)
            while not stop.is_set():
                good, pixels = camera.read()
                if not good:
                    raise SourceError(f"{self._address}: the camera gives no pictures any more")
                check_size(self._address, pixels.shape[1], pixels.shape[0], self._max_pixels)
                image = Image(format="bgr", planes=(np.asarray(pixels, np.uint8),))
                yield Arrival(
                    frame=frame_around(image),
                    pts_seconds=None,
                    received=time.monotonic(),
                    frame_rate=rate if 0 < rate <= 1000 else None,
                )
        finally:
            camera.release()


class Replay:
    """A recorded source at its own pace, as if it were live.

    Each frame is decoded when it is due, not before, so that its age tells what a camera's would. A machine
    too slow for that skips to where the recording should be by now.
    open: a fresh source, decoded as `nvdec` wants it where it can be. loop: start over at the end, for ever.
    """

    ends = True

    def __init__(self, open: Callable[[], Source], *, loop: bool = False, nvdec: Nvdec | None = None) -> None:
        self._open, self._loop = open, loop
        self.nvdec = nvdec or Nvdec()
        self.decoder = "CPU" if self.nvdec.device is None else "NVDEC"

    def __call__(self, stop: threading.Event) -> Generator[Arrival]:
        source = self._open()
        while not stop.is_set():
            source = self._prepared(source)
            with source:
                yield from self._paced(source, stop)
            if not self._loop:
                return
            # What is known of a file need not be looked up again.
            source = source.afresh(self.nvdec.look) if isinstance(source, NvdecFile) else self._open()

    def _prepared(self, source: Source) -> Source:
        nvdec, self.decoder = self.nvdec, source.decoder
        if isinstance(source, NvdecFile):
            nvdec.look = source.look
            source = source if nvdec.turning else source.unturned()
            source.keep = nvdec.keep
        elif nvdec.device is not None and nvdec.strict:
            raise UnfitError(source.name, source.decoder.removeprefix("CPU, because "))
        return source

    def _paced(self, source: Source, stop: threading.Event) -> Generator[Arrival]:
        interval = 1 / source.frame_rate
        damaged = 0
        begun: float | None = None
        due = time.monotonic()
        frames = iter(source)
        with closing(frames):  # type: ignore[type-var]
            while not stop.wait(max(0.0, due - time.monotonic())):
                received = due
                frame = next(frames, None)
                if frame is None:
                    return
                for _ in range(source.counts.corrupt - damaged):
                    yield Arrival(frame=None, pts_seconds=None, received=received)
                damaged = source.counts.corrupt
                if begun is None:
                    begun = due - frame.pts_seconds
                at = begun + frame.pts_seconds
                if at - due > interval / 2:  # the file says it is due later than its rate would have it
                    if stop.wait(max(0.0, at - time.monotonic())):
                        return
                    received = at
                due = at + interval
                if time.monotonic() - received > _LATE_SECONDS:
                    yield Arrival(frame=None, pts_seconds=None, received=received, dropped="late")
                    continue
                yield Arrival(
                    frame=frame,
                    pts_seconds=frame.pts_seconds,
                    received=received,
                    frame_rate=source.frame_rate,
                )


def _words(error: FFmpegError, timeout: tuple[float, float]) -> str:
    """What happened, in words without an address."""
    kind = type(error).__name__
    if kind in ("ExitError", "TimeoutError"):
        return f"silent for {timeout[1]:g} s, or no connection within {timeout[0]:g} s"
    return redacted(error.strerror or kind)
