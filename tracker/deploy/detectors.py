"""Detectors into ONNX files that have been seen to answer as torch does, each with its manifest.

Which networks there are, `models.zoo` says; how layers are written, `graph`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from tracker.deploy.export import TOLERANCE, Export, within, write_checked
from tracker.deploy.feeds import Feeds, run_parts
from tracker.deploy.graph import Lowering, to_onnx
from tracker.errors import ConfigError
from tracker.frontends import FRONTENDS
from tracker.manifest import Manifest
from tracker.models.zoo import network_of
from tracker.runtimes.onnx import OnnxRuntime
from tracker.types import Frame


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorExport:
    """What to write.

    name: of the network, as in `models.zoo`. size: (width, height) of the input. batch: images per run, None
    leaves it open. names: of the classes, None is the front end's own.
    Raises ConfigError for a size that the network does not take.
    """

    name: str
    size: tuple[int, int]
    batch: int | None = 1
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        multiple = network_of(self.name)[0].multiple
        if any(side < 32 or side % multiple for side in self.size):
            raise ConfigError(
                f"size is {self.size[0]}×{self.size[1]}; for {self.name} both sides must be "
                + (f"multiples of {multiple}" if multiple > 1 else "at least 32")
            )
        if self.batch is not None and self.batch < 1:
            raise ConfigError(f"batch is {self.batch}; it must be at least 1, or dynamic")


@torch.no_grad()
def export_detector(model: nn.Module, out: Path, config: DetectorExport, frames: Sequence[Frame]) -> Export:
    """Write a detector to `out` and its manifest beside it, after checking both on these frames.

    model: of the name and size in `config`. Raises EngineError where ONNX Runtime does not answer as torch
    does or the class names are not as many as the classes, SinkError where nothing can be written. Then no
    file is left and an old one stays.
    """
    kind = FRONTENDS[network_of(config.name)[0].frontend]
    model = model.eval()
    begun = perf_counter()
    width, height = config.size
    example = torch.zeros(config.batch or 2, 3, height, width)
    shapes = network_of(config.name)[0].parts(model.config)
    parts = {name: torch.zeros(2, *shape) for name, shape in shapes.items()}
    graph = to_onnx(
        model, example, Lowering(), input_name="images", open_batch=config.batch is None, parts=parts
    )

    def describe(runtime: OnnxRuntime, sha256: str) -> Manifest:
        options = {} if config.names is None else {"names": config.names}
        manifest = kind.describe(runtime, onnx_sha256=sha256, **options)
        kind(runtime, manifest, kind.config_type()).close()
        return manifest

    def check(manifest: Manifest, runtime: OnnxRuntime) -> dict[str, float]:
        with Feeds(runtime, manifest, len(example)) as feeds:
            fed = feeds(frames)
        return compare(model(*fed.values()), run_parts(runtime, fed))

    return write_checked(graph, out, describe, check, begun=begun)


def compare(expected: dict[str, Tensor], answers: dict[str, Tensor]) -> dict[str, float]:
    """The greatest absolute difference of each answer, by output; EngineError for one above TOLERANCE."""
    errors = {}
    for name, wanted in expected.items():
        limit = TOLERANCE * max(1.0, float(wanted.abs().max()))
        errors[name] = within(name, float((answers[name] - wanted).abs().max()), limit)
    return errors
