"""Time of live sources: clocks that start anew, jump and drift; outages; when to try again."""

from __future__ import annotations

import numpy as np
import pytest

from tracker import kalman
from tracker.association import Byte, ByteConfig, Jde, make_association
from tracker.crew_worker import Duty, Post
from tracker.sources.live import Backoff
from tracker.sources.live_clock import LiveClock
from tracker.types import Detections, Frame

RATE = 25


def times(pairs: list[tuple[float | None, float]]) -> list[float]:
    clock = LiveClock()
    return [clock.time_of(pts, arrival, 1 / RATE) for pts, arrival in pairs]


def test_intervals_are_the_sources_whatever_the_network_does() -> None:
    jitter = np.random.default_rng(1).uniform(0, 0.2, 100)
    found = times([(7 + k / RATE, 3 + k / RATE + late) for k, late in enumerate(jitter)])
    assert np.diff(found) == pytest.approx(1 / RATE, abs=1e-4)


def test_a_clock_that_jumps_back_does_not_stop_time() -> None:
    ahead = [(100 + k / RATE, k / RATE) for k in range(25)]
    back = [(5 + k / RATE, 1 + k / RATE) for k in range(25)]
    found = times(ahead + back)
    assert np.all(np.diff(found) > 0)
    assert found[-1] == pytest.approx(49 / RATE, abs=0.05)


def test_a_clock_that_leaps_ahead_leaps_alone() -> None:
    found = times(
        [(k / RATE, k / RATE) for k in range(25)] + [(9000 + k / RATE, 1 + k / RATE) for k in range(25)]
    )
    assert np.all(np.diff(found) > 0)
    assert found[-1] == pytest.approx(49 / RATE, abs=0.05)


def test_after_a_reconnection_the_gap_is_as_long_as_it_was() -> None:
    clock = LiveClock()
    last = [clock.time_of(k / RATE, k / RATE, 1 / RATE) for k in range(25)][-1]
    clock.restart()
    assert clock.time_of(0.0, last + 2.0, 1 / RATE) == pytest.approx(last + 2.0)


def test_without_time_stamps_arrivals_count() -> None:
    assert times([(None, 1.0), (None, 1.5), (None, 1.5)])[:2] == [1.0, 1.5]
    assert times([(None, 1.0), (None, 1.0)])[1] > 1.0


def test_a_quartz_that_is_off_is_followed_without_a_jump() -> None:
    day = [(k * 1.00005, float(k)) for k in range(0, 86_400 * 2, 10)]
    clock = LiveClock()
    found = np.array([clock.time_of(pts, arrival, 1.0) for pts, arrival in day])
    assert clock.jumps == 0
    assert np.abs(found - [arrival for _, arrival in day]).max() < 0.1


@pytest.mark.parametrize("seed", range(5))
def test_time_rises_whatever_comes(seed: int) -> None:
    chance = np.random.default_rng(seed)
    arrival = np.cumsum(chance.exponential(0.1, 500))
    stamps = chance.choice([None, 0.0, 1e9, -5.0, 3.0], 500)
    assert np.all(np.diff(times(list(zip(stamps, arrival, strict=True)))) > 0)


def test_attempts_get_rarer_with_the_outage_and_stay_within_bounds() -> None:
    backoff = Backoff(chance=lambda: 1.0)
    now, delays = 0.0, []
    while now < 1000:
        delays.append(backoff.delay(now))
        now += delays[-1]
    assert delays[:4] == [0.5] * 4
    assert delays == sorted(delays)
    assert delays[-1] == 30.0
    assert len(delays) < 70


def test_the_return_of_a_camera_is_noticed_within_an_eighth_of_its_absence() -> None:
    backoff = Backoff(chance=lambda: 1.0)
    now, attempts = 0.0, [0.0]
    while now < 200:
        now += backoff.delay(now)
        attempts.append(now)
    for back in np.linspace(1, 150, 50):
        waited = min(at for at in attempts if at >= back) - back
        assert waited <= max(0.5, back / 8)


def test_chance_spreads_the_attempts() -> None:
    delays = [Backoff(chance=lambda v=v: v).delay(0.0) for v in (0.0, 0.5, 1.0)]
    assert delays == pytest.approx([0.3, 0.4, 0.5])


