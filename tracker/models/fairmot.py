"""FairMOT: one network that finds objects and says what each looks like, at a quarter of the input's size.

Zhang et al., "FairMOT" (IJCV 2021): DLA-34 with deformable up-sampling and four heads. State-dict keys and
shapes at the default configuration are those of the official checkpoints. Training, decoding and files are
elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tracker.errors import ConfigError
from tracker.models.dla import DLA, DLAUp, IDAUp

STRIDE = 4  # input pixels per cell of the heads
MULTIPLE = 32  # input width and height are multiples of this: the coarsest level's stride
DLA34_CHANNELS = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class FairMOTConfig:
    """Size of the network. The defaults are the official `dla_34` (its `src/lib/opts.py`).

    classes: heat maps. embedding: channels of the appearance head. box: 4 for distances of the left, top,
    right and bottom edges from the centre, 2 for width and height (CenterNet's, older checkpoints).
    width: factor on DLA-34's channels, rounded to multiples of 8. max_channels: no level has more.
    levels, stem_stride: see `DLA`.
    head_channels: hidden, in each head. deformable: False makes the up-sampling's convolutions plain.
    A network of width 0.3 takes a CPU 1.8 times as long with deformable convolutions, and 1.4 times
    as long with a stem_stride of 1 (ONNX Runtime 1.31, two cores, 512×288).
    """

    classes: int = 1
    embedding: int = 128
    box: int = 4
    width: float = 1.0
    max_channels: int = 512
    levels: tuple[int, ...] = (1, 1, 1, 2, 2, 1)
    stem_stride: int = 1
    head_channels: int = 256
    deformable: bool = True

    def __post_init__(self) -> None:
        for key in ("classes", "embedding", "max_channels", "head_channels"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least 1")
        if self.box not in (2, 4):
            raise ConfigError(f"box is {self.box}; it must be 4 (edge distances) or 2 (width and height)")
        if not 0 < self.width <= 4:
            raise ConfigError(f"width is {self.width}; it must be above 0 and at most 4")
        if len(self.levels) != 6 or min(self.levels) < 1:
            raise ConfigError(f"levels is {self.levels}; it must be six numbers, each at least 1")
        if self.stem_stride not in (1, 2):
            raise ConfigError(f"stem_stride is {self.stem_stride}; it must be 1 or 2")

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the backbone's six levels."""
        wide = (max(8, 8 * round(count * self.width / 8)) for count in DLA34_CHANNELS)
        return tuple(min(count, self.max_channels) for count in wide)


class FairMOT(nn.Module):
    """The network; weights are random until loaded."""

    def __init__(self, config: FairMOTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or FairMOTConfig()
        channels = config.channels[2:]  # strides 4, 8, 16, 32
        self.base = DLA(config.channels, config.levels, config.stem_stride)
        self.dla_up = DLAUp(channels, deformable=config.deformable)
        self.ida_up = IDAUp(channels[1:3], channels[0], (2, 4), deformable=config.deformable)
        self.hm = _head(channels[0], config.head_channels, config.classes, bias=-2.19)
        self.wh = _head(channels[0], config.head_channels, config.box)
        self.reg = _head(channels[0], config.head_channels, 2)
        self.id = _head(channels[0], config.head_channels, config.embedding)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """RGB images (B, 3, H, W) in 0..1, H and W multiples of 32 → raw heads (B, channels, H/4, W/4).

        "hm": logits, a channel per class. "wh": left, top, right and bottom distances of the edges from
        the centre (or width and height), in cells. "reg": x and y of the centre within its cell.
        "id": appearance.
        """
        refined = self.dla_up(self.base(images))
        merged = self.ida_up(refined[:3])[-1]
        return {name: getattr(self, name)(merged) for name in ("hm", "wh", "reg", "id")}


def random_fairmot(config: FairMOTConfig | None = None, *, seed: int = 0) -> FairMOT:
    """A network for measuring and testing, in evaluation mode, as different from a new one as a trained one
    is: no offset, bias or normalisation is left as it begins, and activations keep their scale.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)  # a new network's own weights are drawn from torch's generator
        model = FairMOT(config)
    for name, weight in model.named_parameters():
        noise = torch.empty(weight.shape).uniform_(-1, 1, generator=generator)
        gain = 0.02 if "conv_offset_mask" in name else 6.0  # He et al. 2015
        scale = math.sqrt(gain / weight[0].numel()) if weight.ndim == 4 else 0.3
        weight.data = noise * scale + (weight.ndim == 1) * weight
    model(torch.rand(2, 3, 64, 64, generator=generator))  # in training mode: moves running statistics
    return model.eval()


def _head(inputs: int, hidden: int, outputs: int, *, bias: float = 0.0) -> nn.Sequential:
    """bias: of the output, at first; −2.19 makes every heat-map score 0.1 (the focal loss's prior)."""
    last = nn.Conv2d(hidden, outputs, 1)
    nn.init.constant_(last.bias, bias)  # type: ignore[arg-type]
    return nn.Sequential(nn.Conv2d(inputs, hidden, 3, padding=1), nn.ReLU(inplace=True), last)
