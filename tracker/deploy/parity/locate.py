"""Where two networks part: the first layer beyond tolerance, and what is wrong with it.

Layers are paired (`pairs`), marked on both sides (`probe`) and bisected, from an output that
differs back towards the image, until a layer is beyond tolerance and all that it reads is within. That holds
whatever lies between; only which of several such layers is found depends on the way taken.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tracker.deploy.islands import Array
from tracker.deploy.parity.layers import IMAGE, Layer, Layers
from tracker.deploy.parity.pairs import Pairing, pair_layers
from tracker.deploy.parity.probe import Probe
from tracker.deploy.parity.tensors import Comparison, TensorParity, compare, explain
from tracker.frontends.fairmot import peak_scores

WEIGHTS_DIFFER = 0.03  # |a − b| / |a| of weights; INT8 per channel rounds by about 0.01
SHOWN = 6  # names in a message

Change = Callable[[Array], Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One output: its role, and what each side calls it. peaks: see `Comparison`.

    a_logits, b_logits: the side gives a heat map's logits where the other gives its peaks.
    """

    role: str
    a: str
    b: str
    peaks: bool = False
    a_logits: bool = False
    b_logits: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where an output's difference begins.

    layer: as A calls it, or None where every layer in front of the output is within tolerance and only the
    output itself differs. other: as B calls it. kind: ONNX's word. parity: of what it gives. reads: what it
    reads, by A's names, with their relative error. between: layers of A and of B alone, on the way to it.
    why: what else was found out, in words. outputs: those that led here.
    """

    layer: str | None
    other: str | None
    kind: str
    parity: TensorParity
    reads: dict[str, float]
    between: tuple[tuple[str, ...], tuple[str, ...]]
    why: tuple[str, ...]
    outputs: tuple[str, ...]

    def words(self) -> str:
        if self.layer is None:
            name = f"the output {', '.join(self.outputs)} itself; every layer before it is within tolerance"
        else:
            name = f"{self.kind} {self.layer}"
            if self.other not in (None, self.layer):
                name += f" (in B: {self.other})"
        read = f", reads {max(self.reads.values()):.2g}" if self.reads else ""
        error = f"gives a relative error of {self.parity.relative:.2g}{read}"
        return "; ".join((name, error, *self.why))


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What a search found. locations: in the order of A's layers. measured: layers looked at, of `paired`.

    how: what told the pairs. alone: how many layers of A and B have no counterpart.
    """

    locations: tuple[Location, ...]
    measured: int
    paired: int
    how: dict[str, int]
    alone: tuple[int, int]


def locate(
    a: Probe,
    b: Probe,
    outputs: Sequence[Output],
    tolerance: float,
    on_measured: Callable[[int], object] | None = None,
) -> Search:
    """The first layers beyond tolerance on the ways to these outputs. tolerance: as in TensorParity.relative.

    on_measured: told how many layers have been looked at. Raises EngineError where a side cannot run.
    """
    return _Search(a, b, outputs, tolerance, on_measured).run()


@dataclass(slots=True)
class _Point:
    """Something both sides have: a pair of layers, or an output."""

    name: str
    order: int
    a: str  # layers
    b: str
    tensors: tuple[str, str]
    output: Output | None = None
    parents: set[str] = field(default_factory=set)
    parity: TensorParity | None = None


