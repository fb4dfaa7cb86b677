"""Training pictures: moments of many scenes, cropped and recoloured, batch after batch without end.

Each worker keeps its own share of the scenes, so that a street is built once and then seen many times. Knows
nothing of the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tracker.deploy.scenes.lens import Lens
from tracker.deploy.scenes.scene import Scene, SceneConfig
from tracker.errors import ConfigError

Batch = dict[str, torch.Tensor]

MOST = 48  # objects of a picture that are learnt from; the largest, should there be more
NAMEABLE = 0.3  # visibility from which an object's looks are learnt


@dataclass(frozen=True, kw_only=True)
class GlimpseConfig:
    """scenes: how many streets; identities are numbered through all of them. batch: pictures at a time.
    first: seed of the first scene. workers: processes; 0 works in this one."""

    scene: SceneConfig = field(default_factory=SceneConfig)
    scenes: int = 960
    batch: int = 32
    first: int = 1_000_000
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        if self.scenes < max(1, self.workers) or self.batch < 1 or self.workers < 0:
            raise ConfigError(
                f"{self.scenes} scenes, batches of {self.batch}, {self.workers} workers: each worker needs a "
                "scene and a batch a picture"
            )

    @property
    def identities(self) -> int:
        return self.scenes * self.scene.identities


class Glimpses(IterableDataset[Batch]):
    """Batches until `stop` is set. A batch holds, for B pictures and MOST objects each:

    image: (B, 3, H, W) uint8 RGB. xyxy: (B, K, 4) float32 pixels, whole boxes. label, identity: (B, K) int64,
    identity −1 where looks are not to be learnt. state: (B, K) uint8, 0 nothing, 1 to be found, 2 hardly
    visible: neither to be found nor to be taken for background.
    """

    def __init__(self, config: GlimpseConfig, stop: Event) -> None:
        self._config, self._stop = config, stop

    def __iter__(self) -> Iterator[Batch]:
        config, info = self._config, get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if info:
            cv2.setNumThreads(1)  # the workers share the cores already
        rng = np.random.default_rng((config.seed, worker))
        mine = range(worker, config.scenes, workers)
        scenes: dict[int, Scene] = {}
        while not self._stop.is_set():
            glimpses = []
            for which in rng.choice(mine, config.batch):
                if which not in scenes:
                    scenes[which] = Scene(config.first + int(which), config.scene)
                glimpses.append(_glimpse(rng, scenes[which], int(which) * config.scene.identities))
            yield {key: torch.from_numpy(np.stack([each[key] for each in glimpses])) for key in glimpses[0]}


@contextmanager
def load(config: GlimpseConfig) -> Iterator[Iterator[Batch]]:
    """Batches from as many processes as the config asks for, which end when this is left.

    They end by themselves, each after its last batch has been taken: one that is stopped while a batch is on
    its way out is aborted by C++ ("terminate called without an active exception").
    """
    context = get_context("spawn")  # a fork would take CUDA's and OpenCV's threads for its own
    stop = context.Event()
    loader: DataLoader[Batch] = DataLoader(
        Glimpses(config, stop),
        batch_size=None,
        num_workers=config.workers,
        prefetch_factor=3 if config.workers else None,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=context if config.workers else None,
    )
    batches = iter(loader)
    try:
        yield batches
    finally:
        stop.set()
        for _ in batches:
            pass


def _glimpse(rng: np.random.Generator, scene: Scene, first_identity: int) -> dict[str, NDArray[Any]]:
    """One moment, flipped, cropped and recoloured by chance."""
    width, height = scene.config.size
    scale = float(np.exp(rng.uniform(np.log(0.85), np.log(1.35)))) if rng.random() < 0.7 else 1.0
    shift = [rng.uniform(-1, 1) * 0.8 * max(room * scale - 0.5, 0.0) for room in (0.62, 0.56)]
    flip = rng.choice([-1.0, 1.0])
    view = np.array(
        [[flip * scale, 0, width * (0.5 + shift[0])], [0, scale, height * (0.5 + shift[1])], [0, 0, 1]]
    )
    image, truth = scene.frame(rng.uniform(0, scene.config.seconds), view=view, lens=_other(rng, scene.lens))

    sides = truth.xyxy[:, 2:] - truth.xyxy[:, :2]
    kept = np.argsort(-sides.prod(-1))[:MOST]
    count = len(kept)
    found = truth.countable((width, height))[kept]
    xyxy, label = np.zeros((MOST, 4), np.float32), np.zeros(MOST, np.int64)
    identity, state = np.full(MOST, -1), np.zeros(MOST, np.uint8)
    xyxy[:count], label[:count] = truth.xyxy[kept], truth.label[kept]
    named = found & (truth.visibility[kept] >= NAMEABLE)
    identity[:count] = np.where(named, truth.identity[kept] + first_identity, -1)
    state[:count] = np.where(found, 1, 2)
    pixels = np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1))
    return {"image": pixels, "xyxy": xyxy, "label": label, "identity": identity, "state": state}


def _other(rng: np.random.Generator, lens: Lens) -> Lens:
    """The same camera on another day."""
    return replace(
        lens,
        exposure=lens.exposure * float(rng.uniform(0.85, 1.15)),
        tint=(lens.tint * rng.uniform(0.95, 1.05, 3)).astype(np.float32),
        grain=lens.grain * float(rng.uniform(0.5, 1.5)),
        softness=float(rng.choice([0.0, lens.softness, 0.7])),
        quality=int(rng.integers(30, 96)),
    )
