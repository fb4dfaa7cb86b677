"""A network run on the same few images again and again, each time with other intermediate tensors marked.

An ONNX graph is cut down to what the marked tensors need and runs in ONNX Runtime; a torch graph is
interpreted node by node; of a TensorRT engine nothing can be marked any more, so pieces of the ONNX file it
was built from are built again. Knows no pairing and no tolerance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper
from torch import fx

from tracker import manifest as manifests
from tracker.deploy.build import COMPARED, build, load
from tracker.deploy.islands import HALVES, Array, HalfConfig, precision_of
from tracker.deploy.parity.layers import OFFSETS, Layers, layers_of_onnx, layers_of_torch
from tracker.deploy.plan import BuildConfig
from tracker.deploy.precision import dense_upsampling, to_half
from tracker.engine import open_runtime
from tracker.errors import EngineError
from tracker.manifest import Manifest
from tracker.models.deform import DeformConv
from tracker.types import Runtime

SILENT = 4  # ONNX Runtime's severity "fatal": what goes wrong is raised, not printed


class Probe(Protocol):
    """layers: what can be marked. width: how many tensors are best marked at once. about: what runs."""

    layers: Layers
    width: int
    about: str

    def values(self, tensors: Collection[str]) -> dict[str, list[Array]]:
        """Of each tensor what it holds for each image, float tensors as float32."""
        ...


class OnnxProbe:
    """images: each (1, 3, H, W)."""

    width = 4  # a run costs the same whatever is marked, but marks keep ONNX Runtime from fusing
    about = "the ONNX graph in ONNX Runtime on the CPU"

    def __init__(self, model: onnx.ModelProto, images: Sequence[Array]) -> None:
        self.layers = layers_of_onnx(model)
        self._model, self._images, self._types = model, images, inferred(model)

    def values(self, tensors: Collection[str]) -> dict[str, list[Array]]:
        wanted = sorted(set(tensors))
        if not wanted:
            return {}
        model = marked(self._model, wanted, self._types)
        (entry,) = model.graph.input
        rows = entry.type.tensor_type.shape.dim[0].dim_value or 1
        kind = helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = SILENT
        content = model.SerializeToString()
        found: dict[str, list[Array]] = {name: [] for name in wanted}
        try:
            session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            for image in self._images:
                batch = np.repeat(image, rows, axis=0).astype(kind)
                for name, value in zip(wanted, session.run(wanted, {entry.name: batch}), strict=True):
                    found[name].append(_one(value, rows))
        except Exception as error:  # classes of ONNX Runtime's own, derived from nothing narrower
            reason = " ".join(str(error).split())
            raise EngineError(
                f"ONNX Runtime cannot run the graph up to {', '.join(wanted)}: {reason}"
            ) from error
        return found


class TorchProbe:
    """A traced module or an exported program's; images as for `OnnxProbe`."""

    width = 8  # one walk through the graph records any number
    about = "torch on the CPU, node by node"

    def __init__(self, network: fx.GraphModule, images: Sequence[Array]) -> None:
        self.layers = layers_of_torch(network)
        self._network, self._images = network, images

    @torch.no_grad()
    def values(self, tensors: Collection[str]) -> dict[str, list[Array]]:
        found: dict[str, list[Array]] = {name: [] for name in tensors}
        first = next((p for p in self._network.parameters() if p.is_floating_point()), None)
        dtype = torch.float32 if first is None else first.dtype
        for image in self._images if found else ():
            recorder = _Recorder(self._network, found.keys())
            recorder.record(torch.from_numpy(image).to(dtype))
            for name in found:
                found[name].append(_one(recorder.kept[name].float().numpy(), len(image)))
        return found


Open = Callable[[Path, Manifest], Runtime]  # an ONNX file and what the engine built from it must be


