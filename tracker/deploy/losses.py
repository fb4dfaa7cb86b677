"""What FairMOT learns from: targets at a quarter of the input's size, and how far the heads are from them.

After Zhang et al., "FairMOT" (IJCV 2021), §3.4, and Zhou et al., "Objects as Points" (2019), §3, with the
weights of the official code (its `src/lib/opts.py`) but where said. Knows nothing of scenes or optimisers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tracker.models.fairmot import STRIDE

NOTHING, FOUND, IGNORED = 0, 1, 2  # states of an object
# FairMOT and CenterNet take 0.1, for objects of hundreds of pixels. Here people are tens of pixels wide, a
# pixel costs them much of their overlap, and the first run (0.1) was held back by just that: docs/log.md.
BOX_WEIGHT = 1.0
OVERLAP_WEIGHT = 2.0  # of 1 − GIoU, which counts a pixel as much as it costs the box it is missing from
# At run time boxes and looks are read where the heat map peaks, and about four times in ten that is a cell
# next to the centre's: docs/log.md. So they are learnt there too, in the cell that the centre lands in when
# it is moved by up to this many cells each way. Official code learns them in the centre's cell alone.
JITTER = 0.6
OVERLAP = 0.7  # a box whose corners lie within the Gaussian's radius still overlaps the truth by so much


def gaussian_radius(width: Tensor, height: Tensor, overlap: float = OVERLAP) -> Tensor:
    """How far both corners of a box may move so that its IoU stays at least `overlap`; CornerNet's formula.

    CornerNet solves three cases (one box inside the other, the reverse, both shifted) with roots that lack
    the division by 2a; every published CenterNet and FairMOT was trained with that, and so is this one.
    """
    side, area = width + height, width * height
    shifted = (side + (side**2 - 4 * area * (1 - overlap) / (1 + overlap)).sqrt()) / 2
    inside = (2 * side + (4 * side**2 - 16 * (1 - overlap) * area).sqrt()) / 2
    b = -2 * overlap * side
    outside = (b + (b**2 + 16 * overlap * (1 - overlap) * area).sqrt()) / 2
    return torch.minimum(torch.minimum(shifted, inside), outside)


class Targets:
    """What the heads should say about B pictures with up to K objects, on the batch's device.

    heat: (B, classes, H, W), 1 at centres, Gaussian around. Ignored objects peak just below 1, where the
    focal loss has no weight. cell: (B, K) index of the cell in which each object is described. edges:
    (B, K, 4) left, top, right and bottom distances from the centre and offset: (B, K, 2) of the centre from
    that cell's corner, in cells. found: (B, K) bool.
    """

    def __init__(
        self, batch: dict[str, Tensor], classes: int, size: tuple[int, int], moved: Tensor | None = None
    ) -> None:
        """size: (width, height) of the heads. batch: see `glimpses.Glimpses`. moved: (B, K, 2) cells by which
        to miss the centres when choosing `cell`; None takes the centres' own."""
        width, height = size
        xyxy, state, label = batch["xyxy"].float() / STRIDE, batch["state"], batch["label"]
        limit = xyxy.new_tensor([width - 1, height - 1])
        centre = (
            ((xyxy[..., :2] + xyxy[..., 2:]) / 2).clamp(min=0).minimum(limit)
        )  # the official code clips too
        whole = centre.floor()
        self.found = state == FOUND
        described = whole if moved is None else (centre + moved).clamp(min=0).minimum(limit).floor()
        self.cell = (described[..., 1] * width + described[..., 0]).long()
        self.offset = centre - described
        self.edges = torch.cat((centre - xyxy[..., :2], xyxy[..., 2:] - centre), -1)
        wide, high = (xyxy[..., 2:] - xyxy[..., :2]).ceil().unbind(-1)
        radius = gaussian_radius(wide, high).floor().clamp(min=0)[..., None]  # (B, K, 1)
        sigma = (2 * radius + 1) / 6
        rows = []
        for axis, length in ((0, width), (1, height)):
            away = torch.arange(length, device=xyxy.device) - whole[..., axis : axis + 1]
            rows.append(torch.exp(-(away**2) / (2 * sigma**2)) * (away.abs() <= radius))
        peak = torch.where(self.found, 1.0, 0.999) * (state != NOTHING)
        bumps = (rows[1] * peak[..., None])[..., :, None] * rows[0][..., None, :]  # (B, K, H, W)
        heat = [(bumps * (label == kind)[..., None, None]).amax(1) for kind in range(classes)]
        self.heat = torch.stack(heat, 1)


def focal_loss(logits: Tensor, heat: Tensor) -> Tensor:
    """CornerNet's focal loss with α = 2, β = 4, per object; computed from logits, so nothing is clamped."""
    positive = heat == 1
    score = logits.sigmoid()
    hit = -((1 - score) ** 2) * F.logsigmoid(logits) * positive
    false = -(score**2) * F.logsigmoid(-logits) * (1 - heat) ** 4 * ~positive
    return (hit.sum() + false.sum()) / positive.sum().clamp(min=1)


