"""Steps of many systems, in processes that may fail, several at once, remembered for the next time.

A result is one small file per system and step: a run goes on where another ended, and a step that takes its
process with it takes no other's result. Steps of a kind may share one process. What must have the machine
for itself (timing) comes last, one after another. Knows nothing of what steps do, and loads nothing that a
process would have to wait for.
"""

from __future__ import annotations

import json
import multiprocessing
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from time import perf_counter
from typing import Any

NEEDS = "needs "  # what the error of a step begins with whose files are missing
RESERVE_SECONDS = 6.0  # of a deadline, for each step that must be alone; half of it at most

Found = dict[str, Any]
Key = tuple[str, str]  # system and step
Told = Callable[[str, str, Found], object]  # system, step, and what came of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What there is to do.

    needs: the steps in order, and those that each needs to have been done. alone: those beside which nothing
    may run. in_turn: those that the same few processes do for all systems, beside others. product: the file
    that a step leaves for others, None where it leaves none. do: a step; what it raises is its "error". Both
    are sent to other processes. folder: of results.
    """

    needs: dict[str, tuple[str, ...]]
    alone: tuple[str, ...]
    in_turn: tuple[str, ...]
    product: Callable[[str, str], Path | None]
    do: Callable[[str, str], Found]
    folder: Path

    def missing(self, name: str, step: str) -> bool:
        file = self.product(name, step)
        return file is not None and not file.exists()

    def wanted(self, name: str) -> list[str]:
        """Steps that have not been done well, and those before them whose files are gone, in order."""
        results, found = Results(self.folder), set[str]()
        for step in reversed(self.needs):
            needed = any(step in self.needs[later] for later in found)
            if (needed and self.missing(name, step)) or not results.well(name, step):
                found.add(step)
        return [step for step in self.needs if step in found]


@dataclass(frozen=True, slots=True)
class Results:
    """What has been measured, in a folder: whether it went well ("ok"), its "seconds", then either what the
    step says or the "error"."""

    folder: Path

    def read(self, name: str, step: str) -> Found | None:
        try:
            return dict(json.loads(self._file(name, step).read_text(encoding="utf-8")))
        except (OSError, ValueError):  # none, or cut short
            return None

    def write(self, name: str, step: str, found: Found) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file(name, step).write_text(json.dumps(found), encoding="utf-8")

    def well(self, name: str, step: str) -> bool:
        found = self.read(name, step)
        return found is not None and bool(found["ok"])

    def of(self, name: str) -> dict[str, Found]:
        """By step, in the order of their names."""
        files = sorted(self.folder.glob(f"{name}.*.json"))
        steps = (file.name.removeprefix(f"{name}.").removesuffix(".json").replace("~", " ") for file in files)
        return {step: found for step in steps if (found := self.read(name, step)) is not None}

    def _file(self, name: str, step: str) -> Path:
        return self.folder / f"{name}.{step.replace(' ', '~')}.json"


def measure(
    names: Sequence[str],
    plan: Plan,
    *,
    jobs: int = 1,
    turns: int = 1,
    deadline: float | None = None,
    told: Told | None = None,
) -> None:
    """Do all steps of these systems that have not been done well before; see `Results`.

    jobs: processes at once; of several, `turns` (fewer) are for what goes in turn. deadline: seconds after
    which none works any more. Steps that it cuts short or keeps from beginning stay as they were.
    """
    begun = perf_counter()
    keys = [(name, step) for name in names for step in plan.wanted(name)]
    alone = {step for _, step in keys if step in plan.alone}
    in_turn = {step for _, step in keys if step in plan.in_turn} - alone
    others = {step for _, step in keys} - alone
    end = sooner = None
    if deadline is not None:
        end = begun + deadline
        count = sum(step in alone for _, step in keys)
        sooner = end - min(RESERVE_SECONDS * (1 + count), deadline / 2)
    run = _Run(plan, keys, told or (lambda name, step, found: None))
    lanes = [others] * jobs
    if jobs > turns and in_turn:
        lanes = [in_turn] * turns + [others - in_turn] * (jobs - turns)
    with ThreadPoolExecutor(len(lanes)) as threads:
        for done in [threads.submit(run.lane, steps, sooner) for steps in lanes]:
            done.result()
    run.give_up(others)
    run.lane(alone, end)


class _Run:
    """Steps left, and lanes that take one after another as soon as it has all it needs."""

    def __init__(self, plan: Plan, keys: Sequence[Key], told: Told) -> None:
        self._plan, self._results, self._told = plan, Results(plan.folder), told
        self._left, self._begun, self._cut = list(keys), set[Key](), set[Key]()
        self._changed = threading.Condition()

    def lane(self, steps: Collection[str], end: float | None) -> None:
        """One process for steps with these names, until none is left or the time is over."""
        worker = _Worker(self._plan)
        try:
            while (key := self._next(steps, end)) is not None:
                found = worker.do(key, end)
                with self._changed:
                    self._begun.remove(key)
                    self._changed.notify_all()
                    if found is None:
                        self._cut.add(key)
                    else:
                        self._results.write(*key, found)
                        self._told(*key, found)
        except BaseException:
            with self._changed:  # nobody need wait for what will not be done
                self._left.clear()
                self._changed.notify_all()
            raise
        finally:
            worker.end()

    def give_up(self, steps: Collection[str]) -> None:
        """Steps with these names that are not done, and all that need them, for which there was no time."""
        undone = self._cut | {key for key in self._left if key[1] in steps}
        for name, step in self._left:  # in the order of steps
            if any((name, need) in undone for need in self._plan.needs[step]):
                undone.add((name, step))
        self._left = [key for key in self._left if key not in undone]

    def _next(self, steps: Collection[str], end: float | None) -> Key | None:
        with self._changed:
            while any(step in steps for _, step in self._left) and (end is None or perf_counter() < end):
                key = next((key for key in self._left if key[1] in steps and self._ready(key)), None)
                if key is not None:
                    self._left.remove(key)
                    self._begun.add(key)
                    return key
                self._changed.wait(None if end is None else max(0.0, end - perf_counter()))
        return None

    def _ready(self, key: Key) -> bool:
        name, step = key
        return not any(
            (name, need) in self._begun or (name, need) in self._left for need in self._plan.needs[step]
        )


class _Worker:
    """A process that does steps, and another where one has died or was cut short."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._process: SpawnProcess | None = None

    def do(self, key: Key, end: float | None) -> Found | None:
        """What came of it, None where the time was over before."""
        if self._process is None:
            self._pipe, there = multiprocessing.Pipe()
            self._process = multiprocessing.get_context("spawn").Process(
                target=_steps, args=(self._plan, there)
            )
            self._process.start()
            there.close()  # so that the process's end is the end of the pipe
        begun = perf_counter()
        try:
            self._pipe.send(key)
            if self._pipe.poll(None if end is None else max(0.0, end - perf_counter())):
                return dict(self._pipe.recv())
        except (EOFError, ConnectionError):
            self._process.join()
            error = f"the process died with exit code {self._process.exitcode}"
            self.end()
            return {"ok": False, "seconds": round(perf_counter() - begun, 1), "error": error}
        self.end()
        return None

    def end(self) -> None:
        if self._process is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
            self._process = None


def _steps(plan: Plan, asked: Connection) -> None:
    """In the process: steps as they are asked for."""
    while True:
        try:
            name, step = asked.recv()
        except EOFError:  # nobody asks any more
            return
        begun = perf_counter()
        failed = [need for need in plan.needs[step] if plan.missing(name, need)]
        if failed:
            found: Found = {"ok": False, "error": f"{NEEDS}{', '.join(failed)}"}
        else:
            try:
                found = {"ok": True, **plan.do(name, step)}
            except Exception as error:  # whatever it is, the next step may do
                found = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        asked.send(found | {"seconds": round(perf_counter() - begun, 1)})
