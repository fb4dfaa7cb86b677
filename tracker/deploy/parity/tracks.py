"""How alike two trackings of one clip are, and how good each is.

    follow           Findings → Followed, the tracks
    compare_tracks   two Followed → TrackParity
    score            Followed against ground truth, or against another's tracks → HOTA, MOTA, IDF1 …

Detections are `parity`'s. Knows no network; scores are `tracker.evaluation`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracker.association import make_association
from tracker.boxes import xywh_to_xyxy
from tracker.deploy.parity.detections import Findings, check_frames, pair
from tracker.errors import SourceError
from tracker.evaluation import PEDESTRIAN, Benchmark, Scores, detect_rule, evaluate, find_pairs
from tracker.matching import Indices
from tracker.motchallenge import Rows, read_rows
from tracker.sinks.mot import format_rows
from tracker.types import Detections, Tracks


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """The tracks of a clip's frames, in order. numbers: as in Findings."""

    numbers: tuple[int, ...]
    tracks: tuple[Tracks, ...]

    @property
    def rows(self) -> int:
        return sum(map(len, self.tracks))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackParity:
    """Two trackings of the same frames, ids compared up to renumbering.

    reference, candidate: tracks. rows: of the reference and of the candidate. same_rows: rows for which the
    other side has a box of the track that stands for it. same_tracks: tracks for which that holds in every
    row of both sides. first_difference: 0-based index of the first frame with another row, else None.
    """

    reference: int
    candidate: int
    rows: tuple[int, int]
    same_rows: int
    same_tracks: int
    first_difference: int | None

    @property
    def row_share(self) -> float:
        total = sum(self.rows)
        return 2 * self.same_rows / total if total else 1.0

    @property
    def track_share(self) -> float:
        total = self.reference + self.candidate
        return 2 * self.same_tracks / total if total else 1.0


def follow(
    findings: Findings,
    *,
    tracker: str | None = None,
    compat: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Followed:
    """The tracks made from the detections; tracker, compat, settings: see `make_association`.

    tracker: None is jde where there are embeddings, else byte, as for `track`.
    """
    association = make_association(
        tracker or ("jde" if findings.embeds else "byte"),
        compat=compat,
        frame_rate=findings.frame_rate,
        names=findings.names,
        settings=settings,
    )
    frames = zip(findings.numbers, findings.detections, strict=True)
    tracks = tuple(association.update(number, found) for number, found in frames)
    return Followed(numbers=findings.numbers, tracks=tracks)


def compare_tracks(reference: Followed, candidate: Followed, *, least_iou: float = 0.9) -> TrackParity:
    """Which tracks and rows both have.

    Frame by frame, boxes that overlap by `least_iou` and have one label are paired; from the first such pair
    on, two ids stand for each other, and for no third. Of boxes that overlap alike, those are paired.
    """
    check_frames(reference.numbers, candidate.numbers)
    stands_for: dict[int, int] = {}
    taken: dict[int, int] = {}
    same_rows, first = 0, None
    broken: tuple[set[int], set[int]] = (set(), set())
    seen: tuple[set[int], set[int]] = (set(), set())
    frames = zip(reference.numbers, reference.tracks, candidate.tracks, strict=True)
    for number, one, other in frames:
        ids, others = one.id.tolist(), other.id.tolist()
        seen[0].update(ids)
        seen[1].update(others)
        strange = partial(_strange, ids, others, stands_for)
        row, column = pair(one, other, least_iou, strange=strange)
        left, right = set(ids), set(others)
        for a, b in zip(one.id[row].tolist(), other.id[column].tolist(), strict=True):
            if stands_for.setdefault(a, b) == b and taken.setdefault(b, a) == a:
                same_rows += 1
                left.discard(a)
                right.discard(b)
        broken[0].update(left)
        broken[1].update(right)
        if first is None and (left or right):
            first = number
    whole = [a for a, b in stands_for.items() if a not in broken[0] and b not in broken[1]]
    return TrackParity(
        reference=len(seen[0]),
        candidate=len(seen[1]),
        rows=(reference.rows, candidate.rows),
        same_rows=same_rows,
        same_tracks=len(whole),
        first_difference=first,
    )


def score(
    followed: Followed,
    truth: Path | Followed,
    *,
    benchmark: Benchmark = "auto",
    scale: float = 1.0,
) -> Scores | None:
    """HOTA, MOTA, IDF1, ID switches and the rest of `evaluation.Report`, of the frames that were followed.

    truth: a MOT ground truth, of which later frames do not count; or other tracks. benchmark, scale: see
    `evaluate`. None where neither side has a row. Raises as `evaluate` does.
    """
    last = followed.numbers[-1] + 1
    with TemporaryDirectory() as folder:
        results, expected = Path(folder) / "results.txt", Path(folder) / "truth.txt"
        _write_tracks(followed, results)
        if isinstance(truth, Followed):
            check_frames(truth.numbers, followed.numbers)
            counted = (replace(tracks, score=np.ones(len(tracks))) for tracks in truth.tracks)
            _write_tracks(replace(truth, tracks=tuple(counted)), expected)  # a flag of 0 would not count
            benchmark, empty = "none", not truth.rows
        else:
            rows = _truth_rows(truth)
            benchmark = _rule_of(truth, rows) if benchmark == "auto" else benchmark
            rows = rows[rows[:, 0] <= last]
            np.savetxt(expected, rows, fmt="%.17g", delimiter=",")
            empty = not len(rows)
        if empty and not followed.rows:
            return None
        return evaluate(find_pairs(expected, results), benchmark=benchmark, scale=scale).combined


def truth_of(path: Path, numbers: Sequence[int], *, scale: float = 1.0) -> list[Detections]:
    """Objects that count in the frames with these indices, from a MOT ground truth, in pixels of the results.

    scale: what results are multiplied by to have the ground truth's pixels, as in `evaluate`. Objects count
    as TrackEval has it: not those with flag 0, and where there are classes only people.
    """
    rows = _truth_rows(path)
    rule = _rule_of(path, rows)
    counts = rows[:, 6] != 0
    if rule not in ("MOT15", "none"):
        counts &= rows[:, 7] == PEDESTRIAN
    rows = rows[counts]
    xyxy = xywh_to_xyxy(rows[:, 2:6]) / scale
    found = []
    for number in numbers:
        here = rows[:, 0] == number + 1
        count = int(here.sum())
        found.append(Detections(xyxy=xyxy[here], score=np.ones(count), label=np.zeros(count, np.int64)))
    return found


def _truth_rows(path: Path) -> Rows:
    if not path.is_file():
        raise SourceError(
            f"{path} is {'a folder' if path.is_dir() else 'missing'}: name one gt.txt with --gt"
        )
    return read_rows(path)


def _rule_of(path: Path, rows: Rows) -> Benchmark:
    return detect_rule(find_pairs(path, path)[0], rows)


def _write_tracks(followed: Followed, path: Path) -> None:
    frames = zip(followed.numbers, followed.tracks, strict=True)
    path.write_text("".join(format_rows(number + 1, tracks) for number, tracks in frames))


def _strange(
    ids: list[int], others: list[int], stands_for: Mapping[int, int], row: Indices, column: Indices
) -> NDArray[np.bool_]:
    """Of pairs, whether they are another than before."""
    pairs = zip(row.tolist(), column.tolist(), strict=True)
    return np.array([stands_for.get(ids[r]) != others[c] for r, c in pairs], bool)
