"""What a video file promises, what comes out of it, and so what was lost on the way.

Knows packets, time stamps and containers; decodes nothing and sees no pixels.
"""

from __future__ import annotations

import re
from bisect import insort
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tracker.types import FrameCounts

if TYPE_CHECKING:
    from av import Packet, VideoFrame, VideoStream
    from av.container import InputContainer

# Durations in file headers are rounded, by a frame here and an audio packet (0.13 s at 8 kHz AAC) there.
_END_TOLERANCE_SECONDS = 0.2
# H.264 and HEVC hold back at most 16 pictures to reorder them; a packet that old has been dropped.
_REORDER_LIMIT = 32
# Codecs in which a packet is a picture. Not so, in good files: VP8 (hidden reference frames) and MPEG-4
# (packets that say "no change").
_PICTURE_PER_PACKET = frozenset({"h264", "hevc", "vp9", "av1"})
# Containers whose header states a duration. Others (MPEG-TS, raw streams…) are measured by looking for
# their end, and so promise nothing.
_STATE_DURATION = frozenset({"mov", "matroska", "flv", "asf", "mxf"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What a container says it holds.

    frames: number of pictures; None where it does not say.
    itemised: each of them has an entry in the file's index, so each must turn up. Otherwise frames is a
        duration times the nominal rate, only an estimate where the frame rate varies.
    end_seconds: when the longest stream ends; for promises that are not itemised.
    """

    frames: int | None = None
    itemised: bool = False
    end_seconds: float = 0.0

    def missing(self, ledger: Ledger, frame_rate: float) -> int:
        """Pictures promised and never read, once the file has ended.

        An estimated promise counts as broken only if every stream stops well before the stated end: a
        good file may hold fewer pictures than duration times rate, but does not stop early. So pictures
        that vanish from the middle of such a file, where its structure is damaged, are not noticed here.
        """
        if self.frames is None:
            return 0
        if self.itemised:
            return max(0, self.frames - ledger.packets)
        if ledger.end_seconds >= self.end_seconds - max(_END_TOLERANCE_SECONDS, 2 / frame_rate):
            return 0
        return max(1, self.frames - (ledger.packets - ledger.discarded))


def promise_of(container: InputContainer, stream: VideoStream, frame_rate: float) -> Promise:
    family = container.format.name.partition(",")[0]
    if family == "avi" and stream.frames:
        # An exact count, but of chunks, the empty ones for "no change" included, which FFmpeg skips.
        return Promise(frames=stream.frames, end_seconds=stream.frames / frame_rate)
    if family not in _STATE_DURATION:
        return Promise()
    whole_seconds = (container.duration or 0) / 1_000_000
    seconds = _stream_seconds(stream) or whole_seconds
    if family in ("matroska", "flv") and stream.start_time and stream.time_base:
        seconds -= float(stream.start_time * stream.time_base)  # they state the end, not the length
    by_time = round(seconds * frame_rate)
    # The two differ where an edit list hides part of the samples, and in fragmented files, whose header
    # lists the first fragment at best.
    if family == "mov" and stream.frames and abs(stream.frames - by_time) <= 1:
        return Promise(frames=stream.frames, itemised=True)
    return Promise(frames=by_time, end_seconds=whole_seconds) if by_time > 0 else Promise()


def _stream_seconds(stream: VideoStream) -> float | None:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    tag = stream.metadata.get("DURATION", "")  # Matroska's, per stream: 00:00:05.000000000
    clock = re.fullmatch(r"(\d{1,4}):(\d\d):(\d\d(?:\.\d*)?)", tag, re.ASCII)
    return int(clock[1]) * 3600 + int(clock[2]) * 60 + float(clock[3]) if clock else None


class Ledger:
    """Packets into the decoder, pictures out, and the number of each picture in order of presentation.

    A lost picture keeps its number, so that those after it keep theirs. What comes before the first key
    frame, in the file or in time, is not lost if the decoder drops it: it was cut off from its references
    when the file was made, and no player shows it.
    """

    def __init__(self, counts: FrameCounts, codec: str) -> None:
        self.packets = 0
        self.discarded = 0
        self.end_seconds = 0.0
        self._counts = counts
        self._picture_per_packet = codec in _PICTURE_PER_PACKET
        self._waiting: dict[int, int] = {}  # pts → packet number, in decoding order
        self._failed: list[int] = []  # sorted pts of undecodable packets that no later picture has passed
        self._strangers = 0  # pictures that match no packet: each stands for one of those still waiting
        self._first_key_pts: int | None = None
        self._next_index = 0

    def saw(self, packet: Packet[Any]) -> None:
        """A packet of any stream was read."""
        start = packet.dts if packet.pts is None else packet.pts
        if start is not None:
            end_seconds = float((start + (packet.duration or 0)) * packet.time_base)
            self.end_seconds = max(self.end_seconds, end_seconds)

    def packet_in(self, packet: Packet[Any]) -> None:
        self.packets += 1
        if self._first_key_pts is None and packet.is_keyframe:
            self._first_key_pts = packet.pts
        if packet.is_discard:  # cut away by an edit list: decoded for reference, never shown
            self.discarded += 1
            return
        owed_from = self._first_key_pts
        if packet.size and packet.pts is not None and owed_from is not None and packet.pts >= owed_from:
            self._waiting[packet.pts] = self.packets

    def undecodable(self, packet: Packet[Any] | None) -> None:
        """The decoder gave an error for this packet (None: at the very end)."""
        if packet is not None and packet.is_discard:
            return
        self._counts.corrupt += 1
        if packet is None or packet.pts is None:
            self._next_index += 1
        else:
            self._waiting.pop(packet.pts, None)
            insort(self._failed, packet.pts)

    def picture_out(self, picture: VideoFrame) -> int:
        """The picture's 0-based index. A corrupt picture has one too."""
        if picture.pts is None or self._waiting.pop(picture.pts, None) is None:
            self._strangers += 1
        if picture.interlaced_frame:
            self._picture_per_packet = False  # two fields may come in two packets
        while self._failed and (picture.pts is None or self._failed[0] < picture.pts):
            self._failed.pop(0)
            self._next_index += 1
        self._write_off(self.packets - _REORDER_LIMIT)
        self._counts.corrupt += picture.is_corrupt
        self._next_index += 1
        return self._next_index - 1

    def close(self) -> None:
        """The decoder is empty: what has not come will not come."""
        self._write_off(self.packets)

    def _write_off(self, up_to: int) -> None:
        """Gives up waiting for packets with numbers so low; decoders drop what they cannot use in silence."""
        while self._waiting and next(iter(self._waiting.values())) <= up_to:
            del self._waiting[next(iter(self._waiting))]
            if self._strangers:
                self._strangers -= 1
            elif self._picture_per_packet:
                self._counts.corrupt += 1
                self._next_index += 1
