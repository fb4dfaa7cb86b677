"""Masks score what the official tools say; perfect ones 100, none 0; files that are no MOTS are named."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from tracker import rle
from tracker.errors import ConfigError, DetectionsError, SourceError
from tracker.evaluation import evaluate, find_pairs
from tracker.mots import CAR, IGNORED, PEDESTRIAN, read_masks

SIZE = (160, 90)
Row = tuple[int, int, int, int, int, int, int]  # frame, id, class, x, y, width, height of an ellipse


def ellipse(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    inside: np.ndarray = (2 * x + 1 - width) ** 2 * height**2 + (2 * y + 1 - height) ** 2 * width**2
    return inside < (width * height) ** 2


def write(path: Path, rows: Iterable[Row], size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for frame, identity, label, x, y, width, height in rows:
        counts = rle.encode(ellipse(width, height), (x, y), size).decode()
        lines.append(f"{frame} {identity} {label} {size[1]} {size[0]} {counts}\n")
    path.write_text("".join(lines))
    return path


def walk(frames: int = 9, *, label: int = PEDESTRIAN, shift: int = 0) -> list[Row]:
    """Two walk to the right, one above the other."""
    return [
        (t, 1000 * label + k, label, 10 * t + shift, 45 * k, 20, 40)
        for t in range(1, frames + 1)
        for k in (0, 1)
    ]


def busy_street() -> tuple[list[Row], list[Row]]:
    """Truth and results: masks a little off, two who swap names, one lost for a while, a phantom, a track
    in a region to be ignored, and a car that only the truth's other class knows.
    """
    truth, results = walk(12), []
    truth += [(t, 10000, IGNORED, 2, 2, 30, 20) for t in range(8, 13)]
    truth += [(t, 1001, CAR, 140, 60, 18, 20) for t in range(1, 13)]
    for t, identity, _, x, y, width, height in walk(12):
        k = identity % 2
        name = 7 + (k if t < 6 else 1 - k)
        if not (k == 1 and t in (9, 10)):
            results.append((t, name, PEDESTRIAN, x + (t * 5 + k) % 4, y + t % 3, width - 2 * k, height - 3))
    results += [(t, 20, PEDESTRIAN, 5, 4, 20, 14) for t in range(8, 12)]  # in the region
    results += [(t, 21, PEDESTRIAN, 118, 2, 12, 12) for t in range(2, 5)]  # of nothing
    results += [(t, 22, CAR, 140, 60, 18, 20) for t in range(1, 13)]
    return truth, results


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], int]:
    return runpy.run_path(str(ROOT / "tools" / "evaluate.py"))["main"]


# What the official tools say


def test_masks_score_what_mots_tools_say(tmp_path: Path) -> None:
    """Of these two files mots_tools' `mots_eval/eval.py` says the numbers below."""
    truth, results = busy_street()
    pairs = find_pairs(write(tmp_path / "gt.txt", truth), write(tmp_path / "r.txt", results), format="mots")
    report = evaluate(pairs, format="mots")
    official = {"sMOTSA": 53.0710653, "MOTSA": 70.8333333, "MOTSP": 80.6229803, "IDSW": 2, "FP": 3, "FN": 2}
    assert {name: round(report.combined[name], 7) for name in official} == official
    assert report.sequences[0].rule == "MOTS"


# Known answers


def test_perfect_masks_score_100_and_none_0(tmp_path: Path) -> None:
    truth, empty = write(tmp_path / "gt.txt", walk()), write(tmp_path / "none.txt", [])
    shares = ("HOTA", "DetA", "AssA", "LocA", "sMOTSA", "MOTSA", "MOTSP", "IDF1", "IDP", "IDR")
    scores = evaluate(find_pairs(truth, truth, format="mots"), format="mots").combined
    assert {name: round(value, 9) for name, value in scores.items()} == {
        **dict.fromkeys(shares, 100.0),
        **dict.fromkeys(("IDSW", "FP", "FN", "Frag"), 0),
    }
    scores = evaluate(find_pairs(truth, empty, format="mots"), format="mots").combined
    assert (scores["sMOTSA"], scores["HOTA"], scores["FN"]) == (0, 0, 18)


def test_masks_that_fit_worse_cost_smotsa_but_not_motsa(tmp_path: Path) -> None:
    pairs = find_pairs(
        write(tmp_path / "gt.txt", walk()), write(tmp_path / "r.txt", walk(shift=3)), format="mots"
    )
    scores = evaluate(pairs, format="mots").combined
    assert (scores["MOTSA"], scores["IDF1"]) == (100, 100)
    assert scores["sMOTSA"] == pytest.approx(scores["MOTSP"])
    assert 50 < scores["sMOTSA"] < 90


def test_without_pedestrians_every_class_counts(tmp_path: Path) -> None:
    truth, results = write(tmp_path / "gt.txt", walk(label=CAR)), write(tmp_path / "r.txt", walk(label=117))
    report = evaluate(find_pairs(truth, results, format="mots"), format="mots")
    assert report.sequences[0].rule == "none"
    assert report.combined["sMOTSA"] == 100


def test_without_a_rule_a_region_to_be_ignored_is_an_object(tmp_path: Path) -> None:
    region = (1, 10000, IGNORED, 100, 40, 20, 20)
    pairs = find_pairs(
        write(tmp_path / "gt.txt", [*walk(), region]), write(tmp_path / "r.txt", walk()), format="mots"
    )
    assert evaluate(pairs, format="mots").combined["FN"] == 0
    assert evaluate(pairs, format="mots", benchmark="none").combined["FN"] == 1


