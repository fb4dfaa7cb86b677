"""Weights from files into networks, without ever running what is in the file.

Reads what `torch.save` and safetensors write. A file that holds more than tensors and plain values, such as
a pickle with code in it, is refused. Knows what a checkpoint may look like; which network it is for, its
caller says, but for `load_fairmot`.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import pickle
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tracker.errors import CheckpointError, ConfigError
from tracker.models.fairmot import FairMOT, FairMOTConfig

State = dict[str, Tensor]

# In the published checkpoints, and used by nothing: ImageNet's classifier, and in two trees a projection
# whose result is thrown away.
FAIRMOT_UNUSED = re.compile(r"base\.(fc|level[34]\.project)\.")
SHOWN = 3  # names of parameters in a message


def read_checkpoint(path: Path) -> tuple[State, dict[str, Any]]:
    """The tensors by name, prefix `module.` taken off, and what the file says about its network.

    Takes {'state_dict': …, 'epoch': …}, {'model': …} or the tensors alone, and Paddle's .pdparams. What is
    said is the dict under 'config', as `tools/train.py` writes it; safetensors keep it as JSON in their
    metadata. Raises CheckpointError.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is {'a directory' if path.is_dir() else 'missing'}: name a checkpoint")
    if path.suffix == ".safetensors":
        state, about = _guarded(_read_safetensors, path)
    elif path.suffix == ".pdparams":
        state, about = _guarded(_read_paddle, path)
    else:
        state, about = _guarded(_read_torch, path)
    named = isinstance(state, Mapping) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    )
    if not named or not state:
        raise CheckpointError(
            f"{path} holds no tensors by name: save it as {{'state_dict': model.state_dict()}}, or that alone"
        )
    return {key.removeprefix("module."): value for key, value in state.items()}, about


def load_state(model: nn.Module, state: State, path: Path, *, network: str, unused: re.Pattern[str]) -> None:
    """Copy the tensors into the model; CheckpointError, listing what differs, unless they are its own.

    path, network: for the message. unused: names at whose start it matches may be there too, and are left.
    """
    wanted = model.state_dict()
    counters = {key for key in wanted if key.endswith(".num_batches_tracked")}  # older torch kept none
    missing = sorted(wanted.keys() - state.keys() - counters)
    unknown = sorted(key for key in state.keys() - wanted.keys() if not unused.match(key))
    shapes = sorted(
        f"{key} {_shape(state[key])} for {_shape(wanted[key])}"
        for key in wanted.keys() & state.keys()
        if state[key].shape != wanted[key].shape
    )
    if missing or unknown or shapes:
        differences = [
            f"{len(names)} {what} ({', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''})"
            for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
            if names
        ]
        raise CheckpointError(
            f"{path} is no checkpoint of {network}: of its {len(wanted) - len(counters)} tensors "
            f"{'; '.join(differences)}"
        )
    broken = [key for key in wanted if key in state and not state[key].isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{path} holds NaN or inf in {', '.join(broken[:SHOWN])}: its training diverged"
        )
    model.load_state_dict({key: state.get(key, value) for key, value in wanted.items()})


def load_fairmot(path: Path, config: FairMOTConfig | None = None) -> FairMOT:
    """FairMOT with the weights in a checkpoint, in evaluation mode.

    config: what the network is like; None takes what the checkpoint says, or, where it says nothing, the
    published DLA-34, its heads as wide as the tensors are. Raises CheckpointError.
    """
    state, about = read_checkpoint(path)
    if config is None:
        try:
            config = _published(state) if not about else FairMOTConfig(**_tuples(about))
        except (TypeError, ConfigError) as error:
            raise CheckpointError(f"{path} describes no network of ours: {error}") from error
    model = FairMOT(config)
    size = f"width {config.width:g}, embedding {config.embedding}"
    load_state(model, state, path, network=f"FairMOT DLA-34 ({size})", unused=FAIRMOT_UNUSED)
    return model.eval()


def save_fairmot(model: FairMOT, path: Path, *, epoch: int) -> None:
    """Write a checkpoint that `load_fairmot` reads without being told anything."""
    config = dataclasses.asdict(model.config)
    torch.save({"epoch": epoch, "state_dict": model.state_dict(), "config": config}, path)


def _published(state: State) -> FairMOTConfig:
    """The official configuration with the heads of these tensors."""
    default = FairMOTConfig()

    def rows(key: str, otherwise: int) -> int:
        return len(state[key]) if key in state and state[key].ndim else otherwise

    box = rows("wh.2.weight", default.box)
    return FairMOTConfig(
        classes=rows("hm.2.weight", default.classes),
        embedding=rows("id.2.weight", default.embedding),
        box=box if box in (2, 4) else default.box,
        head_channels=rows("hm.0.weight", default.head_channels),
    )


def _guarded(read: Callable[[Path], Any], path: Path) -> Any:
    """What `read` answers, or CheckpointError with its reason: what a damaged file raises has no limits."""
    try:
        return read(path)
    except CheckpointError:
        raise
    except Exception as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and asked:
            raise CheckpointError(
                f"{path} asks for {asked[1]}, which weights have no need of; nothing in it was run. If you "
                "trust where it comes from, save its state_dict alone and use that"
            ) from error
        reason = " ".join(str(error).split()).split(". ")[0]
        wordy = " " in reason and not isinstance(error, pickle.UnpicklingError)  # whose words are advice
        raise CheckpointError(
            f"{path} is no checkpoint or is cut short{f' ({reason})' if wordy else ''}; nothing in it was "
            "run: copy or save it again"
        ) from error


def _read_torch(path: Path) -> tuple[Any, dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the pickle protocol of files that then fail anyway
        raw = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(raw, Mapping):
        return raw, {}
    about = raw.get("config", {})
    return raw.get("state_dict", raw.get("model", raw)), about if isinstance(about, dict) else {}


class _ArraysOnly(pickle.Unpickler):
    """Takes what NumPy arrays are made of and refuses to look up anything else."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "numpy.dtype": np.dtype,
            "numpy.ndarray": np.ndarray,
            "numpy.multiarray._reconstruct": np.empty(0).__reduce__()[0],
            "_codecs.encode": codecs.encode,
        }
        key = re.sub(r"^numpy\._?core\.", "numpy.", f"{module}.{name}")  # moved in NumPy 2
        if key not in known:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return known[key]


def _read_paddle(path: Path) -> tuple[Any, dict[str, Any]]:
    """`paddle.save` of a state dict: a pickle of arrays by name, and what Paddle calls them itself."""
    with path.open("rb") as file:
        raw = _ArraysOnly(file).load()
    if not isinstance(raw, Mapping):
        return raw, {}
    return {
        key: torch.from_numpy(value.copy()) for key, value in raw.items() if isinstance(value, np.ndarray)
    }, {}


def _read_safetensors(path: Path) -> tuple[Any, dict[str, Any]]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise CheckpointError(f"{path} needs the package safetensors: pip install safetensors") from error
    with safe_open(path, framework="pt") as file:
        about = (file.metadata() or {}).get("config")
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(about) if about else {}  # noqa: SIM118


def _tuples(about: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, Sequence) else value for key, value in about.items()}


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "()"