class _Search:
    def __init__(
        self,
        a: Probe,
        b: Probe,
        outputs: Sequence[Output],
        tolerance: float,
        on_measured: Callable[[int], object] | None,
    ) -> None:
        self._a, self._b = a, b
        self._outputs = [
            each for each in outputs if each.a in a.layers.outputs and each.b in b.layers.outputs
        ]
        self._tolerance, self._on_measured = tolerance, on_measured
        self._pairing: Pairing = pair_layers(a.layers, b.layers, [(each.a, each.b) for each in self._outputs])
        self._incomparable: set[str] = set()
        self._points: dict[str, _Point] = {}
        self._measured = 0

    def run(self) -> Search:
        ends = self._make_points()
        self._measure(ends)
        found: dict[str, list[str]] = {}
        for name, role in ends.items():
            if self._is_bad(name):
                found.setdefault(self._first_bad(name), []).append(role)
        order = sorted(found, key=lambda name: self._points[name].order)
        return Search(
            locations=tuple(self._location(name, found[name]) for name in order),
            measured=self._measured,
            paired=len(self._pairing.pairs),
            how=dict(self._pairing.how),
            alone=(len(self._pairing.alone[0]), len(self._pairing.alone[1])),
        )

    def _make_points(self) -> dict[str, str]:
        """Points for pairs and outputs; returns the outputs' own, with their roles."""
        a, b = self._a.layers, self._b.layers
        for order, (one, other) in enumerate(self._pairing.pairs.items()):
            tensors = a.by_name[one].tensor, b.by_name[other].tensor
            self._points[one] = _Point(one, order, one, other, tensors)
        ends = {}
        for output in self._outputs:
            one, other = a.outputs[output.a], b.outputs[output.b]
            plain = not (output.a_logits or output.b_logits)
            if plain and self._pairing.pairs.get(one) == other:
                name = one
                self._points[name].output = output
            else:
                name = f"output {output.role}"
                tensors = a.by_name[one].tensor, b.by_name[other].tensor
                self._points[name] = _Point(name, len(self._points), one, other, tensors, output)
            ends[name] = output.role
        for point in self._points.values():
            point.parents = self._parents(point)
        return ends

    def _parents(self, point: _Point) -> set[str]:
        return self._around(point)[0]

    def _around(self, point: _Point) -> tuple[set[str], list[str], list[str]]:
        """The nearest points on the ways into this one, and what A and B have there alone."""
        back = {other: one for one, other in self._pairing.pairs.items()}
        itself = point.name not in self._pairing.pairs  # an output's layer may be a point of its own
        ones, alone = _nearest(self._a.layers, point.a, self._usable, itself)
        others, alone_too = _nearest(
            self._b.layers, point.b, lambda name: name in back and self._usable(back[name]), itself
        )
        return ones | {back[name] for name in others}, alone, alone_too

    def _usable(self, name: str) -> bool:
        return name in self._pairing.pairs and name not in self._incomparable

    def _ancestors(self, name: str) -> set[str]:
        found: set[str] = set()
        rest = [name]
        while rest:
            for parent in self._points[rest.pop()].parents:
                if parent not in found:
                    found.add(parent)
                    rest.append(parent)
        return found

    def _first_bad(self, start: str) -> str:
        bad, width = start, max(self._a.width, self._b.width)
        while True:
            suspects = self._ancestors(bad)
            while suspects:
                pivots = self._pivots(suspects, width)
                self._measure(pivots)
                for name in sorted(pivots, key=lambda each: self._points[each].order):
                    if self._is_bad(name):
                        bad = name
                        suspects &= self._ancestors(name)
                        break
                    suspects -= {name} | self._ancestors(name)
            # A good layer was taken to mean good ones before it: what this one reads is looked at itself.
            parents = self._settled_parents(bad)
            worse = [name for name in parents if self._is_bad(name)]
            if not worse:
                return bad
            bad = min(worse, key=lambda name: self._points[name].order)

    def _settled_parents(self, name: str) -> set[str]:
        """The parents, measured; those that cannot be compared give way to theirs."""
        while True:
            parents = self._points[name].parents
            self._measure(parents)
            if not parents & self._incomparable:
                return parents
            for point in self._points.values():
                if point.parents & self._incomparable:
                    point.parents = self._parents(point)

    def _pivots(self, suspects: Collection[str], width: int) -> list[str]:
        """Those that part the suspects into pieces of one size, in the order they are computed."""
        ordered = sorted(suspects, key=lambda name: self._points[name].order)
        places = np.linspace(0, len(ordered), width + 2)[1:-1].astype(int)
        return [ordered[place] for place in sorted(set(places.tolist()))]

    def _is_bad(self, name: str) -> bool:
        parity = self._points[name].parity
        return parity is not None and not parity.relative <= self._tolerance

    def _measure(self, names: Iterable[str]) -> None:
        """Fill in the parity of points that have none yet."""
        points = [self._points[name] for name in names if name not in self._incomparable]
        points = [point for point in points if point.parity is None]
        if not points:
            return
        ones = self._a.values({point.tensors[0] for point in points})
        others = self._b.values({point.tensors[1] for point in points})
        for point in points:
            a, b = self._changed(point, ones[point.tensors[0]], others[point.tensors[1]])
            point.parity = _parity(a, b, peaks=point.output is not None and point.output.peaks)
            if point.parity is None:
                self._incomparable.add(point.name)
            else:
                self._measured += 1
        if self._on_measured is not None:
            self._on_measured(self._measured)

    def _changed(
        self, point: _Point, a: Sequence[Array], b: Sequence[Array]
    ) -> tuple[list[Array], list[Array]]:
        output = point.output
        return (
            [_peaks(each) if output and output.a_logits else each for each in a],
            [_peaks(each) if output and output.b_logits else each for each in b],
        )

    def _location(self, name: str, roles: Sequence[str]) -> Location:
        point = self._points[name]
        assert point.parity is not None
        is_layer = name in self._pairing.pairs
        layer = self._a.layers.by_name[point.a]
        _, alone_a, alone_b = self._around(point)
        reads = {}
        for parent in sorted(point.parents, key=lambda each: self._points[each].order):
            parity = self._points[parent].parity
            if parity is not None:
                reads[parent] = parity.relative
        return Location(
            layer=name if is_layer else None,
            other=point.b if is_layer else None,
            kind=layer.kind if is_layer else "output",
            parity=point.parity,
            reads=reads,
            between=(tuple(alone_a), tuple(alone_b)),
            why=tuple(self._why(point, alone_a, alone_b)),
            outputs=tuple(roles),
        )

    def _why(self, point: _Point, alone_a: Sequence[str], alone_b: Sequence[str]) -> list[str]:
        a, b = self._a.layers.by_name[point.a], self._b.layers.by_name[point.b]
        why = []
        if point.name in self._pairing.pairs:
            why += _about_weights(a, b)
            why += self._about_reads(b)
        for side, layers, names in (("A", self._a.layers, alone_a), ("B", self._b.layers, alone_b)):
            if names:
                shown = ", ".join(f"{layers.by_name[each].kind} {each}" for each in names[:SHOWN])
                why.append(f"on the way there {side} alone has {shown}{', …' * (len(names) > SHOWN)}")
        ones = self._a.values({point.tensors[0]})[point.tensors[0]]
        others = self._b.values({point.tensors[1]})[point.tensors[1]]
        first, second = self._changed(point, ones[:1], others[:1])
        if first[0].shape == second[0].shape:
            words = explain(first[0], second[0])
            if words is not None:
                why.append(f"what it gives: {words}")
        return why

    def _about_reads(self, b: Layer) -> list[str]:
        """Whether what B's layer reads was spoilt on its way there, by being stored in fewer bits."""
        words = []
        for read, source in zip(b.reads, b.inputs, strict=True):
            given = self._b.layers.by_name[source].tensor if source != IMAGE else read
            if source == IMAGE or read == given:
                continue
            values = self._b.values({read, given})
            parity = _parity(values[given], values[read])
            if parity is not None and not parity.relative <= self._tolerance:
                words.append(
                    f"what it reads of {source} is stored with a relative error of {parity.relative:.2g}: "
                    "its range or its type is wrong"
                )
        return words


