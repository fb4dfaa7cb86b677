"""Scores of sequences and of all of them together, by TrackEval's metrics."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any, get_args

import numpy as np

from tracker.errors import ConfigError
from tracker.evaluation import boxes, masks
from tracker.evaluation.report import Benchmark, Format, Report, Scores, SequenceReport
from tracker.evaluation.sequences import Pair

_PREPARE = {"mot": boxes.prepare, "mots": masks.prepare}

# What is shown, and which of TrackEval's metrics and fields that is: first what lies in [0, 1], then counts.
# On masks the MOTS paper's sMOTSA, MOTSA and MOTSP are what CLEAR calls sMOTA, MOTA and MOTP.
_CLEAR: dict[Format, dict[str, str]] = {
    "mot": {"MOTA": "MOTA", "MOTP": "MOTP"},
    "mots": {"sMOTSA": "sMOTA", "MOTSA": "MOTA", "MOTSP": "MOTP"},
}
_COUNTS = {"IDSW": "IDSW", "FP": "CLR_FP", "FN": "CLR_FN", "Frag": "Frag"}


def evaluate(
    pairs: Sequence[Pair], *, benchmark: Benchmark = "auto", scale: float = 1.0, format: Format = "mot"
) -> Report:
    """Score every pair and all of them together.

    benchmark: whose preprocessing rule to apply; "auto" asks the sequence's name, then the ground truth's
        columns (`detect_rule`). Of masks it asks their classes: MOTS where all are MOTS's own and one is a
        pedestrian, else none.
    scale: multiplies result boxes, for results in other pixels than the ground truth's.
    format: "mot" for boxes, "mots" for masks.

    A sequence is as long as its seqinfo says, else as the last frame in either file. No tracks at all score
    0 (LocA 100, TrackEval's convention).
    Raises ConfigError (an impossible option, TrackEval not installed), SourceError (unreadable file) and
    DetectionsError (rows that cannot be scored: ids that are not whole or come twice in a frame, frames
    beyond the sequence's length, classes the rule does not know, masks that overlap or differ in size).
    """
    for name, value, kind in (("benchmark", benchmark, Benchmark), ("format", format, Format)):
        if value not in get_args(kind):
            raise ConfigError(f"unknown {name} {value!r}: choose from {', '.join(get_args(kind))}")
    if not 0 < scale < float("inf"):
        raise ConfigError(
            f"scale {scale} is impossible: result boxes are multiplied by it, so it must be > 0"
        )
    if not pairs or len({pair.name for pair in pairs}) < len(pairs):
        raise ConfigError(f"sequences need names of their own, got {[pair.name for pair in pairs]}")
    trackeval = trackeval_module()
    quiet = {"PRINT_CONFIG": False}
    metrics = {
        "HOTA": trackeval.metrics.HOTA(),
        "CLEAR": trackeval.metrics.CLEAR(quiet),
        "Identity": trackeval.metrics.Identity(quiet),
    }
    reports, raw = [], {}
    for pair in pairs:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")  # TrackEval's own
            rule, frames, data = _PREPARE[format](trackeval, pair, benchmark, scale)
            raw[pair.name] = {name: metric.eval_sequence(data) for name, metric in metrics.items()}
        scores = _scores(raw[pair.name], format)
        reports.append(SequenceReport(name=pair.name, frames=frames, rule=rule, scores=scores))
    combined = {
        name: metric.combine_sequences({sequence: scores[name] for sequence, scores in raw.items()})
        for name, metric in metrics.items()
    }
    return Report(
        sequences=tuple(reports),
        combined=_scores(combined, format),
        trackeval_version=trackeval.__version__,
        format=format,
    )


def _scores(raw: dict[str, dict[str, Any]], format: Format) -> Scores:
    """TrackEval's nested numbers → ours, in the order they are shown."""
    shown = {name: ("HOTA", name) for name in ("HOTA", "DetA", "AssA", "LocA")}
    shown |= {name: ("CLEAR", field) for name, field in _CLEAR[format].items()}
    shown |= {name: ("Identity", name) for name in ("IDF1", "IDP", "IDR")}
    percent = {name: 100 * float(np.mean(raw[metric][field])) for name, (metric, field) in shown.items()}
    return percent | {name: int(raw["CLEAR"][field]) for name, field in _COUNTS.items()}


def trackeval_module() -> Any:
    """TrackEval, imported late because it is an extra and takes most of a second. Ask before long work.

    Raises ConfigError where it is not installed.
    """
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            import trackeval
    except ImportError as error:
        raise ConfigError(f"evaluation needs TrackEval ({error}): run pip install 'tracker[eval]'") from error
    return trackeval