class EngineProbe:
    """A TensorRT engine's pieces: its ONNX file, cast as the engine was and built anew with tensors marked.

    A marked tensor is written out, so that what TensorRT would fuse across it is not fused: a difference that
    goes away with marking lies in such a fusion. Layers that were kept in FP32 by name when the engine was
    built are not known here, and are cast.

    source: the ONNX file, its manifest beside it. engine: the engine's. opened: builds and opens a piece.
    """

    width = 16  # a build takes minutes, whatever is marked
    about = "pieces of its ONNX file, built anew"

    def __init__(self, source: Path, engine: Manifest, images: Sequence[Array], opened: Open) -> None:
        self._manifest = manifests.read(manifests.beside(source))
        self._manifest.verify(source)
        model = load(source)
        kind = engine.precision
        if kind in HALVES and kind != precision_of(model):
            # Cast before it is cut: every piece has a tail, which would stay in FP32.
            compared = tuple(n for role, n in self._manifest.outputs.items() if role in COMPARED)
            model = to_half(dense_upsampling(model), HalfConfig(kind=kind, compared=compared))
        self._model, self._types = model, inferred(model)
        self.layers = layers_of_onnx(model)
        self._images, self._opened = images, opened

    def values(self, tensors: Collection[str]) -> dict[str, list[Array]]:
        wanted = sorted(set(tensors))
        if not wanted:
            return {}
        found: dict[str, list[Array]] = {name: [] for name in wanted}
        with TemporaryDirectory() as folder:
            piece = Path(folder) / "piece.onnx"
            onnx.save(marked(self._model, wanted, self._types), piece)
            digest = manifests.sha256(piece)
            manifest = dataclasses.replace(
                self._manifest,
                outputs={name: name for name in wanted},
                engine_sha256=digest,
                onnx_sha256=digest,
            )
            manifests.write(manifest, manifests.beside(piece))
            runtime = self._opened(piece, manifest)
            (entry,) = runtime.inputs
            rows = runtime.inputs[entry][0] or 1
            for image in self._images:
                outputs = runtime.run({entry: torch.from_numpy(np.repeat(image, rows, axis=0))})
                for name in wanted:
                    value = outputs[name]
                    value = value.float() if value.is_floating_point() else value
                    found[name].append(_one(value.cpu().numpy(), rows))
        return found


def builder(config: BuildConfig, device: str) -> Open:
    """Builds pieces with TensorRT and runs them on a device."""

    def opened(piece: Path, manifest: Manifest) -> Runtime:
        out = piece.with_suffix(".engine")
        return open_runtime(out, build(piece, out, config).manifest, device=device, lanes=1)

    return opened


def inferred(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """What is known of the types of a graph's tensors, by name."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {value.name: value for value in values if value.type.tensor_type.elem_type}


def marked(
    model: onnx.ModelProto, tensors: Sequence[str], types: Mapping[str, onnx.ValueInfoProto]
) -> onnx.ModelProto:
    """The part of a graph that gives these tensors, its only outputs then. types: see `inferred`."""
    graph = model.graph
    for name in tensors:
        if name not in types:
            raise EngineError(f"nothing tells the type of {name}: it cannot be looked at")
    givers = {name: node for node in graph.node for name in node.output if name}
    needed: set[str] = set()
    rest = list(tensors)
    while rest:
        name = rest.pop()
        if name in needed:
            continue
        needed.add(name)
        if name in givers:
            rest += [each for each in givers[name].input if each]
    part = helper.make_graph(
        [node for node in graph.node if not needed.isdisjoint(node.output)],
        graph.name,
        list(graph.input),
        [types[name] for name in tensors],
        [tensor for tensor in graph.initializer if tensor.name in needed],
    )
    return helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)


class _Recorder(fx.Interpreter):
    """Runs a graph until all the tensors wanted have come by."""

    def __init__(self, network: fx.GraphModule, wanted: Collection[str]) -> None:
        super().__init__(network)
        self._wanted = set(wanted)
        self.kept: dict[str, torch.Tensor] = {}

    def record(self, images: torch.Tensor) -> None:
        try:
            self.run(images)
        except _Enough:
            return
        raise EngineError(f"the network never gives {', '.join(sorted(self._wanted))}")

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self._keep(n.name, result)
        return result

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        layer = self.fetch_attr(target)
        shifts = f"{target}{OFFSETS}"
        if isinstance(layer, DeformConv) and shifts in self._wanted:
            self._keep(shifts, layer.conv_offset_mask(args[0]))
        return super().call_module(target, args, dict(kwargs))

    def _keep(self, name: str, value: Any) -> None:
        if name in self._wanted:
            self._wanted.discard(name)
            self.kept[name] = value.detach().cpu().clone()  # the next layer may work in place
            if not self._wanted:
                raise _Enough


class _Enough(Exception):  # noqa: N818 (not an error)
    pass


def _one(value: Array, rows: int) -> Array:
    """Of a batch that holds one image several times, the first; float32 where it is floating."""
    first = value[:1] if value.ndim and len(value) == rows else value
    return first.astype(np.float32) if np.issubdtype(first.dtype, np.floating) else first
