"""The price of a run: the arithmetic of the table, not the speed of this machine."""

from __future__ import annotations

from tracker.overhead import Overhead, table


def test_the_share_is_what_the_engine_alone_would_not_have_taken() -> None:
    lap = Overhead(frames=100, run_seconds=2.0, engine_seconds=1.5, stages={"decode": 1.25})
    assert lap.share == 0.25
    text = table([lap, Overhead(frames=100, run_seconds=4.0, engine_seconds=4.0, stages={}), lap])
    assert "decode 1.25" in text
    assert text.endswith("median overhead 25.0% of wall time")
