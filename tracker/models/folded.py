"""Networks as they run rather than as they learn: each batch normalisation inside the layer before it.

What `deploy.graph` writes has these weights under these names, so that an ONNX file of ours can become the
network again.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from tracker.models.deform import DeformConv
from tracker.models.fairmot import FairMOT


@torch.no_grad()
def folded(model: FairMOT) -> FairMOT:
    """A copy in evaluation mode that answers the same without a normalisation: identities are in their
    places, and their convolutions have biases.
    """
    model = copy.deepcopy(model).eval()
    for node in _Tracer().trace(model).nodes:
        norm = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(norm, nn.BatchNorm2d):
            (source,) = node.all_input_nodes
            _fold(model.get_submodule(str(source.target)), norm)
            model.set_submodule(str(node.target), nn.Identity())
    return model


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, DeformConv) or super().is_leaf_module(m, module_qualified_name)


def _fold(conv: nn.Module, norm: nn.BatchNorm2d) -> None:
    assert isinstance(conv, (nn.Conv2d, DeformConv)), "normalisations stand behind convolutions"
    assert norm.running_mean is not None and norm.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        conv.weight.double(),
        None if conv.bias is None else conv.bias.double(),
        norm.running_mean.double(),
        norm.running_var.double(),
        norm.eps,
        norm.weight.double(),
        norm.bias.double(),
    )
    conv.weight, conv.bias = _parameter(weight), _parameter(bias)


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().float(), requires_grad=False)
