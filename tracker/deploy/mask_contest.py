"""What `--cost mask` is worth: boxes against masks on tangles, whose truth is exact.

Both costs get the same detections; TrackEval scores boxes, as for any other tracker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np

from tracker.association import COSTS, make_association
from tracker.deploy.scenes.tangles import Tangle, TangleConfig
from tracker.evaluation import Pair, evaluate
from tracker.sinks.mot import format_rows
from tracker.types import Detections, Tracks

SHOWN = ("IDF1", "IDSW", "HOTA", "AssA", "MOTA")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Of one tangle tracked at one cost. scores: SHOWN, by name. milliseconds: of association in a frame,
    waiting for the device included, median.
    """

    seed: int
    cost: str
    scores: dict[str, float]
    milliseconds: float


def contest(seed: int, config: TangleConfig | None = None, *, device: str = "cpu") -> list[Score]:
    """One tangle tracked at each of COSTS, its masks being on that device. Needs the extra `eval`."""
    tangle = Tangle(seed, config)
    truth = "".join(format_rows(index + 1, _as_tracks(tangle, index)) for index in range(tangle.frames))
    found = [tangle.detections(index, device=device) for index in range(tangle.frames)]
    return [_track(seed, found, truth, cost) for cost in COSTS]


def table(results: Sequence[Score]) -> str:
    """A line per tangle with both costs' IDF1 and switches, then the means of all that is shown."""
    by_seed: dict[int, dict[str, Score]] = {}
    for each in results:
        by_seed.setdefault(each.seed, {})[each.cost] = each
    lines = [f"{'seed':>6}" + "".join(f"{f'IDF1 {cost}':>12}{'IDSW':>6}" for cost in COSTS)]
    for seed, of_cost in by_seed.items():
        cells = (of_cost[cost].scores for cost in COSTS)
        lines.append(f"{seed:>6}" + "".join(f"{cell['IDF1']:>12.1f}{cell['IDSW']:>6.0f}" for cell in cells))
    lines.append("")
    lines.append(f"{'mean':>6}" + "".join(f"{name:>8}" for name in SHOWN) + f"{'ms/frame':>10}")
    for cost in COSTS:
        mine = [each for each in results if each.cost == cost]
        means = (fmean(each.scores[name] for each in mine) for name in SHOWN)
        time = fmean(each.milliseconds for each in mine)
        lines.append(f"{cost:>6}" + "".join(f"{value:>8.1f}" for value in means) + f"{time:>10.2f}")
    return "\n".join(lines)


def _track(seed: int, found: Sequence[Detections], truth: str, cost: str) -> Score:
    association = make_association("byte", settings={"cost": cost})
    rows, seconds = [], []
    for index, detections in enumerate(found):
        begun = perf_counter()
        tracks = association.update(index, detections)
        seconds.append(perf_counter() - begun)
        rows.append(format_rows(index + 1, tracks))
    with TemporaryDirectory() as directory:
        pair = Pair(name=cost, truth=Path(directory, "gt.txt"), results=Path(directory, "R.txt"))
        pair.truth.write_text(truth)
        pair.results.write_text("".join(rows))
        scores = evaluate([pair], benchmark="none").combined
    return Score(
        seed=seed,
        cost=cost,
        scores={name: float(scores[name]) for name in SHOWN},
        milliseconds=1000 * median(seconds),
    )


def _as_tracks(tangle: Tangle, index: int) -> Tracks:
    seen = tangle.truth(index)
    return Tracks(
        id=seen.id,
        xyxy=seen.xyxy.astype(np.float64),
        score=np.ones(len(seen.id)),
        label=np.zeros_like(seen.id),
    )
