"""Stories of masks in results: told, drawn, handed from one to the other, and small in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clips import write_clip
from results import ONE_TRACK, bgr_image, decode, frame_of, masked, tracks_of

from tracker import rle
from tracker.cli import main
from tracker.errors import ConfigError, SinkError
from tracker.evaluation import evaluate, find_pairs
from tracker.live import open_session
from tracker.masks import MaskBits, MaskCrops, Masks
from tracker.mots import read_masks
from tracker.session import Options, Session, options_from
from tracker.sinks import MotsSink, VideoSink, check_kinds
from tracker.sinks.drawing import TINT, Painter, colours
from tracker.sinks.jsonl import format_line
from tracker.sinks.mots import format_rows
from tracker.sinks.preview import Preview
from tracker.types import Detections, Frame, Image, Tracks, Transfers

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (96, 64)


def hook(left: int, top: int, *, size: tuple[int, int] = SIZE) -> np.ndarray:
    """(H, W) with an L of 20×24 pixels: most of its box is somebody else's."""
    picture = np.zeros(size[::-1], bool)
    picture[top : top + 24, left : left + 6] = True
    picture[top + 18 : top + 24, left : left + 20] = True
    return picture


def interlocked(number: int) -> tuple[np.ndarray, np.ndarray]:
    """(2, H, W) masks and (2, 4) boxes of two hooks in each other's arms, walking to the right."""
    left, top = 4 + 3 * number, 12
    low, high = hook(left, top), np.rot90(hook(SIZE[0] - left - 29, SIZE[1] - top - 32), 2)
    assert not (low & high).any()
    return np.stack((low, high)), np.array(
        [[left, top, left + 20, top + 24], [left + 9, top + 8, left + 29, top + 32]]
    )


# Told


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # pycocotools' own
def test_json_lines_have_masks_that_pycocotools_reads() -> None:
    coco = pytest.importorskip("pycocotools.mask", reason="needs pycocotools, which comes with tracker[eval]")
    pictures, boxes = interlocked(3)
    tracks = masked(tracks_of((1, *boxes[0], 0.9, 0), (2, *boxes[1], 0.8, 1)), *pictures, size=SIZE)
    line = format_line(frame_of(4), tracks)
    told = json.loads(line)["tracks"]
    assert [track["mask"]["size"] for track in told] == [[64, 96]] * 2
    assert [track["label"] for track in told] == ["person", "car"]
    for track, picture in zip(told, pictures, strict=True):
        np.testing.assert_array_equal(coco.decode(track["mask"]), picture)


def test_every_letter_of_run_lengths_survives_json() -> None:
    """A backslash among them: a run of 44 pixels and more to follow."""
    picture = np.zeros((100, 100), bool)
    picture[:, 40:] = np.arange(60) % 7 < 3
    tracks = masked(ONE_TRACK, picture, size=(100, 100))
    assert tracks.mask is not None
    text = tracks.mask.rle(0).decode()
    assert "\\" in text
    assert json.loads(format_line(frame_of(0), tracks))["tracks"][0]["mask"]["counts"] == text


def test_a_track_that_was_not_seen_has_no_mask_but_a_null(tmp_path: Path) -> None:
    """Row −1: its detection was missing in this frame."""
    tracks = tracks_of((1, 10, 10, 30, 30, 0.9, 0), (2, 40, 10, 60, 30, 0.9, 0))
    mask = masked(tracks).mask
    assert mask is not None
    tracks = replace(tracks, mask=mask[np.array([-1, 1])])
    gone, seen = json.loads(format_line(frame_of(0), tracks))["tracks"]
    assert gone["mask"] is None
    assert seen["mask"]["size"] == [48, 64]
    assert [row.split()[1] for row in format_rows(frame_of(0), tracks).splitlines()] == ["2"]


def test_without_masks_nothing_is_said_about_them() -> None:
    assert "mask" not in format_line(frame_of(0), ONE_TRACK)
    assert "row" not in json.loads(format_line(frame_of(0), ONE_TRACK))["tracks"][0]


