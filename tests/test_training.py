"""Training: targets, losses and the loop, on tiny streets."""

from __future__ import annotations

import json
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch

from tools.train import main
from tracker.deploy.glimpses import MOST, GlimpseConfig, load
from tracker.deploy.losses import FairMOTLoss, Targets, focal_loss, gather, gaussian_radius, giou_loss
from tracker.deploy.scenes import SceneConfig
from tracker.deploy.training import Pool, TrainingConfig, mirror, schedule, train
from tracker.errors import ConfigError
from tracker.models.fairmot import FairMOT, FairMOTConfig

TINY = SceneConfig(size=(128, 96), seconds=4, people=10, cars=4)
GLIMPSES = GlimpseConfig(scene=TINY, scenes=2, batch=2)
MODEL = FairMOTConfig(classes=2, embedding=16, width=0.125, head_channels=16, stem_stride=2, deformable=False)
Batch = dict[str, torch.Tensor]


def objects(*rows: tuple[tuple[float, ...], int, int, int]) -> Batch:
    """One picture's objects: xyxy in pixels, label, identity, state."""
    return {
        "xyxy": torch.tensor([[row[0] for row in rows]], dtype=torch.float32),
        "label": torch.tensor([[row[1] for row in rows]]),
        "identity": torch.tensor([[row[2] for row in rows]]),
        "state": torch.tensor([[row[3] for row in rows]], dtype=torch.uint8),
    }


@pytest.mark.parametrize(
    ("width", "height", "radius"),
    [(3, 7, 1.1633327), (10, 25, 3.9648907), (40, 20, 7.3558507), (1, 1, 0.27332005)],
)
def test_radius_is_the_published_one(width: int, height: int, radius: float) -> None:
    """Numbers from the official FairMOT's gaussian_radius."""
    found = gaussian_radius(torch.tensor(float(width)), torch.tensor(float(height)))
    assert float(found) == pytest.approx(radius, rel=1e-5)


def test_targets_tell_what_where_and_what_to_ignore() -> None:
    batch = objects(
        ((40, 20, 60, 72), 0, 7, 1), ((80, 40, 112, 60), 1, -1, 1), ((4, 30, 12, 60), 0, -1, 2),
        ((0,) * 4, 0, -1, 0), ((-20, 10, 4, 70), 0, 3, 1),
    )  # fmt: skip
    targets = Targets(batch, 2, (32, 24))
    assert targets.heat.shape == (1, 2, 24, 32)
    peaks = (targets.heat == 1).nonzero().tolist()
    # The last one's centre lies outside: it is looked for at the border, its edges stay where they are.
    assert peaks == [[0, 0, 10, 0], [0, 0, 11, 12], [0, 1, 12, 24]]
    assert targets.edges[0, 4].tolist() == [5.0, 7.5, 1.0, 7.5]
    assert targets.cell[0].tolist()[:2] == [11 * 32 + 12, 12 * 32 + 24]
    assert targets.offset[0, :2].tolist() == [[0.5, 0.5], [0.0, 0.5]]
    assert targets.edges[0, 0].tolist() == [2.5, 6.5, 2.5, 6.5]
    assert targets.found[0].tolist() == [True, True, False, False, True]
    assert 0.99 < float(targets.heat[0, 0, 11, 2]) < 1
    assert float(targets.heat[0, 1, 11, 2]) == 0


def test_focal_loss_is_the_published_one() -> None:
    rng = torch.Generator().manual_seed(0)
    logits, heat = torch.randn(2, 2, 5, 6, generator=rng), torch.rand(2, 2, 5, 6, generator=rng)
    heat[0, 0, 2, 3] = heat[1, 1, 4, 4] = 1
    score = logits.double().sigmoid()
    hit = (torch.log(score) * (1 - score) ** 2)[heat == 1].sum()
    false = (torch.log(1 - score) * score**2 * (1 - heat.double()) ** 4)[heat < 1].sum()
    assert float(focal_loss(logits, heat)) == pytest.approx(float(-(hit + false) / 2), rel=1e-5)


def test_nothing_to_find_is_an_ordinary_picture() -> None:
    batch = objects(((0,) * 4, 0, -1, 0))
    heads = {name: torch.zeros(1, c, 24, 32) for name, c in (("hm", 2), ("wh", 4), ("reg", 2), ("id", 16))}
    total, parts = FairMOTLoss(16, 20)(heads, batch)
    assert torch.isfinite(total)
    assert [float(parts[name]) for name in ("box", "overlap", "offset", "identity")] == [0] * 4


