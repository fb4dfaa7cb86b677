"""What a calibration came to, for machines (JSON) and for people (one HTML page, plots as inline SVG).

Writes what `calibrate` found; measures nothing. The page needs no script and no network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from tracker.deploy.calibration.calibrate import Calibrated, CalibrationConfig, Judged
from tracker.deploy.calibration.judge import SHOWN
from tracker.deploy.parity.detections import BINS, EqualPrecision

BARS = 24  # layers shown in the plot of sensitivity
WIDTH, HEIGHT = 640, 220  # of a plot, in its own units
LEFT, BOTTOM, TOP = 46, 34, 12  # room for its labels

_COUNTS = ("IDSW", "FP", "FN")
_FP32, _LOWER, _LIMIT = "#5b6b7f", "#d9822b", "#b3261e"
_STYLE = f"""
:root {{ color-scheme: light; }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1c2733; margin: 2rem auto; max-width: 46rem;
       padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin: 0 0 .2rem; }} h2 {{ font-size: 1.1rem; margin: 2rem 0 .4rem; }}
p {{ margin: .4rem 0; }} .note {{ color: #5b6b7f; font-size: .9rem; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #e3e8ee; }}
th:first-child, td:first-child {{ text-align: left; }} th {{ font-weight: 600; color: #5b6b7f; }}
svg {{ width: 100%; height: auto; }} svg text {{ font: 11px system-ui, sans-serif; fill: #1c2733; }}
.verdict {{ display: flex; gap: 2.5rem; margin: 1.2rem 0; flex-wrap: wrap; }}
.verdict div {{ line-height: 1.2; }} .verdict b {{ display: block; font-size: 1.7rem; }}
.key::before {{ content: ""; display: inline-block; width: .8em; height: .8em; margin-right: .35em;
               border-radius: 2px; background: var(--c); }}
.key {{ margin-right: 1.2rem; }} code {{ font-size: .88em; overflow-wrap: anywhere; }}
.fp32 {{ --c: {_FP32}; }} .lower {{ --c: {_LOWER}; }}
"""


def to_json(
    done: Calibrated, config: CalibrationConfig, *, source: str, data: Sequence[str]
) -> dict[str, Any]:
    """Everything, with infinite changes as null: JSON has no infinity."""
    manifest, judged = done.manifest, done.judged
    calibration = asdict(manifest.calibration) if manifest.calibration is not None else None
    return {
        "source": source,
        "precision": manifest.precision,
        "onnx_sha256": manifest.onnx_sha256,
        "bytes": {"fp32": done.bytes[0], manifest.precision: done.bytes[1]},
        "calibration": calibration,
        "data": {
            "sources": list(data),
            "frames_seen": done.choice.seen if done.choice else None,
            "frames_unreadable": done.choice.unreadable if done.choice else None,
            "frames_resumed": done.resumed,
        },
        "layers": {"all": list(done.layers), "high_by_rule": done.high, "kept": list(done.kept)},
        "judged": _judged_json(judged, config) if judged is not None else None,
    }


def _judged_json(judged: Judged, config: CalibrationConfig) -> dict[str, Any]:
    verdict = judged.verdict
    return {
        "truth": "ground truth" if judged.truth else "the tracks of fp32",
        "tracker": judged.tracker,
        "frames": judged.frames,
        "max_hota_loss": config.max_hota_loss,
        "hota_loss": verdict.loss,
        "fp32": judged.reference,
        "lower": verdict.scores,
        "lower_refitted": verdict.refitted,
        "thresholds": verdict.thresholds,
        "detections": asdict(verdict.detections),
        "methods": {name: _finite(loss) for name, loss in judged.methods.items()},
        "ranking": {name: _finite(change) for name, change in judged.ranking.items()},
        "tries": [
            {"kept": each.kept, "good": each.good, "hota_loss": each.verdict.loss if each.verdict else None}
            for each in judged.tries
        ],
    }


def to_html(done: Calibrated, config: CalibrationConfig, *, source: str, data: Sequence[str]) -> str:
    """One page. Raises ValueError where nothing was judged: there is nothing to show then."""
    if done.judged is None:
        raise ValueError("nothing was judged")
    judged, name = done.judged, done.manifest.precision.upper()
    parts = [
        f"<h1>{escape(source)} in {name}</h1>",
        f'<p class="note">{_how(done, config, data)}</p>',
        _headline(done, judged, config),
        "<h2>Tracking</h2>",
        _scores(judged, name),
        "<h2>Detections</h2>",
        _detections(judged, name),
        _legend(name),
        _histogram(judged, name),
        '<p class="note">Detections by score, all that the front end reports.</p>',
    ]
    if judged.ranking:
        parts += ["<h2>What each layer does by itself</h2>", _ranking(judged, done.kept, name)]
    if len(judged.tries) > 1:
        parts += ["<h2>How many layers have to be kept</h2>", _tries(judged, config, done)]
    if judged.methods:
        rows = [(method, f"{loss:.3f}") for method, loss in judged.methods.items()]
        parts += ["<h2>Methods of calibration</h2>", _table(("method", "HOTA lost"), rows)]
    parts += ["<h2>Layers in higher precision</h2>", _layers(done)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(source)} in {name}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _how(done: Calibrated, config: CalibrationConfig, data: Sequence[str]) -> str:
    about = done.manifest.calibration
    if done.choice is None or about is None:
        return f"cast around the parts that stay in FP32 anyway; {len(done.layers)} layers could be"
    seen = f"{about.frames} of {done.choice.seen} frames of {', '.join(map(escape, data))} (seed {about.seed}"
    lost = f", {done.choice.unreadable} unreadable)" if done.choice.unreadable else ")"
    return f"calibrated by {about.method} on {seen}{lost}; {len(done.layers)} layers could be quantised"


def _headline(done: Calibrated, judged: Judged, config: CalibrationConfig) -> str:
    share = done.bytes[1] / done.bytes[0]
    facts = (
        (f"{-judged.verdict.loss:+.2f}", f"HOTA (at most {config.max_hota_loss:g} may be lost)"),
        (f"{share:.0%}", f"of the size ({done.bytes[0] / 1e6:.2f} → {done.bytes[1] / 1e6:.2f} MB)"),
        (f"{len(done.layers) - len(done.kept)} of {len(done.layers)}", "layers reduced"),
    )
    return '<div class="verdict">' + "".join(f"<div><b>{a}</b>{escape(b)}</div>" for a, b in facts) + "</div>"


def _scores(judged: Judged, name: str) -> str:
    verdict = judged.verdict
    columns = [("FP32", judged.reference), (name, verdict.scores)]
    if verdict.refitted is not None:
        columns.append((f"{name}, thresholds fitted", verdict.refitted))
    rows = [
        (key, *(_number(key, scores[key]) for _, scores in columns),
         _change(key, columns[-1][1][key] - judged.reference[key]))
        for key in SHOWN
    ]  # fmt: skip
    truth = "the clip's ground truth" if judged.truth else "FP32's own tracks"
    note = f"{judged.frames} frames through {judged.tracker}, scored against {truth}."
    if verdict.thresholds is not None:
        fitted = ", ".join(f"{key} {value:g}" for key, value in verdict.thresholds[judged.tracker].items())
        note += f" The manifest has the fitted thresholds ({escape(fitted)})."
    head = ("", *(title for title, _ in columns), "change")
    return _table(head, rows) + f'<p class="note">{note}</p>'


def _detections(judged: Judged, name: str) -> str:
    found = judged.verdict.detections
    rows = [
        ("confident detections", f"{found.reference}", f"{found.candidate}"),
        ("without the same one on the other side", f"{found.missing}", f"{found.extra}"),
        (f"recall at the same precision{_precision(found.equal)}",
         f"{found.equal.reference_recall:.2%}", f"{found.equal.recall:.2%}"),
    ]  # fmt: skip
    between = [
        ("box corners, pixels", found.box, "{:.2f}"),
        ("score", found.score, "{:.4f}"),
        ("embedding, 1 − cosine", found.cosine, "{:.5f}"),
    ]
    spread = [
        (label, *(shape.format(value) for value in (each.mean, each.median, each.p95, each.max)))
        for label, each, shape in between
        if each is not None
    ]
    head = ("difference", "mean", "median", "95 %", "greatest")
    return _table(("", "FP32", name), rows) + "<p></p>" + _table(head, spread)


def _precision(equal: EqualPrecision) -> str:
    return f" ({equal.precision:.1%})"


def _legend(name: str) -> str:
    return f'<p><span class="key fp32">FP32</span><span class="key lower">{name}</span></p>'


def _histogram(judged: Judged, name: str) -> str:
    ours, theirs = judged.verdict.detections.histogram
    greatest = max(*ours, *theirs, 1)
    step = (WIDTH - LEFT) / BINS
    bars = []
    for place, pair in enumerate(zip(ours, theirs, strict=True)):
        for offset, count, colour in zip((0.08, 0.5), pair, (_FP32, _LOWER), strict=True):
            top = _y(count / greatest)
            x = LEFT + (place + offset) * step
            bars.append(_rect(x, top, 0.4 * step, HEIGHT - BOTTOM - top, colour))
    ticks = [(LEFT + k * step, f"{k / BINS:g}") for k in range(0, BINS + 1, 4)]
    return _plot(bars, ticks, [(0.0, "0"), (1.0, f"{greatest}")], f"detections by score, FP32 and {name}")


def _ranking(judged: Judged, kept: Sequence[str], name: str) -> str:
    shown = list(judged.ranking.items())[:BARS]
    finite = [change for _, change in shown if math.isfinite(change)]
    greatest = max(finite, default=0.0) or 1.0
    row, names = 17, 250
    bars = []
    for place, (layer, change) in enumerate(shown):
        y = place * row
        long = (WIDTH - names - 70) * min(change / greatest, 1.0)
        text = f"{change:.4f}" if math.isfinite(change) else "NaN or inf"
        bars += [
            f'<text x="{names - 8}" y="{y + 12}" text-anchor="end">{escape(_short(layer))}</text>',
            _rect(names, y + 3, max(long, 0.5), row - 6, _FP32 if layer in kept else _LOWER),
            f'<text x="{names + long + 6:.1f}" y="{y + 12}">{text}</text>',
        ]
    rest = len(judged.ranking) - len(shown)
    more = f" The other {rest} change less." if rest > 0 else ""
    return (
        f'<p class="note">Change of detections with that layer alone in {name}: differing scores, boxes and '
        f"embeddings and what is missing, per detection.{more}</p>"
        '<p><span class="key fp32">kept in higher precision</span><span class="key lower">reduced</span></p>'
        f'<svg viewBox="0 0 {WIDTH} {row * len(shown)}" role="img" aria-label="layers by sensitivity">'
        + "".join(bars)
        + "</svg>"
    )


def _tries(judged: Judged, config: CalibrationConfig, done: Calibrated) -> str:
    """HOTA lost over layers kept; what overflows lies at the upper edge."""
    known = [each.verdict.loss for each in judged.tries if each.verdict is not None]
    top = max(*known, config.max_hota_loss, 0.01) * 1.1
    low = min(*known, 0.0)
    most = max(each.kept for each in judged.tries) or 1

    def at(kept: int, loss: float) -> tuple[float, float]:
        # Square roots: the interesting numbers are small.
        x = LEFT + (WIDTH - LEFT - 10) * math.sqrt(kept / most)
        return x, _y((loss - low) / (top - low))

    marks = []
    limit = at(0, config.max_hota_loss)[1]
    marks.append(
        f'<line x1="{LEFT}" x2="{WIDTH}" y1="{limit:.1f}" y2="{limit:.1f}" stroke="{_LIMIT}" '
        f'stroke-dasharray="4 4"/><text x="{WIDTH}" y="{limit - 5:.1f}" text-anchor="end">at most '
        f"{config.max_hota_loss:g}</text>"
    )
    ticks: list[tuple[float, str]] = []
    for each in sorted(judged.tries, key=lambda step: step.kept):
        x, y = at(each.kept, each.verdict.loss if each.verdict is not None else top)
        fill = _LOWER if each.good else "none"
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="{_LOWER}"/>')
        if not ticks or x - ticks[-1][0] > 22:
            ticks.append((x, str(each.kept)))
    lines = [((loss - low) / (top - low), f"{loss:.2f}") for loss in (low, max(known))]
    note = (
        f'<p class="note">HOTA lost over layers kept, most sensitive first; filled: within bounds. '
        f"{len(done.kept)} are kept.</p>"
    )
    return note + _plot(marks, ticks, lines, "HOTA lost over layers kept")


def _layers(done: Calibrated) -> str:
    reasons: dict[str, list[str]] = {}
    for layer, why in done.high.items():
        reasons.setdefault(why, []).append(layer)
    rows = [("kept by search or by wish", _list(done.kept))] if done.kept else []
    rows += [(escape(why), _list(layers)) for why, layers in reasons.items()]
    if not rows:
        return "<p>None.</p>"
    return "".join(f"<p><b>{why}</b>: {layers}</p>" for why, layers in rows)


def _list(layers: Sequence[str], most: int = 40) -> str:
    shown = ", ".join(f"<code>{escape(layer)}</code>" for layer in layers[:most])
    return shown + (f" and {len(layers) - most} more" if len(layers) > most else "")


def _plot(
    marks: Iterable[str],
    ticks: Iterable[tuple[float, str]],
    lines: Iterable[tuple[float, str]],
    label: str,
) -> str:
    """ticks: x and text below. lines: share of the height, and text beside."""
    base = HEIGHT - BOTTOM
    frame = []
    for share, text in lines:
        y = _y(share)
        frame.append(f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e3e8ee"/>')
        frame.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    frame += [f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{text}</text>' for x, text in ticks]
    return (
        f'<svg viewBox="0 0 {WIDTH + 10} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        + "".join((*frame, *marks))
        + "</svg>"
    )


def _y(share: float) -> float:
    return TOP + (HEIGHT - BOTTOM - TOP) * (1 - share)


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join(lines) + "</table>"


def _number(key: str, value: float) -> str:
    return f"{value:.0f}" if key in _COUNTS else f"{value:.3f}"


def _change(key: str, value: float) -> str:
    return f"{value:+.0f}" if key in _COUNTS else f"{value:+.3f}"


def _short(name: str, most: int = 38) -> str:
    return name if len(name) <= most else f"…{name[-most + 1 :]}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
