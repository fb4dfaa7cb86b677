"""A live run's numbers, as Prometheus wants them. Read when asked for; between that nothing is kept."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tracker.live import LiveSession
from tracker.sources.live import State

# Seconds. Frames older than the interval of a slow camera are late, older than seconds useless.
AGES = [0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0]


def registry_for(session: LiveSession) -> CollectorRegistry:
    """The run's numbers and the process's own, its memory among them."""
    registry = CollectorRegistry()
    registry.register(_Run(session))
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


class _Run(Collector):
    def __init__(self, session: LiveSession) -> None:
        self._session = session

    def describe(self) -> list[Metric]:
        return []  # else all of it would be asked for before the run has begun

    def collect(self) -> Iterator[Metric]:
        session = self._session
        since = max(0.0, time.monotonic() - session.beat)
        yield GaugeMetricFamily("track_loop_silent_seconds", "Since the loop last turned.", value=since)
        streams = session.streams.all()
        statuses = {status.name: status for status in session.streams.statuses()}

        frames = CounterMetricFamily(
            "track_frames", "Frames, by what became of them.", labels=("stream", "fate")
        )
        dropped = CounterMetricFamily(
            "track_frames_dropped", "Good frames that were not tracked.", labels=("stream", "reason")
        )
        faults = CounterMetricFamily("track_faults", "Connections that were lost.", labels=("stream",))
        reconnects = CounterMetricFamily("track_reconnects", "Connections made again.", labels=("stream",))
        undelivered = CounterMetricFamily(
            "track_undelivered",
            "Frames that a result or a listener did not get.",
            labels=("stream", "result"),
        )
        tracks = CounterMetricFamily("track_tracks", "Tracks ever reported.", labels=("stream",))
        crossings = CounterMetricFamily(
            "track_crossings", "Across a line or a zone's border.", labels=("stream", "counter", "direction")
        )
        state = GaugeMetricFamily("track_stream_state", "1 for the one it is in.", labels=("stream", "state"))
        speed = GaugeMetricFamily("track_frames_per_second", "Tracked.", labels=("stream",))
        silent = GaugeMetricFamily(
            "track_stream_silent_seconds", "Since a frame was last tracked.", labels=("stream",)
        )
        objects = GaugeMetricFamily("track_objects", "In the newest frame.", labels=("stream", "class"))
        inside = GaugeMetricFamily("track_inside", "In a zone, now.", labels=("stream", "counter"))
        age = HistogramMetricFamily(
            "track_frame_age_seconds", "Of frames once they are tracked, since they came.", labels=("stream",)
        )
        for stream in streams:
            status = statuses.get(stream.name)
            if status is None:
                continue  # it left meanwhile
            name = status.name
            for fate, count in status.frames.items():
                frames.add_metric((name, fate), count)
            for reason, count in status.dropped.items():
                dropped.add_metric((name, reason), count)
            for result, count in status.undelivered.items():
                undelivered.add_metric((name, result), count)
            faults.add_metric((name,), status.faults)
            reconnects.add_metric((name,), status.reconnects)
            tracks.add_metric((name,), status.tracks)
            for counter in status.counters:
                # By number too: several may have the same name.
                words = f"{counter['number']} {counter['name']}"
                crossings.add_metric((name, words, "in"), counter["in"])
                crossings.add_metric((name, words, "out"), counter["out"])
                if "inside" in counter:
                    inside.add_metric((name, words), counter["inside"])
            for each in State:
                state.add_metric((name, each.value), float(each.value == status.state))
            speed.add_metric((name,), status.fps)
            if status.silent_seconds is not None:
                silent.add_metric((name,), status.silent_seconds)
            for label, count in status.objects.items():
                objects.add_metric((name, label), count)
            buckets = [
                (str(bound), float(n)) for bound, n in zip(AGES, stream.ages.at_most(AGES), strict=True)
            ]
            _, total, seconds, _ = stream.ages.snapshot()
            age.add_metric((name,), [*buckets, ("+Inf", float(total))], sum_value=seconds)
        yield from (frames, dropped, faults, reconnects, undelivered, tracks, crossings)
        yield from (state, speed, silent, objects, inside, age)
