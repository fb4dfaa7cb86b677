#!/usr/bin/env python3
"""Write an ONNX file in INT8, with ranges from the user's own footage, judged by tracking.

calibrate.py engines/X.onnx --data video.mp4 --out engines/X_int8.onnx
calibrate.py engines/X.onnx --data footage/ --out engines/X_int8.onnx --evaluate clip.mp4 --gt gt.txt
calibrate.py engines/X.onnx --out engines/X_fp16.onnx --precision fp16 --evaluate clip.mp4

With --evaluate, detections and tracks are compared with FP32's on that clip; layers are kept in higher
precision, as few as needed, until no more than --max-hota-loss is lost; thresholds are fitted to the new
scores; and a report is written beside the result. Without --gt the tracks of FP32 count as the truth.
The file runs in ONNX Runtime; tools/build.py makes an engine of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from tracker.errors import ConfigError, TrackerError
from tracker.evaluation import Benchmark

if TYPE_CHECKING:
    from tracker.deploy.calibration.calibrate import Calibrated, CalibrationConfig
    from tracker.deploy.calibration.observe import Progress

LINE_SECONDS = 15.0  # between lines where there is no terminal


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", type=Path, metavar="X.onnx", help="in FP32, with X.onnx.json beside it")
    parser.add_argument("--out", type=Path, required=True, metavar="Y.onnx")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FOOTAGE",
        help="to calibrate with: videos, images, directories of either, .txt lists of them; they should look "
        "like what is to be tracked",
    )
    parser.add_argument(
        "--frames", type=int, default=256, metavar="N", help="to calibrate with (default: 256)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of their choice (default: 0)")
    parser.add_argument(
        "--method",
        choices=("max", "percentile", "entropy", "mse", "best"),
        default="mse",
        help="of ranges; best tries all of them on --evaluate (default: mse)",
    )
    parser.add_argument("--precision", choices=("int8", "fp16", "bf16"), default="int8", help="default: int8")
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="REGEX",
        help="layers with such names stay in higher precision in any case; may be repeated",
    )
    parser.add_argument("--evaluate", metavar="CLIP", help="video or images to judge tracking on")
    parser.add_argument("--gt", type=Path, metavar="GT", help="its ground truth (MOTChallenge gt.txt)")
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="F", help="multiply boxes by F for --gt (default: 1)"
    )
    parser.add_argument("--benchmark", choices=get_args(Benchmark), default="auto", help="rule of --gt")
    parser.add_argument("--classes", default="", metavar="A,B", help="judge these alone")
    parser.add_argument("--tracker", choices=("jde", "byte"), help="to judge with (default: as for track)")
    parser.add_argument("--max-frames", type=int, metavar="N", help="of --evaluate, from its start")
    parser.add_argument(
        "--max-hota-loss", type=float, default=0.5, metavar="F", help="in points of 100 (default: 0.5)"
    )
    parser.add_argument(
        "--rank-frames",
        type=int,
        default=16,
        metavar="N",
        help="of --evaluate, to rank layers on; 0 ranks them only where some must be kept (default: 16)",
    )
    parser.add_argument("--device", default="auto", help="to judge on: auto, cpu, cuda:N (default: auto)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        _calibrate(options)
    except TrackerError as error:
        print(f"calibrate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("calibrate: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _calibrate(options: argparse.Namespace) -> None:
    from tracker.deploy.calibration.calibrate import CalibrationConfig, calibrate
    from tracker.deploy.calibration.judge import JudgeConfig

    config = CalibrationConfig(
        precision=options.precision,
        frames=options.frames,
        seed=options.seed,
        method=options.method,
        keep=tuple(options.keep),
        max_hota_loss=options.max_hota_loss,
        rank_frames=options.rank_frames,
    )
    if options.precision == "int8" and not options.data:
        raise ConfigError("INT8 is calibrated with footage: name some with --data")
    judging = None
    if options.evaluate:
        judging = JudgeConfig(
            clip=options.evaluate,
            truth=options.gt,
            scale=options.scale,
            benchmark=options.benchmark,
            classes=tuple(filter(None, options.classes.split(","))),
            tracker=options.tracker,
            max_frames=options.max_frames,
            device=options.device,
        )
    elif options.gt:
        raise ConfigError(f"--gt {options.gt} is of a clip: name that with --evaluate")
    with _shown(options.out.name) as progress:
        done = calibrate(options.source, options.out, options.data, config, judging, progress)
    _tell(done, options)
    if done.judged is not None:
        _report(done, config, options)


def _tell(done: Calibrated, options: argparse.Namespace) -> None:
    before, after = done.bytes
    print(
        f"{options.out}: {after / 1e6:.2f} MB, {after / before:.1%} of {options.source.name}; "
        f"{len(done.layers) - len(done.kept)} of {len(done.layers)} layers in {options.precision}"
    )
    about = done.manifest.calibration
    if done.choice is not None and about is not None:
        skipped = f", {done.choice.unreadable} unreadable ones skipped" if done.choice.unreadable else ""
        again = f", {done.resumed} of them before an interruption" if done.resumed else ""
        print(f"ranges by {about.method} of {about.frames} out of {done.choice.seen} frames, seed "
              f"{about.seed}{skipped}{again}")  # fmt: skip
    judged = done.judged
    if judged is None:
        print("not judged: add --evaluate CLIP to see what this does to tracking")
        return
    best, fp32 = judged.verdict.best, judged.reference
    against = "ground truth" if judged.truth else "fp32's own tracks"
    changes = ", ".join(
        f"{key} {best[key]:.2f} ({best[key] - fp32[key]:+.2f})" for key in ("HOTA", "MOTA", "IDF1")
    )
    print(f"{changes}, ID switches {best['IDSW']:.0f} ({best['IDSW'] - fp32['IDSW']:+.0f}) against {against}")


def _report(done: Calibrated, config: CalibrationConfig, options: argparse.Namespace) -> None:
    from tracker.deploy.calibration.report import to_html, to_json
    from tracker.deploy.plan import partial_file

    about = {"source": options.source.name, "data": [Path(each).name for each in options.data]}
    stem = options.out.with_suffix("").name
    texts = {
        "json": json.dumps(to_json(done, config, **about), indent=2, allow_nan=False) + "\n",
        "html": to_html(done, config, **about),
    }
    for kind, text in texts.items():
        path = options.out.with_name(f"{stem}.calibration.{kind}")
        with partial_file(path) as file, file.step():
            file.write(text.encode())
        print(f"report: {path}")


@contextmanager
def _shown(name: str) -> Iterator[Progress]:
    from rich.progress import MofNCompleteColumn

    from tracker.deploy.shown import shown

    def worded(done: float, total: float | None) -> str:
        return f", {done} of {total}" if total else f", {done}"

    with shown(name, MofNCompleteColumn(), line_seconds=LINE_SECONDS, worded=worded) as tell:
        yield tell


if __name__ == "__main__":
    sys.exit(main())
