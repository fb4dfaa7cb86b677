#!/usr/bin/env python3
"""Measure, print a table, write JSON.

bench.py association
bench.py association --official-fairmot ../FairMOT --official-bytetrack ../ByteTrack --json association.json
bench.py pipeline video.mp4 --engine yolox_nano.onnx
bench.py engine fairmot_fp32.engine fairmot_fp16.engine --batch 1,4,8 --json engine.json
bench.py engine fairmot.engine --peers
bench.py masks --seeds 10

Association runs on one thread. The official trackers run from your own clones of ifzhang/FairMOT and
ifzhang/ByteTrack (they need cython-bbox); they must answer what ours answers with --compat, else the exit
code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if sys.argv[1:2] == ["association"]:  # the others run as users run them
    # Before anything loads NumPy: the libraries beneath it ask once.
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

from tracker import benchmark, contenders, engine_times, overhead
from tracker import manifest as manifests
from tracker.errors import ConfigError, TrackerError
from tracker.json_file import write_json
from tracker.session import options_from

if TYPE_CHECKING:
    from tracker.deploy.peers import Peer

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("TRACKER_DATA", ROOT.parent / "shared" / "data"))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    subjects = parser.add_subparsers(dest="subject", required=True)
    association = subjects.add_parser(
        "association", help="detections to tracks, by number of objects", allow_abbrev=False
    )
    association.add_argument(
        "--load",
        type=Path,
        default=DATA.parent / "bench" / "load.py",
        metavar="PY",
        help="file with gen(N, frames=…): per frame (N, 5) xyxy and score, (N, D) embeddings, (N,) ids "
        "(default: $TRACKER_DATA/../bench/load.py)",
    )
    association.add_argument(
        "--objects",
        type=counts,
        default="20,100,250,500,1000",
        metavar="N,N,…",
        help="(default: %(default)s)",
    )
    association.add_argument(
        "--frames", type=positive, default=100, metavar="N", help="of each load (default: %(default)s)"
    )
    association.add_argument(
        "--repeat", type=positive, default=3, metavar="K", help="runs of each load (default: %(default)s)"
    )
    association.add_argument("--official-fairmot", type=Path, metavar="DIR", help="a clone of FairMOT")
    association.add_argument("--official-bytetrack", type=Path, metavar="DIR", help="a clone of ByteTrack")
    association.add_argument(
        "--external",
        type=external,
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="time a byte tracker in another process: COMMAND gets the path of a MOT text file as its last "
        "argument and prints 'F ms per frame'",
    )
    association.add_argument("--json", type=Path, metavar="OUT", help="write all figures there as well")
    masks = subjects.add_parser(
        "masks", help="association by boxes and by masks, where things touch", allow_abbrev=False
    )
    masks.add_argument(
        "--seeds", type=positive, default=10, metavar="N", help="scenes (default: %(default)s)"
    )
    masks.add_argument(
        "--frames", type=positive, default=150, metavar="N", help="of each (default: %(default)s)"
    )
    masks.add_argument(
        "--objects", type=positive, default=30, metavar="N", help="in each (default: %(default)s)"
    )
    masks.add_argument("--device", default="cpu", help="where masks are (default: %(default)s)")
    masks.add_argument("--json", type=Path, metavar="OUT", help="write all figures there as well")
    pipeline = subjects.add_parser(
        "pipeline", help="what a run costs beyond its detector", allow_abbrev=False
    )
    pipeline.add_argument("sources", nargs="+", metavar="VIDEO")
    pipeline.add_argument("--engine", required=True, help="with its manifest beside it")
    pipeline.add_argument("--device", default="auto", help="(default: %(default)s)")
    pipeline.add_argument("--classes", type=lambda text: text.split(","), default=[], metavar="LIST")
    pipeline.add_argument("--save", type=lambda text: text.split(","), default=["mot"], metavar="LIST")
    pipeline.add_argument("--repeat", type=positive, default=3, metavar="K", help="(default: %(default)s)")
    pipeline.add_argument(
        "--official-fairmot",
        type=Path,
        metavar="DIR",
        help="a clone of FairMOT: its loop over the first video",
    )
    pipeline.add_argument(
        "--official-weights", default="", metavar="PTH", help="for it (default: random ones)"
    )
    engine = subjects.add_parser("engine", help="latency and throughput by batch size", allow_abbrev=False)
    engine.add_argument("engines", nargs="+", type=Path, metavar="ENGINE", help="with manifests beside them")
    engine.add_argument(
        "--batch", type=counts, default="1,4,8", metavar="N,N,…", help="(default: %(default)s)"
    )
    engine.add_argument("--device", default="auto", help="(default: %(default)s)")
    engine.add_argument("--source-size", type=size, default="1920x1080", metavar="WxH", help="of the frames")
    engine.add_argument(
        "--repeat",
        type=positive,
        default=100,
        metavar="K",
        help="runs in each of five rounds, of which the median counts (default: %(default)s)",
    )
    engine.add_argument(
        "--peers",
        action="store_true",
        help="run the first engine's network in torch beside it: eager, as a CUDA graph, compiled",
    )
    engine.add_argument(
        "--peer-weights",
        type=Path,
        metavar="FILE",
        help="the peers' network, a checkpoint or .onnx (default: the .onnx that the engine was made from, "
        "if it lies beside it, else FairMOT's DLA-34 with random weights)",
    )
    engine.add_argument("--json", type=Path, metavar="OUT", help="write all figures there as well")
    return parser


def size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return positive(width), positive(height)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def counts(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def external(text: str) -> benchmark.External:
    name, _, command = text.partition("=")
    if not (name and command):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COMMAND")
    return benchmark.External(name=name, command=command)


def races(options: argparse.Namespace) -> list[benchmark.Race]:
    fairmot, bytetrack = options.official_fairmot, options.official_bytetrack
    return [
        benchmark.Race(
            name="jde",
            default=contenders.ours("jde"),
            compat=contenders.ours("jde", "fairmot"),
            rivals=(contenders.official_fairmot(fairmot),) if fairmot else (),
        ),
        benchmark.Race(
            name="byte",
            default=contenders.ours("byte"),
            compat=contenders.ours("byte", "bytetrack"),
            rivals=(contenders.official_bytetrack(bytetrack),) if bytetrack else (),
            externals=tuple(options.external),
        ),
    ]


def association(options: argparse.Namespace) -> int:
    """Run the races; 1 if somebody answered something else."""
    entered = races(options)
    generate = benchmark.load_generator(options.load, frames=options.frames)
    laps = []
    for objects in options.objects:
        load = generate(objects)
        for race in entered:
            print(f"{race.name}: {objects} objects", file=sys.stderr)
            laps.append(benchmark.run_lap(race, objects, load, repeats=options.repeat))
    print(benchmark.table(laps))
    print(f"\nCPU ms of the median of {options.frames} frames, each the best of {options.repeat} runs;")
    print("in brackets the least ratio of any run")
    print(f"one thread of {benchmark.environment()['cpu']}")
    if options.json:
        write_json(
            options.json, benchmark.report(entered, laps, frames=options.frames, repeats=options.repeat)
        )
    wrong = benchmark.disagreements(laps)
    for sentence in wrong:
        print(f"bench: {sentence}", file=sys.stderr)
    rivals = [rival.name for race in entered for rival in race.rivals]
    if rivals and not wrong:
        print(f"{' and '.join(rivals)}: the same ids and boxes as ours with --compat, in every frame")
    return 1 if wrong else 0


def pipeline(options: argparse.Namespace) -> int:
    """`track` and its engine alone, in turns."""
    chosen = {name: getattr(options, name) for name in ("engine", "device", "classes", "save")}
    laps = overhead.measure(options_from({"sources": options.sources, **chosen}), repeats=options.repeat)
    print(overhead.table(laps))
    if options.official_fairmot:
        official(options, median(lap.frames / lap.run_seconds for lap in laps))
    print(where())
    return 0


def official(options: argparse.Namespace, ours: float) -> None:
    """The official FairMOT over the first video, in a process of its own."""
    script = Path(__file__).with_name("official_fairmot.py")
    command = [sys.executable, "-P", str(script), str(options.official_fairmot), options.sources[0]]
    if options.official_weights:
        command += ["--weights", options.official_weights]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(
            f"the official FairMOT failed: {(done.stderr.strip().splitlines() or ['no word'])[-1]}"
        )
    found = json.loads(done.stdout.splitlines()[-1])
    theirs = found["frames"] / found["seconds"]
    print(
        f"official FairMOT (DLA-34, 1088×608), its own loop: {found['frames']} frames at {theirs:.1f} fps, "
        f"{found['objects']:.1f} objects each; ours, with the engine above, {ours / theirs:.1f} times as fast"
    )


def engine(options: argparse.Namespace) -> int:
    """Engines one after another, then the first one's network in torch."""
    if options.peer_weights and not options.peers:
        raise ConfigError("--peer-weights is for the peers: add --peers")
    shared = {"batches": options.batch, "device": options.device, "repeats": options.repeat}
    beside = peers_of(options, shared) if options.peers else lambda rows: []
    rows = [
        row
        for path in options.engines
        for row in engine_times.measure(path, source_size=options.source_size, **shared)
    ]
    print(engine_times.table(rows))
    width, height = options.source_size
    print(
        f"{width}×{height} frames; ms per batch, the median of {engine_times.ROUNDS} × {options.repeat} runs"
    )
    peers = beside(rows)
    print(where())
    if options.json:
        about = {"environment": benchmark.environment(), "where": where()}
        found = {"rows": [asdict(row) for row in rows], "peers": [asdict(peer) for peer in peers]}
        write_json(options.json, about | found)
    return 0


