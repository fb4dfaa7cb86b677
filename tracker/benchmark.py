"""How long association takes per frame, ours and others', on the same arrays in the same minutes.

The clock is the CPU time of this process: it counts hidden threads, and not what else the machine does.
Contenders take turns of a few frames, so that a machine that slows down does so for all of them. The load
is run several times; a frame's time is the best of these, since all that can disturb it makes it slower.
Answers are compared, too: a fast tracker that answers something else is not the same tracker. Knows
nothing of how a contender works.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import platform
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tracker.boxes import xyxy_to_xywh
from tracker.contenders import Answer, Array, Contender
from tracker.errors import ConfigError
from tracker.summary import versions

# What the libraries beneath NumPy, SciPy and torch read, once, when they are loaded.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

# Frames per turn: enough for the caches to be warm again, yet a turn lasts seconds at most.
TURN = 10

# How far apart, in pixels, two boxes may lie that count as the same.
SAME_PIXELS = 1e-3

Load = list[tuple[Array, Array]]  # per frame: (N, 5) float32 xyxy and score, (N, D) float32 embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class External:
    """A tracker outside this process: a command that gets a MOT text file and prints `F ms per frame`."""

    name: str
    command: str

    def time(self, detections: Path) -> float:
        """What the command says. Raises ConfigError when it fails, or says nothing of the kind."""
        try:
            done = subprocess.run(
                [*shlex.split(self.command), str(detections)], capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise ConfigError(f"cannot run {self.command!r} for {self.name}: {error.strerror}") from error
        told = re.search(r"(\d+(?:\.\d+)?(?:e-?\d+)?) ms per frame", done.stdout)
        if done.returncode != 0 or told is None:
            last = (done.stderr or done.stdout).strip().rpartition("\n")[2]
            raise ConfigError(
                f"{self.name} ended with {done.returncode}, saying {last!r}: it must end with 0 and print "
                "a line such as '1.25 ms per frame'"
            )
        return float(told[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """Trackers of one kind. Every rival must answer what `compat` answers; externals are only timed."""

    name: str
    default: Contender
    compat: Contender
    rivals: tuple[Contender, ...] = ()
    externals: tuple[External, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """ms: that of the median frame, each at its best. repeats: the median frame of each repeat."""

    ms: float
    repeats: list[float]

    def over(self, ours: Timing) -> tuple[float, float]:
        """How many times ours it is: each at its best, and in the repeat where it is least."""
        ratios = [theirs / own for theirs, own in zip(self.repeats, ours.repeats, strict=True)]
        return self.ms / ours.ms, min(ratios)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lap:
    """One race at one number of objects.

    timings: by name; our default first, then our compat, then everybody else. differences: by rival, where
    its answer first differs from compat's, or "".
    """

    race: str
    objects: int
    timings: dict[str, Timing]
    differences: dict[str, str]


def load_generator(path: Path, *, frames: int) -> Callable[[int], Load]:
    """The load of N objects, by `gen(N, frames=…)` of a Python file: per frame boxes, embeddings, ids."""
    spec = importlib.util.spec_from_file_location("association_load", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"there is no load generator {path}: name one with --load")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "gen"):
        raise ConfigError(f"{path} has no function gen(objects, frames=…) that makes the load")
    return lambda objects: [(boxes, embedding) for boxes, embedding, _ in module.gen(objects, frames=frames)]


def run_lap(race: Race, objects: int, load: Load, *, repeats: int) -> Lap:
    """Time everybody on the load of so many objects, and compare the answers of the last repeat."""
    contenders = (race.default, race.compat, *race.rivals)
    runs: dict[str, list[list[float]]] = {contender.name: [] for contender in contenders}
    told: dict[str, list[float]] = {external.name: [] for external in race.externals}
    answers: dict[str, list[Answer]] = {}
    with tempfile.TemporaryDirectory() as folder:
        detections = Path(folder) / f"{objects}.txt"
        _write_rows(detections, load)
        for _ in range(repeats):
            ms, answers = _take_turns(contenders, load)
            for name, run in ms.items():
                runs[name].append(run)
            for external in race.externals:
                told[external.name].append(external.time(detections))
    timings = {
        name: Timing(ms=median(map(min, zip(*each, strict=True))), repeats=[median(run) for run in each])
        for name, each in runs.items()
    }
    timings |= {name: Timing(ms=min(each), repeats=each) for name, each in told.items()}
    compat = answers[race.compat.name]
    return Lap(
        race=race.name,
        objects=objects,
        timings=timings,
        differences={rival.name: first_difference(compat, answers[rival.name]) for rival in race.rivals},
    )


def _take_turns(
    contenders: Sequence[Contender], load: Load
) -> tuple[dict[str, list[float]], dict[str, list[Answer]]]:
    """Fresh trackers through all frames → milliseconds and answers, frame by frame, by name.

    Garbage is not collected meanwhile, as in `timeit`: it would hit whoever's turn it is.
    """
    updates = [contender.start() for contender in contenders]
    ms: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    answers: dict[str, list[Answer]] = {contender.name: [] for contender in contenders}
    gc.collect()
    gc.disable()
    try:
        for first in range(0, len(load), TURN):
            for contender, update in zip(contenders, updates, strict=True):
                for number, (boxes, embedding) in enumerate(load[first : first + TURN], start=first + 1):
                    arrays = boxes.copy(), embedding.copy()  # the official code writes into its input
                    started = time.process_time()
                    returned = update(number, *arrays)
                    ms[contender.name].append(1e3 * (time.process_time() - started))
                    answers[contender.name].append(contender.read(returned))
    finally:
        gc.enable()
    return ms, answers


def first_difference(ours: Sequence[Answer], theirs: Sequence[Answer]) -> str:
    """Where two trackers first disagree, in words: ids, or boxes by more than SAME_PIXELS. "" if nowhere."""
    for frame, ((our_ids, our_xyxy), (their_ids, their_xyxy)) in enumerate(
        zip(ours, theirs, strict=True), start=1
    ):
        only_one = np.setxor1d(our_ids, their_ids)
        if len(only_one):
            return f"frame {frame}: only one of them has id {only_one[0]}"
        apart = np.abs(our_xyxy[our_ids.argsort()] - their_xyxy[their_ids.argsort()]).max(axis=1, initial=0.0)
        if not (apart <= SAME_PIXELS).all():  # NaN is no agreement
            return f"frame {frame}: id {np.sort(our_ids)[apart.argmax()]} lies {apart.max():.3g} px apart"
    return ""


def _write_rows(path: Path, load: Load) -> None:
    """The load without its embeddings, as MOT text with all the digits that float32 holds."""
    rows = [
        np.column_stack((np.full((len(boxes), 2), (frame, -1)), xyxy_to_xywh(boxes[:, :4]), boxes[:, 4]))
        for frame, (boxes, _) in enumerate(load, start=1)
    ]
    np.savetxt(path, np.concatenate(rows), fmt="%.9g", delimiter=",")


def disagreements(laps: Sequence[Lap]) -> list[str]:
    """A sentence for every rival that answered something else than compat."""
    return [
        f"{rival} and our --compat differ at {lap.objects} objects: {difference}"
        for lap in laps
        for rival, difference in lap.differences.items()
        if difference
    ]


def table(laps: Sequence[Lap]) -> str:
    """A table for each race, with how many times ours the others' time is."""
    by_race = {lap.race: [other for other in laps if other.race == lap.race] for lap in laps}
    return "\n\n".join(_race_table(group) for group in by_race.values())


