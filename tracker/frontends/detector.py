"""What front ends of detectors have in common: workers, lanes for them to work in, and the clocks.

Knows when things happen; what an engine answers and what that means, each detector's own module knows.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from threading import Lock
from time import perf_counter
from typing import ClassVar

import torch
from torch import Tensor

from tracker.boxes import Fit
from tracker.errors import ConfigError, EngineError
from tracker.frontends.lanes import Answer, DeviceLane, HostLane, Lane, Outputs, Packed
from tracker.frontends.preprocess import batch_of
from tracker.frontends.worker import start_workers
from tracker.manifest import IMAGENET_MEAN, IMAGENET_STD, Input, Manifest
from tracker.types import Detections, Frame, LaneRuntime, Runtime, Transfers


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorConfig:
    """What counts as an object.

    conf: least score. 0.1 is where ByteTrack's second pass ends (its `byte_tracker.py`), so a lower one
        changes no track.
    classes: names of the classes to keep; empty keeps all.
    max_batch: frames at once for an engine whose batch is open; others say themselves.
    """

    conf: float = 0.1
    classes: tuple[str, ...] = ()
    max_batch: int = 8

    def __post_init__(self) -> None:
        check_share("conf", self.conf)
        check_count("max_batch", self.max_batch)


def check_share(key: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ConfigError(f"{key} is {value}; it must be above 0 and at most 1")


def check_count(key: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{key} is {value}; it must be at least 1")


class Detector(ABC):
    """Worker threads prepare, run and decode, so that the caller's thread can decode video and associate
    meanwhile: as many as the runtime runs batches at once, each with a batch of its own.

    A detector sets itself up, then calls `_start`, which runs the engine once on an empty image, so that an
    engine that does not fit is found before the first frame.

    seconds: spent so far in each stage by all workers: preprocess, inference and postprocess on the host; on
        a GPU prepare (of what to enqueue), gpu (from there to the packed answer) and unpack.
    transfers: waits for the device and copies from there so far.
    describe: the manifest of an ONNX file of its family, from its runtime, onnx_sha256, names, size and
        precision by name, and what else the family knows of.
    layouts: what it calls the different outputs that its exporters write, where there are several.
    parts: of engines in several parts, further inputs by name, and how many rows of them an image may have.
    """

    embeds = masks = False
    config_type: ClassVar[type[DetectorConfig]]
    describe: ClassVar[Callable[..., Manifest]]
    layouts: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[Mapping[str, int]] = {}

    def __init__(self, runtime: Runtime, manifest: Manifest, config: DetectorConfig) -> None:
        """Raises EngineError where the engine does not take or give what the manifest says, ConfigError
        for a class to keep that there is not.
        """
        self._runtime = runtime
        self._roles = manifest.outputs
        for name in self._roles.values():
            if name not in runtime.outputs:
                raise EngineError(
                    f"the engine has no output {name}, only {', '.join(runtime.outputs)}: "
                    "correct the manifest"
                )
        self.names = manifest.names
        self._wanted = torch.tensor(_wanted(config.classes, self.names))  # (C,) bool
        fixed = batch_of(runtime, manifest.input)
        self.max_batch = fixed or config.max_batch
        # On a CPU frames side by side, in lanes, are faster than batches and need half the memory.
        self.usual_batch = fixed or (1 if runtime.device.type == "cpu" else config.max_batch)
        self.lanes = runtime.lanes
        self._manifest = manifest
        self._all: list[Lane] = []
        self._idle: SimpleQueue[Lane] = SimpleQueue()
        self._unpack_seconds = 0.0
        self._clock = Lock()

    @abstractmethod
    def _check(self, outputs: Outputs) -> None:
        """EngineError unless what an empty image gave is what the manifest promises."""

    @abstractmethod
    def _pack(self, outputs: Outputs) -> Tensor | Answer:
        """All that the host needs of a batch in one float32 tensor, from outputs by role; an `Answer` also
        says what stays on the device.

        On a GPU in shapes that depend on the batch alone, and without waiting: it becomes part of a graph.
        """

    def _finish(self, answer: Tensor | Answer, fits: Sequence[Fit]) -> Tensor | Answer:
        """What `_pack` gave, and what is made of it in the shapes of the frames: outside of the graph, and
        without waiting.
        """
        return answer

    @abstractmethod
    def _unpack(self, packed: Packed, fits: Sequence[Fit], kept: Tensor | None) -> list[Detections]:
        """Objects of each image. Copies what it keeps: `packed` is overwritten by the next batch. `kept` is
        what `_pack` left on the device; it is nobody else's.
        """

    @property
    def device(self) -> torch.device:
        return self._runtime.device

    @property
    def frames_on(self) -> torch.device:
        """Where frames had best lie; they are copied there from anywhere else."""
        return self.device if self._on_device() else torch.device("cpu")

    @property
    def seconds(self) -> dict[str, float]:
        seconds = {stage: sum(lane.seconds[stage] for lane in self._all) for stage in self._all[0].seconds}
        last = "unpack" if self._on_device() else "postprocess"
        return seconds | {last: seconds.get(last, 0.0) + self._unpack_seconds}

    @property
    def transfers(self) -> Transfers:
        moved = Transfers()
        for lane in self._all:
            moved.add(**asdict(lane.transfers))
        return moved

    @property
    def problem(self) -> str | None:
        """What makes it slower than it should be, in words; None where nothing does."""
        found = [lane.problem for lane in self._all if isinstance(lane, DeviceLane) and lane.problem]
        return f"without CUDA graphs: {found[0]}" if found else None

    def lane(self) -> Lane:
        """One of its lanes, for who times what happens there while nothing is submitted."""
        return self._all[0]

    def submit(self, frames: Sequence[Frame]) -> Future[list[Detections]]:
        """Start on 1 to max_batch frames, of any sizes. Errors of the work are raised by its `result`."""
        if not 1 <= len(frames) <= self.max_batch:
            raise EngineError(
                f"{len(frames)} frames submitted; this engine takes 1 to {self.max_batch} at once"
            )
        return self._workers.submit(self._detect, frames)

    def close(self) -> None:
        """Drop what has not begun, wait for what has."""
        self._workers.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> None:
        self._workers = start_workers(self.lanes)
        try:
            self._workers.submit(self._open).result()
        except BaseException:
            self.close()
            raise

    @torch.inference_mode()
    def _open(self) -> None:
        """Make the lanes; the first finds out whether the engine fits."""
        for _ in range(self.lanes):
            lane = self._lane()
            if not self._all:
                self._check(lane.empty())
            if isinstance(lane, DeviceLane):
                lane.warm_up(self.max_batch)
            self._all.append(lane)
            self._idle.put(lane)

    def _lane(self) -> Lane:
        runtime, manifest = self._runtime, self._manifest
        if self._on_device():
            assert isinstance(runtime, LaneRuntime)
            lane = runtime.lane()
            return DeviceLane(lane, self.device, manifest, self.max_batch, self._pack, self._finish)
        return HostLane(runtime, manifest, self.max_batch, self._pack, self._finish)

    def _on_device(self) -> bool:
        return self.device.type == "cuda" and isinstance(self._runtime, LaneRuntime)

    @torch.inference_mode()
    def _detect(self, frames: Sequence[Frame]) -> list[Detections]:
        lane = self._idle.get()
        try:
            packed, fits = lane(frames)
            begun = perf_counter()
            detections = self._unpack(packed, fits, lane.kept)
        finally:
            self._idle.put(lane)
        with self._clock:
            self._unpack_seconds += perf_counter() - begun
        return detections


def input_of(runtime: Runtime, size: tuple[int, int] | None) -> tuple[str, tuple[int, int]]:
    """Name and image size (width, height) of the one input; `size` where the engine leaves it open."""
    ((name, shape),) = runtime.inputs.items()
    if size is None:
        if len(shape) != 4 or shape[2] is None or shape[3] is None:
            raise EngineError(f"input {name} has shape {shape}: say its image size with --input-size WxH")
        size = (shape[3], shape[2])
    return name, size


def mmdet_input(runtime: Runtime, size: tuple[int, int] | None) -> Input:
    """What mmdet feeds to detectors with a ResNet: RGB, normalised, in proportion
    (`configs/_base_/{models/mask-rcnn_r50_fpn,datasets/coco_instance}.py`). size: as for `input_of`.
    """
    name, size = input_of(runtime, size)
    return Input(
        name=name,
        size=size,
        layout="NCHW",
        colour="rgb",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        resize="corner_rounded",
        pad=IMAGENET_MEAN,  # mmdet pads with zeros what is normalised already
    )


def check_finite(*tensors: Tensor) -> None:
    """EngineError where there is NaN or inf among an engine's answers."""
    # A sum sees every NaN and inf; it can overflow without one, so only then is each value looked at.
    total = sum(float(tensor.sum(dtype=torch.float32)) for tensor in tensors)
    if not math.isfinite(total) and not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise not_finite()


def not_finite() -> EngineError:
    return EngineError(
        "the engine answers NaN or inf: it overflows at its precision (try FP32), or its manifest "
        "describes another input than it was trained on"
    )


def _wanted(classes: Sequence[str], names: Sequence[str]) -> list[bool]:
    """Which of the names to keep; all where `classes` is empty."""
    for name in classes:
        if name not in names:
            near = difflib.get_close_matches(name, names) or names[:5]
            raise ConfigError(
                f"no class {name!r} among the engine's {len(names)}; near it: {', '.join(near)}"
            )
    return [not classes or name in classes for name in names]