def test_a_source_that_was_well_starts_with_the_shortest_delay_again() -> None:
    backoff = Backoff(chance=lambda: 1.0)
    backoff.delay(0.0)
    assert backoff.delay(80.0) == 10.0
    backoff.healthy(90.0, since=89.0)  # one second is no recovery
    assert backoff.delay(96.0) == 12.0
    backoff.healthy(103.0, since=100.0)
    assert backoff.delay(110.0) == 0.5


# The filter and the trackers with time as it passes


def test_a_filter_step_of_part_of_a_frame_is_the_textbooks() -> None:
    state = kalman.initiate(np.array([[100.0], [50.0], [0.4], [80.0]]))
    state = kalman.predict(kalman.update(kalman.predict(state), np.array([[103.0], [50.5], [0.4], [80.0]])))
    dt = 0.37
    mean, covariance = (each[0] for each in kalman.dense(state))
    motion = np.eye(8) + dt * np.eye(8, k=4)
    h = mean[3]
    noise = np.array([h / 20, h / 20, 1e-2, h / 20, h / 160, h / 160, 1e-5, h / 160]) ** 2
    after_mean, after_covariance = (each[0] for each in kalman.dense(kalman.predict(state, dt)))
    np.testing.assert_allclose(after_mean, motion @ mean)
    np.testing.assert_allclose(after_covariance, motion @ covariance @ motion.T + dt * np.diag(noise))


def walker(moment: float, *, scale: float = 1.0, embedding: bool = False) -> Detections:
    x = (50 + 4.0 * moment) * scale
    box = [[x, 100 * scale, x + 30 * scale, 180 * scale]]
    return Detections(
        xyxy=np.array(box, np.float32),
        score=np.array([0.9], np.float32),
        label=np.array([0]),
        embedding=np.array([[1.0, 0.0]], np.float32) if embedding else None,
    )


def test_unequal_intervals_are_no_surprise_to_a_tracker_that_knows_them() -> None:
    """Frames dropped at random: the filter's velocity stays that of the object."""
    tracker = Byte()
    moments = np.cumsum(np.random.default_rng(2).uniform(0.4, 5.0, 60))
    ids = [tracker.update(float(moment), walker(moment)).id.tolist() for moment in moments]
    assert {each for frame in ids for each in frame} == {1}
    assert tracker.table.state[kalman.VELOCITY, 0, 0] == pytest.approx(4.0, rel=0.02)


@pytest.mark.parametrize("kind", ["byte", "jde"])
def test_ids_survive_an_outage_and_not_a_longer_one(kind: str) -> None:
    tracker = make_association(kind, frame_rate=30, settings={"outage_buffer": 150})
    for k in range(30):
        tracker.update(k, walker(k, embedding=kind == "jde"))
    assert tracker.update(30 + 120, walker(150, embedding=kind == "jde")).id.tolist() == [1]
    tracker.update(151, walker(151, embedding=kind == "jde"))
    later = 151 + 151
    tracker.update(later, walker(later, embedding=kind == "jde"))
    assert 1 not in tracker.update(later + 1, walker(later + 1, embedding=kind == "jde")).id.tolist()


def test_an_outage_does_not_count_against_those_who_were_hidden() -> None:
    nobody = Detections(xyxy=np.empty((0, 4)), score=np.empty(0), label=np.empty(0, np.int64))
    tracker = Byte(ByteConfig(outage_buffer=150))
    for k in range(10):
        tracker.update(k, walker(0))
    for k in range(10, 30):
        tracker.update(k, nobody)  # hidden for 20 of 30 frames
    assert tracker.update(100, walker(0)).id.tolist() == [1]
    assert Byte().table.outage == 0
    assert Jde().table.outage == 0


def test_a_change_of_resolution_keeps_ids_and_velocities() -> None:
    post = Post(Duty(name="camera", associate=Byte, frame_rate=30.0))
    ids = []
    for k in range(40):
        scale = 1.0 if k < 20 else 0.5
        frame = Frame(
            index=k, pts_seconds=k / 30, size=(round(640 * scale), round(360 * scale)), received=0.0
        )
        tracks, _ = post.follow(frame, walker(k, scale=scale))
        ids += tracks.id.tolist()
    assert set(ids) == {1}
    assert len(ids) == 40