def _race_table(laps: Sequence[Lap]) -> str:
    default, compat, *others = laps[0].timings
    head = ["objects", default, compat]
    for other in others:
        head += [other, f"÷ {default}", "÷ --compat"]
    lines = [head]
    for lap in laps:
        ours = lap.timings[default], lap.timings[compat]
        line = [str(lap.objects), *(f"{timing.ms:.3f}" for timing in ours)]
        for theirs in (lap.timings[other] for other in others):
            line += [f"{theirs.ms:.3f}", *("{:.1f} ({:.1f})".format(*theirs.over(own)) for own in ours)]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    )


def report(races: Sequence[Race], laps: Sequence[Lap], *, frames: int, repeats: int) -> dict[str, Any]:
    """Everything measured, on what, and of what, for JSON."""
    sources = {c.name: c.source for race in races for c in (race.default, race.compat, *race.rivals)}
    commands = {external.name: external.command for race in races for external in race.externals}
    return {
        "benchmark": "association",
        "unit": "CPU ms of the median frame",
        "frames": frames,
        "repeats": repeats,
        "environment": environment(),
        "sources": sources | commands,
        "laps": [asdict(lap) for lap in laps],
    }


def environment() -> dict[str, Any]:
    """The machine, the versions, and how many threads the libraries were given."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "versions": versions(),
        "threads": {name: os.environ.get(name, "not set") for name in THREAD_VARIABLES},
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if named:
            return named[1]
    return platform.processor() or platform.machine()
