"""The association benchmark: fair to others, and awake when answers differ. Nothing here looks at speed."""

from __future__ import annotations

import json
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import tracker
from tracker.benchmark import THREAD_VARIABLES, External, Timing, first_difference, load_generator
from tracker.contenders import Answer, official_bytetrack, official_fairmot, ours

LOAD = """
import numpy as np
def gen(n, frames=100):
    # People who stand still, far apart: whoever tracks them at all says the same.
    x = 100.0 * np.arange(n)
    boxes = np.stack((x, 0 * x, x + 40, 0 * x + 100, 0 * x + 0.9), 1).astype(np.float32)
    return [(boxes.copy(), np.eye(n, dtype=np.float32), np.arange(n)) for _ in range(frames)]
"""

# Clones in miniature: the official files' imports and seams, and trackers that can number standing people.
BASETRACK = """
class BaseTrack:
    _count = 0
    def __init__(self, box, shift):
        BaseTrack._count += 1
        self.track_id = BaseTrack._count
        self.tlwh = np.array([box[0] + shift, box[1], box[2] - box[0], box[3] - box[1]], dtype=np.float)
import numpy as np
"""
MATCHING = "SHIFT = {shift}\n"
BYTETRACK = """
import torch
from yolox.tracker import matching
from .basetrack import BaseTrack
class BYTETracker:
    def __init__(self, args, frame_rate=30):
        self.thresh, self.tracks = args.track_thresh, None
    def update(self, output_results, img_info, img_size):
        output_results[:, :4] /= min(img_size[0] / float(img_info[0]), img_size[1] / float(img_info[1]))
        boxes = output_results[output_results[:, 4] > self.thresh]
        output_results[:] = np.nan
        self.tracks = self.tracks or [BaseTrack(box, matching.SHIFT) for box in boxes]
        return self.tracks
import numpy as np
"""
FAIRMOT = """
import logging
import torch
import torch.nn.functional as F
from models import *
from models.decode import mot_decode
from models.model import create_model, load_model
from models.utils import _tranpose_and_gather_feat
from tracking_utils.log import logger
from tracking_utils.utils import *
from utils.image import get_affine_transform
from utils.post_process import ctdet_post_process
from tracker import matching
from .basetrack import BaseTrack
class JDETracker(object):
    def __init__(self, opt, frame_rate=30):
        print('Creating model...')
        opt.device = torch.device('cuda' if opt.gpus[0] >= 0 else 'cpu')
        self.opt, self.tracks = opt, None
        self.model = load_model(create_model(opt.arch, opt.heads, opt.head_conv), opt.load_model)
        self.model = self.model.to(opt.device)
        self.model.eval()
    def post_process(self, dets, meta):
        raise NotImplementedError
    def update(self, im_blob, img0):
        s = max(im_blob.shape[3] / im_blob.shape[2] * img0.shape[0], img0.shape[1])
        with torch.no_grad():
            output = self.model(im_blob)[-1]
            hm = output['hm'].sigmoid_()
            id_feature = F.normalize(output['id'], dim=1)
            reg = output['reg'] if self.opt.reg_offset else None
            dets, inds = mot_decode(hm, output['wh'], reg=reg, ltrb=self.opt.ltrb, K=self.opt.K)
            id_feature = _tranpose_and_gather_feat(id_feature, inds).squeeze(0).cpu().numpy()
        dets = self.merge_outputs([self.post_process(dets, {'s': s})])[1]
        remain_inds = dets[:, 4] > self.opt.conf_thres
        dets, id_feature = dets[remain_inds], id_feature[remain_inds]
        assert len(dets) == len(id_feature)
        self.tracks = self.tracks or [BaseTrack(box, matching.SHIFT) for box in dets]
        return self.tracks
"""


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    for name in THREAD_VARIABLES:  # the tool sets them, and they must not outlive the test
        monkeypatch.setenv(name, "1")
    return runpy.run_path(str(ROOT / "tools" / "bench.py"))["main"]


