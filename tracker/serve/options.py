"""Where to listen, and who may come in."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tracker.errors import ConfigError

TOKEN_VARIABLE = "TRACK_TOKEN"
LEAST_TOKEN = 16  # characters


def is_loopback(host: str) -> bool:
    """Whether only this machine can get there; host without brackets."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """host, port: to listen at; port 0 is any free one. token: what everybody has to show who wants more than
    to know whether the run is alive; None lets anybody in who is on this machine. allow_local: cameras added
    through the API may be on this machine and on link-local addresses.

    Raises ConfigError for a token too short, and for an open door to the network.
    """

    host: str
    port: int
    token: str | None = field(default=None, repr=False)
    allow_local: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"serve: port {self.port} must lie between 0 and 65535")
        if self.token is None and not is_loopback(self.host):
            raise ConfigError(
                f"serve: {self.host} is open to the network, which demands a token: put one of {LEAST_TOKEN} "
                f"characters or more into the environment variable {TOKEN_VARIABLE} (openssl rand -hex 16)"
            )
        if self.token is not None and (
            len(self.token) < LEAST_TOKEN or not self.token.isascii() or not self.token.isprintable()
        ):
            raise ConfigError(
                f"serve: the token must have {LEAST_TOKEN} printable ASCII characters or more, this has "
                f"{len(self.token)}: openssl rand -hex 16 makes a good one"
            )


def take_options(values: dict[str, Any], environment: Mapping[str, str] = os.environ) -> ServeOptions | None:
    """Out of all the options of a run, those that begin with "serve"; None if it is not to be served.

    Raises ConfigError for values of the wrong kind, and for a variable that is not set.
    """
    where = values.pop("serve", None)
    variable = values.pop("serve_token_env", None)
    allow_local = values.pop("serve_allow_local", False)
    if where is None:
        if variable is not None or allow_local:
            raise ConfigError("--serve-token-env and --serve-allow-local are for --serve HOST:PORT")
        return None
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})", str(where))
    if found is None:
        raise ConfigError(f"serve is {str(where)[:80]!r}; it must be HOST:PORT, such as 127.0.0.1:8080")
    if not isinstance(allow_local, bool) or not isinstance(variable, str | None):
        raise ConfigError("serve_allow_local must be true or false, serve_token_env a variable's name")
    if variable is not None and not environment.get(variable):
        raise ConfigError(f"the environment variable {variable} is not set: it should hold the page's token")
    return ServeOptions(
        host=found[1] or found[2],
        port=int(found[3]),
        token=environment.get(variable or TOKEN_VARIABLE) or None,
        allow_local=allow_local,
    )
