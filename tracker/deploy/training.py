"""Teaching a small FairMOT on synthetic streets: the loop, its log, its checkpoints and its curves.

Runs for a time or a number of steps, can be stopped and taken up again, and leaves weights that the exporter
loads. Knows nothing of how pictures are made or losses computed.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tracker.deploy.glimpses import Batch, GlimpseConfig, load
from tracker.deploy.losses import FairMOTLoss
from tracker.errors import ConfigError
from tracker.models.checkpoint import load_fairmot
from tracker.models.fairmot import MULTIPLE, FairMOT, FairMOTConfig

CHECKPOINT, WEIGHTS, LOG, MODEL, CURVES = (
    "checkpoint.pth",
    "final.pth",
    "log.jsonl",
    "model.json",
    "curves.png",
)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """minutes or steps: how long; the other is None. reuse: steps per batch of fresh pictures; beyond the
    first they take pictures at random from the latest `pool`, kept on the device.
    rate: AdamW's greatest learning rate, reached after `warm_up` of the run and lowered to nothing along a
    cosine. average: of the weights over steps, which is what is kept in the end. start: weights of the same
    network to begin with, instead of random ones."""

    model: FairMOTConfig
    glimpses: GlimpseConfig
    minutes: float | None = None
    steps: int | None = None
    device: str = "cpu"
    seed: int = 0
    reuse: int = 1
    pool: int = 4096
    rate: float = 1.5e-3
    decay: float = 1e-4
    warm_up: float = 0.03
    average: float = 0.999
    log_seconds: float = 5.0
    save_seconds: float = 60.0
    start: Path | None = None

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ConfigError("give either minutes or steps, not both and not neither")
        if (self.minutes or self.steps or 0) <= 0:
            raise ConfigError(f"nothing can be learnt in {self.minutes or self.steps} minutes or steps")
        if self.reuse < 1 or self.pool < self.glimpses.batch:
            raise ConfigError(f"reuse {self.reuse} must be at least 1, pool {self.pool} at least a batch")
        if any(side % MULTIPLE for side in self.glimpses.scene.size):
            raise ConfigError(f"size {self.glimpses.scene.size}: both sides must be multiples of {MULTIPLE}")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(
                f"device {self.device}: this machine's torch sees no CUDA device; use --device cpu"
            )


class Pool:
    """The latest pictures, on the device, to be seen more than once."""

    def __init__(self, size: int) -> None:
        self._size, self._count, self._next = size, 0, 0
        self._kept: Batch = {}

    def add(self, batch: Batch) -> None:
        if not self._kept:
            self._kept = {key: each.new_empty((self._size, *each.shape[1:])) for key, each in batch.items()}
        count = len(batch["image"])
        where = (torch.arange(count) + self._next) % self._size
        for key, each in batch.items():
            self._kept[key][where.to(each.device)] = each
        self._next = int(where[-1]) + 1
        self._count = min(self._count + count, self._size)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Pictures at random, half of them mirrored."""
        which = torch.randint(self._count, (count,), generator=generator)
        mirrored = torch.rand(count, generator=generator) < 0.5
        return mirror({key: each[which.to(each.device)] for key, each in self._kept.items()}, mirrored)


def mirror(batch: Batch, which: Tensor) -> Batch:
    """The batch with the pictures of a (B,) mask flipped left to right."""
    image, xyxy = batch["image"], batch["xyxy"]
    which = which.to(image.device)
    flipped = (
        xyxy[..., [2, 1, 0, 3]] * xyxy.new_tensor([-1, 1, -1, 1])
        + xyxy.new_tensor([1, 0, 1, 0]) * image.shape[-1]
    )
    return {
        **batch,
        "image": torch.where(which[:, None, None, None], image.flip(-1), image),
        "xyxy": torch.where(which[:, None, None], flipped, xyxy),
    }


@dataclass
class _Run:
    """Where a run stands. seconds: of training so far, over all its parts. waited: of those, for pictures."""

    model: nn.Module
    average: nn.Module
    loss: FairMOTLoss
    optimiser: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, parts: dict[str, Tensor]) -> None:
        """Toward the log's means; summed on the device, since reading each would wait for it."""
        for name, part in parts.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(part)) + part
        self.counts.update(parts.keys())


