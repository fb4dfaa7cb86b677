"""FairMOT as a GPU wants it: the same answers from fewer, wider and half as precise operations.

Normalisations folded, memory channels last, deformable convolutions with their activation as one fused
kernel, transposed convolutions of single channels dense (see `deploy.graph.Lowering`), the first layers of
all heads as one. What stays in FP32 is what `deploy.islands` keeps: sampling coordinates, and the layer whose
answers are compared with each other, the heat map's last.

Nothing here asks for a GPU: torch.export takes it anywhere. Knows no files.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812 (everybody's name for it)
from torch import Tensor, nn

from tracker.kernels.deform import pack_weight
from tracker.kernels.tails import CHANNELS
from tracker.models.deform import TAPS, DeformConv
from tracker.models.dla import UpConv
from tracker.models.fairmot import FairMOT
from tracker.models.folded import folded
from tracker.models.halved import Halved

HEADS = ("hm", "wh", "reg", "id")
WIDE = ("hm",)  # last layers that stay in FP32


class Deployed(nn.Module):
    """Images (B, 3, H, W) of type `dtype`, channels last → the raw heads of `FairMOT`, in the same memory
    format; "hm" in FP32.

    The given network is left alone. dense_upsampling: half as fast where it is False, and smaller.
    """

    def __init__(
        self, model: FairMOT, dtype: torch.dtype = torch.float16, *, dense_upsampling: bool = True
    ) -> None:
        super().__init__()
        self.dtype = dtype
        model = folded(model)
        self.heads = _Heads(model)
        self.base, self.dla_up, self.ida_up = model.base, model.dla_up, model.ida_up
        self._halve_stem()
        for name, layer in list(self.named_modules()):
            if isinstance(layer, UpConv) and isinstance(layer.conv, DeformConv):
                if layer.conv.fusible:
                    layer.conv, layer.actf = _Deform(layer.conv), nn.Sequential()
            elif isinstance(layer, nn.ConvTranspose2d) and dense_upsampling:
                self.set_submodule(name, _Upsampling(layer))
        for name, layer in list(self.named_modules()):
            if isinstance(layer, nn.Conv2d):
                self.set_submodule(name, _Convolution(layer))
        wide = {name: copy.deepcopy(self.heads.last[name]) for name in WIDE}
        self.to(dtype)
        self.heads.last.update(wide)
        self.eval().requires_grad_(False)

    def _halve_stem(self) -> None:
        """Join the layers down to the first of stride 2, where there are no others of it."""
        stem = [
            layer
            for level in (self.base.base_layer, self.base.level0, self.base.level1)
            for layer in level
            if isinstance(layer, nn.Conv2d)
        ]
        strides = [layer.stride[0] for layer in stem]
        count = strides.index(2) + 1
        joined = Halved(stem[:count])
        rest = [part for layer in stem[count:] for part in (layer, nn.ReLU())]
        self.base.base_layer = nn.Sequential(joined, *rest)
        self.base.level0 = self.base.level1 = nn.Sequential()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        refined = self.dla_up(self.base(images))
        heads: dict[str, Tensor] = self.heads(self.ida_up(refined[:3])[-1])
        return heads


def relative_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """By head, |found − expected| / |expected| (Euclidean norms over all elements)."""
    return {
        name: float((found[name].double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-12))
        for name, truth in expected.items()
    }


class _Convolution(nn.Module):
    """Its weight lies as (O, kh, kw, I): channels last, and a plain tensor to those who write it to files."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().permute(0, 2, 3, 1).contiguous())
        self.bias = layer.bias
        self._stride, self._padding = layer.stride, layer.padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.permute(0, 3, 1, 2), self.bias, self._stride, self._padding)


class _Upsampling(nn.Module):
    """A transposed convolution of single channels as a dense one, with zeros between the channels."""

    def __init__(self, layer: nn.ConvTranspose2d) -> None:
        super().__init__()
        single = layer.weight.detach()[:, 0]  # (C, kh, kw)
        each = torch.arange(len(single))
        dense = single.new_zeros(len(single), *single.shape[1:], len(single))
        dense[each, :, :, each] = single
        self.weight = nn.Parameter(dense)  # (C, kh, kw, C)
        self._stride, self._padding = layer.stride, cast(tuple[int, int], layer.padding)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.permute(0, 3, 1, 2)
        return F.conv_transpose2d(x, weight, None, self._stride, self._padding)


class _Deform(nn.Module):
    """The fused kernel, with the layer that predicts its shifts before it and a ReLU behind it.

    The kernel adds that layer's bias, which a compiler would do in a pass of its own; and the layer gives 32
    channels instead of 27, for cuDNN would copy what it takes and gives to make them a multiple of 8.
    """

    def __init__(self, layer: DeformConv) -> None:
        super().__init__()
        plain = layer.conv_offset_mask
        self.shifts = nn.Conv2d(plain.in_channels, -(-3 * TAPS // 8) * 8, 3, padding=1, bias=False)
        nn.init.zeros_(self.shifts.weight)
        self.shifts.weight.data[: 3 * TAPS] = plain.weight.detach()
        self.shift_bias = nn.Parameter(cast(Tensor, plain.bias).detach().clone())
        self.weight = nn.Parameter(pack_weight(layer.weight.detach()))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        shifts = self.shifts(x)
        answer: Tensor = torch.ops.tracker.deform_conv2d(
            x, shifts, shifts, self.weight, self.bias, True, True, self.shift_bias
        )
        return answer


class _Heads(nn.Module):
    """All heads' first layers as one convolution; each last layer reads its part, see `kernels.tails`."""

    def __init__(self, model: FairMOT) -> None:
        super().__init__()
        first = [cast(nn.Conv2d, model.get_submodule(f"{name}.0")) for name in HEADS]
        channels = sum(layer.out_channels for layer in first)
        self.first = nn.Conv2d(first[0].in_channels, channels, 3, padding=1, bias=False)
        self.first.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in first]))
        self.last = nn.ModuleDict()
        start = 0
        for name, layer in zip(HEADS, first, strict=True):
            last = cast(nn.Conv2d, model.get_submodule(f"{name}.2"))
            self.last[name] = _Last(last, cast(Tensor, layer.bias), start)
            start += layer.out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.first(x)
        return {name: self.last[name](hidden) for name in HEADS}


class _Last(nn.Module):
    """A 1×1 convolution behind a ReLU, in the precision of its weight, of the channels from `start` on."""

    def __init__(self, layer: nn.Conv2d, hidden_bias: Tensor, start: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().flatten(1).clone())
        self.bias = nn.Parameter(cast(Tensor, layer.bias).detach().clone())
        self.hidden_bias = nn.Parameter(hidden_bias.detach().clone())
        self._start = start

    def forward(self, hidden: Tensor) -> Tensor:
        count = self.weight.shape[1]
        if count % CHANNELS:  # a small network's: what the kernel does, by torch's own operators
            part = hidden[:, self._start : self._start + count].permute(0, 2, 3, 1)
            rows = F.relu(part + self.hidden_bias.to(part.dtype)).to(self.weight.dtype)
            return F.linear(rows, self.weight, self.bias).permute(0, 3, 1, 2)
        answer: Tensor = torch.ops.tracker.last_layer(
            hidden, self.weight, self.bias, self.hidden_bias, self._start
        )
        return answer
