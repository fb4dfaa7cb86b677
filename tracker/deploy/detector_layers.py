"""Layers of detectors and transformers as ONNX nodes: what `graph` writes beside FairMOT's."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from tracker.models.blocks import Constant, FocusConv
from tracker.models.detr import Attention
from tracker.models.ppyoloe import RepVGG
from tracker.models.solov2 import BilinearResize, CoordConv

if TYPE_CHECKING:
    from tracker.deploy.graph import Writer

Array = NDArray[Any]
Layer = Callable[["Writer", fx.Node, Any, list[str]], str]
Function = Callable[["Writer", fx.Node, list[str]], str]


def _array(values: Tensor) -> Array:
    return values.detach().cpu().numpy()


def _silu(writer: Writer, node: fx.Node, layer: nn.SiLU, inputs: list[str]) -> str:
    """As the product it is: runtimes fuse it, and no opset here has a name for it."""
    gate = writer.add("Sigmoid", inputs, f"{node.name}.sigmoid")
    return writer.add("Mul", [*inputs, gate], node.name)


def _upsample(writer: Writer, node: fx.Node, layer: nn.Upsample, inputs: list[str]) -> str:
    assert layer.mode in ("nearest", "bilinear") and layer.scale_factor == 2
    if layer.mode == "bilinear":
        return _bilinear(writer, node, inputs, (2.0, 2.0))
    scales = writer.constant("scales.2", np.array([1, 1, 2, 2], np.float32))
    return writer.add(
        "Resize",
        [*inputs, "", scales],
        node.name,
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


def _bilinear_resize(writer: Writer, node: fx.Node, layer: BilinearResize, inputs: list[str]) -> str:
    """By scales, for sizes would fix the batch; each so that its product with the old size, cut off, is the
    new one, whether computed in double or in single precision.
    """
    scales = []
    for old, new in zip(node.all_input_nodes[0].meta["tensor_meta"].shape[2:], layer.size[::-1], strict=True):
        scale = np.float32(new / old)
        while min(int(scale * np.float32(old)), int(float(scale) * old)) < new:
            scale = np.nextafter(scale, np.float32(np.inf))
        scales.append(float(scale))
    return _bilinear(writer, node, inputs, (scales[0], scales[1]))


def _bilinear(writer: Writer, node: fx.Node, inputs: list[str], scales: tuple[float, float]) -> str:
    """scales: of the height and the width."""
    name = "scales." + "x".join(map(str, scales))
    tensor = writer.constant(name, np.array([1, 1, *scales], np.float32))
    return writer.add(
        "Resize", [*inputs, "", tensor], node.name, mode="linear", coordinate_transformation_mode="half_pixel"
    )


def _group_norm(writer: Writer, node: fx.Node, layer: nn.GroupNorm, inputs: list[str]) -> str:
    """Each group as one channel of an instance normalisation: opset 19 has none of groups that counts."""
    name, shape = node.name, node.meta["tensor_meta"].shape
    groups, channels = layer.num_groups, layer.num_channels
    one = writer.constant(f"ones.{groups}", np.ones(groups, np.float32))
    zero = writer.constant(f"zeros.{groups}", np.zeros(groups, np.float32))
    rows = writer.reshape(inputs[0], f"{name}.groups", groups, -1)
    rows = writer.add("InstanceNormalization", [rows, one, zero], f"{name}.normal", epsilon=layer.eps)
    normal = writer.reshape(rows, f"{name}.channels", *shape[1:])
    factor = writer.constant(f"{node.target}.weight", _array(layer.weight).reshape(channels, 1, 1))
    scaled = writer.add("Mul", [normal, factor], f"{name}.scaled")
    shift = writer.constant(f"{node.target}.bias", _array(layer.bias).reshape(channels, 1, 1))
    return writer.add("Add", [scaled, shift], name)


def _coord_conv(writer: Writer, node: fx.Node, layer: CoordConv, inputs: list[str]) -> str:
    """A convolution of the features, and a constant: what the coordinates add."""
    name = writer.name_of(node)
    weight = writer.constant(f"{node.target}.weight", _array(layer.weight[:, :-2]))
    attributes = {"kernel_shape": layer.kernel_size, "pads": (*layer.padding, *layer.padding)}
    assert layer.bias is None and layer.stride == (1, 1)
    features = writer.add("Conv", [inputs[0], weight], f"{name}.features", **attributes)
    with torch.no_grad():
        share = layer.share(writer.constant_of(node.args[1]))
    return writer.add("Add", [features, writer.constant(f"{name}.coordinates", _array(share))], name)


def _linear(writer: Writer, node: fx.Node, layer: nn.Linear, inputs: list[str]) -> str:
    return _affine(writer, writer.name_of(node), inputs[0], layer.weight, layer.bias)


def _affine(writer: Writer, name: str, source: str, weight: Tensor, bias: Tensor) -> str:
    matrix = writer.constant(f"{name}.weight", _array(weight).T)
    product = writer.add("MatMul", [source, matrix], f"{name}.matmul")
    return writer.add("Add", [product, writer.constant(f"{name}.bias", _array(bias))], name)


def _layer_norm(writer: Writer, node: fx.Node, layer: nn.LayerNorm, inputs: list[str]) -> str:
    name = writer.name_of(node)
    tensors = [
        *inputs,
        writer.constant(f"{name}.weight", _array(layer.weight)),
        writer.constant(f"{name}.bias", _array(layer.bias)),
    ]
    return writer.add("LayerNormalization", tensors, name, axis=-1, epsilon=layer.eps)


def _attention(writer: Writer, node: fx.Node, layer: Attention, inputs: list[str]) -> str:
    """Four dimensions, no mask. The scale of the scores is part of the queries' weights."""
    name, heads = writer.name_of(node), layer.heads
    weights, biases = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    channels = len(biases[0])
    scale = 1 / math.sqrt(channels / heads)
    shape = writer.constant(f"shape.heads{heads}", np.array([0, 0, heads, channels // heads], np.int64))
    parts = []
    for part, argument, weight, bias in zip("qkv", node.args, weights, biases, strict=True):
        factor = scale if part == "q" else 1.0
        source = writer.tensor(argument)
        projected = _affine(writer, f"{name}.{part}", source, weight * factor, bias * factor)
        split = writer.add("Reshape", [projected, shape], f"{name}.{part}.heads")
        order = (0, 2, 3, 1) if part == "k" else (0, 2, 1, 3)
        parts.append(writer.add("Transpose", [split], f"{name}.{part}.by_head", perm=order))
    query, key, value = parts
    scores = writer.add("MatMul", [query, key], f"{name}.scores")
    share = writer.add("Softmax", [scores], f"{name}.softmax", axis=-1)
    mixed = writer.add("MatMul", [share, value], f"{name}.mixed")
    mixed = writer.add("Transpose", [mixed], f"{name}.by_place", perm=(0, 2, 1, 3))
    joined = writer.constant("shape.joined", np.array([0, 0, -1], np.int64))
    mixed = writer.add("Reshape", [mixed, joined], f"{name}.joined")
    return _affine(writer, f"{name}.out_proj", mixed, layer.out_proj.weight, layer.out_proj.bias)


def _constant(writer: Writer, node: fx.Node, layer: Constant, inputs: list[str]) -> str:
    return writer.constant(writer.name_of(node), _array(layer()))


def _focus(writer: Writer, node: fx.Node, layer: FocusConv, inputs: list[str]) -> str:
    plain = nn.Conv2d(layer.weight.shape[1] // 4, len(layer.weight), 6, 2, padding=2)
    norm = writer.following_normalisation(node)
    return writer.convolution(writer.name_of(node), inputs[0], layer.whole(), None, norm, plain)


def _rep_vgg(writer: Writer, node: fx.Node, layer: RepVGG, inputs: list[str]) -> str:
    """Both branches as one 3×3 convolution."""
    weights, biases = [], []
    alpha = torch.ones(1) if layer.alpha is None else layer.alpha
    for branch, factor in ((layer.conv1, torch.ones(1)), (layer.conv2, alpha)):
        norm, weight = branch.bn, branch.conv.weight
        assert isinstance(weight, Tensor) and norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        shift = norm.bias.double() - norm.running_mean.double() * scale
        around = (3 - weight.shape[2]) // 2
        weights.append(
            nn.functional.pad(weight.double() * scale[:, None, None, None] * factor.double(), [around] * 4)
        )
        biases.append(shift * factor.double())
    plain = nn.Conv2d(1, 1, 3, padding=1)
    weight, bias = (weights[0] + weights[1]).float(), (biases[0] + biases[1]).float()
    return writer.convolution(writer.name_of(node), inputs[0], weight, bias, None, plain)


def _reshaped(writer: Writer, node: fx.Node, inputs: list[str]) -> str:
    """Any function that keeps the batch and the order of the values."""
    shape = [0, *node.meta["tensor_meta"].shape[1:]]
    target = writer.constant("shape." + "x".join(map(str, shape)), np.array(shape, np.int64))
    return writer.add("Reshape", [*inputs, target], node.name)


LAYERS: dict[type[nn.Module], Layer] = {
    nn.AdaptiveAvgPool2d: lambda writer, node, layer, inputs: writer.add(
        "GlobalAveragePool", inputs, node.name
    ),
    nn.GroupNorm: _group_norm,
    nn.Hardsigmoid: lambda writer, node, layer, inputs: writer.add(
        "HardSigmoid", inputs, node.name, alpha=1 / 6, beta=0.5
    ),
    nn.LayerNorm: _layer_norm,
    nn.Linear: _linear,
    nn.SiLU: _silu,
    nn.Upsample: _upsample,
    Attention: _attention,
    BilinearResize: _bilinear_resize,
    Constant: _constant,
    CoordConv: _coord_conv,
    FocusConv: _focus,
    RepVGG: _rep_vgg,
}
FUNCTIONS: dict[Any, Function] = {
    operator.mul: lambda writer, node, inputs: writer.add("Mul", inputs, node.name),
    torch.flatten: _reshaped,
    torch.unflatten: _reshaped,
    torch.permute: lambda writer, node, inputs: writer.add("Transpose", inputs, node.name, perm=node.args[1]),
}
