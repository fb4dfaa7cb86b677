"""MOT files become frames of detections; broken ones become one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tracker.errors import ConfigError, DetectionsError, SourceError, TrackerError
from tracker.motchallenge import MAX_FRAME, SeqInfo, read_detections, read_rows, read_seqinfo

ROW = [1, -1, 10, 20, 30, 40, 0.5]
SEQINFO = "[Sequence]\nname=A\nframeRate=12.5\nseqLength=9\nimWidth=64\nimHeight=48\n"


def written(path: Path, content: str | bytes | np.ndarray) -> Path:
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Reading rows


@pytest.mark.parametrize(
    "text",
    [
        "1,-1,10,20,30,40,0.5\n2,-1,1,2,3,4,1\n",
        "1 -1 10 20 30 40 0.5\n2 -1 1 2 3 4 1",
        "1\t-1\t10\t20\t30\t40\t0.5\n\n2\t-1\t1\t2\t3\t4\t1\n",
        "\ufeff 1, -1, 10, 20, 30, 40, 0.5,\r\n\r\n2, -1, 1, 2, 3, 4, 1, \r\n",
    ],
    ids=["commas", "spaces", "tabs and a blank line", "BOM, spaces, trailing commas, CRLF"],
)
def test_separators_do_not_matter(tmp_path: Path, text: str) -> None:
    rows = read_rows(written(tmp_path / "det.txt", text))
    assert rows.dtype == np.float64
    np.testing.assert_array_equal(rows, [ROW, [2, -1, 1, 2, 3, 4, 1]])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "1,1,1,1,1,1,1\n\n1,1,x,1,1,1,1", "line 3: 'x' is not a number"),
        ("a.txt", "1,,1,1,1,1,1", "line 1: '' is not a number"),
        ("a.txt", "1,1,1,1,1,1,1\n1,1,nan,1,1,1,1", "line 2: column 3 is nan"),
        ("a.txt", "\n1,1,1,1,1,1,-inf", "line 2: column 7 is -inf"),
        ("a.txt", "1,1,1,1,1,1", "6 columns, at least 7"),
        ("a.txt", "1,1,1,1,1,1,1\n2,1,1,1", "line 2: 4 columns, but 7 in the lines before"),
        ("a.txt", "1,1,1,1,1,1,1\n0,1,1,1,1,1,1", "line 2: frame 0 is not a whole number from 1"),
        ("a.txt", "1.5,1,1,1,1,1,1", "line 1: frame 1.5 is not a whole number"),
        ("a.txt", f"{MAX_FRAME + 1},1,1,1,1,1,1", f"frame {MAX_FRAME + 1} is not a whole number"),
        ("a.txt", b"\x93NUMPY\x01", "is not text"),
        ("a.npy", np.array([ROW, [2, -1, 1, np.nan, 3, 4, 1]]), "line 2: column 4 is nan"),
        ("a.npy", np.array([ROW, [-2, -1, 1, 2, 3, 4, 1]]), "line 2: frame -2"),
        ("a.npy", np.zeros((3, 6)), "6 columns, at least 7"),
        ("a.npy", np.zeros(7), "shape (7,)"),
        ("a.npy", np.array([["1"] * 7]), "<U1"),
        ("a.npy", np.array([[None] * 7]), "without pickle"),
        ("a.npy", b"", "not a plain array"),
        ("a.npy", b"1,1,1,1,1,1,1", "not a plain array"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, name: str, content: str | bytes | np.ndarray, says: str) -> None:
    path = written(tmp_path / name, content)
    with pytest.raises(DetectionsError, match=re.escape(says)) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["absent.txt", "absent.npy", "."])
def test_what_cannot_be_opened_is_a_source_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match="cannot read"):
        read_rows(tmp_path / name)


# Detections, frame by frame


def test_every_frame_comes_in_order_and_rows_keep_theirs(tmp_path: Path) -> None:
    rows = [[4, -1, 0, 0, 1, 1, 0.1], [2, -1, 5, 6, 1, 2, 0.2], [4, -1, 0, 0, 1, 1, 0.3]]
    path = written(tmp_path / "det.npy", np.array(rows))
    frames = list(read_detections(path, last_frame=6))
    assert [(number, np.round(d.score, 1).tolist()) for number, d in frames] == [
        (1, []),
        (2, [np.float32(0.2)]),
        (3, []),
        (4, [np.float32(0.1), np.float32(0.3)]),
        (5, []),
        (6, []),
    ]
    np.testing.assert_array_equal(frames[1][1].xyxy, [[5, 6, 6, 8]])
    assert all(d.embedding is None and d.xyxy.shape == (len(d), 4) for _, d in frames)
    assert len(list(read_detections(path, last_frame=3))) == 4  # no row is dropped


@pytest.mark.parametrize(
    ("suffix", "extra", "asked", "dim"),
    [
        (".npy", 0, None, None),
        (".npy", 5, None, 5),
        (".npy", 5, 2, 2),
        (".npy", 5, 0, None),
        (".txt", 3, None, None),
        (".txt", 3, 2, 2),
    ],
)
def test_the_embedding_is_the_last_columns(
    tmp_path: Path, suffix: str, extra: int, asked: int | None, dim: int | None
) -> None:
    row = np.array([[*ROW, *range(1, extra + 1)]], np.float64)
    path = tmp_path / f"det{suffix}"
    written(path, row if suffix == ".npy" else ",".join(map(str, row[0])))
    frames = list(read_detections(path, embedding_dim=asked, last_frame=2))
    for _, detections in frames:
        embedding = detections.embedding
        assert (None if embedding is None else embedding.shape) == (dim and (len(detections), dim))
    if dim:
        np.testing.assert_array_equal(frames[0][1].embedding, row[:, -dim:])


@pytest.mark.parametrize("name", ["empty.txt", "empty.npy"])
def test_no_rows_are_empty_frames(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, "" if name.endswith("txt") else np.empty((0, 7)))
    assert list(read_detections(path)) == []
    frames = list(read_detections(path, embedding_dim=8, last_frame=2))
    assert [(n, len(d), d.embedding.shape) for n, d in frames] == [(1, 0, (0, 8)), (2, 0, (0, 8))]


@pytest.mark.parametrize(
    ("row", "dim", "error", "says"),
    [
        ([1, -1, 5, 5, -1, 2, 1], None, DetectionsError, "frame 1: a box is -1 × 2"),
        ([1, -1, 5, 5, 1, 2, 1, 9, 9], 3, ConfigError, "3 is impossible"),
        ([1, -1, 5, 5, 1, 2, 1, 9, 9], -1, ConfigError, "-1 is impossible"),
    ],
)
def test_impossible_detections_fail_at_the_call(
    tmp_path: Path, row: list[float], dim: int | None, error: type[TrackerError], says: str
) -> None:
    path = written(tmp_path / "det.npy", np.array([row]))
    with pytest.raises(error, match=re.escape(says)):
        read_detections(path, embedding_dim=dim)


def test_real_detections(data: Path) -> None:
    path = data / "pets09" / "det_emb.npy"
    rows = np.load(path).astype(np.float64)
    frames = list(read_detections(path, last_frame=read_seqinfo(data / "pets09" / "seqinfo.ini").length))
    assert [number for number, _ in frames] == list(range(1, 796))
    xyxy = np.concatenate([d.xyxy for _, d in frames])
    assert xyxy.dtype == np.float32
    # Corners rounded once, from float64: what the official results were made from.
    np.testing.assert_array_equal(xyxy[:, 2:], (rows[:, 2:4] + rows[:, 4:6]).astype(np.float32))
    embedding = np.concatenate([d.embedding for _, d in frames])
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-5)

    text = list(read_detections(data / "mot17" / "det" / "MOT17-10.txt"))
    assert len(text) == 654
    assert sum(len(d) for _, d in text) == 29973
    assert all(d.embedding is None for _, d in text)


# seqinfo.ini


def test_seqinfo(tmp_path: Path) -> None:
    path = written(tmp_path / "seqinfo.ini", SEQINFO)
    assert read_seqinfo(path) == SeqInfo(name="A", frame_rate=12.5, length=9, size=(64, 48))


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (None, SourceError, "cannot read"),
        ("frameRate=1", ConfigError, "not an .ini file"),
        ("[Other]\na=1", ConfigError, "needs frameRate=N with N > 0, got 'nothing'"),
        (SEQINFO.replace("12.5", "fast"), ConfigError, "frameRate=N with N > 0, got 'fast'"),
        (SEQINFO.replace("12.5", "0"), ConfigError, "frameRate=N with N > 0, got '0'"),
        (SEQINFO.replace("=9", "=9.5"), ConfigError, "seqLength=9.5 is not a whole number"),
        (SEQINFO.replace("64", "inf"), ConfigError, "imWidth=N with N > 0, got 'inf'"),
        (SEQINFO.replace("imHeight=48\n", ""), ConfigError, "needs imHeight=N"),
    ],
)
def test_bad_seqinfo(tmp_path: Path, content: str | None, error: type[TrackerError], says: str) -> None:
    path = tmp_path / "seqinfo.ini"
    if content is not None:
        written(path, content)
    with pytest.raises(error, match=re.escape(says)):
        read_seqinfo(path)
