"""Packets of a live stream become pictures, one after another and without delay: on the CPU or by NVDEC.

Knows decoders; not where packets come from, nor when. A damaged picture is None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import av
import torch
from av.error import FFmpegError
from torch import Tensor

from tracker.errors import EngineError, SourceError, TrackerError
from tracker.sources.limits import check_size
from tracker.sources.nvdec import Look, Surfaces, frame_of, look_at, upright
from tracker.sources.planes import image_of
from tracker.types import Frame, Image

# So many packets are kept for NVDEC while a first picture is awaited.
_LOOK_PACKETS = 32
# H.264 and HEVC hold back at most 16 pictures to reorder them; a packet that old has been dropped.
_REORDER_LIMIT = 32
# A picture that is to be shown before one that came earlier is so much older at most; else a clock was set.
_REORDER_SECONDS = 1.0


class UnfitError(SourceError):
    """NVDEC cannot decode this stream, however often it is asked. reason: why, in words."""

    def __init__(self, what: object, reason: str) -> None:
        super().__init__(f"{what}: NVDEC cannot decode it, because {reason}: use --decode auto")
        self.reason = reason


class Shown(NamedTuple):
    """A good picture. pts: in ticks of its stream; None if nobody knows."""

    frame: Frame
    pts: int | None


def frame_around(image: Image) -> Frame:
    """Its number, time and source are the reader's to give."""
    height, width = image.planes[0].shape[:2]
    return Frame(index=0, pts_seconds=0.0, size=(width, height), image=image)


def _shown(picture: av.VideoFrame | None) -> Shown | None:
    return None if picture is None else Shown(frame_around(image_of(picture)), picture.pts)


class CpuPictures:
    """what: the stream, in errors. Raises SourceError for pictures of more than max_pixels."""

    def __init__(self, what: object, stream: av.VideoStream, max_pixels: int) -> None:
        self._what, self._max_pixels = what, max_pixels
        self._decoder = stream.codec_context
        self._decoder.thread_type, self._decoder.thread_count = "NONE", 1  # each frame thread is a frame late
        self._decoder.flags |= int(av.codec.context.Flags.low_delay)
        self._decoder.options = {"max_pixels": str(2 * max_pixels)}  # FFmpeg counts padding

    @property
    def codec(self) -> str:
        return self._decoder.codec.canonical_name

    def __call__(self, packet: av.Packet[Any]) -> Iterator[Shown | None]:
        return map(_shown, self.decode(packet))

    def decode(self, packet: av.Packet[Any]) -> Iterator[av.VideoFrame | None]:
        """FFmpeg's own pictures."""
        try:
            pictures = self._decoder.decode(packet)
        except FFmpegError:
            check_size(self._what, self._decoder.width, self._decoder.height, self._max_pixels)
            yield None
            return
        for picture in pictures:
            if picture.is_corrupt or packet.is_corrupt:
                yield None
                continue
            check_size(self._what, picture.width, picture.height, self._max_pixels)
            yield picture


