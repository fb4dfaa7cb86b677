"""Which results belong to which ground truth, and what both must keep to before they are compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracker.errors import DetectionsError, SourceError
from tracker.evaluation.report import Format
from tracker.motchallenge import SeqInfo, read_seqinfo

# Results of other kinds, which may lie beside MOTChallenge rows.
_OTHERS = (".mots.txt", ".dota.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One sequence: its ground truth, the results for it, and its seqinfo where there is one."""

    name: str
    truth: Path
    results: Path
    info: SeqInfo | None = None


def find_pairs(truth: Path, results: Path, *, format: Format = "mot") -> list[Pair]:
    """Pair ground truth with results: two files, or two folders holding SEQ/gt/gt.txt and SEQ.txt.

    format: "mots" takes SEQ.mots.txt, as it is written here, where the results have any of that name.
    A seqinfo.ini is taken from beside gt.txt or one folder above it.
    Raises SourceError for what is not there, and for results without ground truth or the reverse.
    """
    for path in (truth, results):
        if not path.exists():
            raise SourceError(f"{path} does not exist")
    if truth.is_dir() != results.is_dir():
        raise SourceError(
            f"{truth} and {results} are a folder and a file: give both as files, or both as folders "
            "(SEQ/gt/gt.txt and SEQ.txt)"
        )
    if truth.is_file():
        info = _find_seqinfo(truth)
        return [Pair(name=info.name if info else _stem(results), truth=truth, results=results, info=info)]
    truths = {path.parent.parent.name: path for path in sorted(truth.glob("*/gt/gt.txt"))}
    found = _found(results, format)
    if not truths:
        raise SourceError(f"{truth} has no ground truth: SEQ/gt/gt.txt is expected, SEQ the sequence's name")
    if missing := truths.keys() - found.keys():
        raise SourceError(
            f"{results} has no {_files(missing)}, but {truth} has the ground truth; a sequence "
            "without any tracks needs an empty file"
        )
    if extra := found.keys() - truths.keys():
        raise SourceError(f"{results} has {_files(extra)}, but {truth} no sequence of that name")
    return [
        Pair(name=name, truth=path, results=found[name], info=_find_seqinfo(path))
        for name, path in truths.items()
    ]


def whole_ids(path: Path, frames: NDArray[Any], ids: NDArray[Any]) -> NDArray[np.int64]:
    """(R,) frames and ids → ids numbered from 0.

    TrackEval's arrays are as long as the largest id, and negative ids would index from their end.
    Raises DetectionsError for ids that are not whole, or come twice in a frame.
    """
    fractions = ids % 1 != 0
    if fractions.any():
        row = int(np.argmax(fractions))
        raise DetectionsError(f"{path}, frame {frames[row]:.0f}: id {ids[row]} is not a whole number")
    first = np.unique(np.column_stack((frames, ids)), axis=0, return_index=True)[1]
    repeated = np.setdiff1d(np.arange(len(ids)), first)
    if len(repeated):
        raise DetectionsError(
            f"{path}, frame {frames[repeated[0]]:.0f}: id {ids[repeated[0]]:.0f} appears more than once; an "
            "id is one object, in one place (are these detections, not tracks?)"
        )
    numbered: NDArray[np.int64] = np.unique(ids, return_inverse=True)[1]
    return numbered


def length(pair: Pair, truth: NDArray[Any], results: NDArray[Any]) -> int:
    """Frames in the sequence; every row must lie in them. truth, results: the frames of their rows.

    Raises DetectionsError for a row that does not, and where there are neither rows nor a seqinfo.
    """
    last = max((int(frames.max()) for frames in (truth, results) if len(frames)), default=0)
    if pair.info is None:
        if last == 0:
            raise DetectionsError(f"{pair.truth} and {pair.results} are both empty: nothing to evaluate")
        return last
    for path, frames in ((pair.truth, truth), (pair.results, results)):
        beyond = frames > pair.info.length
        if beyond.any():
            raise DetectionsError(
                f"{path} has frame {frames[np.argmax(beyond)]:.0f}, but seqinfo.ini says seqLength="
                f"{pair.info.length}; are the files of the same sequence, and frames counted from 1?"
            )
    return pair.info.length


def _found(results: Path, format: Format) -> dict[str, Path]:
    """Results by the name of their sequence."""
    if format == "mots" and (ours := sorted(results.glob("*.mots.txt"))):
        return {_stem(path): path for path in ours}
    files = (path for path in sorted(results.glob("*.txt")) if not path.name.endswith(_OTHERS))
    return {path.stem: path for path in files}


def _stem(results: Path) -> str:
    return results.stem.removesuffix(".mots")


def _find_seqinfo(truth: Path) -> SeqInfo | None:
    for folder in truth.absolute().parents[:2]:
        if (path := folder / "seqinfo.ini").is_file():
            return read_seqinfo(path)
    return None


def _files(names: Iterable[str]) -> str:
    return ", ".join(f"{name}.txt" for name in sorted(names))
