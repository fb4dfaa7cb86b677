"""Frames and tracks to write into results, and how much of them a result holds."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tracker.masks import MaskBits
from tracker.sinks import SUFFIXES
from tracker.types import Frame, Image, Tracks

Number = int | float


def tracks_of(*rows: tuple[Number, ...], names: tuple[str, ...] = ("person", "car")) -> Tracks:
    """Rows of id, x1, y1, x2, y2, score, label."""
    table = np.array(rows, np.float64).reshape(-1, 7)
    return Tracks(
        id=table[:, 0].astype(np.int64),
        xyxy=table[:, 1:5].astype(np.float32),
        score=table[:, 5],
        label=table[:, 6].astype(np.int64),
        names=names,
    )


def masked(tracks: Tracks, *pictures: np.ndarray, size: tuple[int, int] = (64, 48)) -> Tracks:
    """The same with masks: those of the (H, W) pictures, or else all pixels of the boxes."""
    pixels = torch.zeros((len(tracks), size[1], size[0]), dtype=torch.bool)
    for row, (x1, y1, x2, y2) in enumerate(np.clip(tracks.xyxy, 0, np.tile(size, 2)).astype(int).tolist()):
        if pictures:
            pixels[row] = torch.from_numpy(pictures[row].astype(bool))
        else:
            pixels[row, y1:y2, x1:x2] = True
    return replace(tracks, mask=MaskBits.pack(pixels, size))


def bgr_image(size: tuple[int, int], colour: tuple[int, int, int] = (90, 120, 60)) -> Image:
    return Image(format="bgr", planes=(np.full((size[1], size[0], 3), colour, np.uint8),))


def noise_image(seed: int, size: tuple[int, int] = (160, 120)) -> Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image(format="bgr", planes=(pixels,))


def frame_of(index: int, *, image: Image | None = None, pts_seconds: float | None = None) -> Frame:
    image = image or bgr_image((64, 48))
    height, width = image.planes[0].shape[:2]
    pts_seconds = index / 10 if pts_seconds is None else pts_seconds
    return Frame(index=index, pts_seconds=pts_seconds, size=(width, height), image=image)


def decode(path: Path) -> list[av.VideoFrame]:
    with av.open(path) as container:
        return list(container.decode(video=0))


ONE_TRACK = tracks_of((1, 10, 20, 30, 45, 0.5, 0))
NO_TRACKS = tracks_of()


def frames_in(path: Path) -> int:
    """How many frames a result holds; every line of a text result must be whole."""
    if path.suffix == ".mp4":
        return len(decode(path))
    lines = path.read_text().splitlines(keepends=True)
    assert all(line.endswith("\n") for line in lines)
    if path.suffix == ".jsonl":
        return len([json.loads(line) for line in lines])
    separator, columns = ",", 10
    for kind, number in (("dota", 12), ("mots", 6)):
        if path.name.endswith(SUFFIXES[kind]):
            separator, columns = " ", number
    rows = [line.split(separator) for line in lines]
    assert all(len(row) == columns for row in rows)
    return len({row[0] for row in rows})


@contextmanager
def small_disk(parent: Path, options: str) -> Iterator[Path]:
    """A file system of one's own, mounted with the given options; skips where that takes more rights."""
    path = parent / "disk"
    path.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command here")
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
