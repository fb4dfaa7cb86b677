"""FairMOT as a .pt2 file, for GPUs without TensorRT, seen to answer as the network does, with its manifest.

A program (torch.export) opens anywhere. A package (AOTInductor) is compiled here, for this machine's GPU, and
needs no compiler where it runs. What they compute, `models.deployed` says; who runs them is
`runtimes.torch_export`.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
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
from tracker.graphs import first_line
from tracker.models.deployed import Deployed, relative_errors
from tracker.models.fairmot import FairMOT
from tracker.runtimes.torch_export import TorchExportRuntime, package
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
    compiled: a package for this machine's GPU instead of a program. autotune: try more kernels while it is
    compiled, for minutes. dense_upsampling: see `deploy.graph.Lowering`.
    """

    size: tuple[int, int] = (1088, 608)
    batch: int | None = 1
    names: tuple[str, ...] = ("person",)
    precision: Floats = "fp16"
    compiled: bool = False
    autotune: bool = False
    dense_upsampling: bool = True

    def __post_init__(self) -> None:
        check_shape(self.size, self.batch)
        if self.precision not in get_args(Floats):
            raise ConfigError(f"precision is {self.precision!r}; a .pt2 file has {' or '.join(_TYPES)}")
        if self.autotune and not self.compiled:
            raise ConfigError("--autotune is for what is compiled here: add --compiled")


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
    Raises ConfigError where names or suffix do not fit, EngineError where there is no GPU to compile for or
    the file answers otherwise, SinkError where nothing can be written. Then no file is left and an old one
    stays.
    """
    if out.suffix != ".pt2":
        raise ConfigError(f"{out} is no name for a torch program: end it in .pt2")
    check_names(config.names, model)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if config.compiled and device.type != "cuda":
        raise EngineError(
            "AOTInductor compiles on the GPU it compiles for, and torch sees none: leave out --compiled, or "
            "run on a machine with one"
        )
    begun = perf_counter()
    with unfinished(out) as file:
        program = exported(model, config, device if config.compiled else torch.device("cpu"))
        if config.compiled:
            compile_package(program, file, autotune=config.autotune)
        else:
            torch.export.save(program, file)
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


def exported(model: FairMOT, config: ProgramConfig, device: torch.device) -> Any:
    """The network's torch.export.ExportedProgram, traced on this device."""
    network = Deployed(model, _TYPES[config.precision], dense_upsampling=config.dense_upsampling).to(device)
    width, height = config.size
    example = torch.zeros(config.batch or 2, 3, height, width, dtype=network.dtype, device=device)
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


def compile_package(program: Any, path: Path, *, autotune: bool = False) -> None:
    """Compile a program for the GPU it lies on. Raises EngineError where that does not work."""
    try:
        with torch._inductor.config.patch(max_autotune=autotune), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its words are for its own makers
            package(program, path)
    except Exception as error:  # the compilers' own classes, derived from nothing narrower
        raise EngineError(
            f"AOTInductor of torch {torch.__version__} cannot compile the network ({first_line(error)}): it "
            "needs Triton and a C++ compiler such as g++ on this machine; or leave out --compiled"
        ) from error
