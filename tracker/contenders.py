"""What an association benchmark times: our trackers, and the published ones from the user's own clones.

The Python of FairMOT and ByteTrack runs as its authors wrote it, from the files of the clone. Only the
network is replaced: detections are handed over where its outputs would be decoded, at next to no cost.
Nothing here measures or compares.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracker.association import make_association
from tracker.boxes import xywh_to_xyxy
from tracker.errors import ConfigError
from tracker.types import Detections

Array = NDArray[Any]
Answer = tuple[NDArray[np.int64], NDArray[np.float64]]  # (K,) ids and (K, 4) corners
Update = Callable[[int, Array, Array], Any]

FRAME_RATE = 30.0

# What the official writers leave out (FairMOT's `src/track.py`; ByteTrack's evaluation alike).
MIN_AREA, MAX_ASPECT = 100.0, 1.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A tracker to be timed.

    start: makes a fresh tracker, a function of the frame number from 1, (N, 5) float32 xyxy and score, and
    (N, D) float32 embeddings; a call of it is what the clock sees. read: ids and corners from what the
    call returned. source: which code it is, for the record.
    """

    name: str
    start: Callable[[], Update]
    read: Callable[[Any], Answer]
    source: str


def ours(tracker: str, compat: str | None = None) -> Contender:
    """Our "jde" or "byte". Wrapping and checking the detections counts."""

    def start() -> Update:
        association = make_association(tracker, compat=compat, frame_rate=FRAME_RATE)

        def update(frame: int, boxes: Array, embedding: Array) -> Any:
            detections = Detections(
                xyxy=boxes[:, :4],
                score=boxes[:, 4],
                label=np.zeros(len(boxes), np.int64),
                embedding=embedding if tracker == "jde" else None,
            )
            return association.update(frame, detections)

        return update

    return Contender(
        name=f"{tracker} --compat {compat}" if compat else tracker,
        start=start,
        read=lambda tracks: (tracks.id, tracks.xyxy.astype(np.float64)),
        source="this project",
    )


def official_fairmot(clone: Path) -> Contender:
    """`JDETracker` of a clone of FairMOT, set up as its `src/lib/opts.py` says."""
    library = clone / "src" / "lib"
    file = library / "tracker" / "multitracker.py"
    with _packages(
        {"tracker": library / "tracker", "tracking_utils": library / "tracking_utils"},
        {
            "models": (),
            "models.decode": ("mot_decode",),
            "models.model": ("create_model", "load_model"),
            "models.utils": ("_tranpose_and_gather_feat",),
            "tracking_utils.utils": (),
            "utils.image": ("get_affine_transform",),
            "utils.post_process": ("ctdet_post_process",),
        },
    ):
        module = _import("tracker.multitracker", file)
    module.logger.setLevel(logging.INFO)  # as `src/track.py` does

    # From the network's output to boxes, every step hands on what it got.
    module.create_model = lambda arch, heads, head_conv: _Network()
    module.load_model = lambda network, path: network
    module.F = SimpleNamespace(normalize=lambda feature, dim: feature)
    module.mot_decode = lambda heat, size, **options: (heat, None)
    module._tranpose_and_gather_feat = lambda feature, indices: feature

    class Fed(module.JDETracker):  # type: ignore[misc, name-defined]
        def post_process(self, boxes: _Output, meta: object) -> Array:
            return boxes.numpy()

        def merge_outputs(self, boxes: list[Array]) -> dict[int, Array]:
            return {1: boxes[0]}

    def start() -> Update:
        module.BaseTrack._count = 0
        options = SimpleNamespace(conf_thres=0.4, track_buffer=30, K=500, num_classes=1)
        options.gpus, options.arch, options.heads, options.head_conv = [-1], "dla_34", {}, 256
        options.load_model, options.mean, options.std = "", [0, 0, 0], [1, 1, 1]
        options.down_ratio, options.reg_offset, options.ltrb = 4, True, True
        with redirect_stdout(io.StringIO()):  # it announces its network
            tracker = Fed(options, frame_rate=FRAME_RATE)
        image = SimpleNamespace(shape=(1080, 1920, 3))
        return lambda frame, boxes, embedding: tracker.update(_Blob(boxes, embedding), image)

    return Contender(name="official FairMOT", start=start, read=_written, source=_fingerprint(file))


