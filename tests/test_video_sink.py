"""Stories of annotated videos: frames, times, sizes and colours arrive; what cannot be a video is told."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange
from numpy.typing import NDArray
from results import NO_TRACKS, ONE_TRACK, bgr_image, decode, frame_of, noise_image, small_disk

from tracker.errors import SinkError
from tracker.pixels import to_bgr
from tracker.sinks import VideoSink
from tracker.sinks.video import BT709, FRAMES_BEHIND, MAX_INTERVAL_SECONDS, TICKS, Clock
from tracker.types import Frame, Image, Tracks


def bgr_of(frame: av.VideoFrame) -> NDArray[np.int64]:
    """(H, W, 3), by our own arithmetic: older PyAV does not heed the matrix that the file declares."""
    assert (frame.colorspace, frame.color_range) == (BT709, ColorRange.MPEG)
    height, width = frame.height, frame.width
    y, u, v = np.split(
        frame.to_ndarray(format="yuv420p").reshape(-1), np.cumsum([height * width, height * width // 4])
    )
    chroma = (height // 2, width // 2)
    planes = (y.reshape(height, width), u.reshape(chroma), v.reshape(chroma))
    return to_bgr(Image(format="yuv", planes=planes, matrix="bt709")).astype(np.int64)


def test_a_real_video_can_be_decoded_again_with_its_frames_times_size_and_colours(
    data: Path, tmp_path: Path
) -> None:
    with av.open(data / "pets09/video.mp4") as container:
        decoded = [frame for frame, _ in zip(container.decode(video=0), range(40), strict=False)]
    pictures = [frame.to_ndarray(format="bgr24") for frame in decoded]
    times = [index / 10 + 0.03 * (index % 3 == 1) for index in range(40)]  # a variable frame rate
    with VideoSink(tmp_path, "clip", frame_rate=10) as sink:
        for index, (picture, time) in enumerate(zip(pictures, times, strict=True)):
            image = Image(format="bgr", planes=(picture,))
            sink.write(frame_of(index, image=image, pts_seconds=7 + time), NO_TRACKS)
    with av.open(tmp_path / "clip.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.codec_context.name, stream.pix_fmt) == (40, "h264", "yuv420p")
        assert (stream.width, stream.height) == (480, 360)
        assert container.duration == pytest.approx(4e6)
        again = list(container.decode(stream))
    assert [frame.time for frame in again] == pytest.approx(times, abs=1e-6)
    errors = [np.abs(bgr_of(f) - p).mean() for f, p in zip(again, pictures, strict=True)]
    assert max(errors) < 4


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (40, 90, 200)])
def test_colours_survive_the_way_there_and_back(colour: tuple[int, int, int], tmp_path: Path) -> None:
    with VideoSink(tmp_path, "clip", frame_rate=10) as sink:
        sink.write(frame_of(0, image=bgr_image((64, 48), colour)), NO_TRACKS)
    [frame] = decode(tmp_path / "clip.mp4")
    assert np.abs(bgr_of(frame)[20:28, 20:28] - colour).max() <= 6


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(64, 48)] * 3, (64, 48)),
        ([(63, 47)] * 3, (64, 48)),
        ([(1, 1)] * 3, (2, 2)),
        ([(64, 48), (48, 64), (128, 96), (63, 48)], (64, 48)),
    ],
)
def test_every_size_makes_a_video_and_a_change_does_not_break_it(
    sizes: list[tuple[int, int]], expected: tuple[int, int], tmp_path: Path
) -> None:
    with VideoSink(tmp_path, "clip", frame_rate=10) as sink:
        for index, size in enumerate(sizes):
            sink.write(frame_of(index, image=bgr_image(size)), ONE_TRACK)
    assert [(frame.width, frame.height) for frame in decode(tmp_path / "clip.mp4")] == [expected] * len(sizes)


def test_a_frame_of_another_shape_is_fitted_inside_the_first(tmp_path: Path) -> None:
    red = (0, 0, 255)
    with VideoSink(tmp_path, "clip", frame_rate=10) as sink:
        sink.write(frame_of(0, image=bgr_image((160, 80))), NO_TRACKS)
        sink.write(frame_of(1, image=bgr_image((40, 40), red)), NO_TRACKS)
    pixels = bgr_of(decode(tmp_path / "clip.mp4")[1])
    assert np.abs(pixels[40, [44, 80, 116]] - red).max() < 12
    assert pixels[40, [5, 34, 126, 155]].max() < 12


@pytest.mark.parametrize(
    ("story", "pts_seconds", "film_seconds"),
    [
        ("starts late", [5, 5.1, 5.2], [0, 0.1, 0.2]),
        ("wall clock", [1.7e9, 1.7e9 + 0.5], [0, 0.5]),
        ("variable", [0, 0.04, 0.5, 0.51], [0, 0.04, 0.5, 0.51]),
        ("stands still", [0, 0, 0, 0.1], [0, 0.1, 0.2, 0.3]),
        ("falls back", [9, 9.1, 2, 2.1], [0, 0.1, 0.2, 0.3]),
        ("leaps", [0, 0.1, MAX_INTERVAL_SECONDS + 1, MAX_INTERVAL_SECONDS + 1.1], [0, 0.1, 0.2, 0.3]),
        ("pauses", [0, 0.1, 600], [0, 0.1, 600]),
        ("before zero", [-1, -0.9], [0, 0.1]),
    ],
)
def test_a_film_runs_from_zero_at_the_source_s_intervals(
    story: str, pts_seconds: list[float], film_seconds: list[float]
) -> None:
    clock = Clock(frame_rate=10)
    assert [clock.ticks(pts) / TICKS for pts in pts_seconds] == pytest.approx(film_seconds, abs=1 / TICKS)


@pytest.mark.parametrize("rate", [10, 24, 25, 30, 50, 60, 24000 / 1001, 30000 / 1001, 60000 / 1001])
def test_usual_frame_rates_are_whole_ticks(rate: float) -> None:
    assert Clock(frame_rate=rate).frame_ticks == pytest.approx(TICKS / rate, abs=1e-9)


def test_no_frame_no_video(tmp_path: Path) -> None:
    VideoSink(tmp_path, "clip", frame_rate=10).close(complete=True)
    assert not list(tmp_path.iterdir())


def test_a_replay_without_video_cannot_be_drawn(tmp_path: Path) -> None:
    with (
        pytest.raises(SinkError, match="frame 3 has no picture"),
        VideoSink(tmp_path, "clip", frame_rate=10) as sink,
    ):
        sink.write(Frame(index=2, pts_seconds=0.2, size=(64, 48)), ONE_TRACK)


def test_a_fault_in_the_worker_surfaces_and_nothing_hangs(tmp_path: Path) -> None:
    unequal = Tracks(id=np.arange(3), xyxy=np.zeros((2, 4)), score=np.ones(3), label=np.zeros(3, np.int64))
    sink = VideoSink(tmp_path, "clip", frame_rate=10)
    with pytest.raises(IndexError):
        for index in range(3 * FRAMES_BEHIND):
            sink.write(frame_of(index), unequal)
    sink.close(complete=False)


def test_a_picture_too_large_for_h264_is_told(tmp_path: Path) -> None:
    sink = VideoSink(tmp_path, "clip", frame_rate=10)
    sink.write(frame_of(0, image=bgr_image((16386, 2))), ONE_TRACK)
    with pytest.raises(SinkError, match=r"16386×2 frames: H\.264 ends at 16384 pixels a side"):
        sink.close(complete=True)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_with_the_last_frames_is_told_by_close(tmp_path: Path) -> None:
    with small_disk(tmp_path, "size=8k") as disk:
        sink = VideoSink(disk, "clip", frame_rate=10)
        for index in range(5):  # fewer than x264 holds back: nothing is written before the end
            sink.write(frame_of(index, image=noise_image(index)), ONE_TRACK)
        with pytest.raises(SinkError, match="No space left"):
            sink.close(complete=True)
