#!/usr/bin/env python3
"""The official FairMOT's own tracking loop over one video, for `bench.py pipeline --official-fairmot`.

official_fairmot.py CLONE VIDEO [--weights fairmot_dla34.pth] [--conf 0.4] [--frames N]

A process by itself, which never imports this project: FairMOT calls a package of its own `tracker`. Does what
the clone's src/track.py:eval_seq does without drawing, with its data loader, network, post-processing and
association as they are, and prints frames and seconds as JSON. What it must be spared: the download of
ImageNet weights, and its compiled DCNv2, for which torchvision's deform_conv2d stands in.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn


class DCN(nn.Module):
    """DCNv2's layer, with its parameters' names."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, stride: int, padding: int, **rest: int):
        super().__init__()
        sides = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        self.stride, self.padding = stride, padding
        self.weight = nn.Parameter(
            torch.randn(outputs, inputs, *sides) / math.sqrt(inputs * math.prod(sides))
        )
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.conv_offset_mask = nn.Conv2d(inputs, 3 * math.prod(sides), sides, stride, padding)
        nn.init.zeros_(self.conv_offset_mask.weight)

    def forward(self, features: Tensor) -> Tensor:
        from torchvision.ops import deform_conv2d

        y, x, mask = torch.chunk(self.conv_offset_mask(features), 3, dim=1)
        offset = torch.cat((y, x), dim=1)
        return deform_conv2d(
            features, offset, self.weight, self.bias, self.stride, self.padding, mask=torch.sigmoid(mask)
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clone", type=Path)
    parser.add_argument("video", type=Path)
    parser.add_argument("--weights", default="")
    parser.add_argument("--conf", type=float, default=0.4)
    parser.add_argument("--embedding", type=int, default=128)
    parser.add_argument("--frames", type=int)
    options = parser.parse_args()
    library = options.clone / "src" / "lib"
    if not library.is_dir():
        parser.error(f"there is no {library}: name the top folder of a clone of the official repository")
    sys.path[:0] = [str(library)]
    stand_in("tracker", __path__=[str(library / "tracker")])  # not this project's
    stand_in("dcn_v2", DCN=DCN)
    for other in ("networks.pose_hrnet", "yolo"):  # they want packages that DLA does not
        stand_in(f"models.{other}", get_pose_net=None)
    for name, kind in (("float", float), ("int", int), ("bool", bool)):  # NumPy 1.24 took these names away
        if name not in vars(np):
            setattr(np, name, kind)
    sys.argv = sys.argv[:1]  # the clone parses it at import
    with contextlib.redirect_stdout(io.StringIO()):
        from datasets.dataset.jde import LoadVideo
        from models.networks import pose_dla_dcn

        from tracker import multitracker

        pose_dla_dcn.DLA.load_pretrained_model = lambda self, **rest: None
        multitracker.logger.setLevel(logging.INFO)  # as src/track.py does
        if not options.weights:
            multitracker.load_model = lambda network, path: network
        tracker = multitracker.JDETracker(settings(options), frame_rate=30)
        loader = LoadVideo(str(options.video), (1088, 608))
    cuda, objects = torch.cuda.is_available(), 0
    for count, (_, image, source) in enumerate(loader):
        if count == WARM_UP:
            begun = time.perf_counter()
        if count == options.frames:
            break
        blob = torch.from_numpy(image).unsqueeze(0)
        objects += len(tracker.update(blob.cuda() if cuda else blob, source))
    frames, seconds = count - WARM_UP, time.perf_counter() - begun
    print(json.dumps({"frames": frames, "seconds": seconds, "objects": objects / max(1, count)}))
    return 0


def stand_in(name: str, **contents: object) -> None:
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(contents)


WARM_UP = 5  # frames: the first load libraries and choose algorithms


def settings(options: argparse.Namespace) -> SimpleNamespace:
    """The clone's src/lib/opts.py at its defaults for tracking, as far as they are read."""
    return SimpleNamespace(
        arch="dla_34",
        heads={"hm": 1, "wh": 4, "id": options.embedding, "reg": 2},
        head_conv=256,
        load_model=options.weights,
        gpus=[0 if torch.cuda.is_available() else -1],
        conf_thres=options.conf,
        track_buffer=30,
        K=500,
        num_classes=1,
        mean=[0.408, 0.447, 0.470],
        std=[0.289, 0.274, 0.278],
        down_ratio=4,
        reg_offset=True,
        ltrb=True,
    )


if __name__ == "__main__":
    sys.exit(main())
