"""Where frames come from: video files, images and live sources. `open_source` and `connect_to` choose by what
they are given.

Siblings here share `Reader` (open once, read once, close any time) and the limit on picture sizes; nothing
in this package knows what is done with a frame.
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from tracker.addresses import LIVE_SCHEMES, parse, scheme_of
from tracker.errors import ConfigError, EngineError, SourceError
from tracker.sources.connections import Connect, Network, Nvdec, Replay, Webcam
from tracker.sources.file import VideoFile
from tracker.sources.images import ImageFolder, is_image
from tracker.sources.limits import MAX_PIXELS
from tracker.sources.live import LiveSettings, LiveSource
from tracker.sources.live_decoders import LiveDecoders, Remote
from tracker.sources.nvdec import Look, NvdecFile, examine
from tracker.types import Source

__all__ = [
    "MAX_PIXELS",
    "Decode",
    "ImageFolder",
    "LiveSettings",
    "LiveSource",
    "NvdecFile",
    "VideoFile",
    "connect_to",
    "open_source",
]

Decode = Literal["auto", "cpu", "gpu"]


def open_source(
    spec: str | Path,
    *,
    source: int = 0,
    max_pixels: int = MAX_PIXELS,
    gpu: torch.device | None = None,
    decode: Decode = "auto",
) -> Source:
    """A source for that file, directory or glob pattern; enter it to open it.

    source: its number in the run, for its frames. max_pixels: pictures larger than this are refused.
    gpu: where frames are wanted, if not on the host. decode: "gpu" for NVDEC there, "cpu", or "auto": NVDEC
    where frames are wanted on a GPU and it can decode the file; if not, the source's `decoder` says why.

    Raises SourceError for URLs and webcams (never repeating the URL, which may hold a password), for images
    that are not there, and for videos that NVDEC was asked to decode and cannot. Whether a video file can be
    read shows on entering at the latest. Raises ConfigError for NVDEC without a GPU, EngineError without its
    library.
    """
    scheme = scheme_of(str(spec))
    if scheme is not None and (scheme in LIVE_SCHEMES or f"{scheme}:/" in str(spec).lower()):
        raise SourceError(
            f"{scheme}: is no file or directory: live sources run by themselves, not among files, and are "
            f"{', '.join(LIVE_SCHEMES)}; a file to be replayed wants --realtime"
        )
    path = Path(spec)
    pattern = glob.has_magic(str(spec)) and not path.exists()
    if path.is_dir() or is_image(path) or pattern:
        return ImageFolder(spec, source=source, max_pixels=max_pixels)
    if decode == "gpu" and gpu is None:
        raise ConfigError("--decode gpu needs an engine that runs on a GPU: use --decode auto")
    if gpu is None or decode == "cpu":
        return VideoFile(path, source=source, max_pixels=max_pixels)
    look = _look(path, gpu, decode, max_pixels)
    if isinstance(look, str):
        return VideoFile(path, source=source, max_pixels=max_pixels, decoder=f"CPU, because {look}")
    return NvdecFile(path, look, device=gpu, source=source, max_pixels=max_pixels)


def _look(path: Path, gpu: torch.device, decode: Decode, max_pixels: int) -> Look | str:
    """What NVDEC needs to know of a file, or why it is not NVDEC that decodes it."""
    try:
        look = examine(path, gpu, max_pixels=max_pixels)
    except EngineError as error:
        if decode == "gpu":
            raise
        return str(error)
    if isinstance(look, str) and decode == "gpu":
        raise SourceError(f"{path}: NVDEC cannot decode it, because {look}: use --decode auto")
    return look


def connect_to(
    spec: str,
    settings: LiveSettings,
    *,
    trusted: bool = True,
    allow_local: bool = False,
    loop: bool = False,
    replay: bool = False,
    gpu: torch.device | None = None,
    decode: Decode = "auto",
    decoders: LiveDecoders | None = None,
) -> tuple[str, str, Connect]:
    """A live source by its address: the name it should have, its address for people, and how to connect.

    trusted: False for addresses that strangers gave: network cameras only, and none on this machine or on
    link-local addresses unless allow_local. replay: files are allowed, replayed at their own pace, with loop
    for ever. gpu, decode: as for `open_source`. decoders: where NVDEC's sources are read and decoded, if not
    in this process.

    Raises ConfigError for an address that is not allowed here, and for NVDEC without a GPU. Whether anybody
    answers, nobody knows yet.
    """
    if decode == "gpu" and gpu is None:
        raise ConfigError("--decode gpu needs an engine that runs on a GPU: use --decode auto")
    nvdec = Nvdec(None if decode == "cpu" else gpu, strict=decode == "gpu")
    scheme = scheme_of(spec)
    if scheme == "file" or scheme is None:
        if not (replay and trusted):
            raise ConfigError(
                "a file is no live source: leave out --live to track it, or add --realtime to replay it"
            )
        path = Path(spec.removeprefix("file://") if scheme else spec)
        if not path.exists():
            raise SourceError(f"{path}: no such file or directory")
        # Whether NVDEC must, `Replay` knows; images are the CPU's in any case.
        pictures = path.is_dir() or is_image(path)
        opened: Callable[[], Source] = partial(open_source, path, gpu=nvdec.device)
        replayed = Replay(opened, loop=loop, nvdec=None if pictures else nvdec)
        return path.stem, str(path), _placed(replayed, decoders)
    schemes = LIVE_SCHEMES if trusted else tuple(each for each in LIVE_SCHEMES if each != "webcam")
    address = parse(spec, schemes=schemes)
    if scheme == "webcam":
        if decode == "gpu":
            raise ConfigError("OpenCV reads webcams, on the CPU: use --decode auto")
        decoder = "CPU (OpenCV)" if nvdec.device is None else "CPU, because OpenCV reads webcams"
        webcam = Webcam(address, max_pixels=settings.max_pixels, decoder=decoder)
        return address.name, address.shown, webcam
    network = Network(
        address,
        rtsp_transport=settings.rtsp_transport,
        open_seconds=settings.open_seconds,
        silence_seconds=settings.silence_seconds,
        verify_tls=settings.verify_tls,
        max_pixels=settings.max_pixels,
        allow_local=trusted or allow_local,
        nvdec=nvdec,
    )
    return address.name, address.shown, _placed(network, decoders)


def _placed(connect: Network | Replay, decoders: LiveDecoders | None) -> Connect:
    if decoders is None or not decoders.processes or connect.nvdec.device is None:
        return connect
    return Remote(connect, decoders)