@pytest.fixture
def load(tmp_path: Path) -> Path:
    return written(tmp_path / "load.py", LOAD)


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def bytetrack(root: Path, *, shift: float = 0) -> Path:
    for name, text in (("basetrack", BASETRACK), ("matching", MATCHING), ("byte_tracker", BYTETRACK)):
        written(root / "yolox" / "tracker" / f"{name}.py", text.replace("{shift}", str(shift)))
    written(root / "yolox" / "__init__.py", "raise ImportError('needs its whole environment')")
    return root


def fairmot(root: Path, *, shift: float = 0) -> Path:
    library = root / "src" / "lib"
    for name, text in (("basetrack", BASETRACK), ("matching", MATCHING), ("multitracker", FAIRMOT)):
        written(library / "tracker" / f"{name}.py", text.replace("{shift}", str(shift)))
    written(library / "tracking_utils" / "log.py", "import logging\nlogger = logging.getLogger('fairmot')\n")
    written(library / "tracking_utils" / "utils.py", "raise ImportError('needs its whole environment')")
    return root


# The published answers to the load everybody is measured on


@pytest.mark.parametrize(("name", "compat"), [("jde", "fairmot"), ("byte", "bytetrack")])
def test_compat_answers_the_load_as_published(data: Path, name: str, compat: str) -> None:
    bench = data.parent / "bench"
    if not bench.is_dir():
        pytest.skip(f"no benchmark load at {bench}")
    golden = np.loadtxt(bench / f"load_N100_{compat}_official.txt", delimiter=",")
    contender = ours(name, compat)
    update = contender.start()
    load = load_generator(bench / "load.py", frames=100)(100)
    answers = [contender.read(update(t, *arrays)) for t, arrays in enumerate(load, start=1)]
    theirs = [
        (rows[:, 1].astype(np.int64), np.hstack((rows[:, 2:4], rows[:, 2:4] + rows[:, 4:6])))
        for rows in (golden[golden[:, 0] == t] for t in range(1, 101))
    ]
    assert first_difference(answers, theirs) == ""


# The tool


