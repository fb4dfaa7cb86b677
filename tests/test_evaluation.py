"""Official results score what they officially score; perfect tracks 100, no tracks 0; bad files are named."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from tracker.errors import ConfigError, DetectionsError, SourceError, TrackerError
from tracker.evaluation import Pair, evaluate, find_pairs

SEQINFO = "[Sequence]\nname={name}\nframeRate=10\nseqLength={length}\nimWidth=640\nimHeight=480\n"


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], int]:
    return runpy.run_path(str(ROOT / "tools" / "evaluate.py"))["main"]


def write(path: Path, rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, np.asarray(rows, float), fmt="%.17g", delimiter=",")
    return path


def walk(frames: int, *columns: float, ids: tuple[int, ...] = (1, 2)) -> list[list[float]]:
    """Two objects walking to the right, in rows frame,id,x,y,w,h followed by the columns given."""
    return [
        [t, i, 10 * t, 100 * k, 20, 50, *columns] for t in range(1, frames + 1) for k, i in enumerate(ids)
    ]


# What TrackEval officially says


@pytest.mark.parametrize(
    ("truth", "results", "rule", "scores"),
    [
        (
            "pets09/gt.txt",
            "pets09/PETS09-S2L1_fairmot_official.txt",
            "MOT15",
            "HOTA 49.394 DetA 52.983 AssA 46.144 MOTA 60.210 IDF1 62.255 IDSW 47 FP 1242 FN 492",
        ),
        (
            "mot17/reid/gt/gt/gt.txt",
            "mot17/reid/MOT17-05-FRCNN_fairmot_official.txt",
            "MOT17",
            "HOTA 45.241 DetA 40.002 AssA 51.243 MOTA 47.824 IDF1 57.676 IDSW 39 FP 66 FN 3504",
        ),
    ],
)
def test_official_results_of_one_sequence(
    data: Path, truth: str, results: str, rule: str, scores: str
) -> None:
    report = evaluate(find_pairs(data / truth, data / results))
    assert [each.rule for each in report.sequences] == [rule]
    assert printed(report.combined, scores) == scores
    assert report.combined == report.sequences[0].scores


def test_official_results_of_a_folder(
    data: Path, tmp_path: Path, main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    gt, results, out = data / "mot17" / "gt", data / "mot17" / "bytetrack_official", tmp_path / "scores.json"
    assert main(["--gt", str(gt), "--results", str(results), "--json", str(out)]) == 0
    scores = json.loads(out.read_text())
    official = {
        "MOT17-02": "HOTA 48.156 MOTA 55.729 IDF1 59.624 IDSW 53",
        "MOT17-04": "HOTA 79.458 MOTA 89.470 IDF1 91.583 IDSW 23",
        "MOT17-10": "HOTA 53.958 MOTA 71.163 IDF1 68.690 IDSW 26",
    }
    assert {name: printed(scores["sequences"][name], line) for name, line in official.items()} == official
    assert scores["combined"]["IDSW"] == 53 + 23 + 26

    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split()[:3] == ["HOTA", "DetA", "AssA"]
    assert [line.split()[0] for line in shown[1:5]] == [*official, "COMBINED"]
    assert shown[1].split()[1] == "48.156"
    assert shown[5].startswith("rule MOT17 (MOT17-02, MOT17-04, MOT17-10): pedestrians count")


def printed(scores: dict[str, float], like: str) -> str:
    """The scores named in a line of official ones, to the digits printed there."""
    names, values = like.split()[::2], like.split()[1::2]
    digits = [len(value.partition(".")[2]) for value in values]
    return " ".join(f"{name} {scores[name]:.{places}f}" for name, places in zip(names, digits, strict=True))


# Known answers


@pytest.mark.parametrize("ids", [(1, 2), (0, 7), (-5, 10**12)], ids=["plain", "zero", "negative and huge"])
def test_perfect_tracks_score_100(tmp_path: Path, ids: tuple[int, int]) -> None:
    truth = write(tmp_path / "gt.txt", walk(9, 1, 1, 1))
    results = write(tmp_path / "r.txt", walk(9, 1, -1, -1, -1, ids=ids))
    scores = evaluate(find_pairs(truth, results)).combined
    assert {name: round(value, 9) for name, value in scores.items()} == {
        **dict.fromkeys(("HOTA", "DetA", "AssA", "LocA", "MOTA", "MOTP", "IDF1", "IDP", "IDR"), 100.0),
        **dict.fromkeys(("IDSW", "FP", "FN", "Frag"), 0),
    }


def test_no_tracks_score_0_alone_and_beside_others(tmp_path: Path) -> None:
    truth = write(tmp_path / "gt.txt", walk(9, 1, 1, 1))
    empty, full = write(tmp_path / "none.txt", np.empty((0, 7))), write(tmp_path / "all.txt", walk(9, 1))
    nothing = Pair(name="nothing", truth=truth, results=empty)
    scores = evaluate([nothing]).combined
    assert {name: scores[name] for name in ("HOTA", "MOTA", "IDF1", "FP", "FN")} == {
        "HOTA": 0,
        "MOTA": 0,
        "IDF1": 0,
        "FP": 0,
        "FN": 18,
    }
    both = evaluate([nothing, Pair(name="all", truth=truth, results=full)])
    assert both.combined["MOTA"] == both.combined["IDR"] == 50
    assert both.sequences[1].scores["HOTA"] == 100


def test_truth_without_objects_counts_every_track_as_false(tmp_path: Path) -> None:
    truth, results = write(tmp_path / "gt.txt", np.empty((0, 9))), write(tmp_path / "r.txt", walk(9, 1))
    scores = evaluate(find_pairs(truth, results)).combined
    assert (scores["FP"], scores["FN"], scores["HOTA"]) == (18, 0, 0)


def test_a_switch_halfway_is_one_switch_each(tmp_path: Path) -> None:
    truth = write(tmp_path / "gt.txt", walk(10, 1, 1, 1))
    rows = np.array(walk(10, 1))
    rows[rows[:, 0] > 5, 1] = 3 - rows[rows[:, 0] > 5, 1]
    scores = evaluate(find_pairs(truth, write(tmp_path / "r.txt", rows))).combined
    assert (scores["IDSW"], scores["MOTA"], scores["IDF1"]) == (2, 90.0, 50.0)
    assert scores["AssA"] == pytest.approx(100 / 3)  # TPA 5, FNA 5, FPA 5


def test_scale_brings_results_into_the_truths_pixels(tmp_path: Path) -> None:
    truth = write(tmp_path / "gt.txt", walk(9, 1, 1, 1))
    rows = np.array(walk(9, 1), float)
    rows[:, 2:6] *= 0.625
    pairs = find_pairs(truth, write(tmp_path / "r.txt", rows))
    assert evaluate(pairs, scale=1.6).combined["HOTA"] == pytest.approx(100)
    assert evaluate(pairs).combined["HOTA"] < 100


# Whose rules


@pytest.mark.parametrize(
    ("name", "columns", "rule"),
    [
        ("a", (1, 1, 1), "MOT17"),  # flag, class, visibility
        ("a", (1, 1), "MOT17"),
        ("a", (1,), "none"),
        ("a", (1, -1, -1, -1), "MOT15"),  # flag, world coordinates
        ("a", (1, 1, 1, 1), "MOT15"),
        ("a", (1, 0, 1), "none"),
        ("a", (1, 14, 1), "none"),
        ("MOT15-Venice", (1, 1, 1), "MOT15"),
        ("MOT16-02", (1, 1, 1), "MOT16"),
        ("MOT20-01", (1, 1, 1), "MOT20"),
    ],
)
def test_the_rule_is_read_off_name_and_columns(
    tmp_path: Path, name: str, columns: tuple[float, ...], rule: str
) -> None:
    truth, results = write(tmp_path / "gt.txt", walk(3, *columns)), write(tmp_path / "r.txt", walk(3, 1))
    report = evaluate([Pair(name=name, truth=truth, results=results)])
    assert report.sequences[0].rule == rule
    assert report.combined["HOTA"] == 100
    assert f"rule {rule} ({name}): " in report.table()


@pytest.mark.parametrize(
    ("benchmark", "flag", "label", "counts"),
    [
        # (FP, FN) when both objects are tracked, the first perfectly and the second as truth says
        ("MOT17", 1, 1, (0, 0)),  # a pedestrian
        ("MOT17", 0, 1, (9, 0)),  # a pedestrian not to be counted
        ("MOT17", 1, 3, (9, 0)),  # a car
        ("MOT17", 0, 7, (0, 0)),  # a static person: forgiven
        ("MOT16", 0, 8, (0, 0)),  # a distractor: forgiven
        ("MOT17", 0, 6, (9, 0)),  # a vehicle without motor: forgiven only by MOT20
        ("MOT20", 0, 6, (0, 0)),
        ("MOT15", 0, 7, (9, 0)),  # no classes, so nothing is forgiven
        ("none", 1, 3, (0, 0)),  # a car counts like anything else
        ("none", 0, 3, (9, 0)),
    ],
)
def test_each_rule_forgives_its_own(
    tmp_path: Path, benchmark: str, flag: int, label: int, counts: tuple[int, int]
) -> None:
    rows = np.array(walk(9, 1, 1, 1))
    rows[rows[:, 1] == 2, 6:8] = flag, label
    pairs = find_pairs(write(tmp_path / "gt.txt", rows), write(tmp_path / "r.txt", walk(9, 1)))
    scores = evaluate(pairs, benchmark=benchmark).combined
    assert (scores["FP"], scores["FN"]) == counts


# Finding the files


def test_sequences_take_their_length_from_seqinfo(tmp_path: Path) -> None:
    for name, info in (("A", "A/seqinfo.ini"), ("B", "B/gt/seqinfo.ini"), ("C", None)):
        write(tmp_path / "gt" / name / "gt" / "gt.txt", walk(9, 1, 1, 1))
        write(tmp_path / "out" / f"{name}.txt", walk(9, 1))
        if info:
            (tmp_path / "gt" / info).write_text(SEQINFO.format(name="long", length=12))
    report = evaluate(find_pairs(tmp_path / "gt", tmp_path / "out"))
    assert [(each.name, each.frames) for each in report.sequences] == [("A", 12), ("B", 12), ("C", 9)]


def test_folders_must_hold_the_same_sequences(tmp_path: Path) -> None:
    gt, out = tmp_path / "gt", tmp_path / "out"
    gt.mkdir()
    out.mkdir()
    with pytest.raises(SourceError, match="no ground truth"):
        find_pairs(gt, out)
    for name in "ABC":
        write(gt / name / "gt" / "gt.txt", walk(2, 1, 1, 1))
    write(out / "B.txt", walk(2, 1))
    with pytest.raises(SourceError, match=r"no A\.txt, C\.txt"):
        find_pairs(gt, out)
    for name in "ACXY":
        write(out / f"{name}.txt", walk(2, 1))
    with pytest.raises(SourceError, match=r"has X\.txt, Y\.txt, but"):
        find_pairs(gt, out)
    with pytest.raises(SourceError, match="a folder and a file"):
        find_pairs(gt, out / "A.txt")
    with pytest.raises(SourceError, match="does not exist"):
        find_pairs(gt, tmp_path / "nowhere")


# Bad input


@pytest.mark.parametrize(
    ("truth", "results", "benchmark", "error", "says"),
    [
        (
            walk(3, 1, 1, 1),
            [[2, 7, 0, 0, 1, 1, 1]] * 2,
            "auto",
            DetectionsError,
            "r.txt, frame 2: id 7 appears",
        ),
        (walk(3, 1, 1, 1), walk(3, 1, ids=(-1, -1)), "auto", DetectionsError, "are these detections"),
        (walk(3, 1, 1, 1, ids=(4, 4)), walk(3, 1), "auto", DetectionsError, "gt.txt, frame 1: id 4 appears"),
        (
            walk(3, 1, 1, 1),
            [[1, 1.5, 0, 0, 1, 1, 1]],
            "auto",
            DetectionsError,
            "id 1.5 is not a whole number",
        ),
        (
            walk(3, 1, 1, 1),
            walk(6, 1),
            "auto",
            DetectionsError,
            "r.txt has frame 6, but seqinfo.ini says seqLength=5",
        ),
        (walk(6, 1, 1, 1), walk(3, 1), "auto", DetectionsError, "gt.txt has frame 6"),
        (walk(3, 1), walk(3, 1), "MOT17", ConfigError, "no class column, which MOT17 needs"),
        (walk(3, 1, 99, 1), walk(3, 1), "MOT20", DetectionsError, "class 99 is none of MOT20's 1 to 13"),
        (walk(3, 1), walk(3, 1), "MOT99", ConfigError, "unknown benchmark 'MOT99'"),
        (walk(3), walk(3, 1), "auto", DetectionsError, "6 columns"),
    ],
)
def test_what_cannot_be_scored_is_named(
    tmp_path: Path, truth: object, results: object, benchmark: str, error: type[TrackerError], says: str
) -> None:
    (tmp_path / "seqinfo.ini").write_text(SEQINFO.format(name="A", length=5))
    pairs = find_pairs(write(tmp_path / "gt.txt", truth), write(tmp_path / "r.txt", results))
    with pytest.raises(error, match=re.escape(says)):
        evaluate(pairs, benchmark=benchmark)


def test_nothing_to_evaluate(tmp_path: Path) -> None:
    empty = write(tmp_path / "gt.txt", np.empty((0, 7)))
    pair = Pair(name="a", truth=empty, results=empty)
    with pytest.raises(DetectionsError, match="both empty"):
        evaluate([pair])
    with pytest.raises(ConfigError, match="names of their own"):
        evaluate([pair, pair])
    with pytest.raises(ConfigError, match="names of their own"):
        evaluate([])


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_scales(tmp_path: Path, scale: float) -> None:
    pair = Pair(name="a", truth=tmp_path, results=tmp_path)
    with pytest.raises(ConfigError, match="scale"):
        evaluate([pair], scale=scale)


def test_without_trackeval_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, results = write(tmp_path / "gt.txt", walk(3, 1, 1, 1)), write(tmp_path / "r.txt", walk(3, 1))
    monkeypatch.setitem(sys.modules, "trackeval", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'tracker[eval]'")):
        evaluate(find_pairs(truth, results))


# The command


def test_exit_codes(
    tmp_path: Path, main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    truth, results = write(tmp_path / "gt.txt", walk(3, 1, 1, 1)), write(tmp_path / "r.txt", walk(3, 1))
    files = ["--gt", str(truth), "--results", str(results)]
    assert main([*files, "--scale", "1"]) == 0
    assert capsys.readouterr().err == ""
    assert main([*files, "--scale", "0"]) == 1
    assert main([*files, "--json", str(tmp_path / "no" / "out.json")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("evaluate: scale 0.0 is impossible")
    assert "choose another place" in lines[1]
    for usage in ([], ["--gt", "x"], [*files, "--benchmark", "MOT99"]):
        with pytest.raises(SystemExit) as caught:
            main(usage)
        assert caught.value.code == 2
