"""`--cost mask` from end to end: asked for, refused where it cannot be, and done in one process."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from clips import write_clip
from test_crew import pids_of_children
from test_sinks_masks import SIZE, Seer, interlocked

import tracker
from tracker.cli import main
from tracker.errors import ConfigError
from tracker.session import Options, Session

pytestmark = pytest.mark.alone

ABOUT = SimpleNamespace(engine_sha256="0" * 64, frontend="fake", precision="fp32", thresholds=lambda _: {})


class OnGpu(Seer):
    """... or so it says: there, several sources would be associated in processes of their own."""

    device = torch.device("cuda:0")


def pretend(monkeypatch: pytest.MonkeyPatch, frontend: Seer) -> None:
    monkeypatch.setattr("tracker.session.open_engine", lambda *_, **__: (frontend, ABOUT))


@pytest.fixture
def clips(tmp_path: Path) -> list[str]:
    return [str(write_clip(tmp_path / f"{name}.mp4", frames=10, size=SIZE)) for name in "ab"]


@pytest.mark.parametrize("how", [{"cost": "mask"}, {"settings": {"cost": "mask"}}])
def test_masks_are_compared_in_the_process_that_has_them(
    how: dict[str, Any], clips: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, OnGpu())
    with Session(Options(sources=clips, engine="any", save=(), **how)) as session:
        assert session.workers == 0 and not pids_of_children()
        assert [stream.config.cost for stream in session.streams] == ["mask", "mask"]
        assert len(list(session)) == 20
    # ... where comparing boxes would have been done elsewhere
    with Session(Options(sources=clips, engine="any", save=(), cost="box")) as session:
        assert session.workers > 0


@pytest.mark.parametrize("live", [{}, {"realtime": True}])
@pytest.mark.parametrize("cost", ["mask", "box"])
def test_python_gets_each_track_with_its_mask(
    cost: str, live: dict[str, bool], clips: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, Seer())
    seen = 0
    bar_of: dict[int, int] = {}
    for frame, tracks in tracker.track(clips[0], engine="any", cost=cost, **live):
        pictures = interlocked(frame.index)[0]
        for track in tracks:
            assert track.mask is not None and len(track.mask) == 1
            [bar] = [k for k in (0, 1) if np.array_equal(track.mask.pasted()[0].numpy(), pictures[k])]
            assert bar_of.setdefault(track.id, bar) == bar
            seen += 1
    assert seen >= (20 if not live else 2) and len(bar_of) == 2


def test_the_command_tells_in_the_summary_what_was_compared(
    clips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, Seer())
    out = str(tmp_path / "out")
    assert main([clips[0], "--engine", "any", "--cost", "mask", "--out", out, "--quiet"]) == 0
    summary = json.loads((tmp_path / "out" / "a.summary.json").read_text())
    assert summary["tracker"]["cost"] == "mask" and summary["tracker"]["name"] == "byte"


@pytest.mark.parametrize("more", [[], ["--realtime"]])
def test_a_network_without_masks_is_refused_before_any_source_is_opened(
    more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blind = Seer()
    blind.masks = False
    pretend(monkeypatch, blind)
    monkeypatch.chdir(tmp_path)
    assert main(["nowhere.mp4", "--engine", "any", "--cost", "mask", *more]) == 1
    said = capsys.readouterr().err
    assert said == (
        "track: cost mask needs masks, and this engine finds boxes alone: leave it out, or use one that "
        "finds masks, such as a Mask R-CNN or SOLOv2\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"cost": "mask", "workers": 2},
            "workers is 2, but cost mask works in the process that owns the masks",
        ),
        ({"settings": {"cost": "mask"}, "workers": 1}, "leave one of them out"),
        ({"cost": "pixels"}, "cost is 'pixels'; it must be box or mask"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Options(sources=["a.mp4"], engine="any", **options)
