"""Train the small FairMOT that ships, on synthetic streets.

tools/train.py --out DIR --minutes 12 --device cuda
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="directory; a run found there is taken up again"
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float)
    length.add_argument("--steps", type=int)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--size", default="576x320", help="WIDTHxHEIGHT, multiples of 32 (default: %(default)s)"
    )
    parser.add_argument(
        "--width", type=float, default=0.5, help="of DLA-34's channels (default: %(default)s)"
    )
    parser.add_argument("--max-channels", type=int, default=96, help="of any level (default: %(default)s)")
    parser.add_argument("--head-channels", type=int, default=64)
    parser.add_argument("--stem-stride", type=int, default=2, choices=(1, 2))
    parser.add_argument(
        "--levels", default="1,1,1,1,1,1", help="blocks per level of DLA (default: %(default)s)"
    )
    parser.add_argument(
        "--deformable", action="store_true", help="upsample through deformable convolutions, as DLA-34 does"
    )
    parser.add_argument("--embedding", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--scenes", type=int, default=960, help="streets to learn from (default: %(default)s)"
    )
    parser.add_argument(
        "--first", type=int, default=1_000_000, help="seed of the first street (default: %(default)s)"
    )
    parser.add_argument("--people", type=int, default=40, help="at most, per scene (default: %(default)s)")
    parser.add_argument("--cars", type=int, default=8, help="at most, per scene (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="weights of the same network to begin with")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument(
        "--reuse", type=int, default=1, help="steps per fresh batch; raise it when the log says waiting"
    )
    parser.add_argument(
        "--pool", type=int, default=4096, help="pictures kept for --reuse (default: %(default)s)"
    )
    parser.add_argument("--rate", type=float, default=1.5e-3)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    from tracker.deploy.glimpses import GlimpseConfig
    from tracker.deploy.scenes.scene import CLASSES, SceneConfig
    from tracker.deploy.training import TrainingConfig, train
    from tracker.errors import ConfigError, TrackerError
    from tracker.models.fairmot import FairMOTConfig

    try:
        try:
            width, height = (int(side) for side in options.size.split("x"))
        except ValueError:
            raise ConfigError(f"--size {options.size!r}: expected WIDTHxHEIGHT, such as 576x320") from None
        scene = SceneConfig(size=(width, height), people=options.people, cars=options.cars)
        glimpses = GlimpseConfig(
            scene=scene,
            scenes=options.scenes,
            batch=options.batch,
            first=options.first,
            seed=options.seed,
            workers=options.workers,
        )
        model = FairMOTConfig(
            classes=len(CLASSES),
            embedding=options.embedding,
            width=options.width,
            max_channels=options.max_channels,
            levels=tuple(int(count) for count in options.levels.split(",")),
            head_channels=options.head_channels,
            stem_stride=options.stem_stride,
            deformable=options.deformable,
        )
        config = TrainingConfig(
            model=model,
            glimpses=glimpses,
            minutes=options.minutes,
            steps=options.steps,
            device=options.device,
            seed=options.seed,
            reuse=options.reuse,
            pool=options.pool,
            rate=options.rate,
            start=options.start,
        )
        weights = train(config, options.out, lambda line: print(line, flush=True))
    except TrackerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"weights: {weights}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
