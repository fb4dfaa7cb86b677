"""What an evaluation says: scores per sequence and over all, as a table or JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Format = Literal["mot", "mots"]  # boxes, masks
BoxRule = Literal["MOT15", "MOT16", "MOT17", "MOT20", "none"]
Rule = Literal[BoxRule, "MOTS"]
Benchmark = Literal["auto", BoxRule]
Scores = dict[str, float]

# What TrackEval does before scoring, for people.
_PEOPLE = "pedestrians count; tracks on static or riding persons, distractors and reflections are forgiven"
RULES: dict[Rule, str] = {
    "MOT15": "every row counts, there are no classes",
    "MOT16": _PEOPLE,
    "MOT17": _PEOPLE,
    "MOT20": f"{_PEOPLE}, and so are those on vehicles without a motor",
    "MOTS": "pedestrians count; tracks more than half in regions to be ignored are forgiven",
    "none": "every row counts, whatever its class",
}
_FLAGS = "; ground truth with flag 0 is left out"


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

    HOTA, DetA, AssA and LocA are means over the thresholds 0.05, 0.10, …, 0.95. format: what was compared.
    """

    sequences: tuple[SequenceReport, ...]
    combined: Scores
    trackeval_version: str
    format: Format = "mot"

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
        flags = _FLAGS if self.format == "mot" else ""
        for rule in dict.fromkeys(each.rule for each in self.sequences):
            names = ", ".join(each.name for each in self.sequences if each.rule == rule)
            text.append(f"rule {rule} ({names}): {RULES[rule]}{flags}")
        return "\n".join(text)