def test_the_same_answers_are_timed_and_told(
    main: Callable[[list[str]], int], load: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    external = "echo 9 rows, 2.5 ms per frame, of"
    options = ["--load", str(load), "--objects", "3,5", "--frames", "12", "--repeat", "2"]
    options += ["--official-fairmot", str(fairmot(tmp_path / "F"))]
    options += ["--official-bytetrack", str(bytetrack(tmp_path / "B"))]
    options += ["--external", f"elsewhere={external}", "--json", str(tmp_path / "bench.json")]
    assert main(["association", *options]) == 0
    told = capsys.readouterr()
    assert "official FairMOT and official ByteTrack: the same ids and boxes as ours" in told.out
    assert "Creating model" not in told.out
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["environment"]["threads"] == dict.fromkeys(THREAD_VARIABLES, "1")
    assert report["sources"]["official FairMOT"].startswith("multitracker.py, SHA-256 ")
    assert [(lap["race"], lap["objects"]) for lap in report["laps"]] == [
        ("jde", 3),
        ("byte", 3),
        ("jde", 5),
        ("byte", 5),
    ]
    for lap in report["laps"]:
        for timing in lap["timings"].values():
            assert timing["ms"] > 0
            assert len(timing["repeats"]) == 2
    assert report["laps"][3]["timings"]["elsewhere"] == {"ms": 2.5, "repeats": [2.5, 2.5]}
    # Ours is called tracker too, and is still there.
    assert sys.modules["tracker"] is tracker
    assert "models" not in sys.modules and "yolox" not in sys.modules


@pytest.mark.parametrize("official", ["fairmot", "bytetrack"])
def test_other_answers_are_exit_code_1(
    main: Callable[[list[str]], int],
    load: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    official: str,
) -> None:
    clone = {"fairmot": fairmot, "bytetrack": bytetrack}[official](tmp_path / "clone", shift=0.5)
    options = ["--load", str(load), "--objects", "3", "--frames", "4", "--repeat", "1"]
    assert main(["association", *options, f"--official-{official}", str(clone)]) == 1
    told = capsys.readouterr()
    assert "differ at 3 objects: frame 1: id 1 lies 0.5 px apart" in told.err
    assert "the same ids" not in told.out


def test_nobody_to_compare_with(
    main: Callable[[list[str]], int], load: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--load", str(load), "--objects", "2", "--frames", "3", "--repeat", "1"]
    assert main(["association", *options]) == 0
    told = capsys.readouterr().out
    assert "jde --compat fairmot" in told and "byte --compat bytetrack" in told
    assert "official" not in told


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--load", "absent.py"], "there is no load generator absent.py: name one with --load"),
        (["--load", "empty.py"], "has no function gen"),
        (["--official-fairmot", "nowhere"], "multitracker.py: name the top folder of a clone"),
        (["--official-bytetrack", "nowhere"], "byte_tracker.py: name the top folder of a clone"),
        (["--official-bytetrack", "broken"], "No module named 'cython_bbox_': install what it needs"),
        (["--external", "X=absent-command"], "cannot run 'absent-command' for X: No such file"),
        (["--external", "X=echo done in"], "X ended with 0, saying 'done in "),
        (["--external", "X=false"], "X ended with 1, saying ''"),
        (["--json", "absent/a.json"], "cannot write absent/a.json"),
    ],
)
def test_refusals_are_one_line(
    main: Callable[[list[str]], int],
    load: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    written(Path("empty.py"), "")
    written(Path("broken/yolox/tracker/byte_tracker.py"), "import cython_bbox_")
    common = ["--load", str(load), "--objects", "2", "--frames", "2", "--repeat", "1"]
    assert main(["association", *common, *options]) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bench: ")]
    assert len(told) == 1
    assert says in told[0]


@pytest.mark.parametrize(
    "options", [["--objects", "20,x"], ["--frames", "0"], ["--external", "command"], ["--external", "name="]]
)
def test_usage_is_exit_code_2(main: Callable[[list[str]], int], options: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["association", *options])


# The parts


def answer(*rows: tuple[int, float]) -> Answer:
    return np.array([i for i, _ in rows], np.int64), np.array([[x, 0, x + 40, 100] for _, x in rows]).reshape(
        -1, 4
    )


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ([answer((1, 5), (2, 90)), answer((1, 6))], ""),
        ([answer((2, 90), (1, 5)), answer((1, 6.0009))], ""),
        ([answer((1, 5), (2, 90)), answer((1, 6.002))], "frame 2: id 1 lies 0.002 px apart"),
        ([answer((1, 90), (2, 5)), answer((1, 6))], "frame 1: id 1 lies 85 px apart"),
        ([answer((1, 5), (3, 90)), answer((1, 6))], "frame 1: only one of them has id 2"),
        ([answer((1, 5), (2, 90)), answer()], "frame 2: only one of them has id 1"),
        ([answer((1, 5), (2, math.nan)), answer((1, 6))], "frame 1: id 2 lies nan px apart"),
    ],
    ids=["same", "another order", "apart", "swapped", "another id", "nobody", "no number"],
)
def test_the_first_difference_is_found(theirs: list[Answer], says: str) -> None:
    assert first_difference([answer((1, 5), (2, 90)), answer((1, 6))], theirs) == says


def test_a_ratio_is_of_the_medians_and_the_least_of_any_repeat() -> None:
    ours, theirs = Timing(ms=2.0, repeats=[1.0, 2.0, 4.0]), Timing(ms=30.0, repeats=[30.0, 30.0, 30.0])
    assert theirs.over(ours) == (15.0, 7.5)


def test_an_external_gets_the_detections_and_tells_the_time(tmp_path: Path) -> None:
    detections = written(tmp_path / "with space.txt", "1,-1,0,0,10,10,0.5\n")
    program = written(
        tmp_path / "program.py", "import sys\nprint(len(open(sys.argv[1]).read()), 'ms per frame')"
    )
    external = External(name="X", command=f"'{sys.executable}' '{program}'")
    assert external.time(detections) == 19.0


def test_official_code_leaves_no_trace_among_the_modules(tmp_path: Path) -> None:
    before = set(sys.modules)
    official_fairmot(fairmot(tmp_path / "F"))
    official_bytetrack(bytetrack(tmp_path / "B"))
    assert not {name for name in set(sys.modules) - before if name.partition(".")[0] in ("tracker", "yolox")}
