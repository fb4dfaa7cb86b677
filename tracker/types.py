"""What travels from room to room: frames, detections, tracks, and what each room promises.

Data only. Nothing here opens, computes or remembers. Arrays are NumPy on the host; planes of an
`Image` may be torch tensors on a device (then nobody may call NumPy on them), and masks stay where they were
found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, overload, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tracker.errors import DetectionsError

if TYPE_CHECKING:
    import torch

    from tracker.masks import Masks

Floats = NDArray[np.float32] | NDArray[np.float64]
Labels = NDArray[np.int64]
YuvMatrix = Literal["bt601", "bt709", "bt2020"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """Pixels as they were decoded.

    format: "yuv" (three 8-bit planes Y, U, V; the chroma planes may be smaller in either direction), "bgr"
        (one (H, W, 3) plane) or, on a device, "nv12" (one (H·3/2, W) plane: Y, and below it U and V in turn).
    planes: uint8 arrays, already upright: rotation metadata has been applied. Read-only by convention; a
        row's pixels are contiguous, rows need not be.
    matrix, full_range: how Y, U, V become R, G, B (ITU-R BT.601/709/2020; full range is 0–255, else
        16–235/240). Meaningless for "bgr".
    ready: passes on the device once its planes hold the picture; None where they do already, as on the host.
        Planes on a device may have any strides.
    """

    format: Literal["yuv", "bgr", "nv12"]
    planes: tuple[Any, ...]
    matrix: YuvMatrix = "bt601"
    full_range: bool = False
    ready: torch.cuda.Event | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One decoded frame of one source.

    index: 0-based position in the source's order of presentation. Damaged frames are not delivered but keep
        their number, so there may be gaps.
    pts_seconds: presentation time in seconds on the source's own clock (need not start at 0).
    size: (width, height) in pixels of the upright image; track boxes are in these pixels.
    image: None only where detections are replayed without a video.
    source: which source of the run, from 0.
    received: when its last byte had come, by `time.monotonic`; of live sources alone.
    """

    index: int
    pts_seconds: float
    size: tuple[int, int]
    image: Image | None = None
    source: int = 0
    received: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Detections:
    """What a front end found in one frame, as arrays of N rows on the host.

    xyxy: (N, 4) corners in source pixels, x2 ≥ x1 and y2 ≥ y1.
    score: (N,) confidence. label: (N,) class index. embedding: (N, D) appearance, any positive norm.
    angle: (N,) where boxes are rotated: radians by which each box is turned around its centre, from the x
        axis towards the y axis; xyxy are its corners before the turn (see `boxes.turned`). mmrotate's le90,
        the longer side along x and angles in −π/2…π/2, is one way to say it; others are as good.
    mask: N instance masks of the picture, row for row, where the network finds them; still on its device.

    Raises DetectionsError for wrong shapes and for NaN or inf, which would silently spoil every track.
    """

    xyxy: Floats
    score: Floats
    label: Labels
    embedding: Floats | None = None
    angle: Floats | None = None
    mask: Masks | None = None

    def __post_init__(self) -> None:
        count = len(self.xyxy)
        if self.xyxy.shape != (count, 4) or self.score.shape != (count,) or self.label.shape != (count,):
            raise DetectionsError(
                f"detections need xyxy (N, 4), score (N,) and label (N,); got {self.xyxy.shape}, "
                f"{self.score.shape} and {self.label.shape}"
            )
        if self.embedding is not None and (self.embedding.ndim != 2 or len(self.embedding) != count):
            raise DetectionsError(f"embedding needs shape ({count}, D), got {self.embedding.shape}")
        if self.angle is not None and self.angle.shape != (count,):
            raise DetectionsError(f"angle needs shape ({count},), got {self.angle.shape}")
        if self.mask is not None and len(self.mask) != count:
            raise DetectionsError(f"there must be {count} masks, one of each detection; got {len(self.mask)}")
        with np.errstate(over="ignore"):
            for name in ("xyxy", "score", "embedding", "angle"):
                values = getattr(self, name)
                if values is None:
                    continue
                # One dot product sees every NaN and inf, and is far cheaper than isfinite().all(). It also
                # objects to what is so large that its square overflows, which would spoil the filter.
                flat = values.reshape(-1)
                if not np.isfinite(np.dot(flat, flat)):
                    size = np.nan_to_num(np.abs(values), nan=np.inf).reshape(count, -1).max(axis=1)
                    row = int(size.argmax())
                    raise DetectionsError(
                        f"{name} of detection {row} is not a finite number of sensible size ({values[row]}): "
                        "the detector overflowed or was fed garbage; check its precision and preprocessing"
                    )

    def __len__(self) -> int:
        return len(self.xyxy)


