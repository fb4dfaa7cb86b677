#!/usr/bin/env python3
"""Write a network as a file that has been checked against torch, and its manifest beside it.

export.py fairmot --weights fairmot_dla34.pth --out engines/fairmot.onnx
export.py fairmot --weights fairmot_dla34.pth --out engines/fairmot.onnx --size 480x864 --verify video.mp4
export.py fairmot --weights fairmot_dla34.pth --out engines/fairmot.pt2 --batch dynamic
export.py fairmot --weights engines/fairmot.onnx --out engines/fairmot.pt2 --batch 8
export.py rtmdet-m --weights rtmdet_m_8xb32-300e_coco.pth --out engines/rtmdet_m.onnx --batch dynamic

An .onnx file is for ONNX Runtime and for tools/build.py. A .pt2 file is for GPUs without TensorRT: a program
that opens anywhere.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracker import manifest as manifests
from tracker.errors import ConfigError, TrackerError
from tracker.manifest import Manifest

if TYPE_CHECKING:
    from tracker.models.fairmot import FairMOT

OFFICIAL_SIZE = (1088, 608)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "model",
        metavar="NETWORK",
        help="fairmot, or a detector such as yolox-s: docs/frontends.md lists them",
    )
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument(
        "--weights", type=Path, metavar="CKPT", help=".pth, .safetensors, or an .onnx of this tool"
    )
    weights.add_argument("--random", action="store_true", help="random weights, to measure speed without any")
    parser.add_argument(
        "--network",
        type=Path,
        metavar="JSON",
        help="fields of FairMOTConfig, for a checkpoint of another network that does not say so itself",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="X.onnx|X.pt2")
    parser.add_argument(
        "--size",
        type=_size,
        metavar="HxW",
        help="default: that of the .onnx, or what the network is made for",
    )
    parser.add_argument("--batch", type=_batch, default=1, metavar="N|dynamic", help="default: 1")
    parser.add_argument(
        "--names", metavar="A,B", help="of the classes (default: person, or those of the .onnx)"
    )
    parser.add_argument(
        "--raw", action="store_true", help="leave sigmoid and peak test to the front end (.pt2 files do)"
    )
    parser.add_argument("--precision", choices=("fp32", "fp16"), help="of a .pt2 file (default: fp16)")
    parser.add_argument(
        "--lower-deform",
        action="store_true",
        help="deformable convolutions as GridSample, for TensorRT before 10.15 and TensorRT-RTX",
    )
    parser.add_argument(
        "--depthwise-upsampling",
        action="store_true",
        help="a smaller file, a little faster on a CPU and half as fast in TensorRT",
    )
    parser.add_argument("--verify", metavar="VIDEO", help="frames to check with (default: drawn ones)")
    return parser


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 608x1088")
    return int(match[2]), int(match[1])


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor dynamic")
    return int(text)


def _network(path: Path | None) -> Any:
    from tracker.models.fairmot import FairMOTConfig

    if path is None:
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return FairMOTConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot take the network from {path}: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        if options.model == "fairmot":
            _export(options)
        else:
            _export_detector(options)
    except TrackerError as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    return 0


def _export(options: argparse.Namespace) -> None:
    from tracker.deploy.export import ExportConfig, export_fairmot, frames_of, generated_frames
    from tracker.deploy.graph import Lowering
    from tracker.deploy.program import ProgramConfig, export_program

    program = options.out.suffix == ".pt2"
    for name in ("raw", "lower_deform") if program else ("precision",):
        if getattr(options, name):
            option, files = name.replace("_", "-"), options.out.suffix or "such"
            raise ConfigError(f"--{option} is not for {files} files: leave it out")
    model, source = _network_of(options)
    size = options.size or (source.input.size if source else OFFICIAL_SIZE)
    names = tuple(options.names.split(",")) if options.names else source.names if source else ("person",)
    shape = {"size": size, "batch": options.batch, "names": names}
    frames = frames_of(options.verify) if options.verify else generated_frames(size)
    if program:
        settings = ProgramConfig(
            **shape,
            precision=options.precision or "fp16",
            dense_upsampling=not options.depthwise_upsampling,
        )
        done = export_program(
            model, options.out, settings, frames, onnx_sha256=source.onnx_sha256 if source else None
        )
    else:
        lowering = Lowering(
            deform="GridSample" if options.lower_deform else "DeformConv",
            dense_upsampling=not options.depthwise_upsampling,
        )
        config = ExportConfig(**shape, heads="raw" if options.raw else "peaks", lowering=lowering)
        done = export_fairmot(model, options.out, config, frames)
    print(f"{options.out}: {done.bytes / 1e6:.1f} MB, written in {done.write_seconds:.1f} s")
    print(f"checked against torch in {done.verify_seconds:.1f} s; "
          f"{'relative' if program else 'greatest'} differences: "
          + ", ".join(f"{role} {error:.1e}" for role, error in done.errors.items()))  # fmt: skip


def _export_detector(options: argparse.Namespace) -> None:
    from tracker.deploy.detectors import DetectorExport, export_detector
    from tracker.deploy.export import frames_of, generated_frames
    from tracker.models.zoo import load_detector, network_of, random_detector

    network, _ = network_of(options.model)
    for name in ("network", "raw", "lower_deform", "depthwise_upsampling", "precision"):
        if getattr(options, name):
            raise ConfigError(f"--{name.replace('_', '-')} is for fairmot: leave it out")
    if options.out.suffix != ".onnx":
        raise ConfigError(f"{options.out} is no .onnx file; {options.model} can be written as one only")
    size = options.size or network.size
    names = tuple(options.names.split(",")) if options.names else None
    config = DetectorExport(name=options.model, size=size, batch=options.batch, names=names)
    if options.random:
        model = random_detector(options.model, size)
    else:
        model = load_detector(options.model, options.weights, size)
    frames = frames_of(options.verify) if options.verify else generated_frames(size)
    done = export_detector(model, options.out, config, frames)
    print(f"{options.out}: {done.bytes / 1e6:.1f} MB, written in {done.write_seconds:.1f} s")
    print(f"checked against torch in {done.verify_seconds:.1f} s; greatest differences: "
          + ", ".join(f"{role} {error:.1e}" for role, error in done.errors.items()))  # fmt: skip


def _network_of(options: argparse.Namespace) -> tuple[FairMOT, Manifest | None]:
    """The network, and the manifest of the ONNX file its weights come from, where they do."""
    from tracker.deploy.onnx_weights import fairmot_of_onnx
    from tracker.models.checkpoint import load_fairmot
    from tracker.models.fairmot import random_fairmot

    network = _network(options.network)
    if options.random:
        return random_fairmot(network), None
    if options.weights.suffix != ".onnx":
        return load_fairmot(options.weights, network), None
    if network is not None:
        raise ConfigError(f"{options.weights} says itself what network it is: leave out --network")
    beside = manifests.beside(options.weights)
    source = manifests.read(beside) if beside.exists() else None
    if source is not None:
        source.verify(options.weights)
    return fairmot_of_onnx(options.weights), source


if __name__ == "__main__":
    sys.exit(main())
