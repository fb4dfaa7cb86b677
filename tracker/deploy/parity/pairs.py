"""Which layer of one network is which of another, however both are written. Layers are paired

    by weights     those of one kind and size whose weights point the same way, and only those: renaming,
                   folding, scaling and quantising leave that as it is
    by name        one name, kind and size of weights
    by place       what alone is of its kind between layers that are paired already

Names come second because exporters number their nodes, and numbers shift. Knows graphs; runs nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracker.deploy.islands import Array
from tracker.deploy.parity.layers import IMAGE, Layer, Layers

COMMUTATIVE = frozenset(("Add", "Mul", "Sum", "Min", "Max"))
ALIKE = 0.99  # least cosine between weights of one layer; INT8 weights per channel have 0.9999


@dataclass(frozen=True, slots=True)
class Pairing:
    """pairs: layer of A → layer of B, in A's order. how: how many were found by weights, name and place.
    alone: layers of A and of B without a counterpart.
    """

    pairs: Mapping[str, str]
    how: Mapping[str, int]
    alone: tuple[tuple[str, ...], tuple[str, ...]]


def pair_layers(a: Layers, b: Layers, outputs: Iterable[tuple[str, str]]) -> Pairing:
    """outputs: what the same output is called on both sides."""
    return _Pairing(a, b, list(outputs)).find()


class _Pairing:
    def __init__(self, a: Layers, b: Layers, outputs: list[tuple[str, str]]) -> None:
        self._a, self._b, self._outputs = a, b, outputs
        self._of_a: dict[str, str] = {}
        self._of_b: dict[str, str] = {}
        self._how: Counter[str] = Counter()

    def find(self) -> Pairing:
        self._by_weights()
        for weighted in (True, False):  # functions without weights are numbered, and numbers shift
            self._by_name(weighted)
            while self._by_place(forward=True) or self._by_place(forward=False):
                pass
        pairs = {name: self._of_a[name] for name in self._a.by_name if name in self._of_a}
        alone = (
            tuple(name for name in self._a.by_name if name not in self._of_a),
            tuple(name for name in self._b.by_name if name not in self._of_b),
        )
        return Pairing(pairs, dict(self._how), alone)

    def _pair(self, a: str, b: str, how: str) -> None:
        self._of_a[a], self._of_b[b] = b, a
        self._how[how] += 1

    def _by_weights(self) -> None:
        """Each other's nearest of one kind and shape, where nothing else is as near."""
        groups: dict[Any, tuple[list[Layer], list[Layer]]] = defaultdict(lambda: ([], []))
        for side, layers in enumerate((self._a, self._b)):
            for layer in layers.by_name.values():
                if layer.weight is not None and layer.weight.size > 1:
                    groups[layer.signature][side].append(layer)
        for ones, others in groups.values():
            if not ones or not others:
                continue
            cosine = _directions(ones) @ _directions(others).T  # (A, B)
            like = cosine >= ALIKE
            for row, column in np.argwhere(like):
                if like[row].sum() == like[:, column].sum() == 1:
                    self._pair(ones[row].name, others[column].name, "weights")

    def _by_name(self, weighted: bool) -> None:
        for name, layer in self._a.by_name.items():
            other = self._b.by_name.get(name)
            if other is None or name in self._of_a or name in self._of_b:
                continue
            if layer.signature == other.signature and weighted == (layer.weight is not None):
                self._pair(name, name, "name")

    def _by_place(self, *, forward: bool) -> bool:
        """Layers alone with their kind, shape and neighbours. Whether there were any."""
        ones = self._places(self._a, self._of_a, 0, forward)
        others = self._places(self._b, self._of_b, 1, forward)
        alone = [place for place in ones if len(ones[place]) == len(others.get(place, ())) == 1]
        new = [(ones[place][0], others[place][0]) for place in alone]
        for a, b in new:
            self._pair(a, b, "place")
        return bool(new)

    def _places(
        self, layers: Layers, paired: Mapping[str, str], side: int, forward: bool
    ) -> dict[Any, list[str]]:
        """Unpaired layers by where they are: told by what they read, or by who reads them."""
        readers: dict[str, list[str]] = defaultdict(list)
        for layer in layers.by_name.values():
            for source in layer.inputs:
                readers[source].append(layer.name)
        ends: dict[str, list[str]] = defaultdict(list)
        for number, names in enumerate(self._outputs):
            if names[side] in layers.outputs:
                ends[layers.outputs[names[side]]].append(f"output {number}")
        told: dict[str, Any] = {IMAGE: "image"}
        found: dict[Any, list[str]] = defaultdict(list)
        ordered = list(layers.by_name.values())
        for layer in ordered if forward else reversed(ordered):
            if layer.name in paired:
                told[layer.name] = ("pair", layer.name if side == 0 else paired[layer.name])
                continue
            around = layer.inputs if forward else readers[layer.name]
            parts = [hash(told.get(each)) for each in around]
            if not forward or layer.kind in COMMUTATIVE:
                parts.sort()
            place = (layer.signature, tuple(parts), () if forward else tuple(ends[layer.name]))
            told[layer.name] = hash(place)
            found[place].append(layer.name)
        return found


def _directions(layers: Sequence[Layer]) -> Array:
    """(L, everything) unit vectors; zeros stay zeros."""
    flat = np.stack([np.asarray(layer.weight, np.float64).ravel() for layer in layers])
    flat[~np.isfinite(flat)] = 0
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    unit: Array = (flat / np.maximum(norms, np.finfo(np.float64).tiny)).astype(np.float32)
    return unit
