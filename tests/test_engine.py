"""From an engine file to a front end, with and without a manifest; and the tool that writes one."""

from __future__ import annotations

import dataclasses
import json
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import helper
from onnx_files import detector, save

from tracker import manifest as manifests
from tracker.cli import main as track_command
from tracker.engine import describe, open_engine
from tracker.errors import ConfigError, EngineError
from tracker.types import Detections, Frame, Image

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("person", "dog", "car")


def answer() -> np.ndarray:
    """(84, 8) rows of a 64×64 undecoded YOLOX that sees one dog at (4, 8, 20, 16)."""
    rows = np.zeros((84, 8))
    rows[9] = (0.5, 0.5, np.log(2), 0, 0.8, 0, 0.5, 0)
    return rows


def described(path: Path) -> Path:
    manifests.write(describe(path, frontend="yolox", names=NAMES, size=(64, 64)), manifests.beside(path))
    return path


def detect(path: Path, count: int = 1, **options: object) -> list[Detections]:
    image = Image(format="bgr", planes=(np.zeros((64, 64, 3), np.uint8),))
    shot = Frame(index=0, pts_seconds=0.0, size=(64, 64), image=image)
    frontend, _ = open_engine(path, **options)
    try:
        return frontend.submit([shot] * count).result()
    finally:
        frontend.close()


@pytest.fixture
def tool() -> Callable[[Sequence[str]], int]:
    return runpy.run_path(str(ROOT / "tools" / "manifest.py"))["main"]


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("batch", "count"), [(1, 1), (2, 1), ("N", 3)], ids=["one", "fixed", "open"])
def test_engines_of_every_kind_answer(tmp_path: Path, half: bool, batch: int | str, count: int) -> None:
    path = described(detector(tmp_path / "a.onnx", answer(), batch=batch, half=half))
    found = detect(path, count)
    assert len(found) == count
    for each in found:
        np.testing.assert_allclose(each.xyxy, [(4, 8, 20, 16)], atol=0.02)
        assert each.label.tolist() == [1]


def test_options_reach_the_front_end(tmp_path: Path) -> None:
    path = described(detector(tmp_path / "a.onnx", answer()))
    assert len(detect(path, conf=0.5)[0]) == 0
    assert len(detect(path, classes=["car"])[0]) == 0
    assert len(detect(path, classes=["dog"], conf=0.3, device="cpu", threads=1, frontend="yolox")[0]) == 1


def test_without_a_manifest_the_front_end_must_be_named(tmp_path: Path) -> None:
    path = detector(tmp_path / "a.onnx", np.zeros((84, 85)))
    with pytest.raises(
        EngineError, match=r"no manifest a\.onnx\.json .*tools/manifest\.py .*--frontend yolox"
    ):
        open_engine(path)
    assert len(detect(path, frontend="yolox")) == 1
    with pytest.raises(ConfigError, match="front end is 'yolo'; there is yolox"):
        open_engine(path, frontend="yolo")


def test_a_named_front_end_may_not_contradict_the_manifest(tmp_path: Path) -> None:
    path = described(detector(tmp_path / "a.onnx", answer()))
    with pytest.raises(
        ConfigError, match=r"--frontend fairmot contradicts .*a\.onnx\.json, which says yolox"
    ):
        open_engine(path, frontend="fairmot")


def test_a_manifest_of_an_unknown_front_end(tmp_path: Path) -> None:
    path = described(detector(tmp_path / "a.onnx", answer()))
    other = dataclasses.replace(manifests.read(manifests.beside(path)), frontend="ssd")
    manifests.write(other, manifests.beside(path))
    with pytest.raises(ConfigError, match="front end is 'ssd'; there is yolox"):
        open_engine(path)


def test_an_engine_exchanged_after_its_manifest(tmp_path: Path) -> None:
    path = described(detector(tmp_path / "a.onnx", answer()))
    detector(path, answer() / 2)
    with pytest.raises(EngineError, match="is not the file its manifest"):
        open_engine(path)


