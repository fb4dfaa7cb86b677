#!/usr/bin/env python3
"""Track detections from a file, without a video: MOT text or .npy in, MOT text out.

replay.py det.txt --out R.txt                                    byte, at 30 frames per second
replay.py det_emb.npy --out R.txt --seqinfo seqinfo.ini          jde: there are embeddings
replay.py det.txt --out R.txt --frames 302: --compat bytetrack   a validation half, by the published tracker

DETECTIONS has rows frame,id,x,y,w,h,conf. In a .npy whatever follows is the embedding; --embedding-dim D
takes the last D columns, of a text file too.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from tracker.errors import TrackerError
from tracker.motchallenge import read_seqinfo
from tracker.replay import replay


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("detections", type=Path, metavar="DETECTIONS", help="MOT text or .npy")
    parser.add_argument("--out", type=Path, required=True, metavar="R.txt", help="where the tracks go")
    parser.add_argument(
        "--tracker",
        choices=("jde", "byte"),
        help="default: jde if there are embeddings, else byte",
    )
    parser.add_argument(
        "--compat",
        choices=("fairmot", "bytetrack"),
        help="do exactly as that published tracker does (fairmot is a jde, bytetrack a byte)",
    )
    parser.add_argument(
        "--seqinfo", type=Path, metavar="seqinfo.ini", help="the sequence's frame rate and length"
    )
    parser.add_argument(
        "--frame-rate", type=positive, metavar="F", help="instead of seqinfo's (default without both: 30)"
    )
    parser.add_argument("--embedding-dim", type=int, metavar="D", help="the last D columns; 0 for none")
    parser.add_argument(
        "--frames",
        type=span,
        default=(1, None),
        metavar="FIRST:LAST",
        help="only these frames of DETECTIONS, numbered from 1 in the result; either end may be left out",
    )
    return parser


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a rate greater than 0")
    return value


def span(text: str) -> tuple[int, int | None]:
    match = re.fullmatch(r"(\d*):(\d*)", text)
    first, last = (int(match[1] or 1), int(match[2]) if match[2] else None) if match else (0, None)
    if first < 1 or (last is not None and last < first):
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST:LAST with 1 ≤ FIRST ≤ LAST, such as 302:600")
    return first, last


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    first, last = options.frames
    try:
        done = replay(
            options.detections,
            options.out,
            tracker=options.tracker,
            compat=options.compat,
            seqinfo=read_seqinfo(options.seqinfo) if options.seqinfo else None,
            frame_rate=options.frame_rate,
            embedding_dim=options.embedding_dim,
            first_frame=first,
            last_frame=last,
        )
    except TrackerError as error:
        print(f"replay: {error}", file=sys.stderr)
        return 1
    assumed = "" if options.frame_rate or options.seqinfo else ", assumed for want of --seqinfo"
    rate = f"{done.frame_rate:g} frames per second{assumed}"
    print(
        f"{options.out}: {done.frames} frames, {done.tracks} tracks, {done.rows} rows, "
        f"{done.ms_per_frame:.3f} ms per frame ({done.tracker} at {rate})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
