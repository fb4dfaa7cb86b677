"""FairMOT as a network: its deformable convolution, its published layout, and weights from any file."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from onnx import TensorProto, helper
from torch import Tensor, nn

from tracker.errors import CheckpointError, ConfigError
from tracker.models.checkpoint import FAIRMOT_UNUSED, load_fairmot, save_fairmot
from tracker.models.deform import DeformConv, deform_conv2d
from tracker.models.fairmot import FairMOT, FairMOTConfig, random_fairmot

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = FairMOTConfig(width=0.25, head_channels=8, embedding=16)


def operands(
    *, batch: int = 2, inputs: int = 3, outputs: int = 4, size: tuple[int, int] = (5, 7), reach: float = 2.0
) -> tuple[Tensor, ...]:
    """Images, offset, mask, weight and bias; offsets of some pixels, so that many samples lie outside."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    images, offset = noise(batch, inputs, *size), noise(batch, 18, *size) * reach
    mask = noise(batch, 9, *size).sigmoid()
    return images, offset, mask, noise(outputs, inputs, 3, 3), noise(outputs)


def loop(images: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> np.ndarray:
    """The definition, in float64, one sample at a time (Zhu et al. 2019, eq. 1; bilinear, 0 outside)."""
    x, shift, factor, w, b = (each.double().numpy() for each in (images, offset, mask, weight, bias))
    batch, _, height, width = x.shape
    answer = np.tile(b[None, :, None, None], (batch, 1, height, width))
    for n, i, j, tap in np.ndindex(batch, height, width, 9):
        y = i + tap // 3 - 1 + shift[n, 2 * tap, i, j]
        z = j + tap % 3 - 1 + shift[n, 2 * tap + 1, i, j]
        top, left = int(np.floor(y)), int(np.floor(z))
        for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
            if 0 <= row < height and 0 <= column < width:
                share = (1 - abs(y - row)) * (1 - abs(z - column)) * factor[n, tap, i, j]
                answer[n, :, i, j] += w[:, :, tap // 3, tap % 3] @ x[n, :, row, column] * share
    return answer


class TestDeformableConvolution:
    @pytest.mark.parametrize("size", [(5, 7), (1, 1), (1, 6), (9, 2)], ids=str)
    def test_is_its_definition(self, size: tuple[int, int]) -> None:
        given = operands(size=size)
        np.testing.assert_allclose(deform_conv2d(*given), loop(*given), rtol=1e-5, atol=2e-5)

    @pytest.mark.parametrize("size", [(5, 7), (24, 40)], ids=str)
    def test_is_onnx_deform_conv(self, size: tuple[int, int]) -> None:
        given = operands(size=size, inputs=8, outputs=6)
        names = ("x", "offset", "mask", "weight", "bias")
        node = helper.make_node(
            "DeformConv", ["x", "weight", "offset", "bias", "mask"], ["y"], kernel_shape=(3, 3), pads=(1,) * 4
        )
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (*names, "y")]
        graph = helper.make_graph([node], "graph", values[:-1], values[-1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (answer,) = session.run(None, {name: each.numpy() for name, each in zip(names, given, strict=True)})
        np.testing.assert_allclose(deform_conv2d(*given), answer, rtol=1e-4, atol=1e-4)

    def test_without_shifts_is_a_convolution(self) -> None:
        images, offset, mask, weight, bias = operands()
        answer = deform_conv2d(images, torch.zeros_like(offset), torch.ones_like(mask), weight, bias)
        torch.testing.assert_close(answer, F.conv2d(images, weight, bias, padding=1), rtol=1e-5, atol=1e-5)

    def test_gradients_are_its_differences(self) -> None:
        given = tuple(
            each.double().requires_grad_() for each in operands(batch=1, inputs=1, outputs=2, size=(2, 3))
        )
        assert torch.autograd.gradcheck(deform_conv2d, given)

    def test_trains_as_it_infers(self) -> None:
        """In training it samples again in the backward pass; neither answers nor gradients may show that."""
        torch.manual_seed(0)
        layer, images = DeformConv(3, 4), torch.randn(2, 3, 6, 5, requires_grad=True)
        with torch.no_grad():
            layer.conv_offset_mask.weight.normal_(std=0.3)
            inferred = layer(images)
        trained = layer(images)
        torch.testing.assert_close(trained, inferred)
        shifts = layer.conv_offset_mask(images)
        direct = deform_conv2d(images, shifts[:, :18], shifts[:, 18:].sigmoid(), layer.weight, layer.bias)
        for once, again in zip(*(torch.autograd.grad(each.square().sum(), [images, *layer.parameters()])
                                 for each in (trained, direct)), strict=True):  # fmt: skip
            torch.testing.assert_close(once, again)

    def test_half_precision_keeps_coordinates(self) -> None:
        """Whole shifts near column 1000, where FP16 could not tell neighbours apart, read exact pixels."""
        images = torch.arange(1030.0).repeat(1, 1, 3, 1).half() / 1024
        offset = torch.zeros(1, 18, 3, 1030, dtype=torch.half)
        offset[:, 9] = 1.0  # the middle tap, one to the right
        mask = torch.ones(1, 9, 3, 1030, dtype=torch.half)
        weight = torch.zeros(1, 1, 3, 3, dtype=torch.half)
        weight[..., 1, 1] = 1.0
        answer = deform_conv2d(images, offset, mask, weight, torch.zeros(1, dtype=torch.half))
        torch.testing.assert_close(answer[..., 1:-2], images[..., 2:-1])


class TestNetwork:
    def test_has_the_official_layout(self) -> None:
        """Names and shapes of all 390 tensors of the official `dla_34`, but for those it never uses."""
        lines = sorted(f"{key} {tuple(value.shape)}" for key, value in FairMOT().state_dict().items())
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        assert (len(lines), digest) == (
            390,
            "939ef01edafa3c072c906f6bd140b2583c22ec36bc3fb82c34fcfa75cb51b8cf",
        )

    @pytest.mark.parametrize(
        ("config", "channels"),
        [
            ({}, {"hm": 1, "wh": 4, "reg": 2, "id": 16}),
            ({"classes": 3, "box": 2}, {"hm": 3, "wh": 2, "reg": 2, "id": 16}),
            ({"deformable": False, "stem_stride": 2}, {"hm": 1, "wh": 4, "reg": 2, "id": 16}),
            ({"levels": (1, 2, 1, 1, 1, 1), "max_channels": 32}, {"hm": 1, "wh": 4, "reg": 2, "id": 16}),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("size", [(32, 32), (64, 96)], ids=str)
    def test_heads_are_a_quarter_of_the_image(
        self, config: dict[str, Any], channels: dict[str, int], size: tuple[int, int]
    ) -> None:
        model = FairMOT(
            FairMOTConfig(**{"width": 0.25, "head_channels": 8, "embedding": 16, **config})
        ).eval()
        with torch.no_grad():
            heads = model(torch.rand(2, 3, *size))
        cells = (size[0] // 4, size[1] // 4)
        assert {name: tuple(head.shape) for name, head in heads.items()} == {
            name: (2, count, *cells) for name, count in channels.items()
        }

    def test_begins_with_every_score_at_a_tenth(self) -> None:
        torch.manual_seed(0)
        with torch.no_grad():
            scores = FairMOT(SMALL).eval()(torch.zeros(1, 3, 64, 64))["hm"].sigmoid()
        np.testing.assert_allclose(scores, 0.1, atol=0.02)

    def test_everything_learns(self) -> None:
        torch.manual_seed(0)
        model = FairMOT(SMALL)
        sum(head.square().sum() for head in model(torch.rand(2, 3, 64, 64)).values()).backward()
        still = [name for name, weight in model.named_parameters() if not weight.grad.abs().sum() > 0]
        assert still == []

    def test_width_scales_the_published_channels(self) -> None:
        assert FairMOTConfig().channels == (16, 32, 64, 128, 256, 512)
        assert FairMOTConfig(width=0.25).channels == (8, 8, 16, 32, 64, 128)
        assert FairMOTConfig(width=0.375, max_channels=128).channels == (8, 16, 24, 48, 96, 128)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"classes": 0}, "classes is 0; it must be at least 1"),
            ({"box": 3}, r"box is 3; it must be 4 \(edge distances\) or 2"),
            ({"width": 0}, "width is 0; it must be above 0 and at most 4"),
            ({"levels": (1, 1)}, r"levels is \(1, 1\); it must be six numbers"),
            ({"stem_stride": 3}, "stem_stride is 3; it must be 1 or 2"),
        ],
        ids=str,
    )
    def test_impossible_networks(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            FairMOTConfig(**options)


@pytest.fixture(scope="module")
def official() -> dict[str, Tensor]:
    """The state dict of a full-size network, unused parts included, as the official code saves it."""
    state = random_fairmot().state_dict()
    state["base.fc.weight"], state["base.fc.bias"] = torch.ones(1000, 512, 1, 1), torch.ones(1000)
    for level, inputs, outputs in (("level3", 64, 128), ("level4", 128, 256)):
        state[f"base.{level}.project.0.weight"] = torch.ones(outputs, inputs, 1, 1)
        state[f"base.{level}.project.1.weight"] = torch.ones(outputs)
    return state


def resized(state: dict[str, Tensor], **rows: int) -> dict[str, Tensor]:
    """Heads cut or repeated to other numbers of channels."""
    changed = dict(state)
    for head, count in rows.items():
        for part in ("weight", "bias"):
            key = f"{head}.2.{part}"
            changed[key] = state[key][torch.arange(count) % len(state[key])]
    return changed


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("wrap", "expected"),
        [
            (lambda s: {"epoch": 30, "state_dict": s}, {}),
            (lambda s: s, {}),
            (lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}, {}),
            (lambda s: {"state_dict": {k: v for k, v in s.items() if "batches" not in k}}, {}),
            (lambda s: {"state_dict": resized(s, id=64, wh=2)}, {"embedding": 64, "box": 2}),
            (lambda s: {"state_dict": resized(s, hm=3)}, {"classes": 3}),
        ],
        ids=["official", "bare", "module prefix", "before torch 0.4", "older heads", "three classes"],
    )
    def test_published_kinds_load(
        self,
        tmp_path: Path,
        official: dict[str, Tensor],
        wrap: Callable[[dict[str, Tensor]], Any],
        expected: dict[str, int],
    ) -> None:
        saved = wrap(official)
        torch.save(saved, tmp_path / "a.pth")
        model = load_fairmot(tmp_path / "a.pth")
        assert not model.training
        assert model.config == FairMOTConfig(**expected)
        given = {key.removeprefix("module."): value for key, value in saved.get("state_dict", saved).items()}
        for key, value in model.state_dict().items():
            if key in given:
                assert torch.equal(value, given[key]), key

    def test_our_own_say_what_they_are(self, tmp_path: Path) -> None:
        model = random_fairmot(FairMOTConfig(width=0.25, head_channels=8, deformable=False, stem_stride=2))
        save_fairmot(model, tmp_path / "a.pth", epoch=7)
        again = load_fairmot(tmp_path / "a.pth")
        assert again.config == model.config
        for key, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key

    def test_safetensors(self, tmp_path: Path) -> None:
        safetensors = pytest.importorskip("safetensors.torch")
        model = random_fairmot(SMALL)
        about = {"config": '{"width": 0.25, "head_channels": 8, "embedding": 16}'}
        safetensors.save_file(model.state_dict(), tmp_path / "a.safetensors", about)
        safetensors.save_file(model.state_dict(), tmp_path / "b.safetensors")
        for again in (
            load_fairmot(tmp_path / "a.safetensors"),
            load_fairmot(tmp_path / "b.safetensors", SMALL),
        ):
            assert torch.equal(again.state_dict()["hm.0.weight"], model.state_dict()["hm.0.weight"])

    def test_unused_parts_are_known_by_name(self) -> None:
        assert all(map(FAIRMOT_UNUSED.match, ("base.fc.weight", "base.level4.project.1.running_var")))
        assert not any(
            map(FAIRMOT_UNUSED.match, ("base.level2.project.0.weight", "base.fcn.weight", "fc.bias"))
        )


class Trap:
    """A pickle of this creates the file when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def small() -> dict[str, Tensor]:
    return random_fairmot(SMALL).state_dict()


def bad_file(path: Path, fault: str, state: dict[str, Tensor], sprung: Path) -> Path:
    match fault:
        case "directory":
            path.mkdir()
        case "empty":
            path.touch()
        case "text":
            path.write_text("epoch 30, loss 0.1\n" * 50)
        case "cut" | "cut, old format":
            torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=fault == "cut")
            path.write_bytes(path.read_bytes()[:100_000])
        case "code":
            torch.save({"state_dict": state, "epoch": Trap(sprung)}, path)
        case "code, old format":
            torch.save(
                {"state_dict": state, "epoch": Trap(sprung)}, path, _use_new_zipfile_serialization=False
            )
        case "only code":
            path.write_bytes(pickle.dumps(Trap(sprung), protocol=2))
        case "only code, protocol 4":
            path.write_bytes(pickle.dumps(Trap(sprung), protocol=4))
        case "whole network":
            torch.save(nn.Conv2d(3, 3, 1), path)
        case "no tensors":
            torch.save({"state_dict": {"epoch": 3}}, path)
        case "another network":
            torch.save(
                {"state_dict": {"conv1.weight": torch.ones(8, 3, 7, 7), "fc.bias": torch.ones(9)}}, path
            )
        case "another width":
            torch.save({"state_dict": state}, path)
        case "a part":
            torch.save({"state_dict": {k: v for k, v in state.items() if k[:3] != "id."},
                        "config": {"width": 0.25, "head_channels": 8, "embedding": 16}}, path)  # fmt: skip
        case "diverged":
            state["hm.2.bias"].fill_(torch.nan)
            torch.save(
                {"state_dict": state, "config": {"width": 0.25, "head_channels": 8, "embedding": 16}}, path
            )
        case "unknown config":
            torch.save({"state_dict": state, "config": {"width": 0.25, "height": 3}}, path)
    return path


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("missing", "bad.pth is missing: name a checkpoint"),
        ("directory", "bad.pth is a directory"),
        ("empty", "is no checkpoint or is cut short"),
        ("text", "is no checkpoint or is cut short"),
        ("cut", r"is cut short \(PytorchStreamReader .*zip archive.*\).*copy or save it again"),
        ("cut, old format", r"is cut short \(unexpected EOF.*\).*copy or save it again"),
        ("code", r"asks for \w+\.mkdir, which weights have no need of; nothing in it was run.*state_dict"),
        ("code, old format", r"asks for \w+\.mkdir, which weights have no need of"),
        ("only code", r"asks for \w+\.mkdir"),
        ("only code, protocol 4", "is no checkpoint .*nothing in it was run"),
        ("whole network", r"asks for torch\.nn\.modules\.conv\.Conv2d"),
        ("no tensors", r"holds no tensors by name: save it as \{'state_dict'"),
        ("another network", r"no checkpoint of FairMOT .*: of its 337 tensors 337 missing "
                            r"\(base\.base_layer\.0\.weight, .*, …\); 2 unknown \(conv1\.weight, fc\.bias\)"),
        ("another width", r"of another shape \(base\.base_layer\.0\.weight 8×3×7×7 for 16×3×7×7, "),
        ("a part", r"4 missing \(id\.0\.bias, id\.0\.weight, id\.2\.bias, …\)$"),
        ("diverged", r"holds NaN or inf in hm\.2\.bias: its training diverged"),
        ("unknown config", "describes no network of ours: .*'height'"),
    ],
)  # fmt: skip
def test_files_that_are_no_checkpoint(
    tmp_path: Path, small: dict[str, Tensor], fault: str, words: str
) -> None:
    sprung = tmp_path / "sprung"
    path = bad_file(tmp_path / "bad.pth", fault, small, sprung)
    with pytest.raises(CheckpointError, match=words) as error:
        load_fairmot(path)
    assert "\n" not in str(error.value)
    assert not sprung.exists()


def test_the_trap_would_spring(tmp_path: Path) -> None:
    """So that "nothing was run" above means something."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()
    assert re.fullmatch(r"\w+\.mkdir", f"{os.mkdir.__module__}.{os.mkdir.__name__}")
