"""What an engine is measured against: the same network in torch, as its users run it.

In FP32 as it comes; in FP16, channels last, as a CUDA graph; and that compiled by torch.compile. Deformable
convolutions by torchvision where it is installed, which most would use, else by our fused kernel. The last
two are for GPUs. Knows networks and clocks; engines are `engine_times`'.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tracker import manifest as manifests
from tracker.deploy.onnx_weights import fairmot_of_onnx
from tracker.engine_times import Times, device_clock, free_memory, host_clock, taken_since
from tracker.errors import ConfigError
from tracker.graphs import first_line
from tracker.kernels.deform import pack_weight
from tracker.models.checkpoint import load_fairmot
from tracker.models.deform import TAPS, DeformConv
from tracker.models.fairmot import FairMOT, FairMOTConfig, random_fairmot
from tracker.runtimes.lanes import on, resolve

EAGER, GRAPH, COMPILED = "torch FP32, eager", "torch FP16, CUDA graph", "torch FP16, compiled, CUDA graph"
# FP32 as it comes; FP16 as tensor cores want it.
_FORMATS = {torch.float32: torch.contiguous_format, torch.float16: torch.channels_last}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One way to run the network, at one batch size, images being on the device already.

    ms: of one run, back to back. latency_ms: host included, one run at a time. memory_mib: of the device.
    times_engine: how many times the fastest engine's own inference that is, None where none takes such a
    batch. problem: why it does not run here, else None.
    """

    name: str
    batch: int
    ms: float | None = None
    latency_ms: float | None = None
    memory_mib: float | None = None
    times_engine: float | None = None
    problem: str | None = None


def network_of(engine: Path, weights: Path | None = None) -> tuple[FairMOT, str]:
    """The network to run beside a FairMOT engine, and what it is in words.

    That of `weights`, a checkpoint or ONNX file of ours; else of the ONNX file that the engine is, or was
    made from if it lies beside it; else the official DLA-34 with random weights and as many classes.
    Raises ConfigError for another front end, CheckpointError for weights that are none.
    """
    manifest = manifests.read(manifests.beside(engine))
    if manifest.frontend != "fairmot":
        raise ConfigError(
            f"{engine} is of {manifest.frontend}; peers are there for fairmot: leave out --peers"
        )
    origin = engine.with_suffix(".onnx")
    if weights is None and origin.is_file() and manifests.sha256(origin) == manifest.onnx_sha256:
        weights = origin
    if weights is None:
        return random_fairmot(FairMOTConfig(classes=len(manifest.names))), "FairMOT DLA-34, random weights"
    load = fairmot_of_onnx if weights.suffix == ".onnx" else load_fairmot
    return load(weights), f"the network in {weights.name}"


def measure(
    network: FairMOT,
    engines: Sequence[Times],
    *,
    size: tuple[int, int],
    batches: Sequence[int],
    device: str,
    repeats: int,
) -> list[Peer]:
    """engines: what the peers are compared with, the fastest at each batch. size: (width, height) of the
    input. Others as in `engine_times.measure`.
    """
    place = resolve(device, cpu=True)
    names = (EAGER, GRAPH, COMPILED) if place.type == "cuda" else (EAGER,)
    return [
        _timed(name, network, batch, size, place, repeats, _fastest(engines, batch))
        for batch in batches
        for name in names
    ]


def _fastest(engines: Sequence[Times], batch: int) -> float | None:
    return min((times.stages["inference"] for times in engines if times.batch == batch), default=None)