@dataclass(frozen=True, slots=True)
class Track:
    """One tracked object in one frame. xyxy: (4,) corners in source pixels; label: class name.

    angle: of a rotated box, in radians; then xyxy are its corners before the turn, as in `Detections`.
    mask: one row, where the network finds masks; keeping it keeps those of the whole frame.
    """

    id: int
    xyxy: Floats
    score: float
    label: str
    angle: float | None = None
    mask: Masks | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracks(Sequence[Track]):
    """The tracks of one frame: arrays for those who want speed, a sequence of `Track` for the rest.

    id: (N,) from 1. xyxy: (N, 4) corners in source pixels. score: (N,). label: (N,) class index into
    names; an index beyond names is shown as its number. angle: (N,) of rotated boxes, as in `Detections`.
    row: (N,) the detection of this frame that each track was given, −1 for none. mask: N masks, those of the
    rows; the tracker leaves them out, whoever has the detections puts them in (`with_masks`).
    """

    id: NDArray[np.int64]
    xyxy: Floats
    score: Floats
    label: Labels
    names: tuple[str, ...] = field(default=(), repr=False)
    angle: Floats | None = None
    row: NDArray[np.int64] | None = field(default=None, repr=False)
    mask: Masks | None = None

    def __len__(self) -> int:
        return len(self.id)

    def with_masks(self, found: Detections) -> Tracks:
        """The same, each with the mask of its detection in this frame, where there are masks."""
        if found.mask is None or self.row is None:
            return self
        return replace(self, mask=found.mask[self.row])

    def name_of(self, label: int) -> str:
        return self.names[label] if 0 <= label < len(self.names) else str(label)

    @overload
    def __getitem__(self, index: int) -> Track: ...
    @overload
    def __getitem__(self, index: slice) -> list[Track]: ...
    def __getitem__(self, index: int | slice) -> Track | list[Track]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Track(
            int(self.id[index]),
            self.xyxy[index],
            float(self.score[index]),
            self.name_of(int(self.label[index])),
            None if self.angle is None else float(self.angle[index]),
            None if self.mask is None else self.mask.one(index),
        )

    def __iter__(self) -> Iterator[Track]:
        none = [None] * len(self)
        angle = none if self.angle is None else self.angle.tolist()
        mask = none if self.mask is None else map(self.mask.one, range(len(self)))
        columns = self.id.tolist(), self.xyxy, self.score.tolist(), self.label.tolist(), angle, mask
        return (
            Track(number, xyxy, score, self.name_of(label), turn, pixels)
            for number, xyxy, score, label, turn, pixels in zip(*columns, strict=True)
        )


@dataclass(slots=True, kw_only=True)
class FrameCounts:
    """What became of a source's frames.

    declared: what the container or directory promises; None where it promises nothing.
    decoded: delivered to the pipeline. corrupt: decoded with errors, or not decodable at all, and so
    never tracked. dropped: good, but skipped on purpose. missing: promised but never seen.
    """

    declared: int | None = None
    decoded: int = 0
    corrupt: int = 0
    dropped: int = 0
    missing: int = 0

    @property
    def lost(self) -> int:
        """Frames the user expected in the results and will not find there."""
        return self.corrupt + self.missing


@dataclass(slots=True)
class Transfers:
    """How often the host waited for the device that detects, and what was copied from there, so far.

    waits: host synchronisations. copies: device to host. bytes: in all copies. A front end on the CPU counts
    the same events: a batch's worker is waited for, and hands its detections over.
    """

    waits: int = 0
    copies: int = 0
    bytes: int = 0

    def add(self, *, waits: int, copies: int, bytes: int) -> None:
        self.waits += waits
        self.copies += copies
        self.bytes += bytes


