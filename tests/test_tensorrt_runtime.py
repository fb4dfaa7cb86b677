"""TensorRT behind named tensors: torch owns the memory, each batch size has its context, faults have words.

Without a GPU against a fake of TensorRT's interface that computes at the addresses it is given, and against
the real TensorRT-RTX as far as it goes there; with one against TensorRT itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import without_gpu
from fake_tensorrt import DTYPES, fake_tensorrt, plan, tensor
from torch import Tensor

from tracker import manifest as manifests
from tracker.errors import ConfigError, EngineError
from tracker.graphs import Graphs
from tracker.manifest import Manifest
from tracker.runtimes.tensorrt import Engine, TensorRTRuntime, library_of, split_metadata

CPU = torch.device("cpu")
EXAMPLE = Path(__file__).resolve().parent.parent / "engines" / "fairmot_demo.onnx.json"


@pytest.fixture(params=["8.6.1", "10.3.0"])
def trt(request: pytest.FixtureRequest) -> ModuleType:
    return fake_tensorrt(request.param)


def opened(folder: Path, trt: ModuleType, content: bytes | None = None, **options: Any) -> TensorRTRuntime:
    path = folder / "a.engine"
    path.write_bytes(plan() if content is None else content)
    return TensorRTRuntime(path, device=CPU, bindings=trt, **options)


def images(count: int) -> Tensor:
    return torch.arange(12.0 * count).reshape(count, 3, 2, 2)


def test_an_engine_says_what_it_takes_and_gives(tmp_path: Path, trt: ModuleType) -> None:
    runtime = opened(tmp_path, trt)
    assert runtime.inputs == {"x": (None, 3, 2, 2)}
    assert runtime.outputs == {"y": (None, 3, 2, 2)}
    assert runtime.dtypes == {"x": torch.float32, "y": torch.float32}
    assert (runtime.max_batch, runtime.lanes) == (4, 2)
    assert runtime.description == f"tensorrt {trt.__version__} on cpu"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_batch_is_answered_in_memory_of_its_own(tmp_path: Path, trt: ModuleType, count: int) -> None:
    runtime = opened(tmp_path, trt)
    first = runtime.run({"x": images(count)})["y"]
    runtime.run({"x": -images(4)})
    torch.testing.assert_close(first, 2 * images(count))


def test_a_lane_works_in_its_own_buffers(tmp_path: Path, trt: ModuleType) -> None:
    one, other = (opened(tmp_path, trt).lane() for _ in range(2))
    assert one.inputs["x"].shape == (4, 3, 2, 2)
    one.inputs["x"][:2] = images(2)
    other.inputs["x"][:2] = 7
    answer = one.enqueue(2)["y"]
    assert torch.equal(other.enqueue(2)["y"], torch.full((2, 3, 2, 2), 14.0))
    assert torch.equal(answer, 2 * images(2))  # of no concern to the other
    one.inputs["x"][:1] = 5
    assert one.enqueue(1)["y"].data_ptr() == answer.data_ptr()
    assert torch.equal(answer[0], torch.full((3, 2, 2), 10.0))  # until its own next


def test_once_a_batch_size_has_run_only_runs_follow(tmp_path: Path, trt: ModuleType) -> None:
    lane = opened(tmp_path, trt).lane()
    for batch in (4, 1, 3):
        lane.enqueue(batch)
    trt.said.clear()
    for batch in (1, 4, 3, 3):
        lane.enqueue(batch)
    assert trt.said == ["execute"] * 4


def test_a_thread_keeps_its_lane(tmp_path: Path, trt: ModuleType) -> None:
    runtime = opened(tmp_path, trt)
    runtime.run({"x": images(2)})
    trt.said.clear()
    runtime.run({"x": images(2)})
    assert trt.said == ["execute"]


def test_a_failed_first_run_is_tried_afresh(tmp_path: Path, trt: ModuleType) -> None:
    runtime = opened(tmp_path, trt, plan(fault="memory", where="run"))
    lane = runtime.lane()
    for _ in range(2):
        trt.said.clear()
        with pytest.raises(EngineError, match=r"failed to run: .*out of memory.*; free GPU memory"):
            lane.enqueue(2)
        assert "context" in trt.said


def test_a_static_batch_takes_fewer_images_in_a_lane(tmp_path: Path, trt: ModuleType) -> None:
    shape = (3, 2, 2, 2)
    runtime = opened(tmp_path, trt, plan(tensor("x", shape), tensor("y", shape, of="x")))
    assert runtime.inputs == {"x": shape}
    lane = runtime.lane()
    lane.inputs["x"][:2] = 1
    assert torch.equal(lane.enqueue(2)["y"], torch.full((2, 2, 2, 2), 2.0))
    trt.said.clear()
    lane.enqueue(3)
    assert trt.said == ["execute"]  # the same context: the engine always runs all rows
    with pytest.raises(EngineError, match="input x needs shape 3×2×2×2, got 2×2×2×2"):
        runtime.run({"x": torch.ones(2, 2, 2, 2)})


def test_a_profile_may_begin_above_one(tmp_path: Path, trt: ModuleType) -> None:
    runtime = opened(tmp_path, trt, plan(profile=(2, 2, 4)))
    torch.testing.assert_close(runtime.run({"x": images(1)})["y"], 2 * images(1))


@pytest.mark.parametrize("batch", [0, 5, -1])
def test_a_batch_beyond_the_profile(tmp_path: Path, trt: ModuleType, batch: int) -> None:
    with pytest.raises(EngineError, match=f"batch is {batch}; this engine takes 1 to 4 images"):
        opened(tmp_path, trt).lane().enqueue(batch)


def test_a_lane_without_memory_for_it(tmp_path: Path, trt: ModuleType) -> None:
    runtime = opened(tmp_path, trt, plan(memory=1 << 60))
    with pytest.raises(EngineError, match=r"needs 1099511627776 MiB .*more than cpu has left: use fewer"):
        runtime.lane()


def test_a_profile_that_is_not_shared(tmp_path: Path) -> None:
    """As 8.6 answers the second context of an engine built without PROFILE_SHARING_0806."""
    trt = fake_tensorrt("8.6.1")
    lane = opened(tmp_path, trt, plan(fault="profile", where="share")).lane()
    with pytest.raises(EngineError, match=r"serves no more than one batch size at once: .*build it again"):
        lane.enqueue(1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_there_is(tmp_path: Path, trt: ModuleType, dtype: str) -> None:
    runtime = opened(tmp_path, trt, plan(tensor("x", dtype=dtype), tensor("y", of="x", dtype=dtype)))
    assert runtime.dtypes["x"] == DTYPES[dtype]
    given = (images(1) % 2).to(DTYPES[dtype])
    answer = runtime.run({"x": given})["y"]
    assert answer.dtype == DTYPES[dtype]
    assert torch.equal(answer, (given.double() * 2).to(DTYPES[dtype]))


@pytest.mark.parametrize("layout", ["HWC", "HWC8", "HWC16"])
def test_layouts_with_channels_last(tmp_path: Path, trt: ModuleType, layout: str) -> None:
    half = {"dtype": "HALF", "layout": layout}
    runtime = opened(tmp_path, trt, plan(tensor("x", **half), tensor("y", of="x", **half)))
    lane = runtime.lane()
    assert lane.inputs["x"].shape == (4, 3, 2, 2)
    assert lane.inputs["x"].stride(3) == {"HWC": 3, "HWC8": 8, "HWC16": 16}[layout]
    torch.testing.assert_close(runtime.run({"x": images(3)})["y"].float(), 2 * images(3))


def test_several_inputs_and_outputs_go_by_name(tmp_path: Path, trt: ModuleType) -> None:
    tensors = tensor("b", of="y"), tensor("x"), tensor("a", of="x"), tensor("y", dtype="INT32")
    runtime = opened(tmp_path, trt, plan(*tensors))
    whole = torch.ones(2, 3, 2, 2, dtype=torch.int32)
    answer = runtime.run({"y": whole, "x": images(2)})
    torch.testing.assert_close(answer["a"], 2 * images(2))
    torch.testing.assert_close(answer["b"], 2 * torch.ones(2, 3, 2, 2))
    for inputs, words in (
        ({"x": images(2)}, "takes inputs x, y, not x"),
        ({"x": images(2), "y": images(2)}, "input y needs torch.int32, got torch.float32"),
        ({"x": images(1), "y": whole}, "all inputs need one batch size, got 1, 2"),
        ({"x": images(5), "y": torch.cat([whole] * 3)[:5]}, "takes 1 to 4 images"),
        ({"x": images(2)[:, :1], "y": whole}, "input x needs shape \\?×3×2×2, got 2×1×2×2"),
    ):
        with pytest.raises(EngineError, match=words):
            runtime.run(inputs)


def test_threads_run_at_once_each_in_a_lane(tmp_path: Path, trt: ModuleType) -> None:
    runtime = opened(tmp_path, trt)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for turn in range(50):
            given = images(1 + turn % 4) + seed
            if not torch.equal(runtime.run({"x": given})["y"], 2 * given):
                wrong.append(turn)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("gpu", "expecting compute 9.0 got compute 8.6.*belongs to another GPU.*tools/build.py"),
        ("version", "expecting library version 8.6.1.6 got 8.5.3.1.*another version of TensorRT"),
        ("plugin", "Plugin Registry.*lacks an operator or its plugin"),
        ("memory", "out of memory.*free GPU memory"),
        ("rtx gpu", "does not support this compute capability.*belongs to another GPU"),
    ],
)
@pytest.mark.parametrize("where", ["load", "context"])
def test_what_tensorrt_logs_becomes_our_error(
    tmp_path: Path, trt: ModuleType, fault: str, where: str, words: str
) -> None:
    with pytest.raises(EngineError, match=words) as error:
        opened(tmp_path, trt, plan(fault=fault, where=where))
    assert "a.engine" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"text", plan()[:50], b"\0" * 100])
def test_a_damaged_file(tmp_path: Path, trt: ModuleType, content: bytes) -> None:
    with pytest.raises(EngineError, match=r"a\.engine cannot be loaded: .*damaged, or no engine"):
        opened(tmp_path, trt, content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (plan(tensor("x", (-1, 3, -1, -1)), tensor("y", of="x")), "only its first dimension.* may be open"),
        (plan(profiles=2), "has 2 optimisation profiles; it may have one"),
        (plan(tensor("x"), tensor("z", (2, 3)), tensor("y", of="x")), "inputs differ in their batch"),
        (plan(tensor("x"), tensor("y", (-1, -1), of="x")), "output y has shape .*such as NMS"),
        (plan(tensor("x"), tensor("y", (300, 6), of="x")), "output y has shape .300, 6. for 4 images"),
        (plan(tensor("x"), tensor("y", of="x", location="HOST")), "output y is a shape.* on the host"),
        (plan(tensor("x", dtype="INT4"), tensor("y", of="x")), "input x is INT4, a type torch does not"),
        (plan(tensor("x", layout="CHW32"), tensor("y", of="x")), "laid out as CHW32; LINEAR, HWC"),
    ],
)
def test_engines_that_no_lane_can_hold(tmp_path: Path, trt: ModuleType, content: bytes, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        opened(tmp_path, trt, content)


def manifest_of(content: bytes, **changes: Any) -> Manifest:
    found = hashlib.sha256(content).hexdigest()
    return dataclasses.replace(manifests.read(EXAMPLE), engine_sha256=found, **changes)


def test_the_file_its_manifest_describes_is_loaded(tmp_path: Path, trt: ModuleType) -> None:
    manifest = manifest_of(plan(), tensorrt_version=trt.__version__, sm=90, builder="tensorrt")
    assert opened(tmp_path, trt, manifest=manifest).max_batch == 4


def test_another_file_is_never_given_to_tensorrt(tmp_path: Path, trt: ModuleType) -> None:
    with pytest.raises(EngineError, match="is not the file its manifest"):
        opened(tmp_path, trt, manifest=manifest_of(plan() + b" "))
    with pytest.raises(EngineError, match=r"built with TensorRT 7\.2\.1, this is .*build it again"):
        opened(tmp_path, trt, manifest=manifest_of(plan(), tensorrt_version="7.2.1"))
    assert trt.said == []


def test_engines_bring_no_code_for_the_host(tmp_path: Path, trt: ModuleType) -> None:
    opened(tmp_path, trt)
    assert trt.last.engine_host_code_allowed is False


def prefixed(text: bytes) -> bytes:
    return len(text).to_bytes(4, "little") + text + plan()


def test_what_ultralytics_writes_before_the_plan_is_kept_and_skipped(tmp_path: Path, trt: ModuleType) -> None:
    said = {"stride": 32, "names": {"0": "person"}, "imgsz": [640, 640]}
    runtime = opened(tmp_path, trt, prefixed(json.dumps(said).encode()))
    assert runtime.metadata == said
    torch.testing.assert_close(runtime.run({"x": images(2)})["y"], 2 * images(2))
    assert opened(tmp_path, trt).metadata == {}


@pytest.mark.parametrize(
    "content", [b"", b"{", prefixed(b"{nothing}"), prefixed(b"[1]"), b"\x10\0\0\0{}", prefixed(b"{\xff}")]
)
def test_a_prefix_that_is_none_is_left_to_tensorrt(content: bytes) -> None:
    metadata, rest = split_metadata(content)
    assert metadata == {}
    assert bytes(rest) == content


def test_a_directory_or_nothing(tmp_path: Path, trt: ModuleType) -> None:
    for path in (tmp_path, tmp_path / "missing.engine"):
        with pytest.raises(EngineError, match=f"cannot read {path}"):
            TensorRTRuntime(path, device=CPU, bindings=trt)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"device": "gpu"}, ConfigError, "device is 'gpu'; it must be auto, cpu, cuda or cuda:N"),
        ({"device": "cpu"}, EngineError, "needs an NVIDIA GPU, and the CPU is asked for: use the .onnx"),
        ({"device": "cuda:99"}, EngineError, "device cuda:99 asked for, but torch sees"),
        ({"lanes": 0}, ConfigError, "lanes is 0; it must be at least 1"),
    ],
)
def test_impossible_options(tmp_path: Path, options: dict[str, Any], kind: type, words: str) -> None:
    (tmp_path / "a.engine").write_bytes(plan())
    with pytest.raises(kind, match=words):
        TensorRTRuntime(tmp_path / "a.engine", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_error_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.engine").write_bytes(plan())
    for device in ("auto", "cuda", "cuda:0"):
        with pytest.raises(EngineError, match=r"no CUDA device|torch sees 0 CUDA devices"):
            TensorRTRuntime(tmp_path / "a.engine", device=device)


def rtx_plan(rtx: Any) -> bytes:
    """y = |x| for 1 to 4 images, built by TensorRT-RTX, which needs no GPU for it."""
    from tracker.runtimes.trt import collector

    builder = rtx.Builder(collector(rtx))
    network, config = builder.create_network(), builder.create_builder_config()
    x = network.add_input("x", rtx.float32, (-1, 3, 8, 8))
    y = network.add_unary(x, rtx.UnaryOperation.ABS).get_output(0)
    y.name = "y"
    network.mark_output(y)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))
    config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))


def test_a_real_plan_names_its_library(rtx: Any) -> None:
    assert library_of(memoryview(rtx_plan(rtx))) == "tensorrt_rtx"
    assert library_of(memoryview(plan())) == "tensorrt"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_real_library_without_a_driver(rtx: Any) -> None:
    whole = rtx_plan(rtx)
    with pytest.raises(EngineError, match=r"rtx\.engine cannot be loaded: .*cudaError.*NVIDIA driver"):
        Engine(whole, trt=rtx, device=CPU, name="rtx.engine")
    with pytest.raises(EngineError, match=r"Serialization assertion plan\.header\.size"):
        Engine(whole[: len(whole) // 2], trt=rtx, device=CPU, name="rtx.engine")


def test_where_a_gpu_is_promised_its_tests_fail_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKER_REQUIRE_GPU", "1")
    with pytest.raises(pytest.fail.Exception, match="no GPU"):
        without_gpu("no GPU")
    monkeypatch.delenv("TRACKER_REQUIRE_GPU")
    with pytest.raises(pytest.skip.Exception, match="no GPU"):
        without_gpu("no GPU")


def test_graphs_without_cuda_are_plain_calls() -> None:
    calls: list[int] = []
    graphs = Graphs(lambda batch: calls.append(batch) or batch, CPU)
    assert [graphs(2), graphs(2), graphs(3)] == calls == [2, 2, 3]
    assert graphs.problem == "no CUDA graphs on cpu"


# With a GPU and TensorRT itself


@pytest.fixture(scope="module")
def real(tensorrt: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP32 images (1 to 4, 3, 32, 32) → y = 2 |x| and its FP16 mean over each channel, m."""
    from tracker.runtimes.trt import collector

    trt = tensorrt
    builder = trt.Builder(collector(trt))
    explicit = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
    network = builder.create_network(0 if explicit is None else 1 << int(explicit))
    config = builder.create_builder_config()
    if hasattr(config, "set_tactic_sources"):  # no cuBLAS and cuDNN needed
        config.set_tactic_sources(1 << int(trt.TacticSource.JIT_CONVOLUTIONS))
    if hasattr(getattr(trt, "PreviewFeature", None), "PROFILE_SHARING_0806"):
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
    x = network.add_input("x", trt.float32, (-1, 3, 32, 32))
    absolute = network.add_unary(x, trt.UnaryOperation.ABS).get_output(0)
    double = network.add_elementwise(absolute, absolute, trt.ElementWiseOperation.SUM).get_output(0)
    mean = network.add_reduce(double, trt.ReduceOperation.AVG, 0b1100, False).get_output(0)
    for name, output in (("y", double), ("m", mean)):
        output.name = name
        network.mark_output(output)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 3, 32, 32), (2, 3, 32, 32), (4, 3, 32, 32))
    config.add_optimization_profile(profile)
    path = tmp_path_factory.mktemp("real") / "a.engine"
    path.write_bytes(bytes(builder.build_serialized_network(network, config)))
    return path


