"""The price of a run: the arithmetic of the table, not the speed of this machine."""

from __future__ import annotations

from tracker.overhead import Overhead, table


def test_the_shares_are_what_the_parts_alone_would_not_have_taken() -> None:
    lap = Overhead(
        frames=100,
        run_seconds=2.0,
        decoder_seconds=1.0,
        loop_seconds=2.5,
        lanes_seconds=1.5,
        stages={"decode": 1.25},
    )
    assert (lap.over_loop, lap.over_lanes, lap.of_slower) == (-0.25, 0.25, 1.25)
    even = Overhead(
        frames=100, run_seconds=4.0, decoder_seconds=4.0, loop_seconds=4.0, lanes_seconds=4.0, stages={}
    )
    text = table([lap, even, lap])
    assert "decode 1.25" in text
    assert text.endswith(
        "median: 125.0% of the frame rate of the slower of decoder and loop; overhead -25.0% of wall time "
        "over the loop, 25.0% over the lanes"
    )
