"""A network run over the calibration frames, and what its tensors hold.

Frames go through the front end's own `Preprocessor`, as its manifest says: calibrating on other pixels than
those to be tracked is the commonest way to spoil INT8. What has been seen is kept in a file beside the
result, so that an interrupted run goes on where it was, and another method costs nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

from tracker.deploy.calibration.frames import Choice, choose, chosen
from tracker.deploy.calibration.ranges import BINS, Histogram
from tracker.deploy.feeds import Feeds
from tracker.deploy.islands import copy_of
from tracker.deploy.plan import partial_file
from tracker.errors import EngineError
from tracker.frontends.worker import start_workers
from tracker.manifest import Manifest
from tracker.runtimes.onnx import usable_cores
from tracker.types import Frame

SAVE_SECONDS = 10.0  # between saves of what has been seen
FORMAT = 1  # of the file; another one is not read

Progress = Callable[[str, int, int | None], object]  # what goes on, how many are done, of how many


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """histograms: by tensor. choice: the frames they are from. resumed: how many were seen before."""

    histograms: Mapping[str, Histogram]
    choice: Choice
    resumed: int


def observe(
    model: onnx.ModelProto,
    manifest: Manifest,
    tensors: Sequence[str],
    sources: Sequence[Path],
    *,
    count: int,
    seed: int,
    state: Path,
    progress: Progress | None = None,
) -> Observed:
    """Histograms of the tensors over `count` of the sources' frames.

    state: where to keep what has been seen; what is there is gone on with if it is of the same model, frames
    and seed, else begun anew.
    Raises as `choose` does, EngineError where the network cannot be run or answers NaN.
    """
    told = progress or (lambda what, done, total: None)
    key = _key(model, manifest, tensors, sources, count, seed)
    kept = _read(state, key)
    if kept is None:
        looked = 0

        def look() -> None:
            nonlocal looked
            looked += 1
            told("looking for different frames", looked, None)

        choice = choose(sources, count, seed=seed, on_frame=look)
        histograms, done = {name: Histogram() for name in tensors}, 0
    else:
        choice, histograms, done = kept
    resumed, saved = done, monotonic()
    network = _Network(model, manifest, tensors)
    workers = start_workers(usable_cores())
    try:
        for batch in _batches(chosen(sources, choice.places[done:]), network.batch):
            values = network.run(batch)
            list(workers.map(lambda name, values=values: histograms[name].add(values[name]), tensors))
            done += len(batch)
            told("calibrating", done, len(choice.places))
            if monotonic() > saved + SAVE_SECONDS:
                _write(state, key, choice, histograms, done)
                saved = monotonic()
    finally:  # also when interrupted
        network.feeds.close()
        workers.shutdown()
        _write(state, key, choice, histograms, done)
    if done < len(choice.places):
        raise EngineError(f"{len(choice.places) - done} frames could not be read again: did a file change?")
    return Observed(histograms=histograms, choice=choice, resumed=resumed)


class _Network:
    """The graph with tensors of its inside among its outputs."""

    def __init__(self, model: onnx.ModelProto, manifest: Manifest, tensors: Sequence[str]) -> None:
        shown = copy_of(model)
        outputs = {value.name for value in shown.graph.output}
        inputs = {value.name for value in shown.graph.input}
        self._names = [name for name in tensors if name not in inputs]
        shown.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            for name in self._names
            if name not in outputs
        )
        self.feeds = Feeds.of(model, manifest)
        self.batch = self.feeds.batch
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised, not printed
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                shown.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # classes of ONNX Runtime's own, derived from nothing narrower
            reason = " ".join(str(error).split())
            raise EngineError(
                f"ONNX Runtime {onnxruntime.__version__} cannot run the graph: {reason}"
            ) from error

    def run(self, frames: Sequence[Frame]) -> dict[str, torch.Tensor]:
        """The tensors' values for the frames, at most `batch`; a batch part full counts as far as it is, but
        for what is fed with regions of images.
        """
        fed = self.feeds(frames)
        answers = self._session.run(self._names, {name: rows.numpy() for name, rows in fed.items()})
        values = {n: torch.from_numpy(v) for n, v in zip(self._names, answers, strict=True)} | fed
        return values if len(fed) > 1 else {name: value[: len(frames)] for name, value in values.items()}


def _batches(frames: Iterator[Frame], size: int) -> Iterator[list[Frame]]:
    batch: list[Frame] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _key(
    model: onnx.ModelProto,
    manifest: Manifest,
    tensors: Sequence[str],
    sources: Sequence[Path],
    count: int,
    seed: int,
) -> str:
    """What must be the same for histograms to be gone on with."""
    about = {
        "format": FORMAT,
        "bins": BINS,
        "model": hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest(),
        "input": asdict(manifest.input),
        "tensors": list(tensors),
        "sources": [[str(path.resolve()), *_stamp(path)] for path in sources],
        "frames": count,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _stamp(path: Path) -> list[int]:
    """Size and time of change; of a directory, those of all its files."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    found = [file.stat() for file in files if file.exists()]
    return [sum(each.st_size for each in found), max((each.st_mtime_ns for each in found), default=0)]


def _read(state: Path, key: str) -> tuple[Choice, dict[str, Histogram], int] | None:
    """What was kept for this key; None where there is nothing of the kind."""
    try:
        with state.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            about: dict[str, Any] = json.loads(str(kept["about"]))
            if about.pop("key", None) != key:
                return None
            names, counts, ends = about["tensors"], kept["counts"], kept["ends"]
            histograms = {
                name: Histogram(counts[k].copy(), float(ends[k, 0]), float(ends[k, 1]))
                for k, name in enumerate(names)
            }
            places = tuple((int(source), int(index)) for source, index in about["places"])
            choice = Choice(places=places, seen=about["seen"], unreadable=about["unreadable"])
            return choice, histograms, about["done"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # none there, cut short, or not ours
        return None


def _write(state: Path, key: str, choice: Choice, histograms: Mapping[str, Histogram], done: int) -> None:
    about = {"key": key, "tensors": list(histograms), "done": done, **asdict(choice)}
    arrays: dict[str, Any] = {
        "about": np.array(json.dumps(about)),
        "counts": np.stack([each.counts for each in histograms.values()]),
        "ends": np.array([(each.bound, each.amax) for each in histograms.values()]),
    }
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    with partial_file(state) as file, file.step():
        file.write(content.getvalue())
