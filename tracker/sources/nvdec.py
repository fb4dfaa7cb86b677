"""Video files decoded by NVDEC: their pictures stay on the GPU, as the decoder wrote them (NV12).

Knows PyNvVideoCodec. Containers, time stamps and what a file promises are those of `VideoFile`, whose packets
it feeds to the decoder: its own demuxer says less about damage.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import av
import torch
from av.bitstream import BitStreamFilterContext
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from tracker.errors import EngineError, SourceError, TrackerError
from tracker.sources.accounting import Ledger
from tracker.sources.file import VideoFile
from tracker.sources.limits import MAX_PIXELS
from tracker.sources.planes import Colours, Turn, colours_of, turn_of
from tracker.types import Frame, Image

if TYPE_CHECKING:
    from av.container import InputContainer

# NVDEC's names of codecs, and what turns a container's packets into the stream it reads, start codes and
# parameter sets included. MPEG-4 and VC-1 would need their headers put there by hand: they are the CPU's.
_CODECS = {
    "h264": ("H264", "h264_mp4toannexb"),
    "hevc": ("HEVC", "hevc_mp4toannexb"),
    "vp8": ("VP8", None),
    "vp9": ("VP9", "vp9_superframe_split"),
    "av1": ("AV1", None),
    "mpeg2video": ("MPEG2", None),
}
_EIGHT_BIT_420 = ("yuv420p", "yuvj420p")


@dataclass(frozen=True, slots=True)
class Look:
    """What a file's first picture, decoded on the CPU, says of all of them, and NVDEC does not."""

    codec: str
    turn: Turn
    colours: Colours


def examine(path: str | Path, device: torch.device, *, max_pixels: int = MAX_PIXELS) -> Look | str:
    """What NVDEC needs to know of a file; or, in words, why this device's NVDEC cannot decode it.

    Raises EngineError where PyNvVideoCodec is not installed or finds no driver, SourceError as `VideoFile`.
    """
    nvc = _library()
    picture, codec, container = VideoFile(path, max_pixels=max_pixels).first_picture()
    width, height = picture.width, picture.height
    if codec not in _CODECS:
        return f"its codec is {codec}"
    if picture.format.name not in _EIGHT_BIT_420:
        return f"its pixels are {picture.format.name}"
    if picture.interlaced_frame:
        return "it is interlaced"
    if container == "avi":
        return "AVI files hold no presentation times"
    if width % 2 or height % 2:
        return f"its size is odd, {width}×{height}"
    caps = nvc.GetDecoderCaps(device.index or 0, getattr(nvc.cudaVideoCodec, _CODECS[codec][0]))
    if not caps.get("num_decoder_engines"):
        return f"this GPU does not decode {codec}"
    least, most = (caps["width_min"], caps["height_min"]), (caps["width_max"], caps["height_max"])
    if not (least[0] <= width <= most[0] and least[1] <= height <= most[1]):
        return f"this GPU decodes {codec} from {least[0]}×{least[1]} to {most[0]}×{most[1]} only"
    return Look(codec, turn_of(picture), colours_of(picture))


@dataclass(slots=True)
class _Surface:
    """A decoded picture: NV12 (height · 3/2, width), in the order of the decoder's stream."""

    nv12: Tensor
    width: int
    height: int
    pts: int | None
    dts: int | None
    duration: int
    is_corrupt: bool = False  # NVDEC hides damage inside a picture and does not tell
    interlaced_frame: bool = False


