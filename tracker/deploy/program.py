"""FairMOT as a .pt2 file, for GPUs without TensorRT, seen to answer as the network does, with its manifest.

A program of torch.export, which opens anywhere. What it computes, `models.deployed` says; who runs it is
`runtimes.torch_export`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, get_args

import torch

from tracker import manifest as manifests
from tracker.deploy.export import Export, check_names, check_shape, inputs_of, unfinished
from tracker.errors import ConfigError, EngineError
from tracker.frontends.fairmot import Fairmot
from tracker.models.deployed import Deployed, relative_errors
from tracker.models.fairmot import FairMOT
from tracker.runtimes.torch_export import TorchExportRuntime
from tracker.types import Frame

Floats = Literal["fp32", "fp16"]

MOST = 8  # images per run, where the batch is open
# Greatest |answer − FP32| / |FP32| of a head; FairMOT's are below 0.004 in FP16. FP32 may be TF32 on a GPU.
TOLERANCES: dict[Floats, float] = {"fp32": 0.005, "fp16": 0.05}
_TYPES: dict[Floats, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramConfig:
    """What to write.

    size: (width, height) of the input. batch: images per run, None for 1 to MOST. names: of the classes.
    dense_upsampling: see `deploy.graph.Lowering`.
    """

    size: tuple[int, int] = (1088, 608)
    batch: int | None = 1
    names: tuple[str, ...] = ("person",)
    precision: Floats = "fp16"
    dense_upsampling: bool = True

    def __post_init__(self) -> None:
        check_shape(self.size, self.batch)
        if self.precision not in get_args(Floats):
            raise ConfigError(f"precision is {self.precision!r}; a .pt2 file has {' or '.join(_TYPES)}")


@torch.no_grad()
def export_program(
    model: FairMOT,
    out: Path,
    config: ProgramConfig,
    frames: Sequence[Frame],
    *,
    onnx_sha256: str | None = None,
) -> Export:
    """Write FairMOT to `out` and its manifest beside it, after comparing the file's answers on these frames
    with those of the network in FP32; on a GPU where torch sees one.

    onnx_sha256: of the ONNX file that the weights come from, where they do.
    Raises ConfigError where names or suffix do not fit, EngineError where the file answers otherwise,
    SinkError where nothing can be written. Then no file is left and an old one stays.
    """
    if out.suffix != ".pt2":
        raise ConfigError(f"{out} is no name for a torch program: end it in .pt2")
    check_names(config.names, model)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    begun = perf_counter()
    with unfinished(out) as file:
        torch.export.save(exported(model, config), file)
        written = perf_counter()
        found = manifests.sha256(file)
        runtime = TorchExportRuntime(file, device=device, trusted=True, lanes=1, compiled=False)
        manifest = Fairmot.describe(
            runtime, onnx_sha256=found, names=config.names, precision=config.precision
        )
        Fairmot(runtime, manifest).close()
        images = inputs_of(manifest, config.batch or 2, frames)
        answers = runtime.run({manifest.input.name: images})
        plain = copy.deepcopy(model).eval().to(device)
        errors = relative_errors(answers, plain(images.to(device)))
        check(errors, config.precision)
        verified = perf_counter()
        size = file.stat().st_size
    manifest = dataclasses.replace(manifest, onnx_sha256=onnx_sha256 or found)
    manifests.write(manifest, manifests.beside(out))
    return Export(
        manifest=manifest,
        errors=errors,
        bytes=size,
        write_seconds=written - begun,
        verify_seconds=verified - written,
    )


def exported(model: FairMOT, config: ProgramConfig) -> Any:
    """The network's torch.export.ExportedProgram, traced on a CPU."""
    network = Deployed(model, _TYPES[config.precision], dense_upsampling=config.dense_upsampling).cpu()
    width, height = config.size
    example = torch.zeros(config.batch or 2, 3, height, width, dtype=network.dtype)
    batch = torch.export.Dim("batch", min=1, max=MOST)
    return torch.export.export(
        network,
        (example.to(memory_format=torch.channels_last),),
        dynamic_shapes=None if config.batch else {"images": {0: batch}},
    )


def check(errors: Mapping[str, float], precision: Floats) -> None:
    """Raise EngineError for a head whose relative error is above the precision's tolerance, or no number."""
    for role, error in errors.items():
        if not error <= TOLERANCES[precision]:
            raise EngineError(
                f"in {precision} the output {role} differs by {error:.2%} from torch's in fp32, more than "
                f"{TOLERANCES[precision]:.1%}: nothing was written. Weights that overflow do this; try "
                "--precision fp32"
            )
