"""tools/bench.py engine: what the tables hold, not how fast this machine is."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor

from tracker import engine_times
from tracker.deploy import peers
from tracker.deploy.export import ExportConfig, export_fairmot, generated_frames
from tracker.deploy.peers import EAGER, Peer
from tracker.engine_times import Times
from tracker.errors import ConfigError
from tracker.models.checkpoint import save_fairmot
from tracker.models.deform import deform_conv2d
from tracker.models.fairmot import FairMOT, FairMOTConfig, random_fairmot

pytestmark = pytest.mark.usefixtures("one_thread")

DEMO = ROOT / "engines" / "fairmot_demo.onnx"
Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The tool as it is called, and the JSON that it wrote."""

    def run(*options: str) -> dict[str, Any]:
        out = tmp_path / "times.json"
        common = ["--source-size", "64x48", "--repeat", "1", "--device", "cpu", "--json", str(out)]
        monkeypatch.setattr(sys, "argv", ["bench.py", "engine", *options, *common])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(ROOT / "tools" / "bench.py"), run_name="__main__")
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    return run


@pytest.fixture(scope="module")
def network() -> FairMOT:
    return random_fairmot(FairMOTConfig(width=0.25, max_channels=48, head_channels=8, embedding=8))


@pytest.fixture(scope="module")
def engine(network: FairMOT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "small.onnx"
    export_fairmot(network, path, ExportConfig(size=(96, 64), batch=None), generated_frames((162, 90)))
    return path


def test_an_engine_is_timed_stage_by_stage_at_the_batches_it_takes(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench(str(DEMO), "--batch", "1,64")
    (row,) = found["rows"]
    assert (row["engine"], row["batch"], row["memory_mib"]) == ("fairmot_demo.onnx", 1, None)
    stages = row["stages"]
    assert list(stages) == ["preprocess", "inference", "postprocess", "all"]
    assert min(stages.values()) > 0
    assert row["lanes_fps"] > 0
    assert row["latency_ms"] > stages["inference"] / 2
    assert found["peers"] == []
    assert "fairmot_demo.onnx" in capsys.readouterr().out


def test_peers_run_the_engines_own_network_beside_it(
    bench: Bench, engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench(str(engine), "--peers", "--batch", "1,2")
    assert [(peer["name"].startswith(EAGER), peer["batch"]) for peer in found["peers"]] == [
        (True, 1),
        (True, 2),
    ]
    for row, peer in zip(found["rows"], found["peers"], strict=True):
        assert peer["times_engine"] == pytest.approx(peer["ms"] / row["stages"]["inference"])
        assert (peer["latency_ms"] > 0, peer["memory_mib"], peer["problem"]) == (True, None, None)
    told = capsys.readouterr().out
    assert "network alone, ms per batch" in told
    assert "peers: the network in small.onnx, 96×64" in told


class TestNetwork:
    def test_is_that_of_the_file_it_was_made_from(
        self, engine: Path, network: FairMOT, tmp_path: Path
    ) -> None:
        model, words = peers.network_of(engine)
        assert (model.config, words) == (network.config, "the network in small.onnx")
        other = random_fairmot(FairMOTConfig(width=0.125, head_channels=8))
        save_fairmot(other, tmp_path / "other.pth", epoch=1)
        model, words = peers.network_of(engine, tmp_path / "other.pth")
        assert (model.config, words) == (other.config, "the network in other.pth")

    def test_is_the_official_one_where_none_can_be_had(self, engine: Path, tmp_path: Path) -> None:
        about = json.loads(engine.with_name("small.onnx.json").read_text()) | {"names": ["person", "car"]}
        (tmp_path / "far.engine.json").write_text(json.dumps(about))
        model, words = peers.network_of(tmp_path / "far.engine")
        assert (model.config, words) == (FairMOTConfig(classes=2), "FairMOT DLA-34, random weights")

    def test_of_another_family_is_refused(self, engine: Path, tmp_path: Path) -> None:
        about = json.loads(engine.with_name("small.onnx.json").read_text()) | {"frontend": "yolox"}
        (tmp_path / "a.onnx.json").write_text(json.dumps(about))
        with pytest.raises(ConfigError, match="is of yolox; peers are there for fairmot"):
            peers.network_of(tmp_path / "a.onnx")


def test_torchvisions_deformable_convolution_is_taken_where_there_is_one(
    network: FairMOT, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def theirs(
        x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, *, padding: int, mask: Tensor
    ) -> Tensor:
        """torchvision.ops.deform_conv2d's arguments, as its documentation has them."""
        calls.append(padding)
        return deform_conv2d(x, offset, mask, weight, bias)

    monkeypatch.setattr(peers, "_torchvision", lambda: theirs)
    images = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        found, expected = peers.as_users_run_it(network)(images), network(images)
    assert calls == [1] * 16
    for role, head in expected.items():
        torch.testing.assert_close(found[role], head, rtol=1e-4, atol=1e-4)


def times(name: str, batch: int, ms: float) -> Times:
    stages = dict.fromkeys(("preprocess", "inference", "postprocess", "all"), ms)
    return Times(engine=name, batch=batch, stages=stages, latency_ms=ms, lanes_fps=1, memory_mib=None)


def test_an_engine_that_cannot_be_captured_is_told_of_once() -> None:
    """Its times are those of launches, not of the device."""
    rows = [
        replace(times("a.engine", batch, 2.0), problem="without CUDA graphs: CUDA said no")
        for batch in (1, 4)
    ]
    said = engine_times.table([*rows, times("b.engine", 1, 1.0)]).splitlines()
    assert said[4:] == ["a.engine: without CUDA graphs: CUDA said no"]


def test_the_table_has_engines_peers_and_what_went_wrong() -> None:
    engines = [times("a.engine", 1, 2.0), times("a.engine", 8, 8.0), times("b.engine", 1, 4.0)]
    beside = [
        Peer(name="eager", batch=1, ms=10.0, times_engine=5.0),
        Peer(name="eager", batch=8, ms=40.0, times_engine=5.0),
        Peer(name="compiled", batch=1, problem="no compiler"),
        Peer(name="compiled", batch=8, problem="no compiler"),
    ]
    assert [line.split("  ")[0].strip() for line in peers.table(engines, beside).splitlines()] == [
        "network alone, ms per batch", "a.engine", "b.engine", "eager", "compiled", "compiled: no compiler"
    ]  # fmt: skip
    rows = {line.split("  ")[0]: line.split()[1:] for line in peers.table(engines, beside).splitlines()}
    assert rows["b.engine"] == ["4.000", "–"]
    assert rows["eager"] == ["10.000", "(5.0×)", "40.000", "(5.0×)"]
    assert rows["compiled"] == ["–", "–"]


@pytest.mark.filterwarnings("default")  # torch's compiler warns about what it does
def test_on_a_gpu_all_three_run_and_are_counted(network: FairMOT, gpu: torch.device) -> None:
    found = peers.measure(
        network, [times("a", 1, 1.0)], size=(96, 64), batches=[1, 2], device="cuda:0", repeats=2
    )
    assert [peer.problem for peer in found] == [None] * 6
    assert all(peer.ms and peer.latency_ms for peer in found)
    assert [peer.times_engine is not None for peer in found] == [True] * 3 + [False] * 3