def train(config: TrainingConfig, directory: Path, say: Callable[[str], None] = print) -> Path:
    """Train into a directory, or go on there from its checkpoint; returns the weights' path.

    Writes log.jsonl (a line every few seconds), checkpoint.pth, model.json (the FairMOTConfig), final.pth
    ({'epoch', 'state_dict'}: averaged weights) and, where matplotlib is installed, curves.png.
    Raises ConfigError when the directory holds another run's checkpoint.
    """
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = True
    run = _begin(config)
    _resume(run, config, directory, say)
    (directory / MODEL).write_text(json.dumps(asdict(config.model), indent=2) + "\n", encoding="utf-8")
    with (directory / LOG).open("a", encoding="utf-8") as log:

        def note(line: dict[str, Any]) -> None:
            log.write(json.dumps(line) + "\n")
            log.flush()
            say(_readable(line))

        _loop(run, config, directory, note)
    _save(run, config, directory)
    weights = directory / WEIGHTS
    _write(
        weights, {"epoch": run.step, "state_dict": {k: v.cpu() for k, v in run.average.state_dict().items()}}
    )
    draw_curves(directory)
    return weights


def _begin(config: TrainingConfig) -> _Run:
    device = torch.device(config.device)
    model = FairMOT(config.model) if config.start is None else load_fairmot(config.start, config.model)
    model = model.train().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = FairMOT(config.model).to(device).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    loss = FairMOTLoss(config.model.embedding, config.glimpses.identities).to(device)
    parameters = [*model.parameters(), *loss.parameters()]
    plain = [each for each in parameters if each.ndim < 2]  # biases, norms and task weights do not decay
    groups = [
        {"params": [each for each in parameters if each.ndim >= 2], "weight_decay": config.decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=config.rate, fused=device.type == "cuda")
    return _Run(model=model, average=average, loss=loss, optimiser=optimiser)


def _loop(run: _Run, config: TrainingConfig, directory: Path, note: Callable[[dict[str, Any]], None]) -> None:
    """Steps until the time or the count is up."""
    device, pool = torch.device(config.device), Pool(config.pool)
    generator = torch.Generator().manual_seed(config.seed + run.step)
    noted = saved = time.perf_counter()
    began, first, since = noted - run.seconds, run.step, (run.step, run.waited)
    with load(_shifted(config.glimpses, run.step)) as batches:
        while (progress := _progress(run, config)) < 1:
            for rate_group in run.optimiser.param_groups:
                rate_group["lr"] = config.rate * schedule(progress, config.warm_up)
            fresh = (run.step - first) % config.reuse == 0
            if fresh:
                batch, waited = _next(batches, device)
                run.waited += waited
                if config.reuse > 1:
                    pool.add(batch)
            else:
                batch = pool.draw(config.glimpses.batch, generator)
            parts = _step(run, batch, config)
            run.add({**parts, "fresh": parts["loss"]} if fresh else parts)
            now = time.perf_counter()
            run.seconds = now - began
            if now - noted >= config.log_seconds or _progress(run, config) >= 1:
                note(_line(run, config, since, now - noted))
                noted, since = now, (run.step, run.waited)
            if now - saved >= config.save_seconds:
                _save(run, config, directory)
                saved = now


def _next(batches: Iterator[Batch], device: torch.device) -> tuple[Batch, float]:
    """The next fresh batch on the device, and the seconds spent waiting for it."""
    began = time.perf_counter()
    batch = next(batches)
    waited = time.perf_counter() - began
    return {key: each.to(device, non_blocking=True) for key, each in batch.items()}, waited


def _step(run: _Run, batch: Batch, config: TrainingConfig) -> dict[str, Tensor]:
    """One step of optimisation, and of the average behind it; returns the loss's parts."""
    images = batch["image"].float().div_(255).contiguous(memory_format=torch.channels_last)
    mixed = torch.autocast("cuda", torch.bfloat16) if images.is_cuda else nullcontext()
    run.model.train()
    with mixed:
        heads = run.model(images)
    parts: dict[str, Tensor]
    total, parts = run.loss(heads, batch)
    run.optimiser.zero_grad(set_to_none=True)
    total.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 10.0)
    run.optimiser.step()
    run.step += 1
    keep = min(config.average, (1 + run.step) / (10 + run.step))
    with torch.no_grad():
        mine, theirs = list(run.average.state_dict().values()), list(run.model.state_dict().values())
        floats = [(a, b) for a, b in zip(mine, theirs, strict=True) if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1 - keep)
    return parts


