"""A parity receipt for people, as tables, and for machines, as JSON.

Knows how things are shown; measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from tracker.deploy.parity.receipt import Receipt
from tracker.deploy.parity.tensors import TensorParity
from tracker.evaluation import Scores

SHOWN = ("HOTA", "DetA", "AssA", "MOTA", "IDF1", "IDSW")


def show(receipt: Receipt, console: Console) -> None:
    """Print all that is known."""

    def say(text: str, style: str | None = None) -> None:
        console.print(text, soft_wrap=True, style=style)

    for letter, side in (("A", receipt.a), ("B", receipt.b)):
        say(f"{letter}  {side.path}, {side.precision}, {side.runs}")
    say(f"on {receipt.clip}")
    for lines in (_tensors, _detections, _tracks):
        told = lines(receipt)
        if told is not None:
            table, words = told
            say("")
            console.print(table)
            for text in words:
                say(text)
    if receipt.notes or receipt.search or receipt.first:
        say("")
    for note in receipt.notes:
        say(note)
    if receipt.search is not None:
        search = receipt.search
        how = ", ".join(f"{count} by {what}" for what, count in search.how.items())
        say(
            f"{search.paired} layers paired ({how}; {search.alone[0]} of A and {search.alone[1]} of B are "
            f"alone), {search.measured} compared"
        )
    for text in receipt.first:
        say(f"the difference begins in {text}", style="bold")


def to_json(receipt: Receipt) -> dict[str, Any]:
    """All of it; numbers that are not finite become their names, which JSON has not."""
    plain: dict[str, Any] = _plain({"measures": receipt.measures(), **asdict(receipt)})
    return plain


Told = tuple[Table, list[str]]  # and what does not fit into columns


def _tensors(receipt: Receipt) -> Told | None:
    pixels, beyond = receipt.pixels, receipt.beyond()
    if pixels is None:
        return None
    table = _table("tensor", "relative", "cosine", "mean", "max", "")
    if pixels.parity is not None:
        table.add_row("pixels", *_errors(pixels.parity), "")
    for role, parity in receipt.outputs.items():
        table.add_row(role, *_errors(parity), f"beyond {receipt.tolerance:g}" if role in beyond else "")
    words = [f"the pixels differ in {each}" for each in pixels.differs]
    return table, words + ([f"B's pixels: {pixels.why}"] if pixels.why else [])


def _errors(parity: TensorParity) -> list[str]:
    return [f"{parity.relative:.2g}", f"{parity.cosine:.6f}", f"{parity.mean:.2g}", f"{parity.max:.2g}"]


def _detections(receipt: Receipt) -> Told | None:
    found = receipt.detections
    if found is None:
        return None
    table = _table("paired detections", "mean", "p95", "max")
    for name, spread, unit in (("box", found.box, " px"), ("score", found.score, "")):
        table.add_row(name, *(f"{value:.3g}{unit}" for value in (spread.mean, spread.p95, spread.max)))
    if found.cosine is not None:
        values = (found.cosine.mean, found.cosine.p95, found.cosine.max)
        table.add_row("embedding, 1 − cos", *(f"{value:.2g}" for value in values))
    equal = found.equal
    threshold = "nowhere" if equal.threshold is None else f"from a score of {equal.threshold:.3f}"
    return table, [
        f"{found.same:.2%} of detections are the same ({found.reference} and {found.candidate} in "
        f"{found.frames} frames), {found.missing} missing, {found.extra} extra"
        f"{_first(found.first_difference)}",
        f"recall at a precision of {equal.precision:.2%}: {equal.recall:.2%} ({threshold}), A's "
        f"{equal.reference_recall:.2%}",
    ]


def _tracks(receipt: Receipt) -> Told | None:
    tracks, scores = receipt.tracks, receipt.scores
    if tracks is None or scores is None:
        return None
    table = _table("tracks", *SHOWN)
    rows = [("B against A", scores.b_against_a), ("A against B", scores.a_against_b)]
    if scores.a is not None and scores.b is not None:
        rows += [("A against the truth", scores.a), ("B against the truth", scores.b)]
    for name, row in rows:
        table.add_row(name, *(_score(row, key) for key in SHOWN))
    if not tracks.reference + tracks.candidate:
        return table, ["no tracks on either side: nothing is said of them"]
    return table, [
        f"{tracks.track_share:.2%} of tracks are the same ({tracks.reference} and {tracks.candidate}), "
        f"{tracks.row_share:.2%} of their rows{_first(tracks.first_difference)}"
    ]


def _score(scores: Scores | None, key: str) -> str:
    if scores is None:
        return "–"  # nobody has a row
    return f"{scores[key]:.3f}" if isinstance(scores[key], float) else f"{scores[key]}"


def _first(frame: int | None) -> str:
    return "" if frame is None else f", the first in frame {frame}"


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    return table


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value
