"""MOTS rows of masks, as TrackEval's `MOTSChallenge` reads and preprocesses them."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tracker import rle
from tracker.errors import ConfigError, DetectionsError
from tracker.evaluation.report import Benchmark, Rule
from tracker.evaluation.sequences import Pair, length, whole_ids
from tracker.mots import CAR, IGNORED, PEDESTRIAN, MaskRows, read_masks


def prepare(
    trackeval: Any, pair: Pair, benchmark: Benchmark, scale: float
) -> tuple[Rule, int, dict[str, Any]]:
    """As for boxes. Raises as `evaluate` says."""
    if scale != 1:
        raise ConfigError(f"scale is {scale}, but masks cannot be scaled: track the video at its own size")
    if benchmark not in ("auto", "none"):
        raise ConfigError(f"benchmark {benchmark} is for boxes: for masks there are auto and none")
    truth, results = read_masks(pair.truth), read_masks(pair.results)
    if truth.size and results.size and truth.size != results.size:
        (w, h), (width, height) = truth.size, results.size
        raise DetectionsError(
            f"{pair.results} has pictures of {width}×{height}, {pair.truth} of {w}×{h}; masks are compared "
            "pixel by pixel: track the video at its own size"
        )
    rule = _rule(truth) if benchmark == "auto" else benchmark
    frames = length(pair, truth.frame, results.frame)
    counted = np.array(
        [row for row in range(len(truth)) if rule == "none" or truth.label[row] != IGNORED], int
    )
    ids = np.zeros(len(truth), np.int64)  # of regions nobody asks
    ids[counted] = whole_ids(pair.truth, truth.frame[counted], truth.id[counted])
    found = whole_ids(pair.results, results.frame, results.id)
    with TemporaryDirectory() as folder:
        root, name = Path(folder), "sequence"
        for path, rows, numbers in (
            (root / "gt" / name / "gt" / "gt.txt", truth, ids),
            (root / "results" / "tracker" / "data" / f"{name}.txt", results, found),
        ):
            path.parent.mkdir(parents=True)
            path.write_text(_text(rows, numbers, rule))
        dataset = trackeval.datasets.MOTSChallenge(
            {
                "GT_FOLDER": str(root / "gt"),
                "TRACKERS_FOLDER": str(root / "results"),
                "TRACKERS_TO_EVAL": ["tracker"],
                "SEQ_INFO": {name: frames},
                "SKIP_SPLIT_FOL": True,
                "PRINT_CONFIG": False,
            }
        )
        try:
            raw = dataset.get_raw_seq_data("tracker", name)
        except trackeval.utils.TrackEvalException as error:
            for path, rows in ((pair.truth, truth), (pair.results, results)):
                _refuse_overlap(path, rows)
            raise DetectionsError(f"TrackEval refuses {pair.results}: {error}") from error
        return rule, frames, dataset.get_preprocessed_seq_data(raw, "pedestrian")


def _rule(truth: MaskRows) -> Rule:
    """MOTS for its own classes with people among them, which is what its rule counts."""
    labels = set(truth.label.tolist())
    return "MOTS" if PEDESTRIAN in labels <= {CAR, PEDESTRIAN, IGNORED} else "none"


def _text(rows: MaskRows, ids: np.ndarray[Any, Any], rule: Rule) -> str:
    """The rows as TrackEval reads them; without a rule all are pedestrians to it."""
    if rows.size is None:
        return ""
    width, height = rows.size
    labels = rows.label if rule == "MOTS" else np.full(len(rows), PEDESTRIAN)
    table = zip(rows.frame.tolist(), ids.tolist(), labels.tolist(), rows.counts, strict=True)
    return "".join(f"{frame} {i} {label} {height} {width} {c.decode()}\n" for frame, i, label, c in table)


def _refuse_overlap(path: Path, rows: MaskRows) -> None:
    """Raise DetectionsError for the first frame with a pixel in two masks."""
    for frame in np.unique(rows.frame).tolist():
        assert rows.size is not None
        owner = np.full(rows.size[::-1], -1)
        for row in np.flatnonzero(rows.frame == frame).tolist():
            mask = rle.decode(rows.counts[row], rows.size)
            taken = owner[mask & (owner >= 0)]
            if len(taken):
                raise DetectionsError(
                    f"{path}, frame {frame}: the masks of {rows.id[taken[0]]} and {rows.id[row]} share "
                    f"{(taken == taken[0]).sum()} pixels; in MOTS a pixel belongs to one object"
                )
            owner[mask] = row