def doubled(x: Tensor) -> dict[str, Tensor]:
    return {"y": 2 * x.abs(), "m": 2 * x.abs().mean((2, 3))}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_real_engine_answers(real: Path, gpu: torch.device, count: int) -> None:
    runtime = TensorRTRuntime(real)
    assert runtime.uncapturable is None
    for _ in range(3):  # captured, then replayed
        x = torch.randn(count, 3, 32, 32)
        torch.testing.assert_close(runtime.run({"x": x}), doubled(x.to(gpu)))


def test_a_real_lane_in_its_callers_graph(real: Path, gpu: torch.device) -> None:
    lane = TensorRTRuntime(real).lane()
    work = Graphs(lambda batch: {k: v + 1 for k, v in lane.enqueue(batch).items()}, gpu)
    x = torch.randn(4, 3, 32, 32, device=gpu)
    for batch in (4, 2, 4, 1, 2):
        lane.inputs["x"].copy_(x)
        want = {name: value + 1 for name, value in doubled(x[:batch]).items()}
        torch.testing.assert_close(work(batch), want)
    assert work.problem is None


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_batch_size_that_never_ran_is_not_captured(real: Path, gpu: torch.device) -> None:
    lane, graph = TensorRTRuntime(real).lane(), torch.cuda.CUDAGraph()
    with (
        pytest.raises(EngineError, match="batch 3 has not run yet: enqueue it once"),
        torch.cuda.graph(graph),
    ):
        lane.enqueue(3)


def test_real_lanes_in_threads(real: Path, gpu: torch.device) -> None:
    runtime = TensorRTRuntime(real)
    worst: list[float] = []

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream(gpu)):
            for turn in range(200):
                x = torch.full((1 + turn % 4, 3, 32, 32), float(seed + turn), device=gpu)
                y = runtime.run({"x": x})["y"]
                worst.append(float((y - 2 * x).abs().max()))

    threads = [threading.Thread(target=work, args=(1000 * seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(worst) == 600
    assert max(worst) == 0


def test_a_real_engine_cut_short(real: Path, tmp_path: Path) -> None:
    for part in (0.0, 0.1, 0.5, 0.99):
        path = tmp_path / "cut.engine"
        path.write_bytes(real.read_bytes()[: int(real.stat().st_size * part)])
        with pytest.raises(EngineError, match=r"cut\.engine cannot be loaded: .*build it again"):
            TensorRTRuntime(path)


def test_a_manifest_of_another_gpu(real: Path, gpu: torch.device) -> None:
    with pytest.raises(EngineError, match=r"built for sm_75, this GPU .* is sm_\d+: build it again"):
        TensorRTRuntime(real, manifest=manifest_of(real.read_bytes(), sm=75))