@pytest.mark.parametrize(("label", "name", "number"), [
    (0, "person", 2), (1, "car", 1), (2, "pedestrian", 2), (3, "dog", 103), (99, "99", 199),
])  # fmt: skip
def test_mots_rows_have_mots_s_classes_and_a_number_for_others(label: int, name: str, number: int) -> None:
    tracks = masked(tracks_of((7, 0, 0, 2, 1, 0.9, label), names=("person", "car", "pedestrian", "dog")))
    assert tracks[0].label == name
    assert format_rows(frame_of(11), tracks) == f"12 7 {number} 48 64 {rows_of_first_pixels()}\n"


def rows_of_first_pixels() -> str:
    return rle.encode(np.ones((1, 2), bool), (0, 0), (64, 48)).decode()


def test_in_mots_a_pixel_belongs_to_the_surest(tmp_path: Path) -> None:
    """Three on one place, and one behind another: nothing is shared, and who has nothing left has no row."""
    tracks = masked(
        tracks_of(
            (1, 10, 10, 30, 30, 0.5, 0),
            (2, 20, 10, 40, 30, 0.9, 0),
            (3, 20, 10, 40, 30, 0.9, 0),  # as sure as the one before, but younger
            (4, 24, 14, 28, 18, 0.3, 0),
        )
    )
    with MotsSink(tmp_path, "clip") as sink:
        sink.write(frame_of(0), tracks)
    rows = read_masks(tmp_path / "clip.mots.txt")
    assert rows.id.tolist() == [1, 2]
    first, second = (rle.decode(counts, (64, 48)) for counts in rows.counts)
    assert (first.sum(), second.sum()) == (200, 400)
    assert not (first & second).any()


def test_mots_rows_without_masks_are_refused() -> None:
    with pytest.raises(SinkError, match="frame 3 has no masks, which MOTS is made of"):
        format_rows(frame_of(2), ONE_TRACK)


# From the network to the score


class Seer:
    """Stands for a front end that finds the masks of `interlocked`, to the pixel."""

    names, max_batch, usual_batch, embeds, masks, lanes = ("person", "car"), 4, 4, False, True, 1
    problem: str | None = None
    device = frames_on = torch.device("cpu")

    def __init__(self) -> None:
        self.transfers, self.seconds = Transfers(), {"inference": 0.0}

    def submit(self, frames: Sequence[Frame]) -> Future[list[Detections]]:
        done: Future[list[Detections]] = Future()
        done.set_result([self._found(frame.index) for frame in frames])
        return done

    def close(self) -> None:
        pass

    def _found(self, number: int) -> Detections:
        pictures, boxes = interlocked(number)
        order = [1, 0] if number % 2 else [0, 1]  # so that rows are not ids
        return Detections(
            xyxy=boxes[order].astype(np.float32),
            score=np.array([0.9, 0.8], np.float32)[order],
            label=np.zeros(2, np.int64),
            mask=MaskBits.pack(torch.from_numpy(pictures[order]), SIZE),
        )


@pytest.fixture
def seer(monkeypatch: pytest.MonkeyPatch) -> None:
    about = SimpleNamespace(
        engine_sha256="0" * 64, frontend="fake", precision="fp32", thresholds=lambda _: {}
    )
    monkeypatch.setattr("tracker.session.open_engine", lambda *_, **__: (Seer(), about))


def write_truth(path: Path, frames: int) -> Path:
    rows = [
        f"{number + 1} {2001 + k} 2 64 96 {rle.encode(picture, (0, 0), SIZE).decode()}\n"
        for number in range(frames)
        for k, picture in enumerate(interlocked(number)[0])
    ]
    path.parent.mkdir(parents=True)
    path.write_text("".join(rows))
    return path


