"""`track` as its users run it: exit codes, words, results on disk, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from onnx_files import detector

import tracker
from tracker.cli import main
from tracker.engine import describe
from tracker.manifest import beside, write

FRAMES, SIZE = 30, (64, 64)


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine that finds the same two objects in every image: class "person" and class "car"."""
    rows = np.full((84, 7), -4.0, np.float32)
    rows[:, 4:] = 0.0
    rows[0] = [0.5, 0.5, np.log(3), np.log(4), 0.95, 0.99, 0.0]  # cell 0 of stride 8: a person
    rows[27] = [0.5, 0.5, np.log(3), np.log(2), 0.9, 0.0, 0.98]  # cell (3, 3): a car
    path = detector(tmp_path_factory.mktemp("engine") / "two.onnx", rows, size=SIZE)
    write(describe(path, frontend="yolox", names=("person", "car")), beside(path))
    return path


def make_clip(path: Path, frames: int = FRAMES, codec: str = "libx264") -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.gop_size = 5
        for index in range(frames):
            image = np.full((96, 128, 3), index * 5 % 256, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, "bgr24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return make_clip(tmp_path / "clip.mp4")


def track(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_a_video_becomes_rows_lines_a_picture_and_a_summary(clip: Path, engine: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert track(clip, "--engine", engine, "--save", "mot,jsonl,video", "--out", out) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "clip.jsonl",
        "clip.mp4",
        "clip.summary.json",
        "clip.txt",
    ]
    rows = np.loadtxt(out / "clip.txt", delimiter=",")
    assert rows[:, 0].tolist() == sorted([*range(1, FRAMES + 1)] * 2)
    assert set(rows[:, 1]) == {1, 2}
    lines = [json.loads(line) for line in (out / "clip.jsonl").read_text().splitlines()]
    assert [line["pts_seconds"] for line in lines] == pytest.approx([k / 10 for k in range(FRAMES)])
    assert {t["label"] for t in lines[-1]["tracks"]} == {"person", "car"}
    summary = json.loads((out / "clip.summary.json").read_text())
    assert summary["frames"]["tracked"] == FRAMES
    assert summary["tracks"] == 2
    assert summary["complete"] is True
    assert set(summary["stages"]) == {
        "decode",
        "preprocess",
        "inference",
        "postprocess",
        "associate",
        "write",
    }
    with av.open(str(out / "clip.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == FRAMES


def test_only_the_classes_asked_for_are_tracked(clip: Path, engine: Path, tmp_path: Path) -> None:
    assert track(clip, "--engine", engine, "--classes", "car", "--save", "jsonl", "--out", tmp_path) == 0
    last = json.loads((tmp_path / "clip.jsonl").read_text().splitlines()[-1])
    assert [t["label"] for t in last["tracks"]] == ["car"]


def test_several_sources_keep_their_results_and_ids_apart(engine: Path, tmp_path: Path) -> None:
    for folder, frames in (("a", 10), ("b", 20)):
        (tmp_path / folder).mkdir()
        make_clip(tmp_path / folder / "video.mp4", frames)
    sources = [tmp_path / "a" / "video.mp4", tmp_path / "b" / "video.mp4"]
    assert track(*sources, "--engine", engine, "--out", tmp_path / "out") == 0
    frames = {
        name: np.loadtxt(tmp_path / "out" / f"{name}.txt", delimiter=",") for name in ("video", "video-2")
    }
    assert {name: rows[:, 0].max() for name, rows in frames.items()} == {"video": 10, "video-2": 20}
    assert all(set(rows[:, 1]) == {1, 2} for rows in frames.values())


def test_results_of_an_earlier_run_are_not_touched(
    clip: Path, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert [track(clip, "--engine", engine, "--quiet") for _ in range(2)] == [0, 0]
    assert sorted(p.name for p in Path("runs").iterdir()) == ["clip", "clip-2"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["missing.mp4", "--engine", "ENGINE"], 1, "missing.mp4"),
        (["CLIP", "--engine", "missing.onnx"], 1, "missing.onnx"),
        (["CLIP"], 1, "--engine"),
        (["CLIP", "--engine", "ENGINE", "--classes", "persn"], 1, "person"),
        (["CLIP", "--engine", "ENGINE", "--conf", "1.5"], 1, "between 0 and 1"),
        (["CLIP", "--engine", "ENGINE", "--max-frames", "0"], 1, "at least 1"),
        (["CLIP", "--engine", "ENGINE", "--save", "gif"], 1, "mot, jsonl, dota, mots, video"),
        (["CLIP", "--engine", "ENGINE", "--save", "mots"], 1, "this engine finds boxes and no masks"),
        (["CLIP", "--engine", "ENGINE", "--device", "cuda:0"], 1, "cuda"),
        (["CLIP", "--engine", "ENGINE", "--tracker", "jde"], 1, "embeddings"),
        (["CLIP", "--engine", "ENGINE", "--compat", "fairmot"], 1, "jde with fairmot"),
        (["CLIP", "--engine", "ENGINE", "--frontend", "fairmot5"], 1, "contradicts"),
        (["CLIP", "--engine", "ENGINE", "--config", "missing.toml"], 1, "missing.toml"),
        (["CLIP", "--engine", "CLIP"], 1, "clip.mp4"),
        (["rtsp://user:secret@/1", "--engine", "ENGINE"], 1, "without a host"),
        (["rtmp://user:secret@camera/1", "--engine", "ENGINE"], 1, "live sources run by themselves"),
        (["CLIP", "--engine", "ENGINE", "--loop"], 1, "--realtime"),
        ([], 2, "SOURCE"),
        (["CLIP", "--engine"], 2, "--engine"),
        (["CLIP", "--engine", "ENGINE", "--tracker", "sort"], 2, "sort"),
        (["CLIP", "--engine", "ENGINE", "--conf", "high"], 2, "high"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    arguments: Sequence[str],
    code: int,
    words: str,
    clip: Path,
    engine: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    named = {"CLIP": clip, "ENGINE": engine}
    try:
        got = track(*(named.get(argument, argument) for argument in arguments))
    except SystemExit as error:  # argparse's way out for wrong usage
        got = int(str(error.code))
    printed = capsys.readouterr().err
    assert got == code
    assert words in printed
    assert "Traceback" not in printed
    assert "secret" not in printed
    if code == 1:
        assert printed.startswith("track: ")
        assert printed.count("\n") == 1


def test_options_may_stand_in_a_file_and_the_command_line_wins(
    clip: Path, engine: Path, tmp_path: Path
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        f'engine = "{engine}"\nsave = "jsonl"\nmax-frames = 3\nclasses = ["car"]\n[settings]\nbirth = 0.8\n'
    )
    assert track(clip, "--config", config, "--out", tmp_path / "out", "--max-frames", 5) == 0
    assert len((tmp_path / "out" / "clip.jsonl").read_text().splitlines()) == 5
    summary = json.loads((tmp_path / "out" / "clip.summary.json").read_text())
    assert summary["tracker"]["birth"] == 0.8
    assert summary["frames"]["missing"] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("engin = 'x.onnx'", "no option 'engin'"),
        ("conf = 'high'", "conf must be a number"),
        ("max-frames = 2.5", "max_frames must be a whole number"),
        ("[settings]\nbirht = 0.8", "no setting 'birht'"),
        ("[settings]\nhigh = 7.0", "high must lie in 0…1"),
        ("engine = ", "cannot read"),
    ],
)
def test_a_wrong_config_file_is_said_in_one_line(
    text: str, words: str, clip: Path, engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(text)
    engine_option = [] if "engin" in text else ["--engine", engine]
    assert track(clip, *engine_option, "--config", config, "--out", tmp_path / "out") == 1
    assert words in capsys.readouterr().err


def test_a_truncated_video_gives_its_good_frames_a_warning_and_exit_code_1(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = make_clip(tmp_path / "clip.mkv", 200)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert track(cut, "--engine", engine, "--out", tmp_path / "out", "--quiet") == 1
    assert "missing" in capsys.readouterr().err
    summary = json.loads((tmp_path / "out" / "cut.summary.json").read_text())
    frames = summary["frames"]
    assert 0 < frames["tracked"] == frames["decoded"] < 200
    assert frames["decoded"] + frames["corrupt"] + frames["missing"] == pytest.approx(200, abs=2)
    rows = np.loadtxt(tmp_path / "out" / "cut.txt", delimiter=",")
    assert rows[:, 0].max() == frames["tracked"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_whole_lines_marked_partial(
    sent: signal.Signals, engine: Path, tmp_path: Path
) -> None:
    clip, out = make_clip(tmp_path / "long.mp4", 3000), tmp_path / "out"
    command = [sys.executable, "-m", "tracker", str(clip), "--engine", str(engine), "--out", str(out)]
    with subprocess.Popen([*command, "--save", "mot,jsonl"], stderr=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + 60
        last = out / "long.partial.jsonl"  # of a frame's results: then the first frame is finished
        while not last.exists() or not last.stat().st_size:
            assert run.poll() is None, run.stderr.read() if run.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.02)
        run.send_signal(sent)
        _, printed = run.communicate(timeout=30)
    assert run.returncode == 130, printed
    assert "Traceback" not in printed
    assert sorted(p.name for p in out.iterdir()) == [
        "long.partial.jsonl",
        "long.partial.summary.json",
        "long.partial.txt",
    ]
    lines = [json.loads(line) for line in (out / "long.partial.jsonl").read_text().splitlines()]
    rows = (out / "long.partial.txt").read_text().splitlines()
    assert 0 < len(lines) < 3000
    assert {row.count(",") for row in rows} == {9}
    assert int(rows[-1].split(",")[0]) == lines[-1]["frame"]


def test_a_full_disk_ends_the_run_with_words(
    clip: Path, engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = os.geteuid() == 0 and (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", mount], capture_output=True, check=False
        ).returncode
        == 0
    )
    if not mounted:
        pytest.skip("cannot mount a small tmpfs here")
    try:
        long = make_clip(tmp_path / "long.mp4", 400)
        assert track(long, "--engine", engine, "--out", mount) == 1
        printed = capsys.readouterr().err
        assert "space" in printed
        assert "Traceback" not in printed
        text = (mount / "long.partial.txt").read_text()
        assert text.endswith("\n")
        assert all(line.count(",") == 9 for line in text.splitlines())
    finally:
        subprocess.run(["umount", mount], check=True)


def test_an_unwritable_directory_is_said_before_any_work(
    clip: Path, engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert track(clip, "--engine", engine, "--out", tmp_path / "file" / "out") == 1
    assert "in the way" in capsys.readouterr().err


def test_the_python_api_yields_frames_with_their_tracks(clip: Path, engine: Path) -> None:
    seen = [
        (frame.index, [(t.id, t.label) for t in tracks])
        for frame, tracks in tracker.track(clip, engine=engine)
    ]
    assert [index for index, _ in seen] == list(range(FRAMES))
    assert seen[-1][1] == [(1, "person"), (2, "car")]


def test_leaving_the_python_iterator_early_leaves_nothing_running(
    clip: Path, engine: Path, tmp_path: Path
) -> None:
    iterator = tracker.track(clip, engine=engine, save=["mot"], out=str(tmp_path / "out"))
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert [p.name for p in (tmp_path / "out").glob("*.txt")] == ["clip.partial.txt"]


def test_the_python_api_raises_what_the_command_would_say(engine: Path) -> None:
    with pytest.raises(tracker.SourceError, match=r"missing\.mp4"):
        next(tracker.track("missing.mp4", engine=engine))
    with pytest.raises(tracker.ConfigError, match="no option 'engin'"):
        next(tracker.track("missing.mp4", engine=engine, engin="typo"))


def test_after_a_gpu_has_failed_the_process_ends_without_touching_it_again() -> None:
    """torch aborts when it frees memory there; what stands for that here runs when Python ends."""
    script = """
import atexit, os, sys
from tracker import cli
from tracker.errors import DeviceError
atexit.register(os.abort)
def lost(*_, **__): raise DeviceError("cuda:0 failed: an illegal memory access was encountered")
cli._track = lost
sys.exit(cli.main(["video.mp4", "--engine", "x.engine"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "track: cuda:0 failed: an illegal memory access was encountered\n"
