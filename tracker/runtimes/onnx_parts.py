"""An ONNX graph of several parts that share nothing, taken apart: what takes different inputs runs by itself.

A detector in two stages is one file that way, for people and for tools, and still runs stage by stage.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tracker.errors import EngineError

if TYPE_CHECKING:
    import onnx

PARTS = (
    "parts"  # the key in a model's metadata under which it says that it is such a graph: its inputs' names
)


def read_parts(path: Path, content: bytes | None = None) -> dict[str, bytes]:
    """The parts of a file as files of their own, by the input that each takes, in the inputs' order.

    content: of the file, where it has been read.
    Raises EngineError where the package onnx is missing, and where parts share something.
    """
    try:
        import onnx
    except ImportError as error:
        raise EngineError(
            f"{path} holds several networks; taking them apart needs the package onnx: pip install "
            "'tracker[export]'"
        ) from error
    model = onnx.load(path) if content is None else onnx.load_from_string(content)
    return {name: part.SerializeToString() for name, part in parts_of(model).items()}


def parts_of(model: onnx.ModelProto) -> dict[str, onnx.ModelProto]:
    """The same of a graph in memory. One that does not say that it has parts is given as it is, under its
    first input. Raises EngineError where parts share something.
    """
    import onnx

    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in stored]
    if all(each.key != PARTS for each in model.metadata_props):
        return {inputs[0].name: model}
    owner = {value.name: value.name for value in inputs}  # of tensors: the input that they come from
    nodes: dict[str, list[onnx.NodeProto]] = {name: [] for name in owner}
    constants: list[onnx.NodeProto] = []  # nodes that nothing flows into, for all parts
    for node in graph.node:
        owners = {owner[name] for name in node.input if name in owner}
        if len(owners) > 1:
            raise EngineError(
                f"the inputs {' and '.join(sorted(owners))} meet in {node.name or node.output[0]}: parts of "
                "a network must share nothing; export it again"
            )
        if owners:
            (name,) = owners
            nodes[name].append(node)
            owner.update(dict.fromkeys(node.output, name))
        else:
            constants.append(node)
    parts = {}
    for value in inputs:
        part = onnx.ModelProto()
        part.CopyFrom(_without_graph(model))
        own = _needed([*constants, *nodes[value.name]], nodes[value.name])
        part.graph.name = graph.name
        part.graph.input.append(value)
        part.graph.node.extend(own)
        part.graph.output.extend(each for each in graph.output if owner.get(each.name) == value.name)
        used = {name for node in own for name in node.input}
        part.graph.initializer.extend(tensor for name, tensor in stored.items() if name in used)
        parts[value.name] = part
    return parts


def _without_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnx

    kept = onnx.ModelProto(ir_version=model.ir_version, producer_name=model.producer_name)
    kept.opset_import.extend(model.opset_import)
    return kept


def _needed(nodes: list[onnx.NodeProto], wanted: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The wanted ones and, of the others, those that they use."""
    used: set[str] = set()
    kept = []
    for node in reversed(nodes):
        if any(node is each for each in wanted) or not used.isdisjoint(node.output):
            used.update(node.input)
            kept.append(node)
    return kept[::-1]
