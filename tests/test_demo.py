"""The engine and the clip that ship belong together, and track as well as the README says they do."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import ROOT

from tracker.cli import main
from tracker.evaluation import evaluate, find_pairs

FRAMES = 120


def test_the_shipped_engine_tracks_the_shipped_clip(tmp_path: Path) -> None:
    clip, engine = ROOT / "videos" / "demo.mp4", ROOT / "engines" / "fairmot_demo.onnx"
    options = ["--classes", "person", "--max-frames", str(FRAMES), "--out", str(tmp_path), "--quiet"]
    assert main([str(clip), "--engine", str(engine), *options]) == 0
    summary = json.loads((tmp_path / "demo.summary.json").read_text())
    assert summary["tracker"]["name"] == "jde"  # the engine gives embeddings
    truth = tmp_path / "truth.txt"
    rows = (ROOT / "videos" / "demo_gt.txt").read_text().splitlines(keepends=True)
    truth.write_text("".join(row for row in rows if int(row.split(",")[0]) <= FRAMES))
    scores = evaluate(find_pairs(truth, tmp_path / "demo.txt"), benchmark="MOT17").combined
    assert scores["MOTA"] > 80
    assert scores["IDF1"] > 80
    assert scores["HOTA"] > 65


def test_what_ships_stays_small() -> None:
    shipped = [*(ROOT / "videos").iterdir(), ROOT / "engines" / "fairmot_demo.onnx"]
    assert sum(path.stat().st_size for path in shipped) < 12e6
