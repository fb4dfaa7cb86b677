"""Which frames to calibrate with: from the whole of every video, and as different as they come.

    find      VIDEO, DIR, LIST … → sources
    choose    two passes over them: half of the frames evenly spread over time, half those that look least
              like any already chosen (farthest-point sampling on thumbnails, Gonzalez 1985)
    chosen    the chosen frames themselves, one after another

Frames that cannot be read are skipped and counted. Knows sources; not what frames are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tracker.errors import ConfigError, SourceError
from tracker.sources import open_source
from tracker.sources.images import SUFFIXES
from tracker.types import Frame

UNREADABLE = 0.1  # share of frames that may be so
THUMBNAIL = (16, 9)  # pixels, width and height: the scene, not who is in it
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm")

Place = tuple[int, int]  # which source, and the frame's index there


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """places: of the chosen frames, in order. seen: frames there are. unreadable: those skipped."""

    places: tuple[Place, ...]
    seen: int
    unreadable: int


def find(specs: Sequence[str | Path]) -> list[Path]:
    """Videos, image directories and images: a directory of videos is each of them, a .txt file lists one
    per line, relative to itself. Raises SourceError for what is not there or empty.
    """
    found: list[Path] = []
    for path in map(Path, specs):
        if path.suffix.lower() == ".txt" and path.is_file():
            found += _listed(path)
        elif path.is_dir() and not _has_images(path):
            videos = sorted(p for p in path.iterdir() if p.suffix.lower() in VIDEOS and p.is_file())
            if not videos:
                wanted = ", ".join((*SUFFIXES, *VIDEOS))
                raise SourceError(f"{path}: no images and no videos there; looked for {wanted}")
            found += videos
        else:
            found.append(path)
    return found


def choose(
    sources: Sequence[Path], count: int, *, seed: int, on_frame: Callable[[], object] | None = None
) -> Choice:
    """`count` frames of all that there are, or all where there are fewer. The same seed chooses the same.

    on_frame: called after each frame that was looked at.
    Raises ConfigError for an impossible count, SourceError where there is no frame or where more than
    UNREADABLE of them cannot be read.
    """
    if count < 1:
        raise ConfigError(f"frames is {count}; it must be at least 1")
    places: list[Place] = []
    looks: list[NDArray[np.uint8]] = []
    unreadable, why = 0, ""
    for number, spec in enumerate(sources):
        try:
            with open_source(spec) as source:
                for frame in source:
                    places.append((number, frame.index))
                    looks.append(_thumbnail(frame))
                    if on_frame is not None:
                        on_frame()
                unreadable += source.counts.lost
        except SourceError as error:  # one image or video of several
            unreadable, why = unreadable + 1, str(error)
    total = len(places) + unreadable
    if not places:
        raise SourceError(f"no frames to calibrate with: {why or 'nothing was named'}")
    if unreadable > UNREADABLE * total:
        raise SourceError(
            f"{unreadable} of {total} frames cannot be read, more than {UNREADABLE:.0%}: calibrate with "
            f"whole files{f' ({why})' if why else ''}"
        )
    picked = _diverse(np.stack(looks).reshape(len(looks), -1), count, seed)
    return Choice(places=tuple(places[k] for k in picked), seen=len(places), unreadable=unreadable)


def chosen(sources: Sequence[Path], places: Sequence[Place]) -> Iterator[Frame]:
    """The frames at these places, in order; each source is read as far as it is needed."""
    for number, spec in enumerate(sources):
        wanted = {index for source, index in places if source == number}
        if not wanted:
            continue
        last = max(wanted)
        with open_source(spec, source=number) as source:
            for frame in source:
                if frame.index in wanted:
                    yield frame
                if frame.index >= last:
                    break


def _diverse(looks: NDArray[Any], count: int, seed: int) -> list[int]:
    """Indices of rows, rising."""
    total = len(looks)
    if total <= count:
        return list(range(total))
    rng = np.random.default_rng(seed)
    even = (count + 1) // 2
    edges = np.linspace(0, total, even + 1)
    picked = {int(rng.integers(int(a), max(int(a) + 1, int(b)))) for a, b in pairwise(edges)}
    rows = looks.astype(np.float32)
    nearest = np.full(total, np.inf, np.float32)  # squared distance to the nearest picked row
    for index in sorted(picked):
        nearest = np.minimum(nearest, ((rows - rows[index]) ** 2).sum(axis=1))
    while len(picked) < count:
        nearest[list(picked)] = -1
        index = int(nearest.argmax())
        picked.add(index)
        nearest = np.minimum(nearest, ((rows - rows[index]) ** 2).sum(axis=1))
    return sorted(picked)


def _thumbnail(frame: Frame) -> NDArray[np.uint8]:
    """(9, 16, C): brightness and, for decoded video, colour differences."""
    assert frame.image is not None
    planes = [np.atleast_3d(cv2.resize(np.ascontiguousarray(plane), THUMBNAIL, interpolation=cv2.INTER_AREA))
              for plane in frame.image.planes]  # fmt: skip
    return np.concatenate(planes, axis=2)


def _has_images(path: Path) -> bool:
    return (path / "img1").is_dir() or any(each.suffix.lower() in SUFFIXES for each in path.iterdir())


def _listed(path: Path) -> list[Path]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be read as a list of videos and images: {error}") from error
    found = [path.parent / line for line in lines if line and not line.startswith("#")]
    if not found:
        raise SourceError(f"{path}: an empty list: put a video or image in each line")
    return found
