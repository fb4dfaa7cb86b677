#!/usr/bin/env python3
"""Build a TensorRT engine from an ONNX file and its manifest, and write the engine's manifest beside it.

build.py engines/fairmot.onnx --out engines/fairmot.engine --precision fp16
build.py engines/fairmot.onnx --out engines/fairmot.engine --precision fp16 --batch 1,8,8
build.py engines/fairmot.onnx --out engines/fairmot.engine --builder tensorrt_rtx

fp16 and bf16 cast the graph, but for what would suffer, and first compare its answers with fp32's on a CPU.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from tracker.errors import ConfigError, TrackerError
from tracker.manifest import Batch, Builder, Precision

if TYPE_CHECKING:
    from tracker.deploy.plan import Progress

LINE_SECONDS = 30.0  # between lines where there is no terminal


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", type=Path, metavar="X.onnx", help="with its manifest X.onnx.json beside it")
    parser.add_argument("--out", type=Path, required=True, metavar="X.engine")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        help="int8 is for graphs of tools/calibrate.py, whose rest becomes fp16 (default: the graph's own)",
    )
    parser.add_argument("--builder", choices=get_args(Builder), default="tensorrt", help="default: tensorrt")
    parser.add_argument(
        "--batch",
        type=_batch,
        metavar="MIN,OPT,MAX",
        help="images per run, for a graph exported with --batch dynamic; one number for all three "
        "(default: 1,4,8)",
    )
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="REGEX",
        help="nodes with such names stay in fp32 too; may be repeated",
    )
    parser.add_argument("--half-io", action="store_true", help="inputs and outputs in fp16 or bf16 as well")
    parser.add_argument(
        "--deform",
        choices=("plugin", "fused", "segments", "lower"),
        help="deformable convolutions by TensorRT's own plugin; by our fused kernel, as a plugin inside the "
        "plan (from TensorRT 10.9) or between several plans in one file; or as "
        "GridSample, slowly (default: TensorRT's own if it has one, from 10.15, else segments)",
    )
    parser.add_argument("--verify", metavar="VIDEO", help="frames to compare with (default: drawn ones)")
    parser.add_argument("--no-verify", action="store_true", help="cast without comparing")
    parser.add_argument("--no-tf32", action="store_true", help="fp32 in full, not as tensor cores take it")
    parser.add_argument("--level", type=int, choices=range(6), help="how long to search (TensorRT's own: 3)")
    parser.add_argument("--workspace", type=int, metavar="MIB", help="GPU memory to use at most")
    parser.add_argument(
        "--tactics",
        type=lambda text: tuple(text.split(",")),
        metavar="A,B",
        help="TensorRT's tactic sources to choose from, such as EDGE_MASK_CONVOLUTIONS,JIT_CONVOLUTIONS",
    )
    parser.add_argument("--device", type=_device, default=0, metavar="cuda:N", help="default: cuda:0")
    parser.add_argument(
        "--sm", type=int, help="tensorrt_rtx: one compute capability to build for, such as 89 (default: all)"
    )
    parser.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="what was measured before (default: timing.cache beside the engine)",
    )
    return parser


def _batch(text: str) -> Batch:
    match = re.fullmatch(r"(\d+)(?:,(\d+),(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither MIN,OPT,MAX, such as 1,4,8, nor one number")
    least = int(match[1])
    return (least, int(match[2] or least), int(match[3] or least))


def _device(text: str) -> int:
    match = re.fullmatch(r"cuda(?::(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not cuda or cuda:N")
    return int(match[1] or 0)


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        _build(options)
    except TrackerError as error:
        print(f"build: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("build: interrupted; no engine was written", file=sys.stderr)
        return 130
    return 0


def _build(options: argparse.Namespace) -> None:
    from tracker.deploy.build import build
    from tracker.deploy.export import frames_of, generated_frames
    from tracker.deploy.islands import HalfConfig
    from tracker.deploy.plan import BuildConfig

    if options.no_verify and options.verify:
        raise ConfigError("--no-verify leaves nothing to --verify with: choose one")
    frames = []
    if options.precision in ("fp16", "bf16") and not options.no_verify:
        frames = frames_of(options.verify, 1) if options.verify else generated_frames((640, 360), 1)
    config = BuildConfig(
        builder=options.builder,
        batch=options.batch,
        workspace_mib=options.workspace,
        tactics=options.tactics,
        level=options.level,
        tf32=not options.no_tf32,
        sm=options.sm,
        device=options.device,
        timing_cache=options.timing_cache or options.out.with_name("timing.cache"),
    )
    half = HalfConfig(keep=tuple(options.keep), half_io=options.half_io)
    with _shown(str(options.out)) as progress:
        done = build(
            options.source,
            options.out,
            config,
            precision=options.precision,
            half=half,
            frames=frames,
            deform=options.deform,
            progress=progress,
        )
    about = done.manifest
    bound = f"sm {about.sm}" if about.sm else "every GPU of its library"
    batch = "–".join(map(str, sorted({about.batch[0], about.batch[2]}))) if about.batch else "?"
    print(f"{options.out}: {done.bytes / 1e6:.1f} MB, {about.precision}, batch {batch}, {about.builder} "
          f"{about.tensorrt_version}, {bound}, built in {done.seconds:.1f} s")  # fmt: skip
    if done.deform == "segments":
        why = "asked for" if options.deform else "this TensorRT has no DeformConv"
        print(f"an engine in segments ({why}): deformable convolutions run as one fused kernel each, between "
              "plans; it needs Triton, which comes with torch's CUDA builds")  # fmt: skip
    for note in done.notes:
        print(note)
    if done.errors:
        print(f"{about.precision} against fp32, relative: "
              + ", ".join(f"{name} {error:.2%}" for name, error in done.errors.items()))  # fmt: skip


@contextmanager
def _shown(name: str) -> Iterator[Progress]:
    """A build takes minutes."""
    from tracker.deploy.shown import shown

    def worded(share: float, whole: float | None) -> str:
        return "" if whole is None else f", {share:.0%}"

    with shown(name, line_seconds=LINE_SECONDS, worded=worded) as tell:
        yield lambda what, share: tell(what, share or 0.0, None if share is None else 1.0)


if __name__ == "__main__":
    sys.exit(main())
