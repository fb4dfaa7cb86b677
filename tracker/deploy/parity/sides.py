"""The two sides of a comparison, whatever they are: checkpoints, ONNX files, TensorRT engines, .pt2 files.

Each side becomes a runtime with a manifest. A checkpoint says neither how it wants its pixels nor what its
classes are called: there it takes the other side's word. Knows files; compares nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tracker import manifest as manifests
from tracker.deploy.build import load
from tracker.deploy.islands import Array
from tracker.deploy.parity.layers import trace
from tracker.deploy.parity.probe import EngineProbe, OnnxProbe, Probe, TorchProbe, builder
from tracker.deploy.plan import BuildConfig
from tracker.engine import ONNX, TENSORRT, TORCH, open_runtime
from tracker.errors import ConfigError, EngineError
from tracker.frontends import FRONTENDS
from tracker.frontends.detector import Detector
from tracker.frontends.fairmot import Fairmot
from tracker.manifest import Manifest
from tracker.models.checkpoint import load_fairmot
from tracker.models.fairmot import MULTIPLE, FairMOT, FairMOTConfig
from tracker.runtimes.lanes import LaneRuntime, resolve
from tracker.runtimes.onnx_parts import parts_of
from tracker.types import Runtime

CHECKPOINTS = (".pth", ".pt", ".safetensors")
OFFICIAL_SIZE = (1088, 608)
HEADS = ("hm", "wh", "reg", "id")


@dataclass(slots=True)
class Side:
    """One of two to compare. network: a checkpoint's, else None. onnx: what an engine was built from."""

    path: Path
    manifest: Manifest
    runtime: Runtime
    network: FairMOT | None = None
    onnx: Path | None = None

    def detector(self, *, conf: float, classes: Sequence[str]) -> Detector:
        """Its front end. Raises EngineError where the engine does not fit its manifest."""
        kind = FRONTENDS[self.manifest.frontend]
        config = kind.config_type(conf=conf, classes=tuple(classes))
        if isinstance(self.runtime, LaneRuntime):
            config = dataclasses.replace(config, max_batch=self.runtime.max_batch)
        return kind(self.runtime, self.manifest, config)

    def heads(self, image: Array) -> dict[str, Array]:
        """Outputs by role for one image (1, 3, H, W), in float32."""
        name = self.manifest.input.name
        rows = self.runtime.inputs[name][0] or 1
        outputs = self.runtime.run({name: torch.from_numpy(np.repeat(image, rows, axis=0))})
        return {
            role: outputs[tensor][:1].float().cpu().numpy() for role, tensor in self.manifest.outputs.items()
        }

    def probe(self, images: Sequence[Array], config: BuildConfig, device: str) -> Probe | str:
        """What marks its intermediate tensors, or why nothing can. config: for pieces of an engine.

        Of an engine in parts, those of the part that takes the images.
        """
        if self.network is not None:
            return TorchProbe(trace(self.network.cpu()), images)
        if self.path.suffix == ONNX:
            return OnnxProbe(parts_of(load(self.path))[self.manifest.input.name], images)
        if self.path.suffix == TORCH:
            return self._program(images)
        if self.onnx is None:
            return (
                f"{self.path} is a TensorRT engine, and beside it lies no ONNX file with the hash of its "
                "manifest: name the one it was built from with --onnx"
            )
        config = dataclasses.replace(config, builder=self.manifest.builder or config.builder)
        return EngineProbe(self.onnx, self.manifest, images, builder(config, device))

    def _program(self, images: Sequence[Array]) -> Probe:
        self.manifest.verify(self.path)  # loading runs what is in it
        return TorchProbe(torch.export.load(self.path).module(), images)


class NetworkRuntime:
    """A torch network as a Runtime, in FP32. In a thread of its own: front ends' workers compute without
    helpers, which a network on a CPU needs.
    """

    lanes = 1

    def __init__(self, network: FairMOT, size: tuple[int, int], *, entry: str, device: torch.device) -> None:
        self.device = device
        self._network = network.eval().to(device)
        self.inputs: Mapping[str, tuple[int | None, ...]] = {entry: (None, 3, size[1], size[0])}
        with torch.no_grad():
            heads = self._network(torch.zeros(1, 3, MULTIPLE, MULTIPLE, device=device))
        cells = size[1] // 4, size[0] // 4
        self.outputs: Mapping[str, tuple[int | None, ...]] = {
            name: (None, head.shape[1], *cells) for name, head in heads.items()
        }
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="network")

    @property
    def description(self) -> str:
        return f"torch {torch.__version__} on {self.device}"

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._thread.submit(self._run, inputs).result()

    @torch.no_grad()
    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        (images,) = inputs.values()
        heads: dict[str, Tensor] = self._network(images.to(self.device, torch.float32))
        return heads