def gather(head: Tensor, cell: Tensor) -> Tensor:
    """(B, C, H, W) at cells (B, K) → (B, K, C)."""
    flat = head.flatten(2)
    return flat.gather(2, cell[:, None].expand(-1, flat.shape[1], -1)).transpose(1, 2)


def giou_loss(found: Tensor, truth: Tensor) -> Tensor:
    """1 − GIoU of boxes (…, 4) by their corners → (…); Rezatofighi et al., CVPR 2019, algorithm 1."""
    sides = (found[..., 2:] - found[..., :2]).clamp(min=0), truth[..., 2:] - truth[..., :2]
    low, high = torch.maximum(found[..., :2], truth[..., :2]), torch.minimum(found[..., 2:], truth[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    union = sides[0].prod(-1) + sides[1].prod(-1) - shared
    low, high = torch.minimum(found[..., :2], truth[..., :2]), torch.maximum(found[..., 2:], truth[..., 2:])
    hull = (high - low).clamp(min=0).prod(-1)
    return 1 - shared / union.clamp(min=1e-6) + (hull - union) / hull.clamp(min=1e-6)


class FairMOTLoss(nn.Module):
    """The joint loss, with the classifier over training identities and the two learned task weights.

    An identity's row of the classifier is set to its looks when these are first seen (Qi et al., "Low-Shot
    Learning with Imprinted Weights", CVPR 2018): trained weights then need not be spoilt by a classifier that
    begins at random. known: (identities,) which have been.
    """

    known: Tensor

    def __init__(self, embedding: int, identities: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(embedding, identities)
        self.register_buffer("known", torch.zeros(identities, dtype=torch.bool))
        # JDE's scale: it lets a softmax over so many unit vectors become certain.
        self.scale = math.sqrt(2) * math.log(max(identities - 1, 2))
        # The official ones begin at −1.85 and −1.05, from which ours took 3000 steps to come up to about 0.
        self.detection_weight = nn.Parameter(torch.tensor(0.0))
        self.identity_weight = nn.Parameter(torch.tensor(0.0))

    def forward(self, heads: dict[str, Tensor], batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Raw heads and their batch → the loss to minimise, and its parts without gradient."""
        heads = {name: head.float() for name, head in heads.items()}
        classes, height, width = heads["hm"].shape[1:]
        moved = torch.empty_like(batch["xyxy"][..., :2]).uniform_(-JITTER, JITTER)
        targets = Targets(batch, classes, (width, height), moved)
        heat = focal_loss(heads["hm"], targets.heat)
        edges, offsets = gather(heads["wh"], targets.cell), gather(heads["reg"], targets.cell)
        box = _mean_error(edges, targets.edges, targets.found)
        offset = _mean_error(offsets, targets.offset, targets.found)
        apart = giou_loss(_corners(edges, offsets), _corners(targets.edges, targets.offset))
        overlap = (apart * targets.found).sum() / targets.found.sum().clamp(min=1)
        detection = heat + BOX_WEIGHT * box + OVERLAP_WEIGHT * overlap + offset

        # Everybody is classified, nameable or not: picking them out would wait for the device.
        looks, truth = F.normalize(gather(heads["id"], targets.cell), dim=-1), batch["identity"].flatten()
        if self.training:
            self._imprint(looks.detach().flatten(0, 1), truth)
        guesses = self.classifier(looks * self.scale).flatten(0, 1)
        named = (truth >= 0).sum().clamp(min=1)
        identity = F.cross_entropy(guesses, truth, ignore_index=-1, reduction="sum") / named
        right = (guesses.detach().argmax(-1) == truth).sum() / named
        # Kendall et al. (CVPR 2018): each task's weight is exp of a learned number.
        total = 0.5 * (
            torch.exp(-self.detection_weight) * detection
            + torch.exp(-self.identity_weight) * identity
            + self.detection_weight
            + self.identity_weight
        )
        parts = {
            "loss": total,
            "heat": heat,
            "box": box,
            "overlap": overlap,
            "offset": offset,
            "identity": identity,
            "right": right,
        }
        return total, {name: part.detach() for name, part in parts.items()}

    @torch.no_grad()
    def _imprint(self, looks: Tensor, truth: Tensor) -> None:
        """Rows of the identities (N,) not known yet become their looks (N, D), of length 1.

        Without a look at the numbers, which would wait for the device: those without an identity repeat
        what is done for the one with the greatest.
        """
        order = torch.where(truth >= 0, torch.arange(len(truth), device=truth.device), truth.argmax())
        rows, weight = truth[order].clamp(min=0), self.classifier.weight
        new = (truth[order] >= 0) & ~self.known[rows]
        weight.index_copy_(0, rows, torch.where(new[:, None], looks[order], weight[rows]))
        self.known.index_copy_(0, rows, new | self.known[rows])


def _corners(edges: Tensor, offset: Tensor) -> Tensor:
    """(…, 4) distances and (…, 2) centres → (…, 4) corners, all in cells."""
    return torch.cat((offset - edges[..., :2], offset + edges[..., 2:]), -1)


def _mean_error(found: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute difference over the masked objects' numbers."""
    error = (found - truth).abs() * mask[..., None]
    return error.sum() / (mask.sum() * truth.shape[-1]).clamp(min=1)