def _nearest(
    layers: Layers, start: str, usable: Callable[[str], bool], itself: bool
) -> tuple[set[str], list[str]]:
    """The usable layers that feed one, through others that are not; and those others.

    itself: the layer counts too, as the first of those that feed.
    """
    found: set[str] = set()
    through: list[str] = []
    seen = {start}
    rest = [start] if itself else list(layers.by_name[start].inputs)
    while rest:
        name = rest.pop()
        if name == IMAGE or (name in seen and name != start):
            continue
        seen.add(name)
        if usable(name):
            found.add(name)
        else:
            through.append(name)
            rest += layers.by_name[name].inputs
    return found, through[::-1]


def _about_weights(a: Layer, b: Layer) -> list[str]:
    if a.weight is None or b.weight is None or a.weight.size != b.weight.size:
        return []
    theirs = b.weight.reshape(a.weight.shape)
    parity = compare(a.weight, theirs)
    if parity.relative <= WEIGHTS_DIFFER:
        return []
    told = explain(a.weight, theirs, axis=0) or explain(a.weight, theirs, axis=1)
    size = f"its weights differ by {parity.relative:.2g}, relatively"
    return [f"{size}: {told}" if told else size]


def _parity(a: Sequence[Array], b: Sequence[Array], *, peaks: bool = False) -> TensorParity | None:
    """None for what cannot be compared: other shapes, integers, truth values."""
    comparison = Comparison(peaks=peaks)
    for one, other in zip(a, b, strict=True):
        floating = np.issubdtype(one.dtype, np.floating) and np.issubdtype(other.dtype, np.floating)
        if one.shape != other.shape or not floating:
            return None
        comparison.add(one, other)
    return comparison.result()


def _peaks(logits: Array) -> Array:
    array: Array = peak_scores(torch.from_numpy(logits)).numpy()
    return array
