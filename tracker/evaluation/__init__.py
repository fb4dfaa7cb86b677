"""How good tracks are: HOTA, CLEAR MOT and identity scores of boxes or masks, by the TrackEval package.

Checks the files, brings them into the folder layout TrackEval reads, and hands its own dataset and metric
classes the rest; no matching, scoring or preprocessing rule is written again here. Knows nothing of how
tracks were made.

Scores: HOTA (Luiten et al., IJCV 2021), MOTA and MOTP (Bernardin & Stiefelhagen 2008), IDF1 (Ristani et
al. 2016), sMOTSA (Voigtlaender et al., CVPR 2019). The benchmarks' rules are those of TrackEval's
`MotChallenge2DBox` and `MOTSChallenge`.
"""

from __future__ import annotations

from tracker.evaluation.boxes import PEDESTRIAN, detect_rule
from tracker.evaluation.report import Benchmark, Format, Report, Rule, Scores, SequenceReport
from tracker.evaluation.scoring import evaluate, trackeval_module
from tracker.evaluation.sequences import Pair, find_pairs

__all__ = [
    "PEDESTRIAN",
    "Benchmark",
    "Format",
    "Pair",
    "Report",
    "Rule",
    "Scores",
    "SequenceReport",
    "detect_rule",
    "evaluate",
    "find_pairs",
    "trackeval_module",
]