class NvdecPictures:
    """The first picture is decoded on the CPU, too: it says what NVDEC does not, and whether NVDEC can.

    NVDEC conceals damage without saying so. What FFmpeg marked as damaged, and all that refers to it up to
    the next key frame, counts as damaged here; so does a packet that no picture came of.

    keep: see `Surfaces`. turning: put pictures upright, which else somebody does later by `look`. strict:
    raise UnfitError where this device's NVDEC cannot decode the stream; else the CPU does, and `unfit` says
    why.
    Raises SourceError where NVDEC gives up, and for pictures of more than max_pixels.
    """

    def __init__(
        self,
        what: object,
        stream: av.VideoStream,
        max_pixels: int,
        device: torch.device,
        *,
        keep: Callable[[Tensor], Tensor],
        turning: bool,
        strict: bool,
    ) -> None:
        self._what, self._stream, self._max_pixels = what, stream, max_pixels
        self._device, self._keep, self._turning, self._strict = device, keep, turning, strict
        self._cpu = CpuPictures(what, stream, max_pixels)
        self.look: Look | None = None
        self.unfit = ""
        self._looked_at: list[av.Packet[Any]] = []
        self._surfaces: Surfaces | None = None
        self._cuda: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._cuda = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._low_delay = True
        self._number = 0
        # By what a packet came in with: its number, its time stamp, whether it is damaged.
        self._under_way: dict[int, tuple[int, int | None, bool]] = {}
        self._damaged = False
        self._latest: int | None = None  # time stamp

    def __call__(self, packet: av.Packet[Any]) -> Iterator[Shown | None]:
        if self.unfit:
            yield from self._cpu(packet)
            return
        self._watch_order(packet)
        if self.look is None:
            yield from self._look_at(packet)
        elif self._surfaces is not None:
            yield from self._decode(packet)
        elif packet.is_keyframe:
            self._begin()
            yield from self._decode(packet)

    def _look_at(self, packet: av.Packet[Any]) -> Iterator[Shown | None]:
        """Wait for a picture on the CPU; then show NVDEC all that has come since the key frame."""
        self._looked_at = [packet] if packet.is_keyframe else [*self._looked_at[-_LOOK_PACKETS:], packet]
        for picture in self._cpu.decode(packet):
            if picture is None or self.unfit:
                yield _shown(picture)
            elif self.look is None:
                look = self._look(picture)
                if isinstance(look, str):
                    self.unfit = look
                    yield _shown(picture)
                else:
                    self.look = look
        if self.look is not None:
            packets, self._looked_at = self._looked_at, []
            self._begin()
            for each in packets:
                yield from self._decode(each)

    def _begin(self) -> None:
        try:
            self._surfaces = Surfaces(
                self._stream,
                self._cpu.codec,
                self._device,
                self._cuda,
                self._keep,
                low_delay=self._low_delay,
                repeat_headers=True,
            )
        except Exception as error:  # its own classes, derived from nothing narrower
            raise SourceError(f"{self._what}: NVDEC cannot begin ({error})") from None

    def _look(self, picture: av.VideoFrame) -> Look | str:
        try:
            look = look_at(picture, self._cpu.codec, self._device)
        except EngineError as error:
            look = str(error)
        if isinstance(look, str) and self._strict:
            raise UnfitError(self._what, look)
        return look

    def _watch_order(self, packet: av.Packet[Any]) -> None:
        """Pictures that are shown in another order than they come need a decoder that waits for them."""
        if packet.pts is None:
            return
        step = 0 if self._latest is None else self._latest - packet.pts
        self._latest = packet.pts
        if self._low_delay and 0 < step * float(packet.time_base) < _REORDER_SECONDS:
            self._low_delay = False
            self._surfaces = None  # a new one from the next key frame on
            self._under_way.clear()

    def _decode(self, packet: av.Packet[Any]) -> Iterator[Shown | None]:
        self._damaged = packet.is_corrupt or (self._damaged and not packet.is_keyframe)
        self._number += 1
        # A decoder that puts pictures in order gives the one shown next the earliest stamp that came in.
        stamp = self._number if self._low_delay or packet.pts is None else packet.pts
        self._under_way[stamp] = self._number, packet.pts, self._damaged
        assert self._surfaces is not None
        arrived = self._surfaces(packet, stamp)
        while True:
            with torch.cuda.stream(self._cuda):
                try:
                    nv12, stamp = next(arrived, (None, 0))
                except TrackerError:
                    raise
                except Exception as error:  # its own classes, derived from nothing narrower
                    raise SourceError(f"{self._what}: NVDEC gave up ({error})") from None
                if nv12 is None:
                    break
                _, pts, damaged = self._under_way.pop(stamp, (0, None, False))
                shown = None if damaged else Shown(self._frame(nv12), pts)
            yield shown
        late = [s for s, (number, *_) in self._under_way.items() if number <= self._number - _REORDER_LIMIT]
        for stamp in late:
            del self._under_way[stamp]
            yield None

    def _frame(self, nv12: Tensor) -> Frame:
        rows, width = nv12.shape
        check_size(self._what, width, rows * 2 // 3, self._max_pixels)
        assert self.look is not None
        planes = upright(nv12, self.look.turn) if self._turning else (nv12,)
        ready = self._cuda.record_event() if self._cuda else None
        return frame_of(planes, self.look, index=0, pts_seconds=0.0, source=0, ready=ready)
