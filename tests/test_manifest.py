"""A manifest survives its file, and every wrong word in it is named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tracker import manifest as manifests
from tracker.errors import ConfigError, EngineError, SinkError
from tracker.manifest import Input, Manifest

HASH = "0123456789abcdef" * 4
MANIFEST = Manifest(
    frontend="yolox",
    input=Input(
        name="images",
        size=(640, 384),
        layout="NCHW",
        colour="rgb",
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
        resize="corner",
        pad=114.0,
    ),
    outputs={"undecoded": "output"},
    names=("person", "Straßenbahn"),
    precision="fp16",
    onnx_sha256=HASH,
    engine_sha256=HASH,
    tensorrt_version="10.15.1",
    sm=89,
    builder="tensorrt",
    batch=(1, 4, 8),
)


def test_written_and_read_back(tmp_path: Path) -> None:
    path = manifests.beside(tmp_path / "X.onnx")
    assert path.name == "X.onnx.json"
    manifests.write(MANIFEST, path)
    assert manifests.read(path) == MANIFEST
    assert [each.name for each in tmp_path.iterdir()] == ["X.onnx.json"]


def test_what_only_tensorrt_needs_may_be_left_out(tmp_path: Path) -> None:
    raw = content()
    for key in ("tensorrt_version", "sm", "builder", "batch"):
        del raw[key]
    manifest = manifests.read(file(tmp_path, raw))
    assert manifest.sm is manifest.builder is manifest.batch is None


def content() -> dict[str, Any]:
    return {"format": 1, **json.loads(json.dumps(dataclasses.asdict(MANIFEST)))}


def file(folder: Path, raw: object) -> Path:
    path = folder / "X.onnx.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def put(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        for key in keys[:-1]:
            raw = raw[key]
        raw[keys[-1]] = value

    return change


def drop(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        for key in keys[:-1]:
            raw = raw[key]
        del raw[keys[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("format", value=2), "format is 2; it must be 1"),
        (drop("format"), "format is None"),
        (put("colour", value="bgr"), "unknown key colour; known: frontend, input"),
        (put("input", "color", value="bgr"), "unknown key input.color; known: name, size"),
        (drop("names"), "missing key names; needed: frontend"),
        (drop("input", "pad"), "missing key input.pad"),
        (drop("input"), "missing key input"),
        (put("input", value=3), "input is 3; it must be an object"),
        (put("frontend", value=""), "frontend is ''"),
        (put("input", "size", value=[416]), r"input.size is \(416,\); it must be \[width, height\]"),
        (put("input", "size", value=[416, 416.5]), "input.size"),
        (put("input", "size", value=[True, 416]), "input.size"),
        (put("input", "layout", value="NHWC"), "input.layout is 'NHWC'; it must be NCHW"),
        (put("input", "colour", value="grey"), "input.colour is 'grey'; it must be bgr or rgb"),
        (put("input", "mean", value=[0, 0]), "input.mean"),
        (put("input", "mean", value="000"), "input.mean"),
        (put("input", "std", value=[1, 1, 0]), "input.std"),
        (put("input", "std", value=[1, 1, float("inf")]), "input.std"),
        (put("input", "resize", value="letterbox"), "input.resize is 'letterbox'; it must be corner or"),
        (put("input", "pad", value=float("nan")), "input.pad"),
        (
            put("input", "interpolation", value="lanczos"),
            "input.interpolation is 'lanczos'; it must be linear or",
        ),
        (put("outputs", value={}), "outputs"),
        (put("outputs", value=["output"]), "outputs"),
        (put("outputs", "undecoded", value=0), "outputs"),
        (put("names", value=[]), "names"),
        (put("names", value="person"), "names is 'person'"),
        (put("names", value=["person", 1]), "names"),
        (
            put("names", value=["car", "person", "car"]),
            r"names is \['car'\]; it must be each class name once",
        ),
        (put("precision", value="fp8"), "precision is 'fp8'; it must be fp32 or fp16 or bf16 or int8"),
        (put("onnx_sha256", value="abc"), "onnx_sha256 is 'abc'; it must be 64 hexadecimal"),
        (put("engine_sha256", value=HASH.upper()), "engine_sha256"),
        (put("tensorrt_version", value=10), "tensorrt_version"),
        (put("sm", value="89"), "sm is '89'"),
        (put("builder", value="trtexec"), "builder is 'trtexec'; it must be tensorrt or tensorrt_rtx or"),
        (put("batch", value=8), "batch is 8; it must be three numbers, least, usual and greatest"),
        (put("batch", value=[1, 8]), r"batch is \(1, 8\)"),
        (put("batch", value=[0, 1, 8]), r"batch is \(0, 1, 8\)"),
        (put("batch", value=[4, 1, 8]), r"batch is \(4, 1, 8\)"),
    ],
)
def test_every_wrong_word_is_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    raw = content()
    change(raw)
    path = file(tmp_path, raw)
    with pytest.raises(ConfigError, match=words) as error:
        manifests.read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[]", b"null"])
def test_what_is_no_manifest_at_all(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "X.onnx.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=r"X\.onnx\.json"):
        manifests.read(path)


def test_a_manifest_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read manifest"):
        manifests.read(tmp_path / "X.onnx.json")


def test_the_engine_must_be_the_one_described(tmp_path: Path) -> None:
    engine = tmp_path / "X.onnx"
    engine.write_bytes(b"one")
    manifest = dataclasses.replace(MANIFEST, engine_sha256=manifests.sha256(engine))
    manifest.verify(engine)
    engine.write_bytes(b"two")
    with pytest.raises(
        EngineError,
        match=r"SHA-256 3fc4ccfe7458…, manifest 7692c3ad3540….*build it again with tools/build\.py",
    ):
        manifest.verify(engine)
    own = dataclasses.replace(manifest, tensorrt_version=None, sm=None, builder=None, batch=None)
    with pytest.raises(EngineError, match=r"write the manifest again with tools/manifest\.py"):
        own.verify(engine)
    engine.unlink()
    with pytest.raises(EngineError, match="cannot read"):
        manifest.verify(engine)


def test_writing_where_one_cannot(tmp_path: Path) -> None:
    with pytest.raises(SinkError, match="cannot write manifest"):
        manifests.write(MANIFEST, tmp_path / "nowhere" / "X.onnx.json")
    (tmp_path / "X.onnx.json").mkdir()
    with pytest.raises(SinkError, match="cannot write manifest"):
        manifests.write(MANIFEST, tmp_path / "X.onnx.json")
    assert [each.name for each in tmp_path.iterdir()] == ["X.onnx.json"]
