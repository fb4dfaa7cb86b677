"""Which layers of a quantised graph to leave as they were, by what TensorRT says of a graph that it refuses.

TensorRT names one node made of many ("w + q + conv1 + relu1", "{ForeignNode[a...b]}"), often one that only
lies between quantised ones. Knows ONNX and these words.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

import onnx

from tracker.errors import EngineError

_NAMED = 4  # layers; more are no advice
# What TensorRT says where it has no INT8 kernel, or takes a layer for one that has.
_ABOUT_KERNELS = re.compile(
    r"implementation for node|valid tactics|incorrectly marked|\bk?INT8|\bint8\b|Assertion|qdq", re.ASCII
)


class NoKernelError(EngineError):
    """TensorRT has no kernels for a quantised graph. keep: patterns of layers to leave as they were, for
    `CalibrationConfig.keep`; empty where it names none.
    """

    def __init__(self, words: str, keep: tuple[str, ...]) -> None:
        super().__init__(words)
        self.keep = keep


def refused(model: onnx.ModelProto, said: str, what: str) -> NoKernelError | None:
    """The error of an INT8 graph that TensorRT refuses with these words, with what its user can do about it.

    what: of the error, before the advice. None where the words are about something else: memory, an operator,
    a size.
    """
    if not _ABOUT_KERNELS.search(said):
        return None
    named = quantised_near(model, said)
    keep = tuple(_pattern(name) for name in named[:_NAMED])
    if not keep:
        advice = (
            "it names no layer: leave some out with --keep of tools/calibrate.py, half of them at a time, or "
            "build the graph in fp32 with --precision fp16"
        )
        return NoKernelError(f"{what}: {advice}", keep)
    options = " ".join(f"--keep {shlex.quote(each)}" for each in keep)
    more = f" (and {len(named) - _NAMED} more)" if len(named) > _NAMED else ""
    advice = (
        f"leave out what it names with tools/calibrate.py … {options}{more}, or build the graph in fp32 with "
        "--precision fp16"
    )
    return NoKernelError(f"{what}: {advice}", keep)


def quantised_near(model: onnx.ModelProto, said: str) -> list[str]:
    """Names of layers with INT8 weights that the words name; else the next ones after, or before, a node that
    they do name.
    """
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)

    def takes_integers(node: onnx.NodeProto) -> bool:
        return len(node.input) > 1 and _constant(makers.get(node.input[1]), makers, weights)

    def near(on: Callable[[onnx.NodeProto], list[onnx.NodeProto]]) -> list[str]:
        """From the nodes named on to the first quantised layers that way."""
        found, seen, rest = [], set[str](), list(named)
        while rest:
            node = rest.pop(0)
            if node.output[0] in seen:
                continue
            seen.add(node.output[0])
            if takes_integers(node):
                found.append(node.name)
            else:
                rest += on(node)
        return found

    named = [node for node in graph.node if node.name and _mentions(said, node.name)]
    return (
        [node.name for node in named if takes_integers(node)]
        or near(lambda node: [user for name in node.output for user in users.get(name, ())])
        or near(lambda node: [makers[name] for name in node.input if name in makers])
    )


def _constant(node: onnx.NodeProto | None, makers: dict[str, onnx.NodeProto], weights: set[str]) -> bool:
    """Whether it gives weights that are taken back from integers, stored as such or not, turned or not."""
    quantised = False
    while node is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear", "Transpose", "Cast"):
        quantised |= node.op_type == "DequantizeLinear"
        if node.input[0] in weights:
            return quantised
        node = makers.get(node.input[0])
    return False


def _mentions(said: str, name: str) -> bool:
    return re.search(rf"(?<![\w/.]){re.escape(name)}(?![\w/]|\.\w)", said) is not None


def _pattern(name: str) -> str:
    """A regular expression for a name, as short as it can be."""
    return name if re.fullmatch(r"[\w./:-]+", name) else re.escape(name)
