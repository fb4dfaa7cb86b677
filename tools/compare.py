#!/usr/bin/env python3
"""Compare two engines on one clip: tensors, detections, tracks; and say where a difference begins.

compare.py fairmot.pth engines/fairmot.onnx --data video.mp4
compare.py engines/fairmot.onnx engines/fairmot_int8.onnx --data video.mp4 --gt gt.txt --locate
compare.py engines/fairmot.onnx engines/fairmot.engine --data video.mp4 --fail-above detections=0.01,hota=0.5

Each is a checkpoint (.pth, .pt, .safetensors), an .onnx, .engine or .pt2 file with its manifest beside it.
Exit codes: 0 compared, 1 an error, 2 wrong usage, 3 compared and beyond --fail-above.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from tracker.errors import TrackerError
from tracker.evaluation import Benchmark
from tracker.json_file import write_json

if TYPE_CHECKING:
    from tracker.deploy.parity.compare import Step

MEASURES = ("error", "pixels", "detections", "tracks", "hota")
DIFFERENT = 3


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("a", type=Path, metavar="A", help="the reference")
    parser.add_argument("b", type=Path, metavar="B", help="what should answer as A does")
    parser.add_argument("--data", required=True, metavar="CLIP", help="video, image directory or glob")
    parser.add_argument("--gt", type=Path, metavar="GT", help="MOT ground truth of the clip")
    parser.add_argument("--gt-scale", type=float, default=1.0, metavar="F", help="multiply result boxes by F")
    parser.add_argument(
        "--benchmark", choices=get_args(Benchmark), default="auto", help="as for evaluate.py (default: auto)"
    )
    parser.add_argument(
        "--frames",
        type=int,
        default=8,
        metavar="N",
        help="whose tensors are compared; 0 for none (default: 8)",
    )
    parser.add_argument("--max-frames", type=int, metavar="N", help="of the clip")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="F",
        help="greatest |B − A| / |A| of an output (default: by precision)",
    )
    parser.add_argument("--locate", action="store_true", help="name the first layer beyond tolerance")
    parser.add_argument("--onnx", type=Path, metavar="X.onnx", help="what a TensorRT engine was built from")
    parser.add_argument(
        "--level", type=int, choices=range(6), help="with --locate and engines: as for build.py"
    )
    parser.add_argument(
        "--tactics", type=lambda text: tuple(text.split(",")), metavar="A,B", help="the same, as for build.py"
    )
    parser.add_argument("--timing-cache", type=Path, metavar="FILE", help="the same, as for build.py")
    parser.add_argument("--conf", type=float, default=0.4, metavar="F", help="of detections that count (0.4)")
    parser.add_argument("--score-tolerance", type=float, default=0.02, metavar="F", help="(default: 0.02)")
    parser.add_argument("--iou", type=float, default=0.9, metavar="F", help="of the same box (default: 0.9)")
    parser.add_argument("--classes", type=lambda text: tuple(text.split(",")), default=(), metavar="A,B")
    parser.add_argument("--tracker", choices=("jde", "byte"), help="(default: as for track)")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda:N")
    parser.add_argument("--size", type=_size, metavar="HxW", help="of the input, for two checkpoints")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything there as well")
    parser.add_argument(
        "--fail-above",
        type=_limits,
        default={},
        metavar="NAME=F,…",
        help="exit with 3 where one of these is greater: error (relative, of an output), pixels (fed to the "
        "networks), detections, tracks (shares that differ), hota (lost against the ground truth, else what "
        "B lacks to 100 with A's tracks for the truth)",
    )
    return parser


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 608x1088")
    return int(width), int(height)


def _limits(text: str) -> dict[str, float]:
    limits = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in MEASURES:
            raise argparse.ArgumentTypeError(f"{name!r} is not measured: there is {', '.join(MEASURES)}")
        try:
            limits[name] = float(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{part!r} is not NAME=NUMBER, such as hota=0.5") from error
    return limits


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        return _compare(options)
    except TrackerError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("compare: interrupted", file=sys.stderr)
        return 130


def _compare(options: argparse.Namespace) -> int:
    from rich.console import Console

    from tracker.deploy.parity.compare import CompareConfig, compare_sides
    from tracker.deploy.parity.detections import MatchConfig
    from tracker.deploy.parity.report import show, to_json
    from tracker.deploy.parity.sides import open_sides
    from tracker.deploy.plan import BuildConfig

    config = CompareConfig(
        frames=options.frames,
        max_frames=options.max_frames,
        tolerance=options.tolerance,
        match=MatchConfig(conf=options.conf, score=options.score_tolerance, iou=options.iou),
        tracker=options.tracker,
        classes=options.classes,
        device=options.device,
        locate=options.locate,
        build=BuildConfig(tactics=options.tactics, level=options.level, timing_cache=options.timing_cache),
        truth=options.gt,
        benchmark=options.benchmark,
        scale=options.gt_scale,
    )
    a, b = open_sides(options.a, options.b, device=options.device, onnx=options.onnx, size=options.size)
    with _shown() as on_step:
        receipt = compare_sides(a, b, options.data, config, on_step)
    show(receipt, Console(highlight=False, emoji=False, markup=False))
    if options.json:
        write_json(options.json, to_json(receipt))
    measured = receipt.measures()
    over = {name: limit for name, limit in options.fail_above.items() if not measured[name] <= limit}
    for name, limit in over.items():
        print(f"compare: {name} is {measured[name]:.4g}, more than {limit:g}", file=sys.stderr)
    return DIFFERENT if over else 0


@contextmanager
def _shown() -> Iterator[Step]:
    """A bar on a terminal; elsewhere nothing, the receipt says it all."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, highlight=False)
    if not (console.is_interactive and sys.stderr.isatty()):
        yield lambda what, share: None
        return
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, share: bar.update(
            task, description=what, total=None if share is None else 1.0, completed=share or 0.0
        )


if __name__ == "__main__":
    sys.exit(main())
