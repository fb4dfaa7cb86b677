"""Steps of many systems, each in a process that may fail, several at once, remembered for the next time.

A result is one small file per system and step: a run goes on where another ended, and a step that takes its
process with it takes no other's result. What must have the machine for itself (timing) comes last, one after
another. Knows nothing of what steps do, and loads nothing that a process would have to wait for.
"""

from __future__ import annotations

import json
import multiprocessing
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
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
    may run. product: the file that a step leaves for others, None where it leaves none. do: a step; what it
    raises is its "error". Both are sent to other processes. folder: of results.
    """

    needs: dict[str, tuple[str, ...]]
    alone: tuple[str, ...]
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
    deadline: float | None = None,
    told: Told | None = None,
) -> None:
    """Do all steps of these systems that have not been done well before; see `Results`.

    jobs: processes at once. deadline: seconds after which none works any more. Steps that it cuts short or
    keeps from beginning stay as they were.
    """
    run = _Run(plan, jobs, told or (lambda name, step, found: None))
    begun = perf_counter()
    todo = {name: plan.wanted(name) for name in names}
    alone = [(name, step) for name in names for step in todo[name] if step in plan.alone]
    end = sooner = None
    if deadline is not None:
        end = begun + deadline
        sooner = end - min(RESERVE_SECONDS * (1 + len(alone)), deadline / 2)
    with ThreadPoolExecutor(max(1, len(names))) as threads:
        for name in names:
            threads.submit(run.together, name, [s for s in todo[name] if s not in plan.alone], sooner)
    run.work(alone, end)


class _Run:
    def __init__(self, plan: Plan, jobs: int, told: Told) -> None:
        self._plan, self._results, self._told = plan, Results(plan.folder), told
        self._jobs, self._slots = jobs, threading.Semaphore(jobs)

    def together(self, name: str, steps: Sequence[str], end: float | None) -> None:
        """One system's steps: in one process, or side by side as far as each has what it needs."""
        if self._jobs == 1:
            return self.work([(name, step) for step in steps], end)
        left = list(steps)
        while left:
            ready = [step for step in left if not set(self._plan.needs[step]) & set(left)]
            chains = {step: [step] for step in ready}
            for step in left:  # what waits for one of these alone goes with it
                before = set(self._plan.needs[step]) & set(left)
                if len(before) == 1 and (first := before.pop()) in chains and chains[first][-1] == first:
                    chains[first].append(step)
            done = {step for chain in chains.values() for step in chain}
            with ThreadPoolExecutor(len(chains)) as threads:
                for chain in chains.values():
                    threads.submit(self.work, [(name, step) for step in chain], end)
            left = [step for step in left if step not in done]
        return None

    def work(self, keys: Sequence[Key], end: float | None) -> None:
        """One after another, in one process as long as it lives."""
        left = list(keys)
        while left and (end is None or perf_counter() < end):
            with self._slots:
                for key, found in self._process(left, end):
                    left.remove(key)
                    self._results.write(*key, found)
                    self._told(*key, found)

    def _process(self, keys: Sequence[Key], end: float | None) -> Iterator[tuple[Key, Found]]:
        """What a process says of these steps, until it has done them all, dies, or is ended."""
        here, there = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(
            target=_steps, args=(list(keys), self._plan, there)
        )
        begun = perf_counter()
        process.start()
        there.close()  # so that the process's end is the end of the pipe
        at: Key | None = None
        try:
            while here.poll(None if end is None else max(0.0, end - perf_counter())):
                key, found = here.recv()
                if found is None:
                    at, begun = key, perf_counter()
                else:
                    at = None
                    yield key, found
        except EOFError:
            process.join()
            if at is None and process.exitcode:
                at = keys[0]  # it did not come as far as to begin
            if at is not None:
                error = f"the process died with exit code {process.exitcode}"
                yield at, {"ok": False, "seconds": round(perf_counter() - begun, 1), "error": error}
        finally:
            here.close()
            process.kill()
            process.join()


def _steps(keys: Sequence[Key], plan: Plan, told: Connection) -> None:
    """In the process: each step, begun (None) and done."""
    for name, step in keys:
        told.send(((name, step), None))
        begun = perf_counter()
        failed = [need for need in plan.needs[step] if plan.missing(name, need)]
        if failed:
            found: Found = {"ok": False, "error": f"{NEEDS}{', '.join(failed)}"}
        else:
            try:
                found = {"ok": True, **plan.do(name, step)}
            except Exception as error:  # whatever it is, the next step may do
                found = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        told.send(((name, step), found | {"seconds": round(perf_counter() - begun, 1)}))
    told.close()
