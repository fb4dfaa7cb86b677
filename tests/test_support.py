"""The support table: steps that do what they say, failures that stay where they happen, a README that agrees.

The system here is YOLOX at 96×64; where processes must die, nothing real.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
from conftest import ROOT
from support_steps import do, product

from tracker.deploy.build import Built, build
from tracker.deploy.detectors import DetectorExport, export_detector
from tracker.deploy.export import Export, generated_frames
from tracker.deploy.refusals import NoKernelError
from tracker.deploy.support import systems
from tracker.deploy.support.report import BEGIN, END, block, merged, table, with_block
from tracker.deploy.support.schedule import Found, Plan, Results, measure
from tracker.deploy.support.stand_ins import export_rtdetr, export_yolo
from tracker.deploy.support.steps import StepsConfig, plan_of, run_step, write_pictures
from tracker.deploy.support.systems import SYSTEMS, System
from tracker.errors import ConfigError, EngineError
from tracker.models.zoo import random_detector
from tracker.runtimes.trt import trt_module
from tracker.types import Frame

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (96, 64)
CLIP = str(ROOT / "videos" / "demo.mp4")


def small(name: str) -> System:
    """The system with YOLOX-nano and a small input."""

    def export(system: System, out: Path, frames: Sequence[Frame]) -> Export:
        model = random_detector("yolox-nano", SIZE)
        return export_detector(model, out, DetectorExport(name="yolox-nano", size=SIZE, batch=None), frames)

    return dataclasses.replace(SYSTEMS[name], size=SIZE, export=export)


@pytest.fixture
def config(tmp_path: Path) -> StepsConfig:
    config = StepsConfig(folder=tmp_path, data=CLIP, builders=("tensorrt_rtx",), frames=2, track_frames=3)
    write_pictures(config)
    return config


def test_a_system_goes_from_weights_to_tracks(config: StepsConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(systems.SYSTEMS, "yolox-s", small("yolox-s"))
    assert run_step("yolox-s", "export", config)["size"] == list(SIZE)
    assert run_step("yolox-s", "onnx", config)["outputs"] == {"output": [1, 126, 85]}
    found = run_step("yolox-s", "int8", config)
    assert found["layers"] > found["not quantised"] and found["cosine"]["output"] > 0.9
    assert run_step("yolox-s", "track", config)["frames"] == 3
    try:
        trt_module("tensorrt_rtx")
    except EngineError as error:
        pytest.skip(str(error))
    assert run_step("yolox-s", "tensorrt_rtx int8", config)["mb"] > 0


def test_layers_that_tensorrt_has_no_kernel_for_are_left_out(
    config: StepsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder refuses two layers, one after the other, by their names; without both it builds."""
    monkeypatch.setitem(systems.SYSTEMS, "yolox-s", small("yolox-s"))
    for step in ("export", "onnx", "int8"):
        run_step("yolox-s", step, config)
    refused = ["head.stems.0.conv", "head.stems.1.conv"]
    quantised = []

    def builder(source: Path, out: Path, *args: Any, **more: Any) -> Built:
        weights = {node.input[1] for node in onnx.load(source).graph.node if node.op_type == "Conv"}
        quantised.append([layer for layer in refused if f"{layer}.weight.dq" in weights])
        if quantised[-1]:
            raise NoKernelError("no kernel", tuple(quantised[-1][:1]))
        return build(source, out, *args, **more)

    monkeypatch.setattr("tracker.deploy.support.steps.build", builder)
    try:
        trt_module("tensorrt_rtx")
    except EngineError as error:
        pytest.skip(str(error))
    assert run_step("yolox-s", "tensorrt_rtx int8", config)["left out"] == refused
    assert quantised == [refused, refused[1:], []]


@pytest.mark.parametrize("name", ["yolov5", "yolov8"])
def test_stand_ins_answer_in_the_layout_they_are_named_after(tmp_path: Path, name: str) -> None:
    """The front end takes it for what it is, and ONNX Runtime answers what torch does."""
    done = export_yolo(name, SIZE, tmp_path / "x.onnx", generated_frames(SIZE, 2))
    assert (done.manifest.frontend, tuple(done.manifest.outputs)) == (name, ("decoded",))
    assert max(done.errors.values()) < 0.1  # of boxes, in pixels


def test_a_stand_in_of_rtdetr_has_a_logit_per_class(tmp_path: Path) -> None:
    done = export_rtdetr(
        SIZE, tmp_path / "x.onnx", generated_frames(SIZE, 2), layers=1, hidden=64, queries=10
    )
    assert (done.manifest.frontend, set(done.manifest.outputs)) == ("rtdetr", {"logits", "boxes"})


def plan(folder: Path, **needs: tuple[str, ...]) -> Plan:
    return Plan(
        needs=needs,
        alone=("last",),
        in_turn=("refuse", "die"),
        product=partial(product, folder),
        do=partial(do, folder),
        folder=folder / "results",
    )