def table(engines: Sequence[Times], peers: Sequence[Peer]) -> str:
    """A line for each engine and each peer, a column per batch: ms, and × the fastest engine."""
    batches = sorted({peer.batch for peer in peers})
    lines = [["network alone, ms per batch", *(f"batch {batch}" for batch in batches)]]
    for name in dict.fromkeys(times.engine for times in engines):
        own = {times.batch: f"{times.stages['inference']:.3f}" for times in engines if times.engine == name}
        lines.append([name, *(own.get(batch, "–") for batch in batches)])
    for name in dict.fromkeys(peer.name for peer in peers):
        at = {peer.batch: peer for peer in peers if peer.name == name}
        lines.append([name, *(_cell(at[batch]) for batch in batches)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    problems = dict.fromkeys(f"{peer.name}: {peer.problem}" for peer in peers if peer.problem)
    return "\n".join([*rows, *problems])


def _cell(peer: Peer) -> str:
    if peer.ms is None:
        return "–"
    return f"{peer.ms:.3f}" + (f" ({peer.times_engine:.1f}×)" if peer.times_engine else "")


@torch.inference_mode()
def _timed(
    name: str,
    network: FairMOT,
    batch: int,
    size: tuple[int, int],
    place: torch.device,
    repeats: int,
    engine_ms: float | None,
) -> Peer:
    """One peer at one batch size, in memory of its own."""
    with on(place), torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        if place.type == "cuda":
            torch.cuda.empty_cache()
        free = free_memory(str(place))
        kind = torch.float32 if name == EAGER else torch.float16
        module: Any = as_users_run_it(network)
        module = module.to(device=place, dtype=kind, memory_format=_FORMATS[kind])
        images = torch.rand(batch, 3, size[1], size[0], dtype=kind, device=place)
        images = images.to(memory_format=_FORMATS[kind])
        if name == COMPILED:
            module = torch.compile(module, dynamic=False)

        def answer() -> None:
            module(images)
            if place.type == "cuda":
                torch.cuda.synchronize()

        try:
            answer()
            if place.type == "cuda":
                ms = device_clock(lambda: module(images), repeats, place, captured=name != EAGER)
            else:
                ms = host_clock(answer, repeats, place)
            latency = host_clock(answer, repeats, place)
        except Exception as error:  # a compiler's own classes, torch's for want of memory
            return Peer(name=_named(name, network), batch=batch, problem=first_line(error))
        return Peer(
            name=_named(name, network),
            batch=batch,
            ms=ms,
            latency_ms=latency,
            memory_mib=taken_since(free, str(place)),
            times_engine=ms / engine_ms if engine_ms else None,
        )


def _named(name: str, network: FairMOT) -> str:
    if not network.config.deformable:
        return name
    return f"{name}, deform_conv2d {'of torchvision' if _torchvision() else 'of ours'}"


def as_users_run_it(network: FairMOT) -> nn.Module:
    """A copy with deformable convolutions as most would have them."""
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, DeformConv):
            network.set_submodule(name, _Deform(layer, _torchvision()))
    return network


class _Deform(nn.Module):
    """A deformable convolution by torchvision; by our fused kernel, its weight packed once; else as it is."""

    def __init__(self, layer: DeformConv, theirs: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.layer = layer
        self.packed = nn.Parameter(pack_weight(layer.weight), requires_grad=False)
        self._theirs = theirs

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        answer: Tensor
        if self._theirs is None and not (x.is_cuda and layer.fusible):
            answer = layer(x)
            return answer
        shifts = layer.conv_offset_mask(x)
        offset, logits = shifts[:, : 2 * TAPS], shifts[:, 2 * TAPS :]
        if self._theirs is None:
            answer = torch.ops.tracker.deform_conv2d(x, offset, logits, self.packed, layer.bias, True)
        else:
            answer = self._theirs(x, offset, layer.weight, layer.bias, padding=1, mask=logits.sigmoid())
        return answer


@functools.cache
def _torchvision() -> Callable[..., Tensor] | None:
    """Its deform_conv2d, None where it is not installed or, built for another torch, cannot be imported."""
    try:
        operator: Callable[..., Tensor] = importlib.import_module("torchvision.ops").deform_conv2d
    except (ImportError, RuntimeError, OSError):
        return None
    return operator
