"""MOTChallenge rows of boxes, as TrackEval's `MotChallenge2DBox` reads and preprocesses them."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tracker.errors import ConfigError, DetectionsError
from tracker.evaluation.report import Benchmark, BoxRule
from tracker.evaluation.sequences import Pair, length, whole_ids
from tracker.motchallenge import COLUMNS, Rows, read_rows

CLASSES = range(1, 14)  # of MOT16 to MOT20, as MotChallenge2DBox numbers them
PEDESTRIAN = 1


def prepare(
    trackeval: Any, pair: Pair, benchmark: Benchmark, scale: float
) -> tuple[BoxRule, int, dict[str, Any]]:
    """The rule applied, how many frames, and what TrackEval's metrics take. Raises as `evaluate` says."""
    truth, results = _read(pair.truth), _read(pair.results)
    results[:, 2:6] *= scale
    rule = detect_rule(pair, truth) if benchmark == "auto" else benchmark
    frames = length(pair, truth[:, 0], results[:, 0])
    return rule, frames, _preprocess(trackeval, _truth_columns(pair, truth, rule), results, rule, frames)


def detect_rule(pair: Pair, truth: Rows) -> BoxRule:
    """Whose preprocessing the ground truth is written for.

    A sequence named MOT15-…, MOT16-…, MOT17-…, MOT20-… (by seqinfo or by its folder) says so. Otherwise
    nine or eight columns whose eighth holds only MOTChallenge's classes 1 to 13 mean MOT17 (same rule as
    MOT16), ten columns (three of them world coordinates) mean MOT15, and anything else means no rule.
    """
    names = (pair.info.name if pair.info else "", pair.name)
    for rule in ("MOT15", "MOT16", "MOT17", "MOT20"):
        if any(name.startswith(rule) for name in names):
            return rule
    columns = truth.shape[1]
    if columns in (8, 9) and np.isin(truth[:, 7], CLASSES).all():
        return "MOT17"
    return "MOT15" if columns == 10 else "none"


def _preprocess(trackeval: Any, truth: Rows, results: Rows, rule: BoxRule, frames: int) -> dict[str, Any]:
    """TrackEval's own reading and preprocessing, from a folder laid out the way it wants."""
    with TemporaryDirectory() as folder:
        root, name = Path(folder), "sequence"
        for path, rows in (
            (root / "gt" / name / "gt" / "gt.txt", truth),
            (root / "results" / "tracker" / "data" / f"{name}.txt", results[:, :COLUMNS]),
        ):
            path.parent.mkdir(parents=True)
            np.savetxt(path, rows, fmt="%.17g", delimiter=",")
        dataset = trackeval.datasets.MotChallenge2DBox(
            {
                "GT_FOLDER": str(root / "gt"),
                "TRACKERS_FOLDER": str(root / "results"),
                "TRACKERS_TO_EVAL": ["tracker"],
                "SEQ_INFO": {name: frames},
                "SKIP_SPLIT_FOL": True,
                "BENCHMARK": "MOT15" if rule == "none" else rule,
                "DO_PREPROC": rule != "none",
                "PRINT_CONFIG": False,
            }
        )
        raw = dataset.get_raw_seq_data("tracker", name)
        data: dict[str, Any] = dataset.get_preprocessed_seq_data(raw, "pedestrian")
        return data


def _read(path: Path) -> Rows:
    rows = read_rows(path).copy()
    rows[:, 1] = whole_ids(path, rows[:, 0], rows[:, 1])
    return rows


def _truth_columns(pair: Pair, truth: Rows, rule: BoxRule) -> Rows:
    """The eight columns TrackEval reads: frame, id, box, flag, class (pedestrian, where there is none)."""
    if rule in ("MOT15", "none") or not len(truth):
        return np.column_stack((truth[:, :COLUMNS], np.full(len(truth), PEDESTRIAN)))
    if truth.shape[1] == COLUMNS:
        raise ConfigError(f"{pair.truth} has no class column, which {rule} needs; use the benchmark none")
    unknown = ~np.isin(truth[:, COLUMNS], CLASSES)
    if unknown.any():
        row = truth[np.argmax(unknown)]
        raise DetectionsError(
            f"{pair.truth}, frame {row[0]:.0f}: class {row[7]:g} is none of {rule}'s 1 to {CLASSES[-1]}; "
            "use the benchmark none"
        )
    return truth[:, : COLUMNS + 1]