def schedule(progress: float, warm_up: float) -> float:
    """Share of the greatest learning rate at a progress in 0…1: straight up, then half a cosine down."""
    if progress < warm_up:
        return max(progress / warm_up, 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min((progress - warm_up) / (1 - warm_up), 1.0)))


def _progress(run: _Run, config: TrainingConfig) -> float:
    return run.step / config.steps if config.steps else run.seconds / (60 * (config.minutes or 1))


def _shifted(glimpses: GlimpseConfig, step: int) -> GlimpseConfig:
    """A run taken up again sees other moments than it began with."""
    return GlimpseConfig(
        **{**{k: getattr(glimpses, k) for k in glimpses.__dataclass_fields__}, "seed": glimpses.seed + step}
    )


def _line(run: _Run, config: TrainingConfig, since: tuple[int, float], lasted: float) -> dict[str, Any]:
    """What the log says, as means since the last line; reading the sums is the loop's only wait.

    "fresh" is the loss of pictures never seen before: with --reuse the others are seen several times, and
    while the learning rate is high the network knows the latest of them by heart.
    """
    steps = run.step - since[0]
    means = {name: round(float(total) / run.counts[name], 5) for name, total in run.sums.items()}
    run.sums.clear()
    run.counts.clear()
    return {
        "step": run.step,
        "seconds": round(run.seconds, 1),
        "progress": round(_progress(run, config), 4),
        **means,
        "rate": run.optimiser.param_groups[0]["lr"],
        "weights": [round(each.item(), 3) for each in (run.loss.detection_weight, run.loss.identity_weight)],
        "images_per_second": round(steps * config.glimpses.batch / lasted, 1),
        "waiting": round((run.waited - since[1]) / lasted, 3),
    }


def _readable(line: dict[str, Any]) -> str:
    losses = "  ".join(
        f"{name} {line[name]:.3f}"
        for name in ("loss", "heat", "box", "overlap", "offset", "identity", "right")
    )
    return (
        f"{line['progress']:6.1%}  step {line['step']}  {losses}  "
        f"{line['images_per_second']:.0f} images/s, {line['waiting']:.0%} waiting for them"
    )


def _save(run: _Run, config: TrainingConfig, directory: Path) -> None:
    state = {
        "model": run.model.state_dict(),
        "average": run.average.state_dict(),
        "loss": run.loss.state_dict(),
        "optimiser": run.optimiser.state_dict(),
        "step": run.step,
        "seconds": run.seconds,
        "waited": run.waited,
        "config": json.dumps(asdict(config.model), sort_keys=True),
    }
    _write(directory / CHECKPOINT, state)


def _resume(run: _Run, config: TrainingConfig, directory: Path, say: Callable[[str], None]) -> None:
    path = directory / CHECKPOINT
    if not path.exists():
        return
    state = torch.load(path, map_location=config.device, weights_only=True)
    identities = state["loss"]["classifier.weight"].shape[0]
    if (
        state["config"] != json.dumps(asdict(config.model), sort_keys=True)
        or identities != config.glimpses.identities
    ):
        raise ConfigError(
            f"{path} is of another model or other scenes ({state['config']}, {identities} identities): give "
            "its options again, or another --out"
        )
    run.model.load_state_dict(state["model"])
    run.average.load_state_dict(state["average"])
    run.loss.load_state_dict(state["loss"])
    run.optimiser.load_state_dict(state["optimiser"])
    run.step, run.seconds, run.waited = state["step"], state["seconds"], state["waited"]
    say(f"going on from {path}: step {run.step}, {run.seconds:.0f} s trained")


def _write(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def draw_curves(directory: Path) -> None:
    """curves.png from log.jsonl; nothing where matplotlib is missing, which training does not need."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in (directory / LOG).read_text(encoding="utf-8").splitlines()]
    figure, axes = pyplot.subplots(2, 4, figsize=(16, 6))
    shown = ("loss", "fresh", "heat", "box", "overlap", "identity", "right", "images_per_second")
    for axis, name in zip(axes.flat, shown, strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True))
        axis.set_title(name)
    figure.tight_layout()
    figure.savefig(directory / CURVES, dpi=100)
    pyplot.close(figure)
