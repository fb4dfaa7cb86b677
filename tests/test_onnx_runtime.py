"""ONNX Runtime behind named tensors: right answers, memory of their own, and words for what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_files import save

from tracker.errors import ConfigError, EngineError
from tracker.runtimes.onnx import OnnxRuntime


def affine(path: Path, *, batch: int | str = 1, kind: int = TensorProto.FLOAT) -> Path:
    """double = 2 x, sum = x + y, both (batch, 4)."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["double"]),
        helper.make_node("Add", ["x", "y"], ["sum"]),
    ]
    weights = [numpy_helper.from_array(np.array([2], dtype), "two")]
    shapes = {"x": (batch, 4), "y": (batch, 4)}
    return save(path, nodes, shapes, {"double": (batch, 4), "sum": (batch, 4)}, weights=weights, kind=kind)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.arange(4.0)[None]


def test_named_tensors_in_and_out(tmp_path: Path, x: torch.Tensor) -> None:
    runtime = OnnxRuntime(affine(tmp_path / "a.onnx"), device="cpu", threads=1)
    assert runtime.inputs == {"x": (1, 4), "y": (1, 4)}
    assert runtime.outputs == {"double": (1, 4), "sum": (1, 4)}
    assert onnxruntime.__version__ in runtime.description
    answer = runtime.run({"y": torch.ones(1, 4), "x": x})  # by name, not by order
    torch.testing.assert_close(answer["double"], 2 * x)
    torch.testing.assert_close(answer["sum"], x + 1)


def test_answers_outlive_later_runs_and_the_runtime(tmp_path: Path, x: torch.Tensor) -> None:
    runtime = OnnxRuntime(affine(tmp_path / "a.onnx"))
    first = runtime.run({"x": x, "y": x})["sum"]
    for _ in range(20):
        runtime.run({"x": -x, "y": -x})
    del runtime
    torch.testing.assert_close(first, 2 * x)


@pytest.mark.parametrize("count", [1, 3])
def test_an_open_batch_takes_any(tmp_path: Path, count: int) -> None:
    runtime = OnnxRuntime(affine(tmp_path / "a.onnx", batch="N"))
    assert runtime.inputs["x"] == (None, 4)
    ones = torch.ones(count, 4)
    torch.testing.assert_close(runtime.run({"x": ones, "y": ones})["sum"], 2 * ones)


def test_half_precision_engines_take_and_give_it(tmp_path: Path, x: torch.Tensor) -> None:
    runtime = OnnxRuntime(affine(tmp_path / "a.onnx", kind=TensorProto.FLOAT16))
    for given in (x, x.half()):
        answer = runtime.run({"x": given, "y": given})["sum"]
        assert answer.dtype == torch.float16
        torch.testing.assert_close(answer.float(), 2 * x)


def test_strided_inputs_are_read_as_they_look(tmp_path: Path) -> None:
    runtime = OnnxRuntime(affine(tmp_path / "a.onnx"))
    strided = torch.arange(8.0).reshape(4, 2).T[:1]  # 0, 2, 4, 6
    torch.testing.assert_close(runtime.run({"x": strided, "y": strided})["sum"], 2 * strided)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"x": torch.ones(1, 4)}, "takes inputs x, y, not x"),
        ({"x": torch.ones(1, 4), "z": torch.ones(1, 4)}, "takes inputs x, y, not x, z"),
        ({}, "not none"),
        ({"x": torch.ones(1, 5), "y": torch.ones(1, 4)}, "input x needs shape 1×4, got 1×5"),
        ({"x": torch.ones(1, 4), "y": torch.ones(4)}, "input y needs shape 1×4, got 4"),
        ({"x": torch.ones(1, 4, dtype=torch.int64), "y": torch.ones(1, 4)}, "needs torch.float32, got"),
    ],
)
def test_wrong_inputs_are_named(tmp_path: Path, inputs: dict[str, torch.Tensor], words: str) -> None:
    runtime = OnnxRuntime(affine(tmp_path / "a.onnx"))
    with pytest.raises(EngineError, match=words):
        runtime.run(inputs)


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    shape = numpy_helper.from_array(np.array([5], np.int64), "shape")
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    runtime = OnnxRuntime(save(tmp_path / "a.onnx", [node], {"x": ["N"]}, {"y": ["M"]}, weights=[shape]))
    with pytest.raises(EngineError, match=r"failed to run: .*Reshape"):
        runtime.run({"x": torch.ones(4)})


