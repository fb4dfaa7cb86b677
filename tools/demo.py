"""`make demo`: tracks the shipped clip with the shipped engine, as `track` would, and says how well.

Both come from synthetic streets, so the ground truth is exact; the clip's street was never trained on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tracker.cli import main as track
from tracker.errors import TrackerError
from tracker.evaluation import evaluate, find_pairs

ROOT = Path(__file__).resolve().parent.parent
CLIP, ENGINE = ROOT / "videos" / "demo.mp4", ROOT / "engines" / "fairmot_demo.onnx"
OUT = Path("runs/demo")


def main() -> int:
    command = [str(CLIP), "--engine", str(ENGINE), "--save", "mot,jsonl,video", "--out", str(OUT)]
    print(f"track {' '.join(command)}", flush=True)
    if code := track(command):
        return code
    people = OUT / "people.txt"
    people.write_text("".join(_people(OUT / "demo.jsonl")))
    print("\nPeople against the ground truth:")
    print(evaluate(find_pairs(ROOT / "videos" / "demo_gt.txt", people), benchmark="MOT17").table())
    print(f"\nLook at {OUT}/demo.mp4; the tracks are in {OUT}/demo.txt and demo.jsonl.")
    print("The demo's network has only ever seen synthetic streets. For real footage, bring real weights:")
    print("  .venv/bin/track VIDEO --engine MODEL.onnx        (see README.md)")
    return 0


def _people(lines: Path) -> list[str]:
    """MOT rows of the people alone: the ground truth asks for nobody else."""
    rows = []
    for line in lines.read_text().splitlines():
        frame = json.loads(line)
        for one in frame["tracks"]:
            if one["label"] == "person":
                x1, y1, x2, y2 = one["xyxy"]
                box = f"{x1},{y1},{x2 - x1:.2f},{y2 - y1:.2f}"
                rows.append(f"{frame['frame']},{one['id']},{box},{one['score']},-1,-1,-1\n")
    return rows


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TrackerError as error:
        sys.exit(f"demo: {error}")