def test_heads_that_are_right_cost_nothing() -> None:
    batch = objects(((40, 20, 60, 72), 0, 7, 1), ((80, 40, 112, 60), 1, 2, 1))
    loss, heads = FairMOTLoss(16, 20), {}
    targets = Targets(batch, 2, (32, 24))
    heads["hm"] = torch.where(targets.heat == 1, 20.0, -20.0)
    for name, channels in (("wh", 4), ("reg", 2), ("id", 16)):
        heads[name] = torch.zeros(1, channels, 24 * 32)
    # Around each centre, since a box may be read from any cell there.
    for across, down in ((x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)):
        cell = targets.cell[0] + down * 32 + across
        heads["wh"][0, :, cell] = targets.edges[0].T
        heads["reg"][0, :, cell] = (targets.offset[0] - torch.tensor([across, down])).T
        heads["id"][0, :, cell] = torch.eye(16)[:, :2]
    heads = {name: head.reshape(1, -1, 24, 32) for name, head in heads.items()}
    assert torch.equal(gather(heads["wh"], targets.cell), targets.edges)
    for draw in range(10):
        torch.manual_seed(draw)
        _, parts = loss(heads, batch)
        assert max(float(parts[name]) for name in ("heat", "box", "overlap", "offset")) < 1e-3
    assert float(parts["right"]) == 1


def test_boxes_are_learnt_next_to_the_centre_too() -> None:
    """The heat map's peak is often one cell off; the same box must be read there."""
    batch = objects(((40, 20, 60, 72), 0, 7, 1))
    own = Targets(batch, 2, (32, 24))
    other = Targets(batch, 2, (32, 24), torch.tensor([[[0.55, -0.6]]]))
    assert own.cell.item() == 11 * 32 + 12
    assert other.cell.item() == 10 * 32 + 13
    assert other.offset.tolist() == [[[-0.5, 1.5]]]
    assert torch.equal(other.edges, own.edges)
    assert torch.equal(other.heat, own.heat)


@pytest.mark.parametrize(
    ("found", "loss"),
    [
        ((0, 0, 4, 6), 0.0),
        ((0, 3, 4, 9), 1 - 12 / 36 + 0 / 36),  # half of it, and the hull is their union
        ((2, 3, 6, 9), 1 - 6 / 42 + (54 - 42) / 54),
        ((6, 0, 10, 6), 1 - 0 + (60 - 48) / 60),  # apart: the farther, the worse
        ((2, 3, 1, 2), 1 - 0 + 0.0),  # inside out: nothing of it counts
    ],
)
def test_giou_is_the_published_one(found: tuple[int, ...], loss: float) -> None:
    truth = torch.tensor([0.0, 0, 4, 6])
    box = torch.tensor(found, dtype=torch.float32, requires_grad=True)
    answer = giou_loss(box, truth)
    assert answer.item() == pytest.approx(loss)
    answer.backward()
    assert box.grad is not None
    assert box.grad.isfinite().all()


def test_an_identity_is_known_by_how_it_first_looked() -> None:
    batch = objects(
        ((40, 20, 60, 72), 0, 7, 1), ((80, 40, 112, 60), 1, 0, 1), ((4, 30, 12, 60), 0, -1, 2),
        ((0,) * 4, 0, -1, 0),
    )  # fmt: skip
    loss, generator = FairMOTLoss(16, 20), torch.Generator().manual_seed(0)
    before = loss.classifier.weight.detach().clone()
    heads = {name: torch.zeros(1, c, 24, 32) for name, c in (("hm", 2), ("wh", 4), ("reg", 2))}
    looks = torch.randn(16, generator=generator)
    heads["id"] = looks[:, None, None].expand(1, 16, 24, 32)
    loss.eval()(heads, batch)
    assert not loss.known.any()
    loss.train()(heads, batch)
    assert loss.known.nonzero().flatten().tolist() == [0, 7]
    unit = looks / looks.norm()
    assert torch.allclose(loss.classifier.weight[[0, 7]], unit.expand(2, 16))
    others = ~loss.known
    assert torch.equal(loss.classifier.weight[others], before[others])
    # Later looks do not overwrite what has been learnt since.
    loss(heads | {"id": -heads["id"]}, batch)
    assert torch.allclose(loss.classifier.weight[7], unit)