@pytest.mark.parametrize(("jobs", "turns"), [(1, 1), (3, 1), (3, 2)])
def test_failures_stay_where_they_happen(tmp_path: Path, jobs: int, turns: int) -> None:
    """Given a step that raises and one that takes its process along, the others are done, the one alone last;
    the next run tries these two again and nothing else."""
    steps = plan(tmp_path, make=(), refuse=("make",), die=("make",), good=("make",), last=("good",))
    told: list[str] = []
    measure(["yolo"], steps, jobs=jobs, turns=turns, told=lambda name, step, found: told.append(step))
    assert (told[0], set(told[1:4]), told[4]) == ("make", {"refuse", "die", "good"}, "last")
    results = Results(steps.folder).of("yolo")
    assert {step for step in told if results[step]["ok"]} == {"make", "good", "last"}
    assert results["refuse"]["error"] == "EngineError: output hm has NaN or inf"
    assert results["die"]["error"] == "the process died with exit code 9"
    assert steps.wanted("yolo") == ["refuse", "die"]
    product(tmp_path, "yolo", "make").unlink()
    assert steps.wanted("yolo") == ["make", "refuse", "die"]


def test_a_step_without_what_it_needs_does_not_begin(tmp_path: Path) -> None:
    steps = dataclasses.replace(plan(tmp_path, make=(), good=("make",)), do=partial(do, tmp_path / "nowhere"))
    measure(["yolo"], steps)
    assert Results(steps.folder).of("yolo")["good"]["error"] == "needs make"


def test_nothing_goes_on_beyond_the_deadline(tmp_path: Path) -> None:
    """Nothing is known then of what was cut short, could not begin, or needed either."""
    steps, begun = (
        plan(tmp_path, make=(), dawdle=("make",), good=("dawdle",), last=("good",)),
        time.monotonic(),
    )
    measure(["yolo", "detr"], steps, jobs=2, deadline=4)
    assert time.monotonic() - begun < 30
    assert Results(steps.folder).of("yolo").keys() == Results(steps.folder).of("detr").keys() == {"make"}


def needs_of(config: StepsConfig) -> dict[str, tuple[str, ...]]:
    return plan_of(config).needs


def test_steps_follow_from_the_machine() -> None:
    config = StepsConfig(folder=Path(), data=CLIP)
    assert not any(step.startswith(("tensorrt ", "run ")) for step in needs_of(config))
    there = needs_of(dataclasses.replace(config, device="cuda:0", builders=("tensorrt",)))
    assert there["run int8"] == ("onnx", "tensorrt int8")
    assert there["track"] == ("tensorrt fp16",)


def good(**more: object) -> Found:
    return {"ok": True, "seconds": 1.0, **more}


def test_a_row_says_what_went_well_and_a_note_what_did_not() -> None:
    ms = {"1": {"inference": 0.5, "all": 0.6}, "4": {"inference": 1.25, "all": 1.5}}
    cpu = {"export": good(mb=35.9), "onnx": good(), "track": good(by="onnx")}
    cpu |= {f"tensorrt_rtx {precision}": good() for precision in ("fp32", "fp16")}
    cpu |= {"tensorrt_rtx int8": good(**{"left out": ["head.stem"]})}
    gpu = {"tensorrt fp32": good(), "run fp32": good(ms=ms), "track": good(by="tensorrt fp16")}
    gpu |= {"tensorrt fp16": {"ok": False, "seconds": 9.0, "error": "EngineError: no\nway"}}
    gpu |= {"tensorrt int8": good(**{"left out": ["head.conv"]}), "run int8": good(ms=ms)}
    reports = [
        {"systems": {"yolox-s": {"title": "YOLOX-s", "size": [640, 640], "steps": steps}}}
        for steps in (cpu, gpu)
    ]
    text = table(merged(reports))
    engines = "0.50 / 1.25 (0.60 / 1.50) | no [1] | 0.50 / 1.25 (0.60 / 1.50) [2] | TensorRT FP16 |"
    assert f"| YOLOX-s 640×640 | 36 MB | yes | FP32, FP16, INT8 [3] | {engines}" in text
    assert "1. YOLOX-s, tensorrt fp16: EngineError: no way" in text
    assert "2. YOLOX-s, tensorrt int8: no kernel for head.conv; in half precision" in text
    assert "3. YOLOX-s, tensorrt_rtx int8: no kernel for head.stem; in half precision" in text


def test_the_readme_has_the_table_that_was_measured() -> None:
    files = sorted((ROOT / "docs" / "measurements").glob("support-*.json"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    assert reports and with_block(readme, block(reports)) == readme


def test_a_readme_without_a_place_for_it_is_left_alone() -> None:
    with pytest.raises(ConfigError, match="the table has no place"):
        with_block("# tracker\n", "| |")
    with pytest.raises(ConfigError, match="the table has no place"):
        with_block(f"{END}\n{BEGIN}\n", "| |")


def test_unknown_systems_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "tools" / "support.py"))["main"]
    assert main(["measure", "yolo9000", "--out", str(tmp_path / "x.json")]) == 1
    assert "system is 'yolo9000'; there is fairmot" in capsys.readouterr().err