def text(path: Path) -> Path:
    path.write_text("no model")
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "missing.onnx", "missing.onnx is missing"),
        (lambda folder: folder / "missing.engine", r"missing\.engine is missing: name an engine file"),
        (lambda folder: folder / "missing.pt2", r"missing\.pt2 is missing: name an engine file"),
        (lambda folder: text(folder / "a.pt2"), r"has no manifest: a \.pt2 file is code"),
        (lambda folder: text(folder / "a.pt"), r"a\.pt is no engine this version can run: name an \.onnx"),
        (lambda folder: text(folder / "a.onnx"), "no ONNX model"),
        (lambda folder: folder, "no engine this version can run"),
    ],
)
def test_files_that_are_no_engine(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        open_engine(make(tmp_path), frontend="yolox")


@pytest.mark.parametrize("suffix", [".engine", ".plan"])
def test_tensorrt_engines_are_told_by_their_suffix(tmp_path: Path, suffix: str) -> None:
    path = text(tmp_path / f"a{suffix}")
    with pytest.raises(EngineError, match=r"needs an NVIDIA GPU, and the CPU is asked for: use the \.onnx"):
        open_engine(path, frontend="yolox", device="cpu")
    with pytest.raises(EngineError, match=r"no manifest .*that tools/build\.py wrote .*--frontend"):
        open_engine(path)
    with pytest.raises(EngineError, match=r"TensorRT engine: tools/build\.py describes those that it builds"):
        describe(path, frontend="yolox")
    with pytest.raises(ConfigError, match=r"threads is 2; it is for \.onnx files alone"):
        open_engine(path, frontend="yolox", threads=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_tensorrt_engine_without_a_gpu_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = text(tmp_path / "a.engine")
    assert track_command(["nothing.mp4", "--engine", str(path), "--frontend", "yolox"]) == 1
    said = capsys.readouterr().err
    assert "needs an NVIDIA GPU" in said
    assert "Traceback" not in said


RELU = helper.make_node("Relu", ["x"], ["y"])
SPLIT = helper.make_node("Identity", ["x"], ["z"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: save(path, [RELU], {"x": (1, 1000)}, {"y": (1, 1000)}), "say its image size"),
        (lambda path: save(path, [RELU], {"x": (1, 3, 64, 64)}, {"y": (1, 3, 64, 64)}), "YOLOX with a 64×64"),
        (
            lambda path: save(path, [RELU], {"x": (1, 1, 64, 64)}, {"y": (1, 1, 64, 64)}),
            r"\(batch, 3, 64, 64",
        ),
        (
            lambda path: save(
                path, [RELU, SPLIT], {"x": (1, 3, 64, 64)}, dict.fromkeys("yz", (1, 3, 64, 64))
            ),
            "one input and one output; this one takes x and gives y, z",
        ),
        (lambda path: detector(path, np.zeros((84, 8))), "80 class names gives"),
        (lambda path: detector(path, np.full((84, 85), np.nan)), "NaN or inf"),
        (lambda path: detector(path, np.zeros((84, 85)), size=(60, 60)), "multiples of 32"),
    ],
)
def test_an_onnx_that_is_no_yolox(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        open_engine(make(tmp_path / "a.onnx"), frontend="yolox")


def test_the_tool_writes_what_opens(tmp_path: Path, tool: Callable, capsys: pytest.CaptureFixture) -> None:
    path = detector(tmp_path / "a.onnx", answer(), batch="N")
    (tmp_path / "names.txt").write_text("person\ndog\n\ncar\n")
    for names in ("person, dog,car", str(tmp_path / "names.txt")):
        assert tool([str(path), "--frontend", "yolox", "--names", names, "--precision", "fp16"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed == json.loads((tmp_path / "a.onnx.json").read_text())
        assert printed["names"] == list(NAMES)
        assert (printed["precision"], printed["outputs"]) == ("fp16", {"undecoded": "output"})
        assert len(detect(path)[0]) == 1


def test_the_tool_takes_a_size_and_a_place(tmp_path: Path, tool: Callable) -> None:
    path = detector(tmp_path / "a.onnx", np.zeros((84, 85)), size=("W", "H"))
    out = tmp_path / "elsewhere.json"
    arguments = [str(path), "--frontend", "yolox", "--out", str(out), "--legacy"]
    assert tool(arguments) == 1
    assert tool([*arguments, "--input-size", "64x64"]) == 0
    written = manifests.read(out)
    assert written.input.size == (64, 64)
    assert written.input.colour == "rgb"
    assert not manifests.beside(path).exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--names", "person,dog"], 1, "manifest: output output has shape"),
        (["--names", "nowhere.txt"], 1, "cannot read class names from nowhere.txt"),
        (["--names", "person,person,car"], 1, "each class name once"),
        (["--layout", "decoded"], 1, "declare it undecoded"),
        (["--layout", "raw"], 2, "invalid choice"),
        (["--input-size", "64"], 2, "is not WIDTHxHEIGHT"),
        (["--frontend", "yolo"], 2, "invalid choice"),
    ],
)
def test_the_tool_refuses(
    tmp_path: Path, tool: Callable, capsys: pytest.CaptureFixture, arguments: list[str], code: int, words: str
) -> None:
    path = detector(tmp_path / "a.onnx", answer())
    try:
        result = tool([str(path), "--frontend", "yolox", "--names", "a,b,c", *arguments])
    except SystemExit as leaving:
        result = leaving.code
    assert result == code
    assert words in capsys.readouterr().err
    assert not manifests.beside(path).exists()