def peers_of(
    options: argparse.Namespace, shared: dict[str, Any]
) -> Callable[[list[engine_times.Times]], list[Peer]]:
    """What measures and prints the peers, once the engines have been; their network is loaded here."""
    from tracker.deploy import peers  # needs onnx, which nothing else here does

    first = options.engines[0]
    network, words = peers.network_of(first, options.peer_weights)
    size = manifests.read(manifests.beside(first)).input.size

    def measure(rows: list[engine_times.Times]) -> list[Peer]:
        found = peers.measure(network, rows, size=size, **shared)
        print(f"\n{peers.table(rows, found)}")
        print(f"peers: {words}, {size[0]}×{size[1]}; in brackets how many times the fastest engine's time")
        return found

    return measure


def masks(options: argparse.Namespace) -> int:
    from tracker.deploy import mask_contest
    from tracker.deploy.scenes.tangles import TangleConfig

    config = TangleConfig(frames=options.frames, objects=options.objects)
    scores = []
    for seed in range(options.seeds):
        print(f"scene {seed}", file=sys.stderr)
        scores += mask_contest.contest(seed, config, device=options.device)
    print(mask_contest.table(scores))
    print(f"\n{options.objects} objects, {options.frames} frames; masks on {options.device}; {where()}")
    if options.json:
        write_json(options.json, [asdict(score) for score in scores])
    return 0


def where() -> str:
    import torch

    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{benchmark.environment()['cpu']}, {os.cpu_count()} cores"


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        subjects = {"association": association, "pipeline": pipeline, "engine": engine, "masks": masks}
        return subjects[options.subject](options)
    except TrackerError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
