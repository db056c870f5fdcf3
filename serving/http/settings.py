"""The settings of a server."""

import ipaddress
import math
import re
from dataclasses import dataclass, field

from hashtab.serving.http.errors import SettingsError

_TOKEN = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a service is served.

    Args:
        host: name or address to listen at; one that other machines can reach needs a token.
        port: to listen at; 0 takes a free one, which the log names.
        token: that protected endpoints ask for as `Authorization: Bearer ...`; None asks for none.
        processes: that share the port, each with its own service; one a core is right.
        max_body_bytes: of a request; longer ones get 413.
        max_waiting: calls that wait for their turn to work, in a process; more get 429.
        deadline_ms: milliseconds after which a call that still waits gets 503; a request may ask
            for less by the header `Request-Timeout-Ms`.
        drain_s: seconds that calls in flight have to finish after SIGTERM.

    Raises:
        SettingsError: naming the setting that cannot be used.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    processes: int = 1
    max_body_bytes: int = 4 << 20
    max_waiting: int = 64
    deadline_ms: float = 1000.0
    drain_s: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise SettingsError(f"port must be between 0 and 65535, got {self.port}")
        for name in ("processes", "max_body_bytes", "max_waiting"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("deadline_ms", "drain_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise SettingsError(f"{name} must be a positive number, got {value}")
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            raise SettingsError(
                "token must be printable ASCII without spaces, and not empty; "
                "`openssl rand -hex 32` makes a good one"
            )
        if self.token is None and not is_loopback(self.host):
            raise SettingsError(
                f"host {self.host} can be reached from other machines, and there is no token: "
                "set HASHTAB_TOKEN or --token-file, or listen at 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach a host; of names only localhost counts."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
