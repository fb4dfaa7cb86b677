"""TensorRT's Python interface over the CPU's memory, as 8.6 has it and as 10 and later do.

A plan here is JSON after a plan's four letters, and its engine doubles: each output is twice the input it
names. What TensorRT does with memory is done too: reads and writes go through the addresses it was given, in
the layout it announced, and a run overwrites all of the device memory that it asked for.
"""

from __future__ import annotations

import ctypes
import enum
import json
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}
PACKED = {"LINEAR": 0, "HWC": 1, "HWC8": 8, "HWC16": 16}

# In the words of the libraries (8.6 where not noted), for a plan whose "fault" it is.
FAULTS = {
    "gpu": "6: The engine plan file is generated on an incompatible device, expecting compute 9.0 got "
    "compute 8.6, please rebuild.",
    "version": "6: The engine plan file is not compatible with this version of TensorRT, expecting library "
    "version 8.6.1.6 got 8.5.3.1, please rebuild.",
    "plugin": "1: [pluginV2Runner.cpp::load::300] Error Code 1: Serialization (Serialization assertion "
    "creator failed.Cannot deserialize plugin since corresponding IPluginCreator not found in Plugin "
    "Registry)",
    "damaged": "1: [runtime.cpp::parsePlan::314] Error Code 1: Serialization (Serialization assertion "
    "plan->header.magicTag == rt::kPLAN_MAGIC_TAG failed.)",
    "memory": "1: [defaultAllocator.cpp::allocate::19] Error Code 1: Cuda Runtime (out of memory)",
    "profile": "3: [executionContext.cpp::setOptimizationProfileInternal::1328] Error Code 3: Internal Error "
    "(Profile 0 has been chosen by another IExecutionContext. Use another profileIndex or destroy the "
    "IExecutionContext that use this profile.)",
    "rtx gpu": "IRuntime::deserializeCudaEngine: Error Code 4: API Usage Error (This engine does not support "
    "this compute capability. In deserialize at /_src/runtime/runtime.cpp:12)",
}


def plan(
    *tensors: dict[str, Any],
    profile: tuple[int, int, int] = (1, 2, 4),
    profiles: int = 1,
    memory: int = 1000,
    fault: str = "",
    where: str = "",
) -> bytes:
    """where: "load", "context", "share" (of the profile) or "run" is where the fault shows."""
    body = {
        "tensors": tensors or (tensor("x"), tensor("y", of="x")),
        "profile": profile,
        "profiles": profiles,
        "memory": memory,
        "fault": fault,
        "where": where,
    }
    return b"ftrt" + json.dumps(body).encode()


def tensor(
    name: str,
    shape: tuple[int, ...] = (-1, 3, 2, 2),
    *,
    of: str = "",
    dtype: str = "FLOAT",
    layout: str = "LINEAR",
    location: str = "DEVICE",
) -> dict[str, Any]:
    """of: the input that an output doubles; an input has none."""
    return {"name": name, "shape": shape, "of": of, "dtype": dtype, "format": layout, "location": location}


def fake_tensorrt(version: str) -> ModuleType:
    """A module like TensorRT's of this version. said: the calls that matter to its caller, in order."""
    trt: Any = ModuleType("tensorrt")
    trt.__version__ = version
    trt.said = []
    trt.Runtime = type("Runtime", (_Runtime,), {"trt": trt})
    trt.ILogger = _ILogger
    for name, members in (
        ("TensorIOMode", ("INPUT", "OUTPUT")),
        ("TensorLocation", ("DEVICE", "HOST")),
        ("DataType", (*DTYPES, "INT4")),
        ("TensorFormat", (*PACKED, "CHW32")),
    ):
        setattr(trt, name, enum.Enum(name, [(member, member) for member in members]))
    old = version.startswith("8")
    engine, context = (_Engine8, _Context8) if old else (_Engine10, _Context10)
    trt.Engine, trt.Context = (
        type("Engine", (engine,), {"trt": trt}),
        type("Context", (context,), {"trt": trt}),
    )
    if not old:
        trt.ExecutionContextAllocationStrategy = enum.Enum("Strategy", ["STATIC", "USER_MANAGED"])
    return trt


