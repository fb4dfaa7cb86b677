"""What NVDEC decodes, files above all: pictures stay on the GPU, as the decoder wrote them (NV12).

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
    _library()
    picture, codec, container = VideoFile(path, max_pixels=max_pixels).first_picture()
    if container == "avi" and codec in _CODECS:
        return "AVI files hold no presentation times"
    return look_at(picture, codec, device)


def look_at(picture: av.VideoFrame, codec: str, device: torch.device) -> Look | str:
    """As `examine`, of a stream's first picture, decoded on the CPU, and FFmpeg's name of its codec."""
    nvc = _library()
    width, height = picture.width, picture.height
    if codec not in _CODECS:
        return f"its codec is {codec}"
    if picture.format.name not in _EIGHT_BIT_420:
        return f"its pixels are {picture.format.name}"
    if picture.interlaced_frame:
        return "it is interlaced"
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


class Surfaces:
    """NVDEC: packets of one stream in, decoded pictures out.

    codec: FFmpeg's name. keep: makes of a surface, which the decoder will write over, a tensor that stays.
    cuda_stream: what the decoder works in; be in it whenever this is iterated. low_delay: each picture comes
    out with its own packet, for streams without B-frames only; otherwise one packet later at least.
    repeat_headers: before each key frame, where the container says them only once.
    """

    def __init__(
        self,
        stream: av.VideoStream,
        codec: str,
        device: torch.device,
        cuda_stream: torch.cuda.Stream | None,
        keep: Callable[[Tensor], Tensor],
        *,
        low_delay: bool = False,
        repeat_headers: bool = False,
    ) -> None:
        nvc, (name, bitstream_filter) = _library(), _CODECS[codec]
        latency = {"latency": nvc.DisplayDecodeLatencyType.LOW} if low_delay else {}
        self.decoder = nvc.CreateDecoder(
            gpuid=device.index or 0,
            codec=getattr(nvc.cudaVideoCodec, name),
            cudastream=cuda_stream.cuda_stream if cuda_stream else 0,
            usedevicememory=True,
            **latency,
        )
        self._keep = keep
        self._piece = nvc.PacketData()
        if low_delay:  # else the parser waits for the next packet to see that this picture is whole
            self._piece.decode_flag = int(nvc.VideoPacketFlag.ENDOFPICTURE)
        filters = [bitstream_filter] if bitstream_filter else []
        if repeat_headers:
            filters.append("dump_extra")
        self._annex_b = BitStreamFilterContext(",".join(filters), stream) if filters else None

    def __call__(
        self, packet: av.Packet[Any] | None, stamp: int | None = None
    ) -> Iterator[tuple[Tensor, int]]:
        """What a packet completes, each with the number that came in with its own packet: `stamp`, else its
        presentation time, or 0. None drains the decoder.
        """
        packets: list[av.Packet[Any] | None] = [packet]
        if self._annex_b is not None:
            packets = [*self._annex_b.filter(packet), *([None] if packet is None else [])]
        piece = self._piece
        for each in packets:
            if each is not None:
                piece.bsl, piece.bsl_data = each.size, each.buffer_ptr
                piece.pts = (each.pts or 0) if stamp is None else stamp
            else:
                piece.bsl = piece.bsl_data = piece.pts = 0
            for picture in self.decoder.Decode(piece):
                yield self._keep(from_dlpack(picture)), int(picture.timestamp)


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
        self._surfaces: Surfaces | None = None
        self._times: dict[int, tuple[int | None, int]] = {}  # pts → dts and duration of packets under way

    def __reduce__(self) -> tuple[Any, ...]:
        return self._made(self.look), ()

    def unturned(self) -> Self:
        """The same, not entered, with its surfaces as they lie."""
        return self.afresh(replace(self.look, turn=Turn()))

    def afresh(self, look: Look | None = None) -> Self:
        """The same, not entered."""
        return self._made(look or self.look)()

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
            self._surfaces = None
            self._times.clear()

    def _video_stream(self, container: InputContainer) -> av.VideoStream:
        stream = super()._video_stream(container)
        self._surfaces = Surfaces(stream, self.look.codec, self.device, self._stream, self.keep)
        return stream

    def _decode(self, stream: av.VideoStream, packet: av.Packet[Any] | None, ledger: Ledger) -> Iterator[Any]:
        if packet is not None and packet.pts is not None:
            self._times[packet.pts] = packet.dts, packet.duration or 0
        assert self._surfaces is not None
        try:
            for nv12, pts in self._surfaces(packet):
                yield self._surface(nv12, pts)
        except TrackerError:
            raise
        except Exception as error:  # its own classes, derived from nothing narrower
            raise SourceError(
                f"{self._path}: NVDEC gave up after {self.counts.decoded} frames ({error}): decode it on the "
                "CPU with --decode cpu"
            ) from error

    def _surface(self, nv12: Tensor, pts: int) -> _Surface:
        rows, width = nv12.shape
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
