"""One rising clock for a source whose own clock starts anew, jumps and drifts.

Knows numbers only.
"""

from __future__ import annotations

# Between a picture's time on our clock and its arrival. Buffers of a camera, or of the network after a
# stall, stay within it; a clock that was set does not.
TOLERANCE_SECONDS = 4.0

# Quartz is off by some 50 ppm, 4 s a day. Following the arrivals this slowly keeps the lag that it causes
# at 30 ms, and bends the intervals of a second-long burst by less than a thousandth.
_DRIFT_SECONDS = 600.0


class LiveClock:
    """Arrival times and presentation times in, times for tracking out: seconds, always rising.

    Intervals are those of the source while its clock runs as ours does, so that the network's jitter is none
    of the tracker's business. Where it is set anew (another connection, a jump either way) the arrivals say
    how much time has passed.
    """

    def __init__(self) -> None:
        self._offset: float | None = None
        self._last: float | None = None
        self._last_arrival = 0.0
        self.jumps = 0

    def restart(self) -> None:
        """The next presentation time is of another clock."""
        self._offset = None

    def time_of(self, pts_seconds: float | None, arrival: float, interval: float) -> float:
        """arrival: seconds on our own clock. interval: to be expected between pictures."""
        since, self._last_arrival = arrival - self._last_arrival, arrival
        time = arrival
        if pts_seconds is not None:
            known = self._offset is not None
            offset = arrival - pts_seconds if self._offset is None else self._offset
            late = arrival - (pts_seconds + offset)
            time = pts_seconds + offset
            behind = self._last is not None and time <= self._last
            if known and (abs(late) > TOLERANCE_SECONDS or behind):
                self.jumps += 1
                time = arrival
                offset = arrival - pts_seconds
            elif known:
                offset += late * min(1.0, max(0.0, since) / _DRIFT_SECONDS)
            self._offset = offset
        if self._last is not None and time <= self._last:
            time = self._last + interval / 2
            if pts_seconds is not None:
                self._offset = time - pts_seconds
        self._last = time
        return time
