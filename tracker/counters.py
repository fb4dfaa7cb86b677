"""The lines and zones of one stream: drawn and removed at any moment, kept in a file for the next run.

Every method may be called from any thread. Knows how counts are worded; the geometry is `counting`'s.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from tracker.counting import Count, Shape
from tracker.errors import ConfigError, SinkError
from tracker.types import Frame, Tracks

MAX_COUNTERS = 32


def shape_of(value: Any) -> Shape:
    """A shape from JSON. Raises ConfigError for anything else."""
    try:
        kind, name, points = value["kind"], value["name"], value["points"]
        return Shape(kind=kind, name=str(name), points=tuple((float(x), float(y)) for x, y in points))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            'a counter is like {"kind": "line", "name": "gate", "points": [[0, 0.5], [1, 0.5]]}'
        ) from error


class Counters:
    """Counts at every shape of a stream, by number.

    path: the shapes are read from that file, if it is there, and written to it whenever they change. Counts
    begin with the run.
    Raises ConfigError for a file that holds something else.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._counts: dict[int, Count] = {}
        self._next = 1
        for shape in [] if path is None else _read(path):
            self._counts[self._next] = Count(shape)
            self._next += 1

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, shape: Shape) -> int:
        """Its number. Raises ConfigError for one too many, SinkError if it cannot be kept."""
        with self._lock:
            if len(self._counts) >= MAX_COUNTERS:
                raise ConfigError(f"this stream has {MAX_COUNTERS} counters already: remove one first")
            number, self._next = self._next, self._next + 1
            self._keep({**self._counts, number: Count(shape)})
            return number

    def replace(self, number: int, shape: Shape) -> None:
        """Another name goes on counting; another shape begins anew. Raises as `add`, and if there is none."""
        with self._lock:
            old, new = self._get(number), Count(shape)
            self._keep({**self._counts, number: new})
            if (old.shape.kind, old.shape.points) == (shape.kind, shape.points):
                old.shape = shape
                self._counts[number] = old

    def remove(self, number: int) -> None:
        """Raises ConfigError if there is none."""
        with self._lock:
            self._get(number)
            self._keep({key: count for key, count in self._counts.items() if key != number})

    def update(self, frame: Frame, tracks: Tracks) -> bytes:
        """Count a frame; gives the totals as JSON, empty where nothing is counted."""
        if not self._counts:
            return b""
        with self._lock:
            for count in self._counts.values():
                count.update(frame, tracks)
            totals = [count.totals() for count in self._counts.values()]
        return json.dumps(totals, separators=(",", ":")).encode()

    def to_json(self) -> list[dict[str, Any]]:
        """Shapes and counts, by class too."""
        with self._lock:
            return [
                {
                    "number": number,
                    **count.shape.to_json(),
                    **count.totals(),
                    "by_class": {
                        label: {"in": count.into[label], "out": count.out[label]}
                        for label in sorted({*count.into, *count.out})
                    },
                }
                for number, count in self._counts.items()
            ]

    def _get(self, number: int) -> Count:
        if number not in self._counts:
            raise ConfigError(f"there is no counter {number}")
        return self._counts[number]

    def _keep(self, counts: dict[int, Count]) -> None:
        if self._path is not None:
            _write(self._path, [count.shape for count in counts.values()])
        self._counts = counts


def _read(path: Path) -> list[Shape]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return [shape_of(value) for value in values][:MAX_COUNTERS]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, ConfigError) as error:
        raise ConfigError(
            f"cannot read the counters in {path}: {error}; mend the file or remove it"
        ) from error


def _write(path: Path, shapes: list[Shape]) -> None:
    text = json.dumps([shape.to_json() for shape in shapes], indent=1)
    beside = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise SinkError(f"cannot keep the counters in {path}: {error.strerror}") from error
