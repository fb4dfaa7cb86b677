"""Graphs of several parts, a TensorRT plan each, in one file that `runtimes.parts` runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from time import perf_counter

import onnx
from onnx import TensorProto

from tracker.deploy.plan import BuildConfig, Layouts, Plan, Progress, compile_plan
from tracker.runtimes.parts import pack


def compile_parts(
    parts: Mapping[str, onnx.ModelProto],
    rows: Mapping[str, int],
    config: BuildConfig,
    progress: Progress | None = None,
) -> Plan:
    """As `compile_plan`, of parts by their input; the first takes the images, and the batch is its.

    rows: of each further part's input, per image at most. A part takes from one row up to those of the
    greatest batch, and is tuned for those of the usual one. Maps in half precision cross from part to part
    channels last, as both sides and what lies between compute.
    Raises as `compile_plan`.
    """
    begun = perf_counter()
    plans: dict[str, Plan] = {}
    for name, part in parts.items():
        done = len(plans)

        def told(what: str, share: float | None, done: int = done) -> None:
            if progress is not None:
                progress(f"part {done + 1} of {len(parts)}: {what}", (done + (share or 0.0)) / len(parts))

        if plans:
            _, usual, most = next(iter(plans.values())).batch
            config = dataclasses.replace(config, batch=(1, usual * rows[name], most * rows[name]))
        between = part.graph.input if plans else part.graph.output
        plans[name] = compile_plan(part, config, told, layouts=_layouts(between))
    first = next(iter(plans.values()))
    content = pack({name: plan.content for name, plan in plans.items()})
    return dataclasses.replace(first, content=content, seconds=perf_counter() - begun)


def _layouts(values: Iterable[onnx.ValueInfoProto]) -> Layouts:
    found = {}
    for value in values:
        kind = value.type.tensor_type
        if len(kind.shape.dim) == 4 and kind.elem_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
            found[value.name] = "HWC8"
    return found
