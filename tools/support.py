#!/usr/bin/env python3
"""What works, system by system: measure it on this machine, and write the table of it.

support.py measure --out support-cpu.json
support.py measure yolox-s detr-r50 --out support-gpu.json --device cuda:0 --jobs 8 --deadline 360
support.py table docs/measurements/support-*.json --readme README.md

Networks have random weights, so nothing is fetched. What has been measured is kept in --work and not measured
again; a step that fails stops no other, and the same command tries it again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tracker.errors import SinkError, TrackerError
from tracker.manifest import Batch, Builder

if TYPE_CHECKING:
    from tracker.deploy.support.steps import Found

ROOT = Path(__file__).resolve().parent.parent


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    subjects = parser.add_subparsers(dest="subject", required=True)
    measure = subjects.add_parser("measure", help="do what this machine can", allow_abbrev=False)
    measure.add_argument("names", nargs="*", metavar="SYSTEM", help="(default: all)")
    measure.add_argument("--out", type=Path, required=True, metavar="X.json")
    measure.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "support", metavar="DIR", help="(default: runs/support)"
    )
    measure.add_argument(
        "--data",
        default=str(ROOT / "videos" / "demo.mp4"),
        metavar="VIDEO",
        help="(default: the shipped clip)",
    )
    measure.add_argument("--device", default="cpu", metavar="cpu|cuda:N", help="(default: cpu)")
    measure.add_argument("--builders", type=listed, default=get_args(Builder), metavar="A,B")
    measure.add_argument("--precisions", type=listed, metavar="A,B", help="(default: fp32,fp16,int8)")
    measure.add_argument("--frames", type=int, default=8, metavar="N", help="to calibrate with (default: 8)")
    measure.add_argument(
        "--repeat", type=int, default=10, metavar="N", help="timed runs a round (default: 10)"
    )
    measure.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at once (default: 1)")
    measure.add_argument(
        "--builds", type=int, default=1, metavar="N", help="of --jobs, those that only build (default: 1)"
    )
    measure.add_argument(
        "--deadline", type=float, metavar="SECONDS", help="begin nothing and end everything then"
    )
    measure.add_argument(
        "--batch", type=batch, default=(1, 1, 4), metavar="MIN,OPT,MAX", help="of engines (default: 1,1,4)"
    )
    measure.add_argument("--level", type=int, choices=range(6), help="as for build.py, like the next three")
    measure.add_argument("--tactics", type=listed, metavar="A,B")
    measure.add_argument("--timing-cache", type=Path, metavar="FILE")
    measure.add_argument(
        "--no-verify", action="store_true", help="build half precision without comparing it on the CPU first"
    )
    table = subjects.add_parser("table", help="write the table", allow_abbrev=False)
    table.add_argument("files", nargs="+", type=Path, metavar="X.json", help="of measure; later ones win")
    table.add_argument("--readme", type=Path, metavar="README.md", help="put it between its markers there")
    return parser


def listed(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def batch(text: str) -> Batch:
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if len(numbers) != 3 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not MIN,OPT,MAX, such as 1,1,4")
    return numbers[0], numbers[1], numbers[2]


def measure(options: argparse.Namespace) -> int:
    from tracker.deploy.support.report import report
    from tracker.deploy.support.schedule import measure
    from tracker.deploy.support.steps import PRECISIONS, StepsConfig, plan_of, write_pictures
    from tracker.deploy.support.systems import SYSTEMS, system_of
    from tracker.runtimes.onnx import usable_cores

    names = options.names or list(SYSTEMS)
    for name in names:
        system_of(name)
    config = StepsConfig(
        folder=options.work,
        data=options.data,
        device=options.device,
        builders=options.builders,
        precisions=options.precisions or PRECISIONS,
        frames=options.frames,
        repeat=options.repeat,
        batch=options.batch,
        level=options.level,
        tactics=options.tactics,
        timing_cache=options.timing_cache,
        verify=not options.no_verify,
        threads=max(1, usable_cores() // options.jobs) if options.jobs > 1 else None,
    )
    write_pictures(config)
    begun = time.perf_counter()

    def told(name: str, step: str, found: Found) -> None:
        said = {key: value for key, value in found.items() if key not in ("ok", "seconds")}
        line = found["error"] if not found["ok"] else json.dumps(said)
        print(f"{time.perf_counter() - begun:6.1f} s  {'ok  ' if found['ok'] else 'FAIL'} {name} {step} "
              f"({found['seconds']} s)  {line}", flush=True)  # fmt: skip
        write(options.out, report(config))

    measure(
        names, plan_of(config), jobs=options.jobs, turns=options.builds, deadline=options.deadline, told=told
    )
    found = report(config)
    write(options.out, found)
    steps = [step for name in names for step in found["systems"].get(name, {}).get("steps", {}).values()]
    wrong = sum(not step["ok"] for step in steps)
    seconds = time.perf_counter() - begun
    print(f"{options.out}: {len(names)} systems, {len(steps)} steps, {wrong} failed; {seconds:.0f} s")
    return 1 if wrong else 0


def table(options: argparse.Namespace) -> int:
    from tracker.deploy.support.report import block, with_block

    text = block([json.loads(file.read_text(encoding="utf-8")) for file in options.files])
    if options.readme is None:
        print(text)
    else:
        options.readme.write_text(
            with_block(options.readme.read_text(encoding="utf-8"), text), encoding="utf-8"
        )
    return 0


def write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise SinkError(f"cannot write {path}: {error.strerror}; choose another place with --out") from error


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        return {"measure": measure, "table": table}[options.subject](options)
    except TrackerError as error:
        print(f"support: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
