#!/usr/bin/env python3
"""Score tracks against ground truth: HOTA, MOTA, IDF1 and their parts, through TrackEval.

evaluate.py --gt gt.txt --results R.txt         one sequence
evaluate.py --gt DIR --results DIR              SEQ/gt/gt.txt against SEQ.txt, each and all together
evaluate.py --format mots --gt … --results …    masks: sMOTSA and MOTSA in MOTA's place
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from tracker.errors import TrackerError
from tracker.evaluation import Benchmark, Format, evaluate, find_pairs
from tracker.json_file import write_json


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--gt", type=Path, required=True, help="gt.txt, or a folder of SEQ/gt/gt.txt")
    parser.add_argument("--results", type=Path, required=True, help="MOT rows, or a folder of SEQ.txt")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the scores there as well")
    parser.add_argument(
        "--format",
        choices=get_args(Format),
        default="mot",
        help="of both: mot for boxes (default), mots for masks (SEQ.mots.txt or SEQ.txt)",
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="F", help="multiply result boxes by F (default: 1)"
    )
    parser.add_argument(
        "--benchmark",
        choices=get_args(Benchmark),
        default="auto",
        help="whose preprocessing rule (default: auto, from the sequence's name or the columns of gt.txt)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        pairs = find_pairs(options.gt, options.results, format=options.format)
        report = evaluate(pairs, benchmark=options.benchmark, scale=options.scale, format=options.format)
        print(report.table())
        if options.json:
            write_json(options.json, report.to_json())
    except TrackerError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