# Finding and telling


def test_a_folder_of_results_may_hold_boxes_masks_and_corners(
    tmp_path: Path, main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "AB":
        write(tmp_path / "gt" / name / "gt" / "gt.txt", walk())
        write(tmp_path / "out" / f"{name}.mots.txt", walk())
        (tmp_path / "out" / f"{name}.txt").write_text("1,1,0,0,5,5,1,-1,-1,-1\n")
        (tmp_path / "out" / f"{name}.dota.txt").write_text("")
    assert list(find_pairs(tmp_path / "gt", tmp_path / "out")[0].results.parts)[-1] == "A.txt"
    files = ["--gt", str(tmp_path / "gt"), "--results", str(tmp_path / "out"), "--format", "mots"]
    assert main([*files, "--json", str(tmp_path / "scores.json")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split()[4:7] == ["sMOTSA", "MOTSA", "MOTSP"]
    assert [line.split()[0] for line in shown[1:4]] == ["A", "B", "COMBINED"]
    assert shown[4] == (
        "rule MOTS (A, B): pedestrians count; tracks more than half in regions to be ignored are forgiven"
    )
    assert json.loads((tmp_path / "scores.json").read_text())["combined"]["sMOTSA"] == 100


def test_official_results_are_called_as_their_sequence(tmp_path: Path) -> None:
    write(tmp_path / "gt" / "MOTS20-02" / "gt" / "gt.txt", walk())
    write(tmp_path / "out" / "MOTS20-02.txt", walk())
    [pair] = find_pairs(tmp_path / "gt", tmp_path / "out", format="mots")
    assert (pair.name, pair.results.name) == ("MOTS20-02", "MOTS20-02.txt")
    [pair] = find_pairs(pair.truth, write(tmp_path / "out" / "clip.mots.txt", walk()), format="mots")
    assert pair.name == "clip"


# Bad input

GOOD = "1 2001 2 3 4 01;"  # a picture of 4×3, its first pixel


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1,2001,2,3,4,01;", "line 1: 1 fields; a MOTS row has six: frame id class height width rle"),
        (f"{GOOD}\n\n0 1 2 3 4 <", "line 3: frame is '0'; it must be a whole number from 1"),
        ("1 -1 2 3 4 <", "line 1: id is '-1'"),
        ("1 1.5 2 3 4 <", "line 1: id is '1.5'"),
        ("1 1 2 70000 4 <", "line 1: height is '70000'; it must be a whole number from 1 to 65536"),
        ("1 1 2 3 4 7", "line 1: rle covers 7 pixels, the picture has 4×3 = 12"),
        ("1 1 2 3 4 |", "line 1: counts have characters"),
        (f"{GOOD}\n2 2001 2 4 3 <", "line 2: a picture of 3×4, but 4×3 in the lines before"),
        ("1 1 2 3 4 é", "not text in ASCII"),
    ],
)
def test_a_line_that_is_no_mots_row_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "r.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DetectionsError, match=re.escape(says)):
        read_masks(path)


@pytest.mark.parametrize(
    ("results", "says"),
    [
        (
            [(3, 5, 2, 0, 0, 20, 20), (3, 6, 2, 10, 0, 20, 20)],
            "r.txt, frame 3: the masks of 5 and 6 share 124",
        ),
        ([(3, 5, 2, 0, 0, 20, 20), (3, 5, 2, 90, 0, 20, 20)], "r.txt, frame 3: id 5 appears more than once"),
        ([(10, 5, 2, 0, 0, 20, 20)], "r.txt has frame 10, but seqinfo.ini says seqLength=9"),
    ],
)
def test_masks_that_cannot_be_scored_are_named(tmp_path: Path, results: list[Row], says: str) -> None:
    (tmp_path / "seqinfo.ini").write_text(
        "[Sequence]\nname=A\nframeRate=10\nseqLength=9\nimWidth=160\nimHeight=90\n"
    )
    pairs = find_pairs(write(tmp_path / "gt.txt", walk()), write(tmp_path / "r.txt", results), format="mots")
    with pytest.raises(DetectionsError, match=re.escape(says)):
        evaluate(pairs, format="mots")


def test_masks_of_another_size_or_scale_or_benchmark_are_refused(tmp_path: Path) -> None:
    truth = write(tmp_path / "gt.txt", walk())
    small = write(tmp_path / "r.txt", [(1, 1, 2, 0, 0, 9, 9)], size=(80, 45))
    pairs = find_pairs(truth, small, format="mots")
    with pytest.raises(DetectionsError, match=r"r\.txt has pictures of 80×45, .*gt\.txt of 160×90"):
        evaluate(pairs, format="mots")
    with pytest.raises(ConfigError, match=r"scale is 2\.0, but masks cannot be scaled"):
        evaluate(pairs, format="mots", scale=2.0)
    with pytest.raises(ConfigError, match="benchmark MOT17 is for boxes"):
        evaluate(pairs, format="mots", benchmark="MOT17")
    with pytest.raises(ConfigError, match="unknown format 'coco'"):
        evaluate(pairs, format="coco")
    with pytest.raises(SourceError, match="cannot read"):
        read_masks(tmp_path / "nowhere.txt")
