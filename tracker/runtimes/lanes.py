"""What runtimes that work in lanes have in common: `run` on top of them, and its checks.

A lane is a place to run batches one after another: input and output buffers of its own beside weights that
all lanes share. Its caller writes the inputs and chooses the stream.
"""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tracker.errors import ConfigError, EngineError
from tracker.graphs import Graphs, first_line
from tracker.types import EngineLane

Shape = tuple[int | None, ...]


class LaneRuntime(ABC):
    """A `types.LaneRuntime`: what its lanes have in common, and a `run` on top of them.

    inputs, outputs: shapes by name, None for the batch where it is open. dtypes: of all of them.
    max_batch: images at once. library: what runs the engine, with its version. uncapturable: why its lanes
    cannot be captured in CUDA graphs, None as long as nothing is known against it.
    """

    device: torch.device
    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    dtypes: Mapping[str, torch.dtype]
    max_batch: int
    lanes: int
    library: str
    uncapturable: str | None = None

    def __init__(self, lanes: int) -> None:
        if lanes < 1:
            raise ConfigError(f"lanes is {lanes}; it must be at least 1")
        self.lanes = lanes
        self._of_thread = threading.local()

    @abstractmethod
    def lane(self) -> EngineLane:
        """A fresh one, for one thread at a time, and for work that follows one after another: on one stream,
        or on streams that wait for each other. Its inputs are zeros at first.

        Its `enqueue` never waits once the batch size has run, and can be captured in a CUDA graph after one
        enqueue of the same batch size outside; a graph's own run counts as an enqueue. It raises EngineError
        for a batch size that the engine does not take, and for a run that fails.
        Raises EngineError where there is no memory for another.
        """

    @property
    def description(self) -> str:
        """For people: what runs where, and what is not as it should be."""
        where = f"{self.library} on {self.device}"
        if self.device.type == "cuda":
            where += f" ({torch.cuda.get_device_name(self.device)})"
        return ", ".join((where, *self.problems))

    @property
    def problems(self) -> tuple[str, ...]:
        """What makes it slower than it should be."""
        return (f"without CUDA graphs: {self.uncapturable}",) if self.uncapturable else ()

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs by name, in memory of their own on the engine's device, on a lane of this thread.

        Inputs may lie on any device; floating-point ones are cast to the engine's own precision. Never
        waits for the answers. Raises EngineError for inputs whose names, types or shapes the engine does
        not take, and for a run that fails.
        """
        batch = self._check(inputs)
        lane, graphs = self._mine()
        try:
            for name, tensor in inputs.items():
                lane.inputs[name][:batch].copy_(tensor)
            outputs = {name: output.clone() for name, output in graphs(batch).items()}
        except RuntimeError as error:  # torch's: out of memory, or a GPU that failed or is gone
            raise EngineError(f"the engine failed to run: {first_line(error)}") from error
        if self.device.type == "cuda":
            self.uncapturable = self.uncapturable or graphs.problem
        return outputs

    def _mine(self) -> tuple[EngineLane, Graphs[dict[str, Tensor]]]:
        if not hasattr(self._of_thread, "lane"):
            lane = self.lane()
            self._of_thread.lane = lane, Graphs(lane.enqueue, self.device)
        mine: tuple[EngineLane, Graphs[dict[str, Tensor]]] = self._of_thread.lane
        return mine

    def _check(self, inputs: Mapping[str, Tensor]) -> int:
        """The batch size; EngineError unless the engine takes these inputs."""
        if inputs.keys() != self.inputs.keys():
            given = ", ".join(inputs) or "none"
            raise EngineError(f"the engine takes inputs {', '.join(self.inputs)}, not {given}")
        for name, tensor in inputs.items():
            have, want, dtype = tuple(tensor.shape), self.inputs[name], self.dtypes[name]
            if len(have) != len(want) or any(w not in (None, h) for h, w in zip(have, want, strict=True)):
                raise EngineError(f"input {name} needs shape {_words(want)}, got {_words(have)}")
            if tensor.dtype != dtype and not (dtype.is_floating_point and tensor.is_floating_point()):
                raise EngineError(f"input {name} needs {dtype}, got {tensor.dtype}")
        batches = {len(tensor) for tensor in inputs.values()}
        if len(batches) != 1:
            raise EngineError(f"all inputs need one batch size, got {', '.join(map(str, sorted(batches)))}")
        (batch,) = batches
        check_batch(batch, self.max_batch)
        return batch


def check_batch(batch: int, most: int) -> None:
    if not 1 <= batch <= most:
        raise EngineError(f"batch is {batch}; this engine takes 1 to {most} images at once")


def resolve(device: str | torch.device, *, cpu: bool) -> torch.device:
    """The device that is meant: CUDA for "auto" where there is one. cpu: whether the CPU will do.

    Raises ConfigError for what is no device, EngineError for one that is not there or will not do.
    """
    named = str(device)
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", named)
    if match is None:
        raise ConfigError(f"device is {named!r}; it must be auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if named == "cpu" or (named == "auto" and count == 0):
        if not cpu:
            why = "asked for" if named == "cpu" else "all there is (torch sees no CUDA device)"
            raise EngineError(
                f"a TensorRT engine needs an NVIDIA GPU, and the CPU is {why}: use the .onnx file, or a "
                "machine with a GPU, its driver and a torch built for CUDA"
            )
        return torch.device("cpu")
    index = int(match[1] or 0)
    if index >= count:
        raise EngineError(
            f"device {named} asked for, but torch sees {count} CUDA devices: use a device that exists, a "
            "torch built for CUDA, or the .onnx file with --device cpu"
        )
    return torch.device("cuda", index)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Inside, what uses the thread's current CUDA device uses this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured from this thread's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _words(shape: Shape) -> str:
    return "×".join("?" if size is None else str(size) for size in shape) or "()"
