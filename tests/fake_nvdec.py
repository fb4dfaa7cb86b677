"""NVDEC played by FFmpeg, and GPU memory by the host's: in this process, or in one that decodes for it.

The fake decodes the very stream it is fed, so start codes, parameter sets, time stamps and order are real.
"""

from __future__ import annotations

import ctypes
import heapq
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import av
import numpy as np
import torch

from tracker.sources import nvdec, open_source
from tracker.sources.connections import Network

CPU = torch.device("cpu")


class Surface:
    """What the decoder gives: NV12 in memory that it will use again."""

    def __init__(self, shared: torch.Tensor, pts: int) -> None:
        self._shared, self.timestamp = shared, pts

    def __dlpack__(self, **options: Any) -> Any:
        return self._shared.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._shared.__dlpack_device__()


class FakeDecoder:
    """Like NVDEC it knows nothing of containers, and has one surface, which it overwrites. Of the time stamps
    that came in, the picture shown next has the earliest: right where they are presentation times.
    """

    def __init__(self, codec: str, breaks_at: int | None = None) -> None:
        self._codec = av.CodecContext.create({"MPEG2": "mpeg2video"}.get(codec, codec.lower()), "r")
        self._surface: torch.Tensor | None = None
        self._stamps: list[int] = []
        self.left = breaks_at

    def Decode(self, piece: SimpleNamespace) -> Any:  # noqa: N802 (NVIDIA's name)
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("cuvidParseVideoData returned error 999")
        packet = None
        if piece.bsl:
            packet = av.Packet(ctypes.string_at(piece.bsl_data, piece.bsl))
            packet.pts = piece.pts
            heapq.heappush(self._stamps, piece.pts)
        for picture in self._codec.decode(packet):
            nv12 = torch.from_numpy(picture.to_ndarray(format="nv12"))
            if self._surface is None or self._surface.shape != nv12.shape:
                self._surface = torch.empty_like(nv12)
            self._surface.copy_(nv12)
            yield Surface(self._surface, heapq.heappop(self._stamps))


class FakeLibrary:
    cudaVideoCodec = SimpleNamespace(H264="H264", HEVC="HEVC", VP8="VP8", VP9="VP9", AV1="AV1", MPEG2="MPEG2")  # noqa: N815
    DisplayDecodeLatencyType = SimpleNamespace(NATIVE=0, LOW=1)
    VideoPacketFlag = SimpleNamespace(ENDOFPICTURE=8)
    PacketData = SimpleNamespace

    def __init__(self, **limits: int) -> None:
        self.caps = {"num_decoder_engines": 7, "width_min": 48, "height_min": 16, "width_max": 4096}
        self.caps |= {"height_max": 4096, **limits}
        self.breaks_at: int | None = None

    def GetDecoderCaps(self, gpu: int, codec: str) -> dict[str, int]:  # noqa: N802
        return self.caps

    def CreateDecoder(self, *, codec: str, usedevicememory: bool, **_: Any) -> FakeDecoder:  # noqa: N802
        assert usedevicememory
        return FakeDecoder(codec, self.breaks_at)


@dataclass
class HostMemory:
    """What `DeviceMemory` is on a GPU. The name of an open file is what another process opens."""

    size: int
    path: str = ""
    device: torch.device = CPU
    owned: int = -1

    def __post_init__(self) -> None:
        if not self.path:
            self.owned = os.memfd_create("pictures")
            os.truncate(self.owned, self.size)
            self.path = f"/proc/{os.getpid()}/fd/{self.owned}"
        self._bytes = np.memmap(self.path, np.uint8, "r+", shape=(self.size,))

    @property
    def address(self) -> HostAddress:
        return HostAddress(self.path, self.size)

    def tensor(self, start: int, shape: tuple[int, ...], owner: object = None) -> torch.Tensor:
        view = _View(self, self._bytes.ctypes.data + start, shape, owner)
        return torch.from_numpy(np.asarray(view))

    def __del__(self) -> None:
        if self.owned >= 0:
            os.close(self.owned)


@dataclass(frozen=True)
class HostAddress:
    path: str
    size: int

    def open(self) -> HostMemory:
        return HostMemory(self.size, self.path)


class _View:
    """As torch keeps the owner of CUDA memory, NumPy keeps this."""

    def __init__(self, memory: HostMemory, begin: int, shape: tuple[int, ...], owner: object) -> None:
        self._kept = memory, owner
        self.__array_interface__ = {"shape": shape, "typestr": "|u1", "data": (begin, False), "version": 3}


class FakeFile(nvdec.NvdecFile):
    """Brings its library along to the process that unpickles it.

    quirks: `breaks_at`, the step that the decoder does not survive; `at`, a frame, and what happens there:
    `error` is raised, or its process gets `signal`.
    """

    quirks: Mapping[str, Any] = MappingProxyType({})
    ready: Callable[[], Any] | None = None  # makes events where pictures shall have some

    def afresh(self, look: nvdec.Look | None = None) -> FakeFile:
        file = super().afresh(look)
        file.quirks = self.quirks
        return file

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (self._made(self.look), dict(self.quirks))

    def _video_stream(self, container: Any) -> av.VideoStream:
        stream = super()._video_stream(container)
        assert self._surfaces is not None
        self._surfaces.decoder.left = self.quirks.get("breaks_at")
        return stream

    def _frame(self, picture: Any, index: int, pts_seconds: float) -> Any:
        if index == self.quirks.get("at"):
            if "error" in self.quirks:
                raise self.quirks["error"]
            os.kill(os.getpid(), self.quirks["signal"])
            time.sleep(60)
        frame = super()._frame(picture, index, pts_seconds)
        if self.ready is None or frame.image is None:
            return frame
        return replace(frame, image=replace(frame.image, ready=self.ready()))


def _arrive(make: Callable[[], FakeFile], quirks: dict[str, Any]) -> FakeFile:
    nvdec._library = FakeLibrary
    file = make()
    file.quirks = quirks
    return file


def fake_file(path: Path, number: int = 0, **quirks: Any) -> FakeFile:
    """As `open_source` gives it where a GPU can decode it."""
    look = nvdec.examine(path, CPU)
    assert isinstance(look, nvdec.Look), look
    file = FakeFile(path, look, device=CPU, source=number)
    file.quirks = quirks
    return file


def fake_open(path: Path, **quirks: Any) -> Any:
    """As `open_source` where there is a GPU, in whatever process."""
    nvdec._library = lambda: FakeLibrary()
    source = open_source(path, gpu=CPU)
    return fake_file(path, **quirks) if isinstance(source, nvdec.NvdecFile) else source


class FakeNetwork(Network):
    """Brings its library along to the process that unpickles it."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        nvdec._library = lambda: FakeLibrary()
        self.__dict__.update(state)