def official_bytetrack(clone: Path) -> Contender:
    """`BYTETracker` of a clone of ByteTrack, set up as its `tools/track.py` says."""
    file = clone / "yolox" / "tracker" / "byte_tracker.py"
    with _packages({"yolox": clone / "yolox"}, {}):
        module = _import("yolox.tracker.byte_tracker", file)

    def start() -> Update:
        module.BaseTrack._count = 0
        options = SimpleNamespace(track_thresh=0.6, track_buffer=30, match_thresh=0.9, mot20=False)
        tracker = module.BYTETracker(options, frame_rate=FRAME_RATE)
        size = (1080, 1920)  # of the image and of the network's input: alike, so that boxes stay as they are
        return lambda frame, boxes, embedding: tracker.update(boxes, size, size)

    return Contender(name="official ByteTrack", start=start, read=_written, source=_fingerprint(file))


class _Output:
    """An array in the clothes of a network's output."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def sigmoid_(self) -> _Output:
        return self

    def squeeze(self, dim: int) -> _Output:
        return self

    def cpu(self) -> _Output:
        return self

    def numpy(self) -> Array:
        return self.array


class _Blob:
    """Detections in the clothes of the network's input."""

    shape = (1, 3, 608, 1088)

    def __init__(self, boxes: Array, embedding: Array) -> None:
        self.boxes, self.embedding = boxes, embedding


class _Network:
    def to(self, device: object) -> _Network:
        return self

    def eval(self) -> None: ...

    def __call__(self, blob: _Blob) -> list[dict[str, _Output | None]]:
        return [{"hm": _Output(blob.boxes), "wh": None, "reg": None, "id": _Output(blob.embedding)}]


def _written(tracks: Iterable[Any]) -> Answer:
    """Ids and corners of what the official writers would write."""
    rows = [
        (track.track_id, *box)
        for track, box in ((track, track.tlwh) for track in tracks)
        if box[2] * box[3] > MIN_AREA and not box[2] / box[3] > MAX_ASPECT
    ]
    table = np.array(rows, np.float64).reshape(len(rows), 5)
    return table[:, 0].astype(np.int64), xywh_to_xyxy(table[:, 1:])


@contextmanager
def _packages(folders: dict[str, Path], stubs: dict[str, tuple[str, ...]]) -> Iterator[None]:
    """Inside, `import` finds these packages in their folders, and stubs that hold names without use.

    FairMOT calls a package of its own `tracker`; so what is loaded under such names steps aside, and
    returns afterwards. The modules imported inside live on in those who hold them.
    """
    roots = {name.partition(".")[0] for name in (*folders, *stubs)}

    def take() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.partition(".")[0] in roots]
        return {name: sys.modules.pop(name) for name in names}

    aside = take()
    try:
        for name in (*roots, *folders, *stubs):
            module = sys.modules.setdefault(name, ModuleType(name))
            module.__path__ = [str(folders[name])] if name in folders else []
            for unused in stubs.get(name, ()):
                setattr(module, unused, None)
        yield
    finally:
        take()
        sys.modules.update(aside)


def _import(name: str, file: Path) -> Any:
    if not file.is_file():
        raise ConfigError(f"there is no {file}: name the top folder of a clone of the official repository")
    # The official code is older than NumPy 1.24, which took this name away.
    if "float" not in vars(np):
        np.float = float  # type: ignore[attr-defined]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{file} cannot be loaded, {error}: install what it needs") from error


def _fingerprint(file: Path) -> str:
    return f"{file.name}, SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()}"
