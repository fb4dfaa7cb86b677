"""What a graph's inputs are fed for some frames: images, and to further parts what the front end cuts out.

Knows no network: it watches what the network's own front end hands to each part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Self

import onnx
import torch
from torch import Tensor

from tracker.errors import ConfigError
from tracker.frontends import FRONTENDS
from tracker.frontends.preprocess import Preprocessor
from tracker.manifest import Manifest
from tracker.runtimes.onnx import OnnxRuntime
from tracker.types import Frame, Runtime


class Feeds:
    """For one thread at a time; enter before, exit after.

    runtime: of the FP32 network, whose answers decide which regions its further parts get; None where it has
    none. batch: images per run.
    """

    def __init__(self, runtime: OnnxRuntime | None, manifest: Manifest, batch: int = 1) -> None:
        self._input, self.batch = manifest.input.name, batch
        self._preprocess = Preprocessor(manifest.input, self.batch)
        self._parts: dict[str, _Watched] = {}
        self._frontend = None
        if runtime is not None and runtime.parts:
            self._parts = {name: _Watched(part) for name, part in runtime.parts.items()}
            kind = FRONTENDS[manifest.frontend]
            self._frontend = kind(_InParts(runtime, self._parts), manifest, kind.config_type())

    @classmethod
    def of(cls, model: onnx.ModelProto, manifest: Manifest) -> Feeds:
        """Those of an FP32 graph in memory, with its batch, or 1 where it is open."""
        constants = {tensor.name for tensor in model.graph.initializer}
        images, *others = (value for value in model.graph.input if value.name not in constants)
        runtime = None
        if others:
            path = Path("network.onnx")  # for messages
            runtime = OnnxRuntime(path, device="cpu", lanes=1, content=model.SerializeToString())
        return cls(runtime, manifest, images.type.tensor_type.shape.dim[0].dim_value or 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._frontend is not None:
            self._frontend.close()

    def __call__(self, frames: Sequence[Frame]) -> dict[str, Tensor]:
        """By input, its rows; images of `batch` frames, repeated where there are fewer. Raises ConfigError
        without any.
        """
        if not frames:
            raise ConfigError("no frame to feed the network with: name another video")
        frames = list(islice(cycle(frames), self.batch))
        fed = {self._input: self._preprocess(frames)[0].clone()}
        if self._frontend is not None:
            self._frontend.submit(frames).result()
        return fed | {name: part.fed for name, part in self._parts.items()}


def run_parts(runtime: OnnxRuntime, fed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All answers of a network, by output, to what `Feeds` gives."""
    answers: dict[str, Tensor] = {}
    for name, tensor in fed.items():
        answers |= runtime.parts.get(name, runtime).run({name: tensor})
    return answers


class _Watched:
    """A part, and what it was fed last."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.inputs, self.outputs = runtime.inputs, runtime.outputs
        self.device, self.lanes, self.description = runtime.device, 1, runtime.description
        self.fed = torch.empty(0)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        (self.fed,) = (tensor.clone() for tensor in inputs.values())
        return self._runtime.run(inputs)


class _InParts(_Watched):
    def __init__(self, runtime: Runtime, parts: Mapping[str, Runtime]) -> None:
        super().__init__(runtime)
        self.parts = parts
