"""DETR with a ResNet-50 (Carion et al., ECCV 2020); state-dict keys as in github.com/facebookresearch/detr.

Its `models/{detr,transformer,backbone,position_encoding}.py`, for one input size without padding: the
position embedding is then a constant and there is nothing to mask, and only the last layer's answers are
made. What is left has no boolean tensor and no gather, which INT8 engines cannot have. Decoding is the front
end's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from tracker.models.blocks import Constant
from tracker.models.resnet import ResNet

STRIDE = 32  # of the map that the transformer sees


@dataclass(frozen=True, slots=True, kw_only=True)
class DetrConfig:
    """size: (width, height) of the input. classes: with those COCO does not use, without "no object"."""

    size: tuple[int, int] = (1066, 800)
    classes: int = 91
    queries: int = 100
    channels: int = 256
    heads: int = 8
    hidden: int = 2048
    layers: int = 6


def settle(model: DETR, images: Tensor) -> None:
    """Scale random weights so that attention sees features that deviate by 1, and some classes are likely.

    The residual sums of a random ResNet grow to a hundred times that, and the first scores of attention
    beyond what FP16 holds. images: pixels from 0 to 1.
    """
    features = model.input_proj(model.backbone[0]((images - 0.5) * 4))  # as normalised ones spread
    for weight in model.input_proj.parameters():
        weight.div_(features.std())
    model.class_embed.weight.mul_(3)


class DETR(nn.Module):
    def __init__(self, config: DetrConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DetrConfig()
        width, height = (-(-side // STRIDE) for side in config.size)
        channels = config.channels
        self.backbone = nn.ModuleList([_Backbone()])
        self.input_proj = nn.Conv2d(2048, channels, 1)
        self.transformer = _Transformer(config)
        self.query_embed = nn.Embedding(config.queries, channels)
        self.class_embed = nn.Linear(channels, config.classes + 1)
        self.bbox_embed = _Perceptron(channels, 4, 3)
        self.positions = Constant(lambda: sine_positions(width, height, channels))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """RGB images (B, 3, H, W), normalised → "logits" (B, queries, classes + 1), the last for no object,
        and "boxes" (B, queries, 4): centre and size in shares of the image.
        """
        features = self.input_proj(self.backbone[0](images))
        source = torch.permute(torch.flatten(features, 2), (0, 2, 1))  # (B, L, channels)
        found = self.transformer(source, self.positions(), self.query_embed.weight)
        return {"logits": self.class_embed(found), "boxes": torch.sigmoid(self.bbox_embed(found))}


def sine_positions(width: int, height: int, channels: int) -> Tensor:
    """(1, H·W, channels) of an unpadded map: half of the channels for the row, half for the column.

    `PositionEmbeddingSine` with normalize=True: rows and columns count from 1 to the map's size, which is 2π.
    """
    count = channels // 2
    period = 10000 ** (2 * (torch.arange(count, dtype=torch.float32) // 2) / count)

    def waves(length: int) -> Tensor:
        place = torch.arange(1, length + 1, dtype=torch.float32)
        angle = (place / (length + 1e-6) * (2 * math.pi))[:, None] / period  # (length, count)
        return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=2).flatten(1)

    rows = waves(height)[:, None].expand(height, width, count)
    columns = waves(width)[None].expand(height, width, count)
    return torch.cat((rows, columns), dim=2).reshape(1, height * width, channels)


class Attention(nn.Module):
    """Multi-head attention over (B, L, channels); parameters are named as in `nn.MultiheadAttention`."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: (B or 1, L, channels). key, value: (B or 1, M, channels). → as query, batches broadcast."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            torch.unflatten(nn.functional.linear(x, weight, bias), 2, (self.heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )  # (B, heads, L, channels / heads)
        share = (q / math.sqrt(q.shape[-1]) @ k.mT).softmax(dim=-1)
        answer: Tensor = self.out_proj((share @ v).transpose(1, 2).flatten(2))
        return answer


class _FeedForward(nn.Module):
    """Base of layers: their second half."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(config.channels, config.hidden)
        self.linear2 = nn.Linear(config.hidden, config.channels)
        self.relu = nn.ReLU()

    def fed_forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.linear2(self.relu(self.linear1(x)))
        return answer


class _EncoderLayer(_FeedForward):
    def __init__(self, config: DetrConfig) -> None:
        super().__init__(config)
        self.self_attn = Attention(config.channels, config.heads)
        self.norm1, self.norm2 = nn.LayerNorm(config.channels), nn.LayerNorm(config.channels)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        placed = x + positions
        x = self.norm1(x + self.self_attn(placed, placed, x))
        answer: Tensor = self.norm2(x + self.fed_forward(x))
        return answer


class _DecoderLayer(_FeedForward):
    def __init__(self, config: DetrConfig) -> None:
        super().__init__(config)
        self.self_attn = Attention(config.channels, config.heads)
        self.multihead_attn = Attention(config.channels, config.heads)
        self.norm1, self.norm2 = nn.LayerNorm(config.channels), nn.LayerNorm(config.channels)
        self.norm3 = nn.LayerNorm(config.channels)

    def forward(self, x: Tensor, memory: Tensor, placed_memory: Tensor, queries: Tensor) -> Tensor:
        asking = x + queries
        x = self.norm1(x + self.self_attn(asking, asking, x))
        x = self.norm2(x + self.multihead_attn(x + queries, placed_memory, memory))
        answer: Tensor = self.norm3(x + self.fed_forward(x))
        return answer


class _Layers(nn.Module):
    def __init__(self, layers: list[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if norm is not None:
            self.norm = norm


class _Transformer(nn.Module):
    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.encoder = _Layers([_EncoderLayer(config) for _ in range(config.layers)])
        self.decoder = _Layers(
            [_DecoderLayer(config) for _ in range(config.layers)], nn.LayerNorm(config.channels)
        )
        self.start = Constant(lambda: torch.zeros(1, config.queries, config.channels))

    def forward(self, source: Tensor, positions: Tensor, queries: Tensor) -> Tensor:
        """source: (B, L, channels), positions (1, L, channels), queries (N, channels) → (B, N, channels)."""
        memory = source
        for layer in self.encoder.layers:
            memory = layer(memory, positions)
        placed, found = memory + positions, self.start()
        for layer in self.decoder.layers:
            found = layer(found, memory, placed, queries)
        answer: Tensor = self.decoder.norm(found)
        return answer


class _Perceptron(nn.Module):
    def __init__(self, channels: int, outputs: int, layers: int) -> None:
        super().__init__()
        sizes = [*[channels] * layers, outputs]
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(sizes))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.relu(layer(x))
        answer: Tensor = self.layers[-1](x)
        return answer


class _Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = ResNet(50)

    def forward(self, images: Tensor) -> Tensor:
        answer: Tensor = self.body(images)[-1]
        return answer