def test_ignored_objects_pull_nowhere() -> None:
    batch = objects(((40, 20, 60, 72), 0, -1, 2))
    logits = torch.full((1, 1, 24, 32), 3.0, requires_grad=True)
    focal_loss(logits, Targets(batch, 1, (32, 24)).heat).backward()
    assert logits.grad is not None
    assert float(logits.grad[0, 0, 11, 12].abs()) < 1e-9 < float(logits.grad[0, 0, 0, 0].abs())


def test_glimpses_carry_what_the_loss_needs() -> None:
    with load(GLIMPSES) as batches, load(GLIMPSES) as again:
        batch, other, same = next(batches), next(batches), next(again)
    assert batch["image"].shape == (2, 3, 96, 128)
    assert batch["image"].dtype == torch.uint8
    assert batch["xyxy"].shape == (2, MOST, 4)
    assert not torch.equal(batch["image"], other["image"])
    assert torch.equal(same["image"], batch["image"])
    named = batch["identity"] >= 0
    assert (batch["state"][named] == 1).all()
    assert int(batch["identity"].max()) < GLIMPSES.identities


def test_workers_end_by_themselves(capfd: pytest.CaptureFixture[str]) -> None:
    """Those stopped while a batch was on its way out were aborted, more often than not."""
    others = active_children()
    with load(replace(GLIMPSES, batch=64, workers=2)) as batches:
        next(batches)
        workers = [child for child in active_children() if child not in others]
    for worker in workers:
        worker.join(20)  # a busy machine takes its time to end what is over
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert "terminate" not in capfd.readouterr().err


def test_mirroring_twice_changes_nothing() -> None:
    with load(GLIMPSES) as batches:
        batch = next(batches)
    which = torch.tensor([True, False])
    once = mirror(batch, which)
    assert torch.equal(once["image"][0], batch["image"][0].flip(-1))
    assert torch.equal(once["xyxy"][1], batch["xyxy"][1])
    twice = mirror(once, which)
    assert torch.equal(twice["image"], batch["image"])
    assert torch.allclose(twice["xyxy"], batch["xyxy"])


def test_the_pool_forgets_the_oldest() -> None:
    pool = Pool(4)
    for first in (0, 3, 6):
        values = torch.arange(first, first + 3)
        pool.add({"image": values[:, None, None, None], "xyxy": torch.zeros(3, 1, 4)})
    drawn = pool.draw(200, torch.Generator().manual_seed(0))["image"].flatten()
    assert set(drawn.tolist()) == {5, 6, 7, 8}


@pytest.mark.parametrize(
    ("progress", "share"), [(0.0, 1e-3), (0.05, 0.5), (0.1, 1.0), (0.55, 0.5), (1.0, 0.0)]
)
def test_the_learning_rate_rises_and_falls(progress: float, share: float) -> None:
    assert schedule(progress, 0.1) == pytest.approx(share)


def test_a_run_can_be_taken_up_again_and_leaves_weights(tmp_path: Path) -> None:
    said: list[str] = []
    config = {"model": MODEL, "glimpses": GLIMPSES, "reuse": 2, "pool": 8, "log_seconds": 0.0}
    train(TrainingConfig(**config, steps=3), tmp_path, said.append)
    weights = train(TrainingConfig(**config, steps=5), tmp_path, said.append)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    # Every other batch is of pictures seen before; each part of a run begins with new ones.
    assert ["fresh" in line for line in lines] == [True, False, True, True, False]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert any("going on" in line for line in said)
    saved = torch.load(weights, weights_only=True)
    assert saved["epoch"] == 5
    shape = json.loads((tmp_path / "model.json").read_text())
    model = FairMOT(FairMOTConfig(**{**shape, "levels": tuple(shape["levels"])}))
    model.load_state_dict(saved["state_dict"])
    assert not list(tmp_path.glob("*.partial"))

    other = TrainingConfig(**{**config, "model": FairMOTConfig(classes=2, width=0.125)}, steps=9)
    with pytest.raises(ConfigError, match="another model"):
        train(other, tmp_path, said.append)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "1", "--size", "100x100"], "multiples of 32"),
        (["--steps", "1", "--size", "big"], "WIDTHxHEIGHT"),
        (["--steps", "0"], "nothing can be learnt"),
        (["--steps", "1", "--scenes", "2", "--workers", "3"], "each worker needs a scene"),
        (["--steps", "1", "--reuse", "0"], "reuse 0"),
    ],
)
def test_the_tool_says_what_is_wrong(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path), *arguments]) == 1
    assert words in capsys.readouterr().err
