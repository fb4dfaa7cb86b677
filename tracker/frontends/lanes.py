"""Lanes: where one batch at a time goes from frames to the numbers the host needs of it.

On the host, step by step, with OpenCV, the runtime and torch. On a GPU all of it is enqueued at once, from
the frames' pixels to the packed answer, as one CUDA graph per batch size; the host waits and copies once.
Knows nothing of what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tracker.boxes import Fit
from tracker.errors import DeviceError
from tracker.frontends.preprocess import Preprocessor, fit_of
from tracker.graphs import Graphs, first_line
from tracker.kernels.letterbox import FrameTable, letterbox
from tracker.manifest import Manifest
from tracker.types import EngineLane, Frame, Image, Runtime, Transfers

Outputs = Mapping[str, Tensor]
Pack = Callable[[Outputs], "Tensor | Answer"]
Finish = Callable[["Tensor | Answer", Sequence[Fit]], "Tensor | Answer"]
Packed = NDArray[np.float32]


class Answer(NamedTuple):
    """packed: what the host needs, in one float32 tensor. kept: what stays where it is, such as masks."""

    packed: Tensor
    kept: Tensor


class Lane(Protocol):
    """For one thread at a time. seconds, transfers: spent and moved so far.

    placed: (batch, 4) int64, where the engine is: offset (x, y) and size (width, height) of each image within
    its input. kept: of the last call, in memory of its own; None where `pack` keeps nothing.
    """

    seconds: dict[str, float]
    transfers: Transfers
    kept: Tensor | None

    @property
    def placed(self) -> Tensor: ...

    def empty(self) -> Outputs:
        """What the engine gives for one empty image, by role."""
        ...

    def stages(self, frames: Sequence[Frame]) -> dict[str, Callable[[], object]]:
        """The parts of a batch's work, and all of it, for who times them.

        On a GPU each enqueues its part on the current stream; on the host each does it.
        """
        ...

    def __call__(self, frames: Sequence[Frame]) -> tuple[Packed, list[Fit]]:
        """What `pack` makes of the outputs, valid until the next call, and how the frames were placed."""
        ...


class HostLane:
    """Frames and packed answers in host memory; the engine wherever its runtime has it.

    pack: outputs by role → one tensor, or also one to keep. finish: what that becomes once it is known how
    the frames were placed.
    """

    def __init__(
        self, runtime: Runtime, manifest: Manifest, batch: int, pack: Pack, finish: Finish | None = None
    ) -> None:
        self._runtime, self._pack, self._finish = runtime, pack, finish or _as_packed
        self._input, self._roles = manifest.input.name, manifest.outputs
        self._static = runtime.inputs[self._input][0] is not None
        self._preprocess = Preprocessor(manifest.input, batch)
        self._places: list[tuple[int, int, int, int]] = [(0, 0, *manifest.input.size)] * batch
        self.kept: Tensor | None = None
        self.seconds = {"preprocess": 0.0, "inference": 0.0, "postprocess": 0.0}
        self.transfers = Transfers()

    @property
    def placed(self) -> Tensor:
        return torch.tensor(self._places)

    def empty(self) -> Outputs:
        tensor, _ = self._preprocess(())
        return self._run(tensor, 1)

    def __call__(self, frames: Sequence[Frame]) -> tuple[Packed, list[Fit]]:
        begun = perf_counter()
        tensor, fits = self._preprocess(frames)
        self._places[: len(fits)] = [(*fit.offset, *fit.resized) for fit in fits]
        prepared = perf_counter()
        outputs = self._run(tensor, len(frames))
        ran = perf_counter()
        there, self.kept = _parted(self._finish(self._pack(outputs), fits))
        packed = there.cpu().numpy()
        self.seconds["preprocess"] += prepared - begun
        self.seconds["inference"] += ran - prepared
        self.seconds["postprocess"] += perf_counter() - ran
        self.transfers.add(waits=1, copies=1, bytes=packed.nbytes)
        return packed, fits

    def stages(self, frames: Sequence[Frame]) -> dict[str, Callable[[], object]]:
        tensor, fits = self._preprocess(frames)
        outputs = self._run(tensor, len(frames))
        return {
            "preprocess": lambda: self._preprocess(frames),
            "inference": lambda: self._run(tensor, len(frames)),
            "postprocess": lambda: self._finish(self._pack(outputs), fits),
            "all": lambda: self(frames),
        }

    def _run(self, tensor: Tensor, count: int) -> Outputs:
        """What the first `count` images give, by role."""
        outputs = self._runtime.run({self._input: tensor if self._static else tensor[:count]})
        return {role: outputs[name][:count] for role, name in self._roles.items()}


class DeviceLane:
    """Frames, engine and decoding on one GPU, on a stream of its own.

    Frames on the host are copied to the device first. pack: outputs by role → one tensor, or also one to
    keep, in shapes that depend on the batch alone and without waiting, so that it can be captured. finish: of
    what that gave, what depends on the frames' sizes; without waiting either, and not captured.
    """

    def __init__(
        self,
        engine: EngineLane,
        device: torch.device,
        manifest: Manifest,
        batch: int,
        pack: Pack,
        finish: Finish | None = None,
    ) -> None:
        spec = manifest.input
        self._spec, self._device, self._pack, self._roles = spec, device, pack, manifest.outputs
        self._finish = finish or _as_packed
        self._engine, self._input = engine, engine.inputs[spec.name]
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._table = FrameTable(batch, device, interpolation=spec.interpolation, rgb=spec.colour == "rgb")
        self._staging = [_Staging(device) for _ in range(batch)]
        self._graphs = Graphs(self._work, device)
        self._answer: Tensor | None = None  # page-locked, as large as the largest yet
        # Waiting for `_done` gives the core away: the other lane's thread and the decoders need it.
        self._begun = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        self.kept: Tensor | None = None
        self.seconds = {"prepare": 0.0, "gpu": 0.0}
        self.transfers = Transfers()

    @property
    def placed(self) -> Tensor:
        return self._table.placed

    @property
    def problem(self) -> str | None:
        """Why it runs without CUDA graphs, None where it has them."""
        return self._graphs.problem

    def empty(self) -> Outputs:
        with torch.cuda.stream(self._stream):
            outputs = self._by_role(self._engine.enqueue(1))
        self._stream.synchronize()
        return outputs

    def warm_up(self, batch: int) -> None:
        """Compile and capture what a batch needs, so that the first one is as fast as the next."""
        width, height = self._spec.size
        grey = np.full((height, width), 128, np.uint8)
        image = Image(format="yuv", planes=(grey, grey, grey))
        self([Frame(index=0, pts_seconds=0.0, size=(width, height), image=image)] * batch)
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self.transfers = Transfers()

    def __call__(self, frames: Sequence[Frame]) -> tuple[Packed, list[Fit]]:
        begun = perf_counter()
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                fits = [self._put(index, frame) for index, frame in enumerate(frames)]
                self._table.upload()
                self._begun.record()
                packed, kept = _parted(self._finish(self._graphs(len(frames)), fits))
                answer = self._host_memory(packed).copy_(packed, non_blocking=True)
                self.kept = None if kept is None else self._handed_over(kept)
                self._done.record()
            self.seconds["prepare"] += perf_counter() - begun
            self._done.synchronize()
            self.seconds["gpu"] += self._begun.elapsed_time(self._done) / 1000
        except RuntimeError as error:  # torch's and Triton's: out of memory, or a GPU that failed or is gone
            raise DeviceError(f"{self._device} failed: {first_line(error)}") from error
        self.transfers.add(waits=1, copies=1, bytes=answer.nbytes)
        return answer.numpy(), fits

    def stages(self, frames: Sequence[Frame]) -> dict[str, Callable[[], object]]:
        batch = len(frames)
        with torch.cuda.stream(self._stream):
            fits = [self._put(index, frame) for index, frame in enumerate(frames)]
            self._table.upload()
            outputs = self._by_role(self._engine.enqueue(batch))
        self._stream.synchronize()
        return {
            "preprocess": lambda: self._letterbox(batch),
            "inference": lambda: self._engine.enqueue(batch),
            "postprocess": lambda: self._finish(self._pack(outputs), fits),
            "all": lambda: self._finish(self._work(batch), fits),
        }

    def _work(self, batch: int) -> Tensor | Answer:
        """All that a batch takes, from the table to the packed answer; what a graph captures."""
        self._letterbox(batch)
        return self._pack(self._by_role(self._engine.enqueue(batch)))

    def _letterbox(self, batch: int) -> None:
        spec = self._spec
        letterbox(self._table, self._input[:batch], mean=spec.mean, std=spec.std, pad=spec.pad)

    def _by_role(self, outputs: Outputs) -> Outputs:
        return {role: outputs[name] for role, name in self._roles.items()}

    def _put(self, index: int, frame: Frame) -> Fit:
        assert frame.image is not None, "a front end needs frames with images"
        fit, image = fit_of(self._spec, frame), frame.image
        if isinstance(image.planes[0], np.ndarray):
            image = self._staging[index].upload(image)
        elif image.ready is not None:
            self._stream.wait_event(image.ready)
        self._table.put(index, image, fit)
        return fit

    def _handed_over(self, kept: Tensor) -> Tensor:
        """A copy that the next batch leaves alone, for whoever works on the device's default stream."""
        copy = kept.clone()
        copy.record_stream(torch.cuda.default_stream(self._device))
        return copy

    def _host_memory(self, packed: Tensor) -> Tensor:
        """Page-locked memory of that shape: the same again and again, for one answer at a time."""
        if self._answer is None or self._answer.numel() < packed.numel():
            self._answer = torch.empty(packed.numel(), dtype=packed.dtype, pin_memory=True)
        return self._answer[: packed.numel()].view(packed.shape)


def _as_packed(answer: Tensor | Answer, fits: Sequence[Fit]) -> Tensor | Answer:
    return answer


def _parted(answer: Tensor | Answer) -> tuple[Tensor, Tensor | None]:
    return (answer, None) if isinstance(answer, Tensor) else answer


class _Staging:
    """A way for one host frame at a time to the device: page-locked memory, and as much over there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host, self._there = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)

    def upload(self, image: Image) -> Image:
        """The image with its planes on the device, once the current stream is there. Does not wait."""
        planes: Sequence[NDArray[Any]] = image.planes
        size = sum(plane.size for plane in planes)
        if self._host.numel() < size:
            self._host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            self._there = torch.empty(size, dtype=torch.uint8, device=self._device)
        start, there = 0, []
        for plane in planes:
            stop = start + plane.size
            np.copyto(self._host.numpy()[start:stop].reshape(plane.shape), plane)
            there.append(self._there[start:stop].view(plane.shape))
            start = stop
        self._there[:size].copy_(self._host[:size], non_blocking=True)
        return replace(image, planes=tuple(there))