class NvdecFile(VideoFile):
    """One local video file as a `Source` of frames on the GPU.

    Counts as `VideoFile` does what never comes out of the decoder; NVDEC conceals damage inside a picture
    without saying so, so that such a picture is tracked and not counted as corrupt.

    look: from `examine`. keep: makes of a surface (height · 3/2, width), which the decoder will write over, a
    tensor that stays; on torch's current stream. Raises SourceError as `VideoFile` does, and where the
    decoder gives up. Until entered it can be pickled, for another process to enter.
    """

    def __init__(
        self,
        path: str | Path,
        look: Look,
        *,
        device: torch.device,
        source: int = 0,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(path, source=source, max_pixels=max_pixels, decoder="NVDEC")
        self.look, self.device, self.number = look, device, source
        self.keep: Callable[[Tensor], Tensor] = torch.clone
        self._stream: torch.cuda.Stream | None = None
        self._nvdec: Any = None
        self._piece: Any = None
        self._annex_b: BitStreamFilterContext | None = None
        self._times: dict[int, tuple[int | None, int]] = {}  # pts → dts and duration of packets under way

    def __reduce__(self) -> tuple[Any, ...]:
        return self._made(self.look), ()

    def unturned(self) -> Self:
        """The same, not entered, with its surfaces as they lie."""
        return self._made(replace(self.look, turn=Turn()))()

    def _made(self, look: Look) -> Callable[[], Self]:
        return partial(
            type(self),
            self._path,
            look,
            device=self.device,
            source=self.number,
            max_pixels=self._max_pixels,
        )

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            return super().__enter__()

    def _next(self) -> Frame | None:
        with torch.cuda.stream(self._stream):
            return super()._next()

    def _read(self) -> Generator[Frame]:
        try:
            yield from super()._read()
        finally:
            self._nvdec = self._annex_b = None
            self._times.clear()

    def _video_stream(self, container: InputContainer) -> av.VideoStream:
        stream = super()._video_stream(container)
        nvc, (name, bitstream_filter) = _library(), _CODECS[self.look.codec]
        self._nvdec = nvc.CreateDecoder(
            gpuid=self.device.index or 0,
            codec=getattr(nvc.cudaVideoCodec, name),
            cudastream=self._stream.cuda_stream if self._stream else 0,
            usedevicememory=True,
        )
        self._piece = nvc.PacketData()
        self._annex_b = BitStreamFilterContext(bitstream_filter, stream) if bitstream_filter else None
        return stream

    def _decode(self, stream: av.VideoStream, packet: av.Packet[Any] | None, ledger: Ledger) -> Iterator[Any]:
        if packet is not None and packet.pts is not None:
            self._times[packet.pts] = packet.dts, packet.duration or 0
        packets: list[av.Packet[Any] | None] = [packet]
        if self._annex_b is not None:
            packets = [*self._annex_b.filter(packet), *([None] if packet is None else [])]
        for each in packets:
            yield from self._feed(each)

    def _feed(self, packet: av.Packet[Any] | None) -> Iterator[_Surface]:
        """A stretch of the stream in, what that completes out; None drains the decoder."""
        piece = self._piece
        if packet is not None:
            piece.bsl, piece.bsl_data, piece.pts = packet.size, packet.buffer_ptr, packet.pts or 0
        else:
            piece.bsl = piece.bsl_data = piece.pts = 0
        try:
            for picture in self._nvdec.Decode(piece):
                yield self._surface(picture)
        except TrackerError:
            raise
        except Exception as error:  # its own classes, derived from nothing narrower
            raise SourceError(
                f"{self._path}: NVDEC gave up after {self.counts.decoded} frames ({error}): decode it on the "
                "CPU with --decode cpu"
            ) from error

    def _surface(self, picture: Any) -> _Surface:
        nv12 = self.keep(from_dlpack(picture))
        rows, width = nv12.shape
        pts = int(picture.timestamp)
        dts, duration = self._times.pop(pts, (pts, 0))
        return _Surface(nv12, width, rows * 2 // 3, pts, dts, duration)

    def _frame(self, picture: Any, index: int, pts_seconds: float) -> Frame:
        surface: _Surface = picture
        planes = upright(surface.nv12, self.look.turn)
        ready = self._stream.record_event() if self._stream else None
        return frame_of(
            planes, self.look, index=index, pts_seconds=pts_seconds, source=self.number, ready=ready
        )


def frame_of(
    planes: tuple[Tensor, ...],
    look: Look,
    *,
    index: int,
    pts_seconds: float,
    source: int,
    ready: torch.cuda.Event | None,
) -> Frame:
    """planes: as `upright` gives them. The rest: see `Frame` and `Image`."""
    rows, width = planes[0].shape
    image = Image(
        format="nv12" if len(planes) == 1 else "yuv",
        planes=planes,
        matrix=look.colours.matrix,
        full_range=look.colours.full_range,
        ready=ready,
    )
    height = rows * 2 // 3 if len(planes) == 1 else rows
    return Frame(index=index, pts_seconds=pts_seconds, size=(width, height), image=image, source=source)


def upright(nv12: Tensor, turn: Turn) -> tuple[Tensor, ...]:
    """The surface as it lies. One that is to be turned about is taken apart into Y, U and V, which costs
    more: each step of torch's lets go of Python and has to wait until the other threads give it back.
    """
    if turn == Turn():
        return (nv12,)
    height = len(nv12) * 2 // 3
    luma, chroma = nv12[:height], nv12[height:]
    return tuple(_upright(plane, turn) for plane in (luma, chroma[:, ::2], chroma[:, 1::2]))


def _upright(plane: Tensor, turn: Turn) -> Tensor:
    """As `planes._upright`, copied only where turning about demands it."""
    plane = plane.T if turn.turned else plane
    about = [axis for axis, turned in enumerate((turn.flipped, turn.mirrored)) if turned]
    return plane.flip(about) if about else plane


def _library() -> Any:
    """PyNvVideoCodec; importing it loads the driver, so only where a GPU is wanted."""
    try:
        return importlib.import_module("PyNvVideoCodec")
    except ImportError as error:
        raise EngineError(
            "decoding on the GPU needs PyNvVideoCodec: install tracker[gpu], or use --decode cpu"
        ) from error
    except RuntimeError as error:  # that is how it says that NVIDIA's driver libraries are missing
        raise EngineError(f"PyNvVideoCodec finds no NVIDIA driver ({error}): use --decode cpu") from error
