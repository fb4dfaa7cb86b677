"""Video files decoded by NVDEC: their pictures stay on the GPU, as the decoder wrote them (NV12).

Knows PyNvVideoCodec. Containers, time stamps and what a file promises are those of `VideoFile`, whose packets
it feeds to the decoder: its own demuxer says less about damage.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import torch
from av.bitstream import BitStreamFilterContext
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from tracker.errors import EngineError, SourceError
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

    look: from `examine`. Raises SourceError as `VideoFile` does, and where the decoder gives up.
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
        self._look, self._device = look, device
        self._stream: torch.cuda.Stream | None = None
        self._nvdec: Any = None
        self._annex_b: BitStreamFilterContext | None = None
        self._times: dict[int, tuple[int | None, int]] = {}  # pts → dts and duration of packets under way

    def _read(self) -> Generator[Frame]:
        try:
            yield from super()._read()
        finally:
            self._nvdec = self._annex_b = None
            self._times.clear()

    def _video_stream(self, container: InputContainer) -> av.VideoStream:
        stream = super()._video_stream(container)
        nvc, (name, bitstream_filter) = _library(), _CODECS[self._look.codec]
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._nvdec = nvc.CreateDecoder(
            gpuid=self._device.index or 0,
            codec=getattr(nvc.cudaVideoCodec, name),
            cudastream=self._stream.cuda_stream if self._stream else 0,
            usedevicememory=True,
        )
        self._annex_b = BitStreamFilterContext(bitstream_filter, stream) if bitstream_filter else None
        return stream

    def _decode(self, stream: av.VideoStream, packet: av.Packet[Any] | None, ledger: Ledger) -> list[Any]:
        if packet is not None and packet.pts is not None:
            self._times[packet.pts] = packet.dts, packet.duration or 0
        packets: list[av.Packet[Any]] = [] if packet is None else [packet]
        if self._annex_b is not None:
            packets = self._annex_b.filter(packet)
        surfaces = [surface for each in packets for surface in self._feed(each)]
        return surfaces + self._feed(None) if packet is None else surfaces

    def _feed(self, packet: av.Packet[Any] | None) -> list[_Surface]:
        """A stretch of the stream in, what that completes out; None drains the decoder."""
        piece = _library().PacketData()
        if packet is not None:
            piece.bsl, piece.bsl_data, piece.pts = packet.size, packet.buffer_ptr, packet.pts or 0
        else:
            piece.bsl = piece.bsl_data = piece.pts = 0
        try:
            with torch.cuda.stream(self._stream):
                return [self._surface(picture) for picture in self._nvdec.Decode(piece)]
        except Exception as error:  # its own classes, derived from nothing narrower
            raise SourceError(
                f"{self._path}: NVDEC gave up after {self.counts.decoded} frames ({error}): decode it on the "
                "CPU with --decode cpu"
            ) from error

    def _surface(self, picture: Any) -> _Surface:
        """A copy: the decoder writes over its own surfaces as soon as it needs them again."""
        nv12 = from_dlpack(picture).clone()
        rows, width = nv12.shape
        pts = int(picture.timestamp)
        dts, duration = self._times.pop(pts, (pts, 0))
        return _Surface(nv12, width, rows * 2 // 3, pts, dts, duration)

    def _frame(self, picture: Any, index: int, pts_seconds: float) -> Frame:
        surface: _Surface = picture
        luma, chroma = surface.nv12[: surface.height], surface.nv12[surface.height :]
        with torch.cuda.stream(self._stream):
            planes = tuple(
                _upright(plane, self._look.turn) for plane in (luma, chroma[:, ::2], chroma[:, 1::2])
            )
        image = Image(
            format="yuv",
            planes=planes,
            matrix=self._look.colours.matrix,
            full_range=self._look.colours.full_range,
            ready=self._stream.record_event() if self._stream else None,
        )
        height, width = planes[0].shape
        return Frame(
            index=index, pts_seconds=pts_seconds, size=(width, height), image=image, source=self._source
        )


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