def bad_file(folder: Path, fault: str) -> Path:
    path = folder / "bad.onnx"
    relu = helper.make_node("Relu", ["x"], ["y"])
    shapes = {"x": [4]}, {"y": [4]}
    match fault:
        case "missing":
            pass
        case "directory":
            path.mkdir()
        case "empty":
            path.touch()
        case "text":
            path.write_text("this is no model\n" * 50)
        case "truncated":
            big = numpy_helper.from_array(np.ones(4000, np.float32), "big")
            save(path, [helper.make_node("Add", ["x", "big"], ["y"])], *shapes, weights=[big])
            path.write_bytes(path.read_bytes()[:9000])
        case "opset":
            save(path, [relu], *shapes, opset=99)
        case "operator":
            save(path, [helper.make_node("DCNv2", ["x"], ["y"], domain="nowhere")], *shapes)
        case "external data":
            save(path, [helper.make_node("Add", ["x", "w"], ["y"])], *shapes,
                 weights=[numpy_helper.from_array(np.ones(4, np.float32), "w")])  # fmt: skip
            model = onnx.load(path)
            onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
            (folder / "weights.bin").unlink()
    return path


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("missing", "bad.onnx is missing: name an .onnx file"),
        ("directory", "bad.onnx is a directory"),
        ("empty", "no ONNX model or is cut short: export or copy it again"),
        ("text", "no ONNX model or is cut short"),
        ("truncated", "no ONNX model or is cut short"),
        ("opset", "Opset 99 is under development.*; export it again with what ONNX Runtime"),
        ("operator", "nowhere:DCNv2.* is not a registered function/op; export it again"),
        ("external data", "its weights lie in a separate file: put that file beside it"),
    ],
)
def test_files_that_cannot_be_loaded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], fault: str, words: str
) -> None:
    with pytest.raises(EngineError, match=words) as error:
        OnnxRuntime(bad_file(tmp_path, fault))
    message = str(error.value)
    assert "\n" not in message
    assert "onnxruntime_src" not in message
    assert capfd.readouterr() == ("", "")  # ONNX Runtime itself stays quiet


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:", "CPU", ""])
def test_a_device_that_is_none(tmp_path: Path, device: str) -> None:
    with pytest.raises(ConfigError, match="it must be auto, cpu, cuda or cuda:N"):
        OnnxRuntime(affine(tmp_path / "a.onnx"), device=device)


@pytest.mark.parametrize("key", ["threads", "lanes"])
def test_impossible_counts(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is 0; it must be at least 1"):
        OnnxRuntime(affine(tmp_path / "a.onnx"), **{key: 0})


def test_lanes_share_the_cores_of_a_cpu(tmp_path: Path) -> None:
    path = affine(tmp_path / "a.onnx")
    by_itself, alone = OnnxRuntime(path, device="cpu"), OnnxRuntime(path, device="cpu", lanes=1)
    assert alone.threads >= by_itself.threads == max(1, alone.threads // by_itself.lanes)
    assert OnnxRuntime(path, device="cpu", lanes=3, threads=2).threads == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_cuda_is_never_replaced_in_silence(tmp_path: Path, device: str) -> None:
    with pytest.raises(EngineError, match=f"device {device} asked for.*--device cpu"):
        OnnxRuntime(affine(tmp_path / "a.onnx"), device=device)
