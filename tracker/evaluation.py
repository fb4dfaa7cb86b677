"""How good tracks are: HOTA, CLEAR MOT and identity scores, computed by the TrackEval package.

Checks the files, brings them into the folder layout TrackEval reads, and hands its own dataset and metric
classes the rest; no matching, scoring or preprocessing rule is written again here. Knows nothing of how
tracks were made.

Scores: HOTA (Luiten et al., IJCV 2021), MOTA and MOTP (Bernardin & Stiefelhagen 2008), IDF1 (Ristani et
al. 2016). The benchmarks' rules are those of TrackEval's `MotChallenge2DBox`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import numpy as np

from tracker.errors import ConfigError, DetectionsError, SourceError
from tracker.motchallenge import COLUMNS, Rows, SeqInfo, read_rows, read_seqinfo

Rule = Literal["MOT15", "MOT16", "MOT17", "MOT20", "none"]
Benchmark = Literal["auto", "MOT15", "MOT16", "MOT17", "MOT20", "none"]

# What MotChallenge2DBox does before scoring, for people.
_PEOPLE = "pedestrians count; tracks on static or riding persons, distractors and reflections are forgiven"
RULES: dict[Rule, str] = {
    "MOT15": "every row counts, there are no classes",
    "MOT16": _PEOPLE,
    "MOT17": _PEOPLE,
    "MOT20": f"{_PEOPLE}, and so are those on vehicles without a motor",
    "none": "every row counts, whatever its class",
}
CLASSES = range(1, 14)  # of MOT16 to MOT20, as MotChallenge2DBox numbers them
PEDESTRIAN = 1

# TrackEval's metrics and the fields shown of them: first what lies in [0, 1], then counts by shown name.
_SHARES = {
    "HOTA": ("HOTA", "DetA", "AssA", "LocA"),
    "CLEAR": ("MOTA", "MOTP"),
    "Identity": ("IDF1", "IDP", "IDR"),
}
_COUNTS = {"IDSW": "IDSW", "FP": "CLR_FP", "FN": "CLR_FN", "Frag": "Frag"}

Scores = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One sequence: its ground truth, the results for it, and its seqinfo where there is one."""

    name: str
    truth: Path
    results: Path
    info: SeqInfo | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceReport:
    """One sequence's scores, with the number of frames and the preprocessing rule they were made with."""

    name: str
    frames: int
    rule: Rule
    scores: Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Scores per sequence and over all. HOTA to IDR are per cent, the rest counts.

    HOTA, DetA, AssA and LocA are means over the thresholds 0.05, 0.10, …, 0.95.
    """

    sequences: tuple[SequenceReport, ...]
    combined: Scores
    trackeval_version: str

    def to_json(self) -> dict[str, Any]:
        return {
            "sequences": {
                each.name: {"frames": each.frames, "rule": each.rule, **each.scores}
                for each in self.sequences
            },
            "combined": self.combined,
            "trackeval": self.trackeval_version,
        }

    def table(self) -> str:
        """Aligned text, one line per sequence and one for all, and the rules that were applied."""
        named = [(each.name, each.scores) for each in self.sequences]
        if len(named) > 1:
            named.append(("COMBINED", self.combined))
        lines = [["", *self.combined]]
        for name, scores in named:
            shown = (f"{value:.3f}" if isinstance(value, float) else f"{value}" for value in scores.values())
            lines.append([name, *shown])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
            for line in lines
        ]
        for rule in dict.fromkeys(each.rule for each in self.sequences):
            names = ", ".join(each.name for each in self.sequences if each.rule == rule)
            text.append(f"rule {rule} ({names}): {RULES[rule]}; ground truth with flag 0 is left out")
        return "\n".join(text)


def find_pairs(truth: Path, results: Path) -> list[Pair]:
    """Pair ground truth with results: two files, or two folders holding SEQ/gt/gt.txt and SEQ.txt.

    A seqinfo.ini is taken from beside gt.txt or one folder above it.
    Raises SourceError for what is not there, and for results without ground truth or the reverse.
    """
    for path in (truth, results):
        if not path.exists():
            raise SourceError(f"{path} does not exist")
    if truth.is_dir() != results.is_dir():
        raise SourceError(
            f"{truth} and {results} are a folder and a file: give both as files, or both as folders "
            "(SEQ/gt/gt.txt and SEQ.txt)"
        )
    if truth.is_file():
        info = _find_seqinfo(truth)
        return [Pair(name=info.name if info else results.stem, truth=truth, results=results, info=info)]
    truths = {path.parent.parent.name: path for path in sorted(truth.glob("*/gt/gt.txt"))}
    found = {path.stem: path for path in sorted(results.glob("*.txt"))}
    if not truths:
        raise SourceError(f"{truth} has no ground truth: SEQ/gt/gt.txt is expected, SEQ the sequence's name")
    if missing := truths.keys() - found.keys():
        raise SourceError(
            f"{results} has no {_files(missing)}, but {truth} has the ground truth; a sequence "
            "without any tracks needs an empty file"
        )
    if extra := found.keys() - truths.keys():
        raise SourceError(f"{results} has {_files(extra)}, but {truth} no sequence of that name")
    return [
        Pair(name=name, truth=path, results=found[name], info=_find_seqinfo(path))
        for name, path in truths.items()
    ]


def evaluate(pairs: Sequence[Pair], *, benchmark: Benchmark = "auto", scale: float = 1.0) -> Report:
    """Score every pair and all of them together.

    benchmark: whose preprocessing rule to apply; "auto" asks the sequence's name, then the ground truth's
        columns (`detect_rule`).
    scale: multiplies result boxes, for results in other pixels than the ground truth's.

    A sequence is as long as its seqinfo says, else as the last frame in either file. No tracks at all score
    0 (LocA 100, TrackEval's convention).
    Raises ConfigError (an impossible option, TrackEval not installed), SourceError (unreadable file) and
    DetectionsError (rows that cannot be scored: ids that are not whole or come twice in a frame, frames
    beyond the sequence's length, classes the rule does not know).
    """
    if benchmark not in get_args(Benchmark):
        raise ConfigError(f"unknown benchmark {benchmark!r}: choose from {', '.join(get_args(Benchmark))}")
    if not 0 < scale < float("inf"):
        raise ConfigError(
            f"scale {scale} is impossible: result boxes are multiplied by it, so it must be > 0"
        )
    if not pairs or len({pair.name for pair in pairs}) < len(pairs):
        raise ConfigError(f"sequences need names of their own, got {[pair.name for pair in pairs]}")
    trackeval = _import_trackeval()
    quiet = {"PRINT_CONFIG": False}
    metrics = {
        "HOTA": trackeval.metrics.HOTA(),
        "CLEAR": trackeval.metrics.CLEAR(quiet),
        "Identity": trackeval.metrics.Identity(quiet),
    }
    reports, raw = [], {}
    for pair in pairs:
        truth, results = _read(pair.truth), _read(pair.results)
        results[:, 2:6] *= scale
        rule = detect_rule(pair, truth) if benchmark == "auto" else benchmark
        frames = _length(pair, truth, results)
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")  # TrackEval's own; ours are all raised before
            data = _preprocess(trackeval, _truth_columns(pair, truth, rule), results, rule, frames)
            raw[pair.name] = {name: metric.eval_sequence(data) for name, metric in metrics.items()}
        reports.append(
            SequenceReport(name=pair.name, frames=frames, rule=rule, scores=_scores(raw[pair.name]))
        )
    combined = {
        name: metric.combine_sequences({sequence: scores[name] for sequence, scores in raw.items()})
        for name, metric in metrics.items()
    }
    return Report(
        sequences=tuple(reports), combined=_scores(combined), trackeval_version=trackeval.__version__
    )


def detect_rule(pair: Pair, truth: Rows) -> Rule:
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


def _preprocess(trackeval: Any, truth: Rows, results: Rows, rule: Rule, frames: int) -> dict[str, Any]:
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
    """Rows with whole ids, at most one of each in a frame; ids renumbered from 0.

    TrackEval's arrays are as long as the largest id, and negative ids would index from their end.
    """
    rows = read_rows(path).copy()
    fractions = rows[:, 1] % 1 != 0
    if fractions.any():
        row = rows[np.argmax(fractions)]
        raise DetectionsError(f"{path}, frame {row[0]:.0f}: id {row[1]} is not a whole number")
    repeated = np.setdiff1d(np.arange(len(rows)), np.unique(rows[:, :2], axis=0, return_index=True)[1])
    if len(repeated):
        frame, identity = rows[repeated[0], :2]
        raise DetectionsError(
            f"{path}, frame {frame:.0f}: id {identity:.0f} appears more than once; an id is one object, in "
            "one place (are these detections, not tracks?)"
        )
    rows[:, 1] = np.unique(rows[:, 1], return_inverse=True)[1]
    return rows


def _length(pair: Pair, truth: Rows, results: Rows) -> int:
    """Frames in the sequence; every row must lie in them."""
    last = max((int(rows[:, 0].max()) for rows in (truth, results) if len(rows)), default=0)
    if pair.info is None:
        if last == 0:
            raise DetectionsError(f"{pair.truth} and {pair.results} are both empty: nothing to evaluate")
        return last
    for path, rows in ((pair.truth, truth), (pair.results, results)):
        beyond = rows[:, 0] > pair.info.length
        if beyond.any():
            raise DetectionsError(
                f"{path} has frame {rows[np.argmax(beyond), 0]:.0f}, but seqinfo.ini says seqLength="
                f"{pair.info.length}; are the files of the same sequence, and frames counted from 1?"
            )
    return pair.info.length


def _truth_columns(pair: Pair, truth: Rows, rule: Rule) -> Rows:
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


def _scores(raw: dict[str, dict[str, Any]]) -> Scores:
    """TrackEval's nested numbers → ours, in the order they are shown."""
    shares = [(metric, field) for metric, fields in _SHARES.items() for field in fields]
    percent = {field: 100 * float(np.mean(raw[metric][field])) for metric, field in shares}
    return percent | {name: int(raw["CLEAR"][field]) for name, field in _COUNTS.items()}


def _find_seqinfo(truth: Path) -> SeqInfo | None:
    for folder in truth.absolute().parents[:2]:
        if (path := folder / "seqinfo.ini").is_file():
            return read_seqinfo(path)
    return None


def _import_trackeval() -> Any:
    """TrackEval, imported late because it is an extra and takes most of a second."""
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            import trackeval
    except ImportError as error:
        raise ConfigError(f"evaluation needs TrackEval ({error}): run pip install 'tracker[eval]'") from error
    return trackeval


def _files(names: Iterable[str]) -> str:
    return ", ".join(f"{name}.txt" for name in sorted(names))