class Outcome(NamedTuple):
    """What became of one frame.

    texts: the frame as each text result of its source words it, in their order. confirmed: tracks of its
    source that were ever reported, up to this frame.
    """

    frame: Frame
    tracks: Tracks
    texts: tuple[bytes, ...]
    confirmed: int


class Source(Protocol):
    """Frames in order. Iterate once; enter before, exit after. `counts` is true at any moment."""

    name: str
    decoder: str  # for people
    counts: FrameCounts
    size: tuple[int, int]  # (width, height) of the first frame, upright
    frame_rate: float  # nominal frames per second, > 0

    def __enter__(self) -> Source: ...
    def __exit__(self, *exc: object) -> None: ...
    def __iter__(self) -> Iterator[Frame]: ...


class AheadSource(Source, Protocol):
    """One that decodes ahead by itself. seconds: spent decoding so far."""

    seconds: float


class Runtime(Protocol):
    """An engine with named tensors. Shapes use None for a dimension left open.

    device: where its tensors live. lanes: runs at once, each in a thread of its caller's, that use the
    machine best.
    """

    inputs: Mapping[str, tuple[int | None, ...]]
    outputs: Mapping[str, tuple[int | None, ...]]
    device: torch.device
    lanes: int

    @property
    def description(self) -> str: ...  # for people: provider, version, what is not as it should be
    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...


class EngineLane(Protocol):
    """A place on a device to run batches of one engine one after another, on torch's current stream.

    inputs: by name, shaped for the greatest batch; write rows [:B] into them.
    """

    inputs: Mapping[str, torch.Tensor]

    def enqueue(self, batch: int) -> dict[str, torch.Tensor]:
        """All outputs by name, [:batch] of each, valid until the next enqueue. Never waits."""
        ...


@runtime_checkable
class LaneRuntime(Runtime, Protocol):
    """A runtime that gives its lanes away, so that others can enqueue their work around the engine's."""

    def lane(self) -> EngineLane: ...


class Pending(Protocol):
    """Work under way. `result` is the only place where the host waits."""

    def result(self) -> list[Detections]: ...


class Frontend(Protocol):
    """A detector: frames in, detections in source pixels out, one list entry per frame.

    max_batch: frames that it takes at once. usual_batch: those that it had best be given. embeds: whether
    detections carry embeddings. masks: whether they carry masks. lanes: batches it works on at once. device:
    where it computes. frames_on: where frames had best lie. transfers: between its device and the host so
    far. seconds: spent so far, by stage, in order. problem: what makes it slower than it should be, if
    anything.
    """

    names: tuple[str, ...]
    max_batch: int
    usual_batch: int
    embeds: bool
    masks: bool
    lanes: int

    @property
    def device(self) -> torch.device: ...
    @property
    def frames_on(self) -> torch.device: ...
    @property
    def problem(self) -> str | None: ...
    @property
    def transfers(self) -> Transfers: ...
    @property
    def seconds(self) -> Mapping[str, float]: ...
    def submit(self, frames: Sequence[Frame]) -> Pending: ...
    def close(self) -> None: ...


class Association(Protocol):
    """Turns each frame's detections into tracks. Empty frames count too: time passes.

    config: its settings, a dataclass. confirmed: tracks that were ever reported. update: frame_index may
    lie between whole numbers, since it stands for time. rescale: from here on the same picture is so many
    times as wide and as high.
    """

    @property
    def config(self) -> Any: ...
    @property
    def confirmed(self) -> int: ...
    def rescale(self, x: float, y: float) -> None: ...
    def update(self, frame_index: float, detections: Detections) -> Tracks: ...


class Crew(Protocol):
    """Follows the objects of every source: each frame goes to the association of its own.

    associate_seconds, format_seconds: spent so far associating, and wording tracks for text results.
    """

    @property
    def associate_seconds(self) -> float: ...
    @property
    def format_seconds(self) -> float: ...
    def associate(self, frames: Sequence[Frame], found: Sequence[Detections]) -> Iterator[Outcome]:
        """Take a batch with its detections; give what is finished, which may be the batch before."""
        ...

    def finish(self) -> Iterator[Outcome]:
        """What is still under way."""
        ...


class Sink(Protocol):
    """Writes one source's results. `close(complete=False)` leaves them marked partial."""

    def write(self, frame: Frame, tracks: Tracks) -> None: ...
    def close(self, *, complete: bool) -> None: ...