class _ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class _Runtime:
    trt: Any

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.engine_host_code_allowed = False
        self.trt.last = self

    def deserialize_cuda_engine(self, data: Any) -> Any:
        self.trt.said.append("deserialize")
        content = bytes(data)
        self.logger.log(_ILogger.Severity.INFO, "Loaded engine size: 0 MiB")
        try:
            assert content[:4] == b"ftrt"
            body = json.loads(content[4:])
        except (AssertionError, ValueError):
            return self.logger.log(_ILogger.Severity.ERROR, FAULTS["damaged"])
        if body["where"] == "load":
            return self.logger.log(_ILogger.Severity.ERROR, FAULTS[body["fault"]])
        return self.trt.Engine(body, self.logger)


class _Engine:
    trt: Any

    def __init__(self, body: dict[str, Any], logger: Any) -> None:
        self.body, self.logger = body, logger
        self.tensors = {each["name"]: each for each in body["tensors"]}
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = body["profiles"]
        self.contexts = 0

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode("OUTPUT" if self.tensors[name]["of"] else "INPUT")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name]["shape"])

    def get_tensor_dtype(self, name: str) -> Any:
        return self.trt.DataType(self.tensors[name]["dtype"])

    def get_tensor_format(self, name: str) -> Any:
        return self.trt.TensorFormat(self.tensors[name]["format"])

    def get_tensor_location(self, name: str) -> Any:
        return self.trt.TensorLocation(self.tensors[name]["location"])

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        assert index == 0
        return [(batch, *self.tensors[name]["shape"][1:]) for batch in self.body["profile"]]

    def _context(self) -> Any:
        self.trt.said.append("context")
        if self.body["where"] == "context":
            return self.logger.log(_ILogger.Severity.ERROR, FAULTS[self.body["fault"]])
        self.contexts += 1
        return self.trt.Context(self)


class _Engine8(_Engine):
    @property
    def device_memory_size(self) -> int:
        return self.body["memory"]

    def create_execution_context_without_device_memory(self) -> Any:
        return self._context()


class _Engine10(_Engine):
    @property
    def device_memory_size_v2(self) -> int:
        return self.body["memory"]

    def create_execution_context(self, strategy: Any) -> Any:
        assert strategy.name == "USER_MANAGED"
        return self._context()


class _Context:
    trt: Any
    memory = 0

    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        # 8.6 gives the profile to the first context alone.
        first = engine.contexts == 1 or not self.trt.__version__.startswith("8")
        self.active_optimization_profile = 0 if first else -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        body = self.engine.body
        if body["where"] == "share":
            self.engine.logger.log(_ILogger.Severity.ERROR, FAULTS[body["fault"]])
            return False
        self.active_optimization_profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.trt.said.append("shape")
        assert self.active_optimization_profile == 0
        least, _, most = self.engine.body["profile"]
        self.shapes[name] = tuple(shape)
        return bool(least <= shape[0] <= most)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = self.engine.get_tensor_shape(name)
        if shape[:1] != (-1,):
            return shape
        batch = next(iter(self.shapes.values()))[0]
        return (batch, *shape[1:])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.trt.said.append("address")
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        self.trt.said.append("execute")
        engine = self.engine
        if engine.body["where"] == "run":
            engine.logger.log(_ILogger.Severity.ERROR, FAULTS[engine.body["fault"]])
            return False
        assert self.memory or not engine.body["memory"], "no device memory was given"
        ctypes.memset(self.memory, 0xAB, engine.body["memory"])
        for name, spec in engine.tensors.items():
            if spec["of"]:
                self._at(name).copy_(self._at(spec["of"]).double() * 2)
        return True

    def _at(self, name: str) -> Tensor:
        """What lies at the tensor's address, in its layout, seen as NCHW."""
        spec, shape = self.engine.tensors[name], self.get_tensor_shape(name)
        packed = PACKED[spec["format"]]
        stored = shape
        if packed:
            stored = (shape[0], *shape[2:], -(-shape[1] // packed) * packed)
        dtype, count = DTYPES[spec["dtype"]], torch.Size(stored).numel()
        held = (ctypes.c_char * (count * dtype.itemsize)).from_address(self.addresses[name])
        found = torch.frombuffer(held, dtype=dtype).reshape(stored)
        return found.permute(0, 3, 1, 2)[:, : shape[1]] if packed else found


class _Context8(_Context):
    @property
    def device_memory(self) -> int:
        return self.memory

    @device_memory.setter
    def device_memory(self, address: int) -> None:
        self.memory = address


class _Context10(_Context):
    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.body["memory"]
        self.memory = address
