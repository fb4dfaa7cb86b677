"""What was measured, as JSON, and the table of it in Markdown. Measures nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tracker.benchmark import environment
from tracker.deploy.support.schedule import NEEDS, Results
from tracker.deploy.support.steps import PRECISIONS, StepsConfig, plan_of
from tracker.deploy.support.systems import SYSTEMS
from tracker.errors import ConfigError

Report = dict[str, Any]
Steps = dict[str, Any]  # results by step
BEGIN, END = "<!-- support: begin -->", "<!-- support: end -->"


def report(config: StepsConfig) -> Report:
    """Everything in the folder, and on what it was measured."""
    results = Results(plan_of(config).folder)
    found = {name: results.of(name) for name in SYSTEMS}
    gpu = torch.cuda.get_device_name() if config.device != "cpu" else None
    flags = dataclasses.asdict(config)
    kept = ("frames", "track_frames", "repeat", "batch", "level", "tactics")
    return {
        "gpu": gpu,
        "environment": environment(),
        "settings": {key: flags[key] for key in kept},
        "systems": {
            name: {"title": SYSTEMS[name].title, "size": SYSTEMS[name].size, "steps": steps}
            for name, steps in found.items()
            if steps
        },
    }


def merged(reports: Sequence[Report]) -> dict[str, Any]:
    """By system and step, of several machines; what went well wins, else the later."""
    systems: dict[str, Any] = {}
    for each in reports:
        for name, found in each["systems"].items():
            system = systems.setdefault(name, {"title": found["title"], "size": found["size"], "steps": {}})
            for step, result in found["steps"].items():
                known = system["steps"].get(step)
                if known is None or result["ok"] or not known["ok"]:
                    system["steps"][step] = result
    return systems


def table(systems: dict[str, Any]) -> str:
    """A row per system, in the order of `SYSTEMS`, then the words of what failed or is not as asked for."""
    notes: list[str] = []
    rows = [
        "| | export | ONNX Runtime | TensorRT-RTX | TensorRT FP32 | FP16 | INT8 | tracked by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, system in SYSTEMS.items():
        if name not in systems:
            continue
        steps, (width, height) = systems[name]["steps"], systems[name]["size"]
        size = f"{steps['export']['mb']:.0f} MB" if steps.get("export", {}).get("ok") else ""
        inside = f" ({system.stands_in} inside)" if system.stands_in else ""
        say = _Row(system.title, steps, notes).say
        left_out = partial(_left_out, system.title, steps, notes)
        engines = [
            say(*needed, words=f"{_ms(steps, p)}{left_out(*needed)}")
            for p, needed in ((p, (f"tensorrt {p}", f"run {p}")) for p in PRECISIONS)
        ]
        built = [f"tensorrt_rtx {p}" for p in PRECISIONS]
        cells = [
            f"{system.title} {width}×{height}{inside}",
            say("export", words=size),
            say("onnx", words="yes"),
            say(*built, words=f"{', '.join(PRECISIONS).upper()}{left_out(*built)}"),
            *engines,
            say("track", words=_tracked(steps)),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    numbered = [f"{number}. {words}" for number, words in enumerate(notes, 1)]
    return "\n".join([*rows, "", *numbered, *([""] if numbered else [])])


def block(reports: Sequence[Report]) -> str:
    """The table and, before it, on what and how it was measured."""
    systems = merged(reports)
    found = [step for system in systems.values() for step in system["steps"].items() if step[1]["ok"]]
    words = [
        "Networks with random weights and an open batch. ONNX Runtime answers as torch does; TensorRT-RTX "
        "parses and builds on a CPU; INT8 is calibrated."
    ]
    gpus = sorted({str(report["gpu"]) for report in reports if report.get("gpu")})
    if gpus:
        versions = sorted({result["version"] for step, result in found if step.startswith("tensorrt ")})
        apart = [max(result["relative"].values()) for step, result in found if step == "run fp32"]
        levels = {report["settings"]["level"] for report in reports if report.get("gpu")}
        level = "".join(f", builder level {each}" for each in sorted(levels - {None}))
        words.append(
            f"TensorRT {', '.join(versions)} on one {', '.join(gpus)}{level}: ms of the engine "
            "alone, batch 1 / 4, in brackets from frames to detections (Mask R-CNN's heads are in the "
            "brackets alone); "
            f"its FP32 answers lie within {max(apart, default=0.0):.1e} of ONNX Runtime's, relative to the "
            "greatest of each output."
        )
    words.append(
        '"Inside": the weights and exporter are yours; measured is its layout around a network of ours.'
    )
    return "\n".join([" ".join(words), "", table(systems)])


def with_block(readme: str, text: str) -> str:
    """A README with its table replaced. Raises ConfigError where the markers are not there once, in order."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise ConfigError(f"the table has no place: put {BEGIN} and {END} there, each on a line of its own")
    return f"{before}{BEGIN}\n{text.rstrip()}\n{END}{after}"


@dataclass(frozen=True, slots=True)
class _Row:
    """One system's results, and the notes of all."""

    title: str
    steps: Steps
    notes: list[str]

    def say(self, *needed: str, words: str) -> str:
        """The words where all of these went well, the number of a note where one did not, a dash where
        one is not known, or could not begin for another that failed.
        """
        for step in needed:
            found = self.steps.get(step, {"ok": True})
            if not found["ok"] and not found["error"].startswith(NEEDS):
                self.notes.append(f"{self.title}, {step}: {' '.join(found['error'].split())}")
                return f"no [{len(self.notes)}]"
        return words if all(self.steps.get(step, {"ok": False})["ok"] for step in needed) else "–"


def _ms(steps: Steps, precision: str) -> str:
    """The engine alone, at each batch size, and everything on the device."""
    times = steps.get(f"run {precision}", {}).get("ms", {}).values()
    alone, everything = (
        " / ".join(f"{stages[stage]:.2f}" for stages in times) for stage in ("inference", "all")
    )
    return f"{alone} ({everything})"


def _left_out(title: str, steps: Steps, notes: list[str], *needed: str) -> str:
    """The number of a note on the layers that an INT8 engine has not in INT8, though they were to be; nothing
    where not all of these steps went well.
    """
    if not all(steps.get(step, {}).get("ok") for step in needed):
        return ""
    marks = ""
    for step in needed:
        if "left out" in steps[step]:
            notes.append(
                f"{title}, {step}: no kernel for {', '.join(steps[step]['left out'])}; in half precision"
            )
            marks += f" [{len(notes)}]"
    return marks


def _tracked(steps: Steps) -> str:
    by = steps.get("track", {}).get("by", "")
    return {"onnx": "ONNX Runtime", "": ""}.get(by, f"TensorRT {by.split()[-1].upper()}" if by else "")