def open_sides(
    a: Path,
    b: Path,
    *,
    device: str = "auto",
    network: FairMOTConfig | None = None,
    onnx: Path | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[Side, Side]:
    """Both files, opened.

    device: where they run, as for `track`; an ONNX file may run on a CPU beside an engine on a GPU.
    network: of checkpoints that do not say what they are of. onnx: what a TensorRT engine was built from,
    where that does not lie beside it. size: (width, height) of the input, for two checkpoints.
    Raises EngineError, ConfigError or CheckpointError for what cannot be opened or not be compared.
    """
    for path in (a, b):
        if path.suffix not in (ONNX, *TENSORRT, TORCH, *CHECKPOINTS):
            known = ", ".join((ONNX, TENSORRT[0], TORCH, *CHECKPOINTS))
            raise EngineError(f"{path} is nothing that can be compared: name a file that ends in {known}")
    opened = {path: _engine(path, device, onnx) for path in (a, b) if path.suffix not in CHECKPOINTS}
    pattern = next((side.manifest for side in opened.values()), None)
    if pattern is not None and size is not None:
        raise ConfigError("the input size is the manifest's: leave out --size, it is for two checkpoints")
    sides = [
        opened.get(path) or _checkpoint(path, network, pattern, size or OFFICIAL_SIZE, device)
        for path in (a, b)
    ]
    return sides[0], sides[1]


def _engine(path: Path, device: str, onnx: Path | None) -> Side:
    beside = manifests.beside(path)
    if not path.is_file():
        raise EngineError(f"{path} is {'a directory' if path.is_dir() else 'missing'}: name an engine file")
    if not beside.exists():
        raise EngineError(
            f"{path} has no manifest {beside.name} beside it: write one with `tools/manifest.py {path} "
            f"--frontend {'|'.join(FRONTENDS)}`"
        )
    manifest = manifests.read(beside)
    side = Side(path, manifest, open_runtime(path, manifest, device=device))
    if path.suffix in TENSORRT:
        side.onnx = _origin(path, manifest, onnx)
    return side


def _origin(path: Path, manifest: Manifest, named: Path | None) -> Path | None:
    """The ONNX file an engine was built from, with its manifest beside it."""
    if named is not None:
        if manifests.sha256(named) != manifest.onnx_sha256:
            raise ConfigError(f"{path} was not built from {named}: its manifest names another hash")
        return named
    near = sorted(path.parent.glob("*.onnx"))
    return next((each for each in near if manifests.sha256(each) == manifest.onnx_sha256), None)


def _checkpoint(
    path: Path,
    config: FairMOTConfig | None,
    pattern: Manifest | None,
    size: tuple[int, int],
    device: str,
) -> Side:
    network = load_fairmot(path, config)
    if pattern is not None and pattern.frontend != "fairmot":
        raise EngineError(
            f"{path} is FairMOT's, the other is {pattern.frontend}'s: nothing is the same in them"
        )
    place = resolve(device, cpu=True)
    entry = "images" if pattern is None else pattern.input.name
    runtime = NetworkRuntime(
        network, size if pattern is None else pattern.input.size, entry=entry, device=place
    )
    digest = manifests.sha256(path)
    if pattern is None:
        names = tuple(f"class {index}" for index in range(network.config.classes))
        return Side(path, Fairmot.describe(runtime, onnx_sha256=digest, names=names), runtime, network)
    if len(pattern.names) != network.config.classes:
        raise EngineError(
            f"{path} has {network.config.classes} classes, the other {len(pattern.names)} "
            f"({', '.join(pattern.names)}): one is not made of the other"
        )
    manifest = dataclasses.replace(
        pattern,
        outputs={role: role for role in HEADS},
        precision="fp32",
        onnx_sha256=digest,
        engine_sha256=digest,
        tensorrt_version=None,
        sm=None,
        builder=None,
        batch=None,
        calibration=None,
    )
    return Side(path, manifest, runtime, network)
