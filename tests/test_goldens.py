"""On real and measured data: the published trackers row for row, and our defaults at least as good."""

from __future__ import annotations

import runpy
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scenes import PUBLISHED

from tracker.association import make_association
from tracker.evaluation import evaluate, find_pairs
from tracker.motchallenge import SeqInfo, read_detections, read_rows, read_seqinfo
from tracker.types import Association, Detections

Rows = NDArray[np.float64]
Frames = Iterable[tuple[int, Detections]]

EMBEDDED = {
    "PETS09-S2L1": ("pets09/det_emb.npy", "pets09", "pets09/PETS09-S2L1_fairmot_official.txt"),
    "MOT17-05": (
        "mot17/reid/MOT17-05-FRCNN.npy",
        "mot17/reid/gt",
        "mot17/reid/MOT17-05-FRCNN_fairmot_official.txt",
    ),
}
FULL_LENGTH = {"MOT17-02": 600, "MOT17-04": 1050, "MOT17-10": 654}

# What the published code scores: HOTA, MOTA, IDF1 (README of the test data).
OFFICIAL = {
    "PETS09-S2L1": (49.394, 60.210, 62.255),
    "MOT17-05": (45.241, 47.824, 57.676),
    "MOT17-02": (48.156, 55.729, 59.624),
    "MOT17-04": (79.458, 89.470, 91.583),
    "MOT17-10": (53.958, 71.163, 68.690),
}


def track(association: Association, frames: Frames) -> Rows:
    """(R, 7) frame, id, x, y, w, h, score of all that is reported."""
    rows = [np.empty((0, 7))]
    for frame, detections in frames:
        tracks = association.update(frame, detections)
        low, high = tracks.xyxy[:, :2], tracks.xyxy[:, 2:]
        rows.append(np.column_stack((np.full(len(tracks), frame), tracks.id, low, high - low, tracks.score)))
    return np.concatenate(rows)


def embedded(data: Path, sequence: str) -> tuple[Frames, SeqInfo]:
    detections, folder, _ = EMBEDDED[sequence]
    info = read_seqinfo(data / folder / "seqinfo.ini")
    return read_detections(data / detections, last_frame=info.length), info


def validation_half(data: Path, sequence: str) -> tuple[Frames, SeqInfo]:
    """The last frames of the detections, as many as the ground truth has, counted from 1."""
    info = read_seqinfo(data / "mot17" / "gt" / sequence / "seqinfo.ini")
    skipped = FULL_LENGTH[sequence] - info.length
    full = read_detections(data / "mot17" / "det" / f"{sequence}.txt", last_frame=FULL_LENGTH[sequence])
    return ((frame - skipped, detections) for frame, detections in full if frame > skipped), info


def by_frame_and_id(rows: Rows) -> Rows:
    return rows[np.lexsort((rows[:, 1], rows[:, 0]))][:, :7]


def assert_rows_equal(ours: Rows, golden: Rows, *, pixels: float) -> None:
    """The same (frame, id) everywhere, and boxes within so many pixels."""
    ours, golden = by_frame_and_id(ours), by_frame_and_id(golden)
    np.testing.assert_array_equal(ours[:, :2], golden[:, :2])
    np.testing.assert_allclose(ours[:, 2:6], golden[:, 2:6], rtol=0, atol=pixels)


# The published trackers


@pytest.mark.parametrize("sequence", EMBEDDED)
def test_fairmot_row_for_row(data: Path, sequence: str) -> None:
    frames, info = embedded(data, sequence)
    ours = track(make_association("jde", compat="fairmot", frame_rate=info.frame_rate), frames)
    assert_rows_equal(ours, read_rows(data / EMBEDDED[sequence][2]), pixels=1e-3)


@pytest.mark.parametrize("sequence", FULL_LENGTH)
def test_bytetrack_row_for_row(data: Path, sequence: str) -> None:
    """Published with one decimal of a pixel and two of the score. Its buffer of 30 frames is at 30 fps."""
    frames, _ = validation_half(data, sequence)
    ours = track(make_association("byte", compat="bytetrack"), frames)
    golden = read_rows(data / "mot17" / "bytetrack_official" / f"{sequence}.txt")
    assert_rows_equal(ours, golden, pixels=0.051)
    scores = by_frame_and_id(ours)[:, 6], by_frame_and_id(golden)[:, 6]
    np.testing.assert_allclose(*scores, rtol=0, atol=0.00501)


@pytest.mark.parametrize(("kind", "compat"), PUBLISHED)
def test_a_hundred_synthetic_objects_row_for_row(data: Path, kind: str, compat: str) -> None:
    folder = data.parent / "bench"
    if not (folder / "load.py").is_file():
        pytest.skip(f"no synthetic load at {folder}")
    ours = track(make_association(kind, compat=compat), synthetic(folder, objects=100))
    assert_rows_equal(ours, read_rows(folder / f"load_N100_{compat}_official.txt"), pixels=1e-3)


def synthetic(folder: Path, objects: int) -> Iterator[tuple[int, Detections]]:
    frames = runpy.run_path(str(folder / "load.py"))["gen"](objects)
    for frame, (rows, embedding, _) in enumerate(frames, start=1):
        yield (
            frame,
            Detections(
                xyxy=rows[:, :4],
                score=rows[:, 4],
                label=np.zeros(len(rows), np.int64),
                embedding=embedding,
            ),
        )


# Our defaults


@pytest.mark.parametrize("sequence", EMBEDDED)
def test_jde_by_default_is_at_least_fairmot(data: Path, tmp_path: Path, sequence: str) -> None:
    frames, info = embedded(data, sequence)
    rows = track(make_association("jde", frame_rate=info.frame_rate), frames)
    folder = data / EMBEDDED[sequence][1]
    truth = folder / "gt.txt" if (folder / "gt.txt").is_file() else folder / "gt" / "gt.txt"
    hota, _, idf1 = scores(rows, truth, tmp_path)
    official_hota, _, official_idf1 = OFFICIAL[sequence]
    assert (hota >= official_hota, idf1 >= official_idf1) == (True, True), (hota, idf1)


@pytest.mark.parametrize("sequence", FULL_LENGTH)
def test_byte_by_default_is_at_least_bytetrack(data: Path, tmp_path: Path, sequence: str) -> None:
    frames, info = validation_half(data, sequence)
    rows = track(make_association("byte", frame_rate=info.frame_rate), frames)
    ours = scores(rows, data / "mot17" / "gt" / sequence / "gt" / "gt.txt", tmp_path)
    assert [a >= b for a, b in zip(ours, OFFICIAL[sequence], strict=True)] == [True, True, True], ours


def scores(rows: Rows, truth: Path, folder: Path) -> tuple[float, float, float]:
    """HOTA, MOTA and IDF1, in per cent."""
    results = folder / "results.txt"
    np.savetxt(results, rows, fmt=["%d", "%d", *5 * ["%.4f"]], delimiter=",")
    combined = evaluate(find_pairs(truth, results)).combined
    return combined["HOTA"], combined["MOTA"], combined["IDF1"]
