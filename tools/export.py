#!/usr/bin/env python3
"""Write a network as an ONNX file that has been checked against torch, and its manifest beside it.

export.py fairmot --weights fairmot_dla34.pth --out engines/fairmot.onnx
export.py fairmot --weights fairmot_dla34.pth --out engines/fairmot.onnx --size 480x864 --verify video.mp4
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tracker.errors import ConfigError, TrackerError


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", choices=("fairmot",))
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--weights", type=Path, metavar="CKPT", help=".pth or .safetensors")
    weights.add_argument("--random", action="store_true", help="random weights, to measure speed without any")
    parser.add_argument(
        "--network",
        type=Path,
        metavar="JSON",
        help="fields of FairMOTConfig, for a checkpoint of another network that does not say so itself",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="X.onnx")
    parser.add_argument("--size", type=_size, default=(1088, 608), metavar="HxW", help="default: 608x1088")
    parser.add_argument("--batch", type=_batch, default=1, metavar="N|dynamic", help="default: 1")
    parser.add_argument("--names", default="person", metavar="A,B", help="of the classes (default: person)")
    parser.add_argument("--raw", action="store_true", help="leave sigmoid and peak test to the front end")
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
        _export(options)
    except TrackerError as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    return 0


def _export(options: argparse.Namespace) -> None:
    from tracker.deploy.export import ExportConfig, export_fairmot, frames_of, generated_frames
    from tracker.deploy.graph import Lowering
    from tracker.models.checkpoint import load_fairmot
    from tracker.models.fairmot import random_fairmot

    config = ExportConfig(
        size=options.size,
        batch=options.batch,
        heads="raw" if options.raw else "peaks",
        names=tuple(options.names.split(",")),
        lowering=Lowering(
            deform="GridSample" if options.lower_deform else "DeformConv",
            dense_upsampling=not options.depthwise_upsampling,
        ),
    )
    network = _network(options.network)
    model = random_fairmot(network) if options.random else load_fairmot(options.weights, network)
    frames = frames_of(options.verify) if options.verify else generated_frames(config.size)
    done = export_fairmot(model, options.out, config, frames)
    print(f"{options.out}: {done.bytes / 1e6:.1f} MB, written in {done.write_seconds:.1f} s")
    print(f"checked against torch in {done.verify_seconds:.1f} s; greatest differences: "
          + ", ".join(f"{role} {error:.1e}" for role, error in done.errors.items()))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
