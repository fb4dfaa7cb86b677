"""FairMOT: heads become objects in source pixels, and outputs that are not FairMOT's are refused.

A fake engine answers chosen heads, so that every expected box can be worked out by hand. Its input is 96×64,
so 24×16 cells of 4 pixels. Golden rows are what the official `mot_decode` and `ctdet_post_process` answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tracker import boxes
from tracker.errors import ConfigError, DetectionsError, EngineError
from tracker.frontends.fairmot import Fairmot, FairmotConfig, decode, peak_scores
from tracker.manifest import Manifest
from tracker.types import Detections, Frame, Image

WIDTH, HEIGHT = 96, 64
COLUMNS, ROWS = 24, 16
NOTHING = -9.0  # logit of a cell without object
Shape = tuple[int | None, ...]
Heads = dict[str, Tensor]


def quiet(classes: int = 1, *, box: int = 4, embedding: int = 3, batch: int = 1) -> Heads:
    """Heads of images without objects."""
    cells = (ROWS, COLUMNS)
    return {
        "hm": torch.full((batch, classes, *cells), NOTHING),
        "wh": torch.ones(batch, box, *cells),
        "reg": torch.zeros(batch, 2, *cells),
        "id": torch.ones(batch, embedding, *cells),
    }


def with_object(
    heads: Heads,
    cell: tuple[int, int],
    *,
    score: float = 0.9,
    label: int = 0,
    sides: Sequence[float] = (1, 2, 1, 2),
    shift: tuple[float, float] = (0.0, 0.0),
    looks: Sequence[float] = (3, 0, 4),
    image: int = 0,
) -> Heads:
    """An object at cell (column, row), its sides and shift in cells."""
    column, row = cell
    heads["hm"][image, label, row, column] = float(np.log(score / (1 - score)))
    heads["wh"][image, :, row, column] = torch.tensor(sides, dtype=torch.float32)
    heads["reg"][image, :, row, column] = torch.tensor(shift)
    heads["id"][image, :, row, column] = torch.tensor(looks, dtype=torch.float32)
    return heads


class FakeRuntime:
    """Answers nothing to the run at the opening, afterwards the heads; remembers what it was fed."""

    description, lanes, device = "fake", 1, torch.device("cpu")

    def __init__(self, heads: Heads, *, batch: int | None = 1, opening: Heads | None = None) -> None:
        classes, box = heads.get("hm", heads.get("peaks")).shape[1], heads["wh"].shape[1]
        self.inputs: Mapping[str, Shape] = {"images": (batch, 3, HEIGHT, WIDTH)}
        self.outputs: Mapping[str, Shape] = {name: (batch, *head.shape[1:]) for name, head in heads.items()}
        first = quiet(classes, box=box, batch=len(heads["wh"]))
        if "peaks" in heads:
            first["peaks"] = torch.sigmoid(first.pop("hm"))
        self.answers = [opening or first, heads]
        self.fed: list[Tensor] = []

    def run(self, inputs: Mapping[str, Tensor]) -> Heads:
        self.fed.append(inputs["images"].clone())
        answer = self.answers[0] if len(self.fed) == 1 else self.answers[1]
        return {name: head[: len(inputs["images"])].clone() for name, head in answer.items()}


def manifest(runtime: FakeRuntime, names: tuple[str, ...] = ("person",), **changes: Any) -> Manifest:
    described = Fairmot.describe(runtime, onnx_sha256="0" * 64, names=names)
    return dataclasses.replace(described, **changes)


def frame(size: tuple[int, int] = (WIDTH, HEIGHT), shade: int = 0) -> Frame:
    image = Image(format="bgr", planes=(np.full((size[1], size[0], 3), shade, np.uint8),))
    return Frame(index=0, pts_seconds=0.0, size=size, image=image)


def detect(
    heads: Heads,
    *,
    sizes: Sequence[tuple[int, int]] = ((WIDTH, HEIGHT),),
    names: tuple[str, ...] = ("person",),
    batch: int | None = 1,
    **config: Any,
) -> list[Detections]:
    runtime = FakeRuntime(heads, batch=batch)
    opened = Fairmot(runtime, manifest(runtime, names), FairmotConfig(**config))
    try:
        return opened.submit([frame(size) for size in sizes]).result()
    finally:
        opened.close()


class TestDecoding:
    def test_a_box_in_the_pixels_of_its_source(self) -> None:
        """A 100×50 frame fills 96×48 of the input, 8 rows from the top."""
        heads = with_object(quiet(), (10, 8), sides=(2, 3, 4, 5), shift=(0.5, 0.25))
        (found,) = detect(heads, sizes=[(100, 50)])
        cells = np.array([10.5 - 2, 8.25 - 3, 10.5 + 4, 8.25 + 5])
        np.testing.assert_allclose(found.xyxy, [(cells * 4 - (0, 8, 0, 8)) * 100 / 96], rtol=1e-6)
        np.testing.assert_allclose(found.score, [0.9], rtol=1e-6)
        np.testing.assert_allclose(found.embedding, [(0.6, 0, 0.8)], rtol=1e-6)
        assert found.label.tolist() == [0]

    def test_width_and_height_of_older_networks(self) -> None:
        (found,) = detect(with_object(quiet(box=2), (10, 8), sides=(4, 6)))
        np.testing.assert_allclose(found.xyxy, [(32, 20, 48, 44)])

    def test_nothing_found(self) -> None:
        (found,) = detect(quiet())
        assert found.xyxy.shape == (0, 4)
        assert found.embedding.shape == (0, 3)

    def test_only_peaks_count(self) -> None:
        """A weaker neighbour, diagonal or straight, is the same object; two cells away is another."""
        heads = quiet()
        for cell, score in (((5, 5), 0.9), ((6, 5), 0.8), ((6, 6), 0.7), ((8, 5), 0.6), ((23, 15), 0.5)):
            with_object(heads, cell, score=score)
        (found,) = detect(heads)
        np.testing.assert_allclose(found.score, [0.9, 0.6, 0.5], rtol=1e-6)  # strongest first

    def test_classes_peak_each_by_itself(self) -> None:
        heads = with_object(quiet(2), (5, 5), score=0.9, label=0)
        with_object(heads, (6, 5), score=0.8, label=1)
        (found,) = detect(heads, names=("person", "car"))
        assert found.label.tolist() == [0, 1]

    @pytest.mark.parametrize(
        ("config", "labels"),
        [
            ({}, [2, 1, 0]),
            ({"classes": ("car",)}, [1]),
            ({"classes": ("dog", "person")}, [2, 0]),
            ({"conf": 0.55}, [2, 1]),
            ({"conf": 0.95}, []),
            ({"top_k": 1}, [2]),
            ({"top_k": 1, "classes": ("person", "car")}, [1]),  # others do not use up the places
            ({"top_k": 10_000}, [2, 1, 0]),  # more than there are cells
        ],
        ids=str,
    )
    def test_what_is_asked_for(self, config: dict[str, Any], labels: list[int]) -> None:
        heads = quiet(3)
        for label, score in enumerate((0.5, 0.6, 0.7)):
            with_object(heads, (5 * label + 3, 5), score=score, label=label)
        (found,) = detect(heads, names=("person", "car", "dog"), **config)
        assert found.label.tolist() == labels

    def test_peaks_found_in_the_engine_are_the_same(self) -> None:
        raw = wave_heads()
        inside = {**raw, "peaks": peak_scores(raw["hm"])}
        del inside["hm"]
        (here,), (there,) = detect(raw, conf=0.4), detect(inside, conf=0.4)
        for field in ("xyxy", "score", "label", "embedding"):
            np.testing.assert_array_equal(getattr(here, field), getattr(there, field))

    @pytest.mark.parametrize("batch", [3, None], ids=["fixed", "open"])
    def test_batches_of_different_frames(self, batch: int | None) -> None:
        heads = quiet(batch=3)
        for image in range(2):
            with_object(heads, (10 + image, 8), image=image, looks=(image, 1, 0))
        found = detect(heads, sizes=[(96, 64), (192, 128)], batch=batch)
        np.testing.assert_allclose(found[0].xyxy, [(36, 24, 44, 40)], rtol=1e-6)
        np.testing.assert_allclose(found[1].xyxy, [(80, 48, 96, 80)], rtol=1e-6)
        np.testing.assert_allclose(found[1].embedding, [(0.5**0.5, 0.5**0.5, 0)], rtol=1e-6)

    def test_half_precision_places_boxes_in_single(self) -> None:
        heads = with_object(quiet(), (21, 13), sides=(0.1, 0.1, 0.1, 0.1), shift=(0.3, 0.3))
        (found,) = detect({name: head.half() for name, head in heads.items()})
        np.testing.assert_allclose(found.xyxy, [(84.8, 52.8, 85.6, 53.6)], atol=2e-3)  # FP16 steps: 0.06

    def test_an_object_without_looks_is_no_number_apart(self) -> None:
        (found,) = detect(with_object(quiet(), (10, 8), looks=(0, 0, 0)))
        np.testing.assert_array_equal(found.embedding, [(0, 0, 0)])

    def test_boxes_turned_inside_out_are_no_objects(self) -> None:
        heads = with_object(quiet(), (10, 8), sides=(1, 1, -2, 1))
        assert len(detect(heads)[0]) == 0
        assert len(detect(heads, official_transform=True)[0]) == 1  # where they take part in everything

    def test_boxes_may_leave_the_image(self) -> None:
        (found,) = detect(with_object(quiet(), (0, 0), sides=(3, 3, 1, 1)))
        np.testing.assert_allclose(found.xyxy, [(-12, -12, 4, 4)])

    def test_shapes_do_not_depend_on_what_is_seen(self) -> None:
        for heads in (quiet(2), with_object(quiet(2), (3, 3))):
            rows = decode(peak_scores(heads["hm"]), heads["wh"], heads["reg"], heads["id"], limit=50)
            assert rows.shape == (1, 50, 6 + 3)


def wave_heads() -> Heads:
    """Heads full of peaks, the same on every machine."""

    def wave(channels: int, step: float) -> Tensor:
        c, y, x = torch.meshgrid(*map(torch.arange, (channels, ROWS, COLUMNS)), indexing="ij")
        return torch.sin(step * (c * 7.0 + y * 3.1 + x * 1.7).double() + 0.05 * (x * y).double()).float()[
            None
        ]

    return {
        "hm": wave(1, 0.9) * 4 - 1.2,
        "wh": wave(4, 0.37) * 3 + 4,
        "reg": wave(2, 0.71) * 0.5 + 0.5,
        "id": wave(8, 0.53),
    }


class TestOfficialTransform:
    @pytest.mark.parametrize(
        ("size", "golden"),
        [
            ((640, 481), {
                0: (297.5042, 338.9156, 597.8701, 602.5698, 0.942676, -0.0255, -0.2734),
                1: (-150.2521, 171.1421, 235.3608, 261.6266, 0.942631, -0.1711, -0.147),
                3: (609.8138, 163.4320, 845.5695, 327.5055, 0.942537, 0.4702, -0.3161),
                60: (-230.3226, 204.1039, 153.0366, 352.5370, 0.788607, -0.4519, 0.2462),
            }),
            ((333, 777), {
                0: (130.1607, 547.4790, 615.3671, 973.3821, 0.942676, -0.0255, -0.2734),
                1: (-593.1380, 276.4603, 29.7751, 422.6277, 0.942631, -0.1711, -0.147),
                60: (-722.4827, 329.7063, -103.2101, 569.4828, 0.788607, -0.4519, 0.2462),
            }),
        ],
        ids=["wide", "tall"],
    )  # fmt: skip
    def test_golden(self, size: tuple[int, int], golden: dict[int, tuple[float, ...]]) -> None:
        (found,) = detect(wave_heads(), sizes=[size], conf=0.4, official_transform=True)
        assert len(found) == 61
        rows = np.column_stack((found.xyxy, found.score, found.embedding[:, :2]))
        np.testing.assert_allclose(rows[list(golden)], list(golden.values()), atol=1e-4)

    def test_ours_inverts_the_letterbox_instead(self) -> None:
        """641×481 is resized to 85×64, not to 85.3×64: 0.4 % wider boxes than the official ones."""
        heads, size = wave_heads(), (641, 481)
        (official,) = detect(heads, sizes=[size], conf=0.4, official_transform=True)
        (ours,) = detect(heads, sizes=[size], conf=0.4)
        fit = boxes.fit_center(size, (WIDTH, HEIGHT))
        assert (fit.resized, fit.offset) == ((85, 64), (5, 0))
        wide = np.diff(ours.xyxy[:, ::2]) / np.diff(official.xyxy[:, ::2])
        np.testing.assert_allclose(wide, (641 / 85) / (481 * 96 / 64 / 96), rtol=1e-4)
        tall = np.diff(ours.xyxy[:, 1::2]) / np.diff(official.xyxy[:, 1::2])
        np.testing.assert_allclose(tall, 1, rtol=1e-4)


class TestPixels:
    def test_rgb_from_0_to_1_on_grey(self) -> None:
        """As the official letterbox: the middle of the input, 128 of 255 around (OpenCV rounds its 127.5)."""
        runtime = FakeRuntime(quiet())
        opened = Fairmot(runtime, manifest(runtime))
        image = np.zeros((32, 96, 3), np.uint8)
        image[:] = (10, 20, 30)  # blue, green, red
        shot = Frame(index=0, pts_seconds=0.0, size=(96, 32), image=Image(format="bgr", planes=(image,)))
        opened.submit([shot]).result()
        opened.close()
        fed = runtime.fed[-1][0]
        np.testing.assert_allclose(fed[:, 16:48], np.broadcast_to(np.reshape([30, 20, 10], (3, 1, 1)) / 255,
                                                                  (3, 32, 96)), rtol=1e-6)  # fmt: skip
        np.testing.assert_allclose(fed[:, :16], 128 / 255, rtol=1e-6)
        np.testing.assert_allclose(fed[:, 48:], 128 / 255, rtol=1e-6)


class TestRefusals:
    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (lambda h: h["hm"].fill_(torch.nan), "answers NaN or inf"),
            (lambda h: h["hm"][..., 3].fill_(torch.nan), "answers NaN or inf"),
            (lambda h: with_object(h, (4, 4), sides=(1, 1, 1, torch.inf)), "xyxy of detection 0"),
            (lambda h: with_object(h, (4, 4), looks=(torch.nan, 1, 1)), "embedding of detection 0"),
        ],
        ids=["all NaN", "some NaN", "endless box", "no looks"],
    )
    def test_numbers_that_are_none(self, spoil: Any, words: str) -> None:
        heads = quiet()
        spoil(heads)
        with pytest.raises((EngineError, DetectionsError), match=words):
            detect(heads)

    @pytest.mark.parametrize(
        ("opening", "words"),
        [
            (
                {"wh": torch.ones(1, 3, 16, 24)},
                r"output wh has shape \(1, 3, 16, 24\); .* \(1, 4 or 2, 16, 24\)",
            ),
            ({"reg": torch.ones(1, 2, 8, 12)}, r"output reg has shape \(1, 2, 8, 12\); .* 96×64 input"),
            (
                {"hm": torch.ones(1, 80, 16, 24)},
                r"1 class names, it has \(1, 1, 16, 24\): correct the size or",
            ),
            ({"id": torch.ones(1, 8)}, r"output id has shape \(1, 8\)"),
            ({"id": torch.full((1, 8, 16, 24), torch.inf)}, "answers NaN or inf"),
            ({"hm": torch.full((1, 1, 16, 24), 0.1)}, "is declared hm, but .* 0.1 to 0.1 look like peaks"),
        ],
        ids=["wh", "stride", "classes", "flat", "inf", "scores"],
    )
    def test_engines_that_do_not_fit(self, opening: Heads, words: str) -> None:
        runtime = FakeRuntime(quiet(), opening={**quiet(), **opening})
        with pytest.raises(EngineError, match=words):
            Fairmot(runtime, manifest(runtime))

    def test_logits_declared_peaks(self) -> None:
        runtime = FakeRuntime(quiet())
        wrong = manifest(runtime, outputs={"peaks": "hm", "wh": "wh", "reg": "reg", "id": "id"})
        with pytest.raises(
            EngineError, match=r"output hm is declared peaks, but .* look like hm: declare it hm"
        ):
            Fairmot(runtime, wrong)

    @pytest.mark.parametrize(
        ("outputs", "error", "words"),
        [
            ({"hm": "hm", "wh": "wh"}, ConfigError, "hm or peaks, and wh, reg, id; the manifest has hm, wh"),
            ({"undecoded": "hm"}, ConfigError, "the manifest has undecoded"),
            ({"hm": "hm", "peaks": "hm", "wh": "wh", "reg": "reg", "id": "id"}, ConfigError, "hm or peaks"),
            (
                {"hm": "heat", "wh": "wh", "reg": "reg", "id": "id"},
                EngineError,
                "no output heat, only hm, wh",
            ),
        ],
        ids=str,
    )
    def test_manifests_of_something_else(
        self, outputs: dict[str, str], error: type[Exception], words: str
    ) -> None:
        runtime = FakeRuntime(quiet())
        with pytest.raises(error, match=words):
            Fairmot(runtime, manifest(runtime, outputs=outputs))

    def test_an_unknown_class(self) -> None:
        runtime = FakeRuntime(quiet())
        with pytest.raises(ConfigError, match="no class 'persn' among the engine's 1; near it: person"):
            Fairmot(runtime, manifest(runtime), FairmotConfig(classes=("persn",)))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"conf": 0}, "conf is 0; it must be above 0 and at most 1"),
            ({"top_k": 0}, "top_k is 0; it must be at least 1"),
            ({"max_batch": 0}, "max_batch is 0"),
        ],
        ids=str,
    )
    def test_impossible_settings(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            FairmotConfig(**options)

    def test_an_engine_with_other_outputs_cannot_be_described(self) -> None:
        runtime = FakeRuntime(quiet())
        runtime.outputs = {"output": (1, 84, 8)}
        with pytest.raises(
            EngineError, match=r"outputs hm \(or peaks\), wh, reg and id; this one .* gives output"
        ):
            manifest(runtime)

    @pytest.mark.parametrize("count", [0, 2])
    def test_frames_at_once(self, count: int) -> None:
        with pytest.raises(EngineError, match=f"{count} frames submitted; this engine takes 1 to 1 at once"):
            detect(quiet(), sizes=[(96, 64)] * count)