@pytest.mark.usefixtures("seer")
@pytest.mark.parametrize("workers", [0, 1])
def test_perfect_masks_are_tracked_written_and_score_100(workers: int, tmp_path: Path) -> None:
    """In this process and in another one, where there are no masks."""
    clips = [str(write_clip(tmp_path / f"{name}.mp4", frames=12, size=SIZE)) for name in "ab"]
    save = ("mots", "jsonl", "mot")
    with Session(
        Options(sources=clips, engine="any", save=save, out=str(tmp_path / "out"), workers=workers)
    ) as run:
        shown = [(frame.index, tracks) for frame, tracks in run]
    assert len(shown) == 24
    for index, tracks in shown:
        assert tracks.mask is not None
        pictures = interlocked(index)[0]
        np.testing.assert_array_equal(tracks.mask.pasted().numpy(), pictures[tracks.id - 1])
    for name in "ab":
        write_truth(tmp_path / "gt" / name / "gt" / "gt.txt", 12)
    scores = evaluate(find_pairs(tmp_path / "gt", tmp_path / "out", format="mots"), format="mots").combined
    assert (scores["sMOTSA"], scores["HOTA"], scores["IDF1"], scores["IDSW"]) == (100, 100, 100, 0)
    lines = [json.loads(line) for line in (tmp_path / "out" / "b.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        texts = {track["id"]: track["mask"]["counts"] for track in line["tracks"]}
        expected = [rle.encode(picture, (0, 0), SIZE).decode() for picture in interlocked(number)[0]]
        assert [texts[identity] for identity in sorted(texts)] == expected


@pytest.mark.usefixtures("seer")
def test_live_streams_have_masks_in_their_lines_too(tmp_path: Path) -> None:
    """Associated in another process, worded in this one."""
    clip = write_clip(tmp_path / "a.mp4", frames=12, size=SIZE)
    options = {
        "sources": [str(clip)],
        "engine": "any",
        "save": ["mots", "jsonl"],
        "realtime": True,
        "workers": 1,
    }
    with open_session(options_from({**options, "out": str(tmp_path / "out")})) as run:
        assert list(run)  # not every frame: some come while the process is being started
    [rows], [lines] = (list((tmp_path / "out").glob(f"a-*{end}")) for end in (".mots.txt", ".jsonl"))
    written = read_masks(rows)
    assert len(written)
    for number, counts in zip(written.frame.tolist(), written.counts, strict=True):
        assert any((rle.decode(counts, SIZE) == picture).all() for picture in interlocked(number - 1)[0])
    told = [
        track["mask"]["counts"]
        for line in lines.read_text().splitlines()
        for track in json.loads(line)["tracks"]
    ]
    assert sorted(told) == sorted(counts.decode() for counts in written.counts)


def test_masks_asked_of_a_network_without_are_refused_before_anything_else() -> None:
    with pytest.raises(ConfigError, match="cannot save 'mots': this engine finds boxes and no masks"):
        check_kinds(["mot", "mots"], masks=False)
    check_kinds(["mot", "mots"], masks=True)
    check_kinds(["mot", "jsonl", "dota", "video"], masks=False)


def test_the_command_says_so_before_it_opens_a_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blind = Seer()
    blind.masks = False
    monkeypatch.setattr("tracker.session.open_engine", lambda *_, **__: (blind, SimpleNamespace()))
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--realtime"]):
        assert main(["nowhere.mp4", "--engine", "any", "--save", "mot,mots", *more]) == 1
        assert capsys.readouterr().err.startswith("track: cannot save 'mots': this engine finds boxes")
    assert not list(tmp_path.iterdir())


# Drawn


def drawn(tracks: Tracks, size: tuple[int, int]) -> np.ndarray:
    image = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Painter(frame_rate=10).draw(image, tracks)
    return image


def test_pixels_of_a_mask_are_tinted_in_the_box_s_colour_and_no_others() -> None:
    size = (480, 360)
    picture = np.zeros(size[::-1], bool)
    picture[140:200, 120:180] = np.add.outer(np.arange(60), np.arange(60)) % 3 > 0
    tracks = tracks_of((5, 110, 130, 190, 300, 0.9, 0))
    plain, tinted = drawn(tracks, size), drawn(masked(tracks, picture, size=size), size)
    np.testing.assert_array_equal(tinted[~picture], plain[~picture])
    mixed = (1 - TINT) * plain[picture] + TINT * colours(np.array([5]))[0]
    np.testing.assert_allclose(tinted[picture], mixed, atol=0.51)


def test_masks_at_the_edges_and_none_at_all_are_drawn() -> None:
    """Also one of a box that reaches beyond the picture, as Mask R-CNN gives them."""
    size = (160, 120)
    tracks = tracks_of(
        (1, -40, -30, 60, 50, 0.9, 0), (2, 100, 80, 300, 200, 0.9, 0), (3, 5, 90, 5, 90, 0.9, 0)
    )
    crops = MaskCrops(torch.full((3, 28, 28), 9.0), torch.from_numpy(tracks.xyxy.copy()), size)
    plain, tinted = drawn(tracks, size), drawn(replace(tracks, mask=crops), size)
    changed = (plain != tinted).any(axis=2)
    assert changed[30:45, 5:55].mean() > 0.9
    assert changed[95:110, 110:150].mean() > 0.9
    assert not changed[:, 65:95].any()


def test_a_film_and_a_preview_show_masks(tmp_path: Path) -> None:
    size = (160, 120)
    picture = np.zeros(size[::-1], bool)
    picture[60:100, 60:100] = True
    tracks = masked(tracks_of((1, 40, 40, 120, 110, 0.9, 0)), picture, size=size)
    frame = frame_of(0, image=bgr_image(size, (100, 100, 100)))
    with VideoSink(tmp_path, "clip", frame_rate=10) as sink:
        sink.write(frame, tracks)
    [film] = decode(tmp_path / "clip.mp4")
    preview = Preview(frame_rate=10)
    with preview.watch() as watch:
        preview.offer(frame, tracks)
        jpeg = watch.next(5)
    assert jpeg is not None
    shown = np.frombuffer(jpeg, np.uint8)
    import cv2

    for picture in (film.to_ndarray(format="bgr24"), cv2.imdecode(shown, cv2.IMREAD_COLOR)):
        expected = (1 - TINT) * 100 + TINT * colours(np.array([1]))[0]
        assert np.abs(picture[70:90, 70:90].mean(axis=(0, 1)) - expected).max() < 8
        assert np.abs(picture[50:56, 50:110].mean(axis=(0, 1)) - 100).max() < 8


# How large


def peak_kilobytes(*, reset: bool = False) -> int:
    """The most memory this process had since it was last asked to forget."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError as error:
        pytest.skip(f"cannot measure memory here: {error}")
    return int(status.partition("VmHWM:")[2].split()[0])


@pytest.mark.parametrize("kind", ["crops", "bits"])
def test_a_hundred_masks_of_1080p_are_written_and_drawn_in_a_few_megabytes(kind: str) -> None:
    """A hundred whole pictures would be 207 MB."""
    size = (1920, 1080)
    rows = [(i + 1, 15 * i, 8 * i, 15 * i + 200, 8 * i + 250, 0.5 + i / 250, 0) for i in range(100)]
    tracks = tracks_of(*rows)
    masks: Masks
    if kind == "crops":
        logits = torch.linspace(-3, 5, 28 * 28).view(28, 28).expand(100, 28, 28)
        masks = MaskCrops(logits, torch.from_numpy(tracks.xyxy.copy()), size)
    else:
        bits = torch.zeros((100, 1080, 240), dtype=torch.uint8)  # 26 MB, here before we look
        for row, (_, left, top, *_) in enumerate(rows):
            bits[row, top : top + 250, left // 8 : left // 8 + 25] = 0b10101111
        masks = MaskBits(bits, size)
    tracks = replace(tracks, mask=masks)
    frame = Frame(index=0, pts_seconds=0, size=size, image=Image(format="bgr", planes=()))
    image = np.zeros((1080, 1920, 3), np.uint8)
    warm = masked(ONE_TRACK)
    format_line(frame, warm)
    format_rows(frame, warm)
    Painter(frame_rate=10).draw(image, warm)
    peak_kilobytes(reset=True)
    before = peak_kilobytes()
    assert len(format_line(frame, tracks)) > 100_000 / 20
    assert format_rows(frame, tracks).count("\n") == 100
    Painter(frame_rate=10).draw(image, tracks)
    assert peak_kilobytes() - before < 60_000
