"""Addresses of cameras and servers: what is let in, what may be said of them, and how they are called.

An address holds a password more often than not, and FFmpeg repeats addresses in its errors. So whatever is
said to anybody goes through `redacted`; the whole address is for those alone who open it. Opens nothing.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from tracker.errors import ConfigError, SourceError

LIVE_SCHEMES = ("rtsp", "rtsps", "http", "https", "webcam")
MAX_LENGTH = 2048  # characters; longer ones are no addresses but attempts
_PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443, "mqtt": 1883, "mqtts": 8883}
# Path() turns "rtsp://" into "rtsp:/". One letter before the colon is a drive.
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=:/)(/?)[^\s'\"]*@")
_QUERY = re.compile(r"((?:^|(?<=[\s'\"(]))[a-z][a-z0-9+.-]+:/[^\s?#'\"]*)[?#][^\s'\"]*", re.IGNORECASE)
_MAX_NAME = 64
# fd00:ec2::254 is where one cloud keeps its secrets in IPv6; the others' places are link-local.
_METADATA = (ipaddress.ip_address("fd00:ec2::254"), ipaddress.ip_address("100.100.100.200"))


def redacted(text: object) -> str:
    """The text without user names, passwords and queries of any address in it."""
    return _QUERY.sub(r"\1?***", _USER_INFO.sub(r"\1***@", str(text)))


def scheme_of(spec: str) -> str | None:
    """In lower case; None for what is a path."""
    found = _SCHEME.match(spec)
    return found[1].lower() if found and (len(found[1]) > 1) else None


@dataclass(frozen=True, slots=True)
class Address:
    """An address that may be opened. Its text and repr are redacted; `secret` is the whole.

    host, port: None for a webcam, whose number is `port`.
    """

    scheme: str
    shown: str
    name: str
    host: str | None
    port: int | None
    secret: str = field(repr=False)

    def __str__(self) -> str:
        return self.shown

    @property
    def user(self) -> str | None:
        user = urlsplit(self.secret).username
        return None if user is None else unquote(user)

    @property
    def password(self) -> str | None:
        password = urlsplit(self.secret).password
        return None if password is None else unquote(password)

    @property
    def path(self) -> str:
        return urlsplit(self.secret).path


def parse(spec: str, *, schemes: Sequence[str] = LIVE_SCHEMES) -> Address:
    """Raises ConfigError for a scheme that is not allowed, and for what is no address."""
    scheme = scheme_of(spec)
    if scheme is None or scheme not in schemes:
        raise ConfigError(
            f"{'this' if scheme is None else scheme + ':'} is no address to open here: "
            f"use {', '.join(schemes)}"
        )
    if len(spec) > MAX_LENGTH or any(ord(character) < 33 or ord(character) == 127 for character in spec):
        raise ConfigError(
            f"an address of {len(spec)} characters: it must have at most {MAX_LENGTH}, no spaces and no "
            "control characters (write them as %20 and so on)"
        )
    if scheme == "webcam":
        return _webcam(spec)
    try:
        parts = urlsplit(spec)
        host, port = parts.hostname, parts.port or _PORTS.get(scheme)
    except ValueError as error:  # a port that is no number, brackets that do not close
        raise ConfigError(
            f"{scheme}: address that makes no sense; write {scheme}://host:port/path"
        ) from error
    if not spec[len(scheme) :].startswith("://") or not host:
        raise ConfigError(f"{scheme}: address without a host: write {scheme}://host/path")
    place = f"[{host}]" if ":" in host else host
    where = f"{place}:{parts.port}" if parts.port else place
    shown = f"{scheme}://{'***@' if '@' in parts.netloc else ''}{where}{parts.path}"
    return Address(
        scheme=scheme,
        shown=shown + ("?***" if parts.query or parts.fragment else ""),
        name=file_name(f"{host}{parts.path}"),
        host=host,
        port=port,
        secret=spec,
    )


def _webcam(spec: str) -> Address:
    number = spec.partition(":")[2].lstrip("/")
    if not re.fullmatch(r"[0-9]{1,3}", number):
        raise ConfigError("webcam: wants a number, such as webcam:0")
    shown = f"webcam:{int(number)}"
    return Address(
        scheme="webcam", shown=shown, name=f"webcam-{int(number)}", host=None, port=int(number), secret=shown
    )


def file_name(text: str, fallback: str = "stream") -> str:
    """The text as a part of a file name on any system: letters, digits, dots, dashes, underscores."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:_MAX_NAME].strip(".-")
    if re.fullmatch(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", plain):
        plain = f"_{plain}"  # devices, on Windows
    return plain or fallback


def check_reach(address: Address, *, allow_local: bool) -> None:
    """Raises SourceError where the host is, or resolves to, a place that strangers must not reach through us.

    Those are loopback, link-local (where clouds keep their metadata), multicast and unspecified addresses,
    unless allow_local. To be asked before every connection: names may resolve to something else tomorrow.
    """
    if allow_local or address.host is None:
        return
    for each in _resolve(address.host, address.port):
        mapped = getattr(each, "ipv4_mapped", None)
        if any(map(_is_off_limits, (each, mapped or each))):
            raise SourceError(
                f"{address}: {each} is a loopback, link-local or metadata address, which is not open to "
                "streams added from outside: add it on the command line, or allow local addresses"
            )


def _resolve(host: str, port: int | None) -> list[Any]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise SourceError(f"cannot find the host {host}: check the name, or the network") from error
    return [ipaddress.ip_address(str(place[4][0]).partition("%")[0]) for place in found]


def _is_off_limits(address: Any) -> bool:
    return (
        address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_unspecified
        or address in _METADATA
    )
