"""tools/bench.py engine: what the table holds, not how fast this machine is."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def test_an_engine_is_timed_stage_by_stage_at_the_batches_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo, out = ROOT / "engines" / "fairmot_demo.onnx", tmp_path / "times.json"
    options = ["engine", str(demo), "--batch", "1,64", "--source-size", "64x48", "--repeat", "1"]
    monkeypatch.setattr(sys, "argv", ["bench.py", *options, "--device", "cpu", "--json", str(out)])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "tools" / "bench.py"), run_name="__main__")
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["engine"], row["batch"], row["memory_mib"]) == ("fairmot_demo.onnx", 1, None)
    stages = row["stages"]
    assert list(stages) == ["preprocess", "inference", "postprocess", "all"]
    assert min(stages.values()) > 0
    assert row["lanes_fps"] > 0
    assert "fairmot_demo.onnx" in capsys.readouterr().out
