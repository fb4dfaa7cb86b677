"""Detections in a file become tracks in a file: the published trackers' answers, and clear refusals."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

SEQINFO = "[Sequence]\nname=A\nframeRate=10\nseqLength={}\nimWidth=64\nimHeight=48\n"


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], int]:
    return runpy.run_path(str(ROOT / "tools" / "replay.py"))["main"]


def walk(path: Path, *, frames: range, embeds: bool = False) -> Path:
    """Two people walking to the right, one row of detections each per frame."""
    rows = [
        [t, -1, 100 + 5 * t, 200 * k, 40, 100, 0.9, *([k, 1 - k] if embeds else [])]
        for t in frames
        for k in (0, 1)
    ]
    if path.suffix == ".npy":
        np.save(path, np.array(rows, np.float32))
    else:
        np.savetxt(path, rows, fmt="%g", delimiter=",")
    return path


def boxes(path: Path) -> dict[tuple[int, int], np.ndarray]:
    return {(int(row[0]), int(row[1])): row[2:6] for row in np.loadtxt(path, delimiter=",")}


# The published trackers' own answers to the same detections. ByteTrack's are stored with two decimals.


@pytest.mark.parametrize(
    ("detections", "seqinfo", "golden", "options", "tolerance"),
    [
        (
            "pets09/det_emb.npy",
            "pets09/seqinfo.ini",
            "pets09/PETS09-S2L1_fairmot_official.txt",
            ["--compat", "fairmot"],
            1e-3,
        ),
        (
            "mot17/reid/MOT17-05-FRCNN.npy",
            "mot17/reid/gt/seqinfo.ini",
            "mot17/reid/MOT17-05-FRCNN_fairmot_official.txt",
            ["--compat", "fairmot", "--embedding-dim", "128"],
            1e-3,
        ),
        *(
            (
                f"mot17/det/MOT17-{sequence}.txt",
                f"mot17/gt/MOT17-{sequence}/seqinfo.ini",
                f"mot17/bytetrack_official/MOT17-{sequence}.txt",
                ["--compat", "bytetrack", "--frames", f"{first}:"],
                0.005 + 1e-3,
            )
            for sequence, first in (("02", 302), ("04", 527), ("10", 329))
        ),
    ],
)
def test_compat_answers_what_the_published_tracker_answers(
    main: Callable[[list[str]], int],
    data: Path,
    tmp_path: Path,
    detections: str,
    seqinfo: str,
    golden: str,
    options: list[str],
    tolerance: float,
) -> None:
    out = tmp_path / "R.txt"
    assert main([str(data / detections), "--out", str(out), "--seqinfo", str(data / seqinfo), *options]) == 0
    ours, theirs = boxes(out), boxes(data / golden)
    assert ours.keys() == theirs.keys()
    assert max(np.abs(ours[key] - theirs[key]).max() for key in theirs) <= tolerance


# What is chosen when nothing is said


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("det.npy", [], "(jde at 30 frames per second, assumed for want of --seqinfo)"),
        ("det.npy", ["--embedding-dim", "0"], "(byte at 30"),
        ("det.npy", ["--tracker", "byte"], "(byte at 30"),
        ("det.npy", ["--compat", "bytetrack"], "(byte at 30"),
        ("det.txt", [], "(byte at 30"),
        ("det.txt", ["--embedding-dim", "2"], "(jde at 30"),
        ("det.txt", ["--seqinfo", "seqinfo.ini"], "(byte at 10 frames per second)"),
        ("det.txt", ["--seqinfo", "seqinfo.ini", "--frame-rate", "12.5"], "(byte at 12.5 frames per second)"),
    ],
)
def test_tracker_and_rate(
    main: Callable[[list[str]], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    options: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("seqinfo.ini").write_text(SEQINFO.format(6))
    walk(Path(name), frames=range(1, 7), embeds=True)
    assert main([name, "--out", "R.txt", *options]) == 0
    told = capsys.readouterr().out
    assert says in told
    assert told.startswith("R.txt: 6 frames, 2 tracks, 12 rows, ")


def test_fairmot_writes_confidence_1_and_others_the_score(
    main: Callable[[list[str]], int], tmp_path: Path
) -> None:
    detections, out = walk(tmp_path / "det.npy", frames=range(1, 4), embeds=True), tmp_path / "R.txt"
    for options, confidence in (["--compat", "fairmot"], 1.0), ([], 0.9):
        assert main([str(detections), "--out", str(out), *options]) == 0
        np.testing.assert_array_equal(np.loadtxt(out, delimiter=",")[:, 6], confidence)


# Frames


@pytest.mark.parametrize(
    ("frames", "expected"),
    [("1:", range(1, 9)), ("5:", range(1, 5)), (":3", range(1, 4)), ("4:6", range(1, 4)), ("8:20", [1])],
)
def test_chosen_frames_count_from_1(
    main: Callable[[list[str]], int], tmp_path: Path, frames: str, expected: range | list[int]
) -> None:
    detections, out = walk(tmp_path / "det.txt", frames=range(1, 9)), tmp_path / "R.txt"
    assert main([str(detections), "--out", str(out), "--frames", frames]) == 0
    assert boxes(out).keys() == {(t, i) for t in expected for i in (1, 2)}


@pytest.mark.parametrize(
    ("length", "frames", "told"),
    [
        ("12", "1:", "12 frames"),
        ("8", "1:", "8 frames"),
        ("4", "5:", "4 frames"),
        ("8", "5:", "4 frames"),
        ("8", "5:6", "2 frames"),
    ],
    ids=["trailing frames are empty", "whole", "half of its own seqinfo", "half of the whole's", "a piece"],
)
def test_length_of_the_sequence(
    main: Callable[[list[str]], int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    length: str,
    frames: str,
    told: str,
) -> None:
    detections, seqinfo = walk(tmp_path / "det.txt", frames=range(1, 9)), tmp_path / "seqinfo.ini"
    seqinfo.write_text(SEQINFO.format(length))
    options = ["--out", str(tmp_path / "R.txt"), "--seqinfo", str(seqinfo), "--frames", frames]
    assert main([str(detections), *options]) == 0
    assert f": {told}, 2 tracks" in capsys.readouterr().out


def test_no_detections_are_no_tracks(main: Callable[[list[str]], int], tmp_path: Path) -> None:
    (tmp_path / "det.txt").write_text("")
    assert main([str(tmp_path / "det.txt"), "--out", str(tmp_path / "new" / "R.txt")]) == 0
    assert (tmp_path / "new" / "R.txt").read_text() == ""


# Refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tracker", "jde"], "jde needs embeddings"),
        (["--compat", "fairmot"], "jde needs embeddings"),
        (["--tracker", "byte", "--compat", "fairmot"], "no tracker 'byte' with compat 'fairmot'"),
        (["--seqinfo", "half.ini"], "has detections up to frame 8 but A has 3 frames"),
        (["--seqinfo", "half.ini"], "--frames 6:"),
        (["--seqinfo", "absent.ini"], "cannot read absent.ini"),
        (["--frames", "9:"], "ends before frame 9"),
        (["--embedding-dim", "3"], "embedding dimension 3 is impossible"),
        (["--out", "det.txt"], "det.txt holds the detections"),
        (["--out", "."], "cannot write"),
    ],
)
def test_refusals_are_one_line_and_leave_the_last_result(
    main: Callable[[list[str]], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = walk(Path("det.txt"), frames=range(1, 9)).read_bytes()
    Path("half.ini").write_text(SEQINFO.format(3))
    Path("R.txt").write_text("an earlier result\n")
    assert main(["det.txt", "--out", "R.txt", *options]) == 1
    told = capsys.readouterr().err
    assert says in told
    assert told.startswith("replay: ") and told.count("\n") == 1
    assert Path("R.txt").read_text() == "an earlier result\n"
    assert Path("det.txt").read_bytes() == before


@pytest.mark.parametrize(
    "options",
    [
        ["--frames", "5"],
        ["--frames", "0:"],
        ["--frames", "6:5"],
        ["--frame-rate", "0"],
        ["--frame-rate", "nan"],
        ["--tracker", "sort"],
    ],
)
def test_usage_is_exit_code_2(main: Callable[[list[str]], int], options: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["det.txt", "--out", "R.txt", *options])
