#!/usr/bin/env python3
"""Write the manifest of your own ONNX file, MODEL.onnx.json, after running the model once.

manifest.py MODEL.onnx --frontend yolox
manifest.py MODEL.onnx --frontend yolox --names person,car --layout decoded --input-size 640x384
manifest.py MODEL.onnx --frontend yolov8
manifest.py MODEL.onnx --frontend fairmot
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from tracker import manifest as manifests
from tracker.engine import describe
from tracker.errors import ConfigError, TrackerError
from tracker.frontends import FRONTENDS
from tracker.frontends.coco import COCO_NAMES
from tracker.manifest import Precision


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--frontend", required=True, choices=FRONTENDS, help="the family of detector")
    parser.add_argument(
        "--names",
        metavar="coco|FILE.txt|a,b,c",
        help="class names by index; a file has one per line (default: coco, for fairmot person)",
    )
    parser.add_argument(
        "--layout",
        choices=sorted({layout for kind in FRONTENDS.values() for layout in kind.layouts}),
        help="what the outputs are, where their names do not tell: see docs/frontends.md",
    )
    parser.add_argument(
        "--input-size", type=size, metavar="WxH", help="image size, where the model leaves it open"
    )
    parser.add_argument(
        "--legacy",
        action="store_true",
        help="a YOLOX that wants RGB with ImageNet's mean and std: ByteTrack's and YOLOX's first",
    )
    parser.add_argument(
        "--precision", choices=get_args(Precision), default="fp32", help="for people (default: fp32)"
    )
    parser.add_argument("--out", type=Path, help="where to write (default: MODEL.onnx.json)")
    return parser


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 640x384")
    return int(match[1]), int(match[2])


def class_names(text: str) -> tuple[str, ...]:
    if text == "coco":
        return COCO_NAMES
    if not text.endswith(".txt"):
        return tuple(name.strip() for name in text.split(","))
    try:
        return tuple(
            line.strip() for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip()
        )
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read class names from {text}: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    out = options.out or manifests.beside(options.model)
    try:
        manifest = describe(
            options.model,
            frontend=options.frontend,
            names=None if options.names is None else class_names(options.names),
            layout=options.layout,
            size=options.input_size,
            precision=options.precision,
            legacy=options.legacy,
        )
        manifests.write(manifest, out)
    except TrackerError as error:
        print(f"manifest: {error}", file=sys.stderr)
        return 1
    print(out.read_text(encoding="utf-8"), end="")
    print(f"wrote {out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
