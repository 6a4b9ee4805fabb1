"""Where requests go: a URL taken apart once, and the rule that a load test hits this machine unless told otherwise."""

import ipaddress
import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from ard_serve.errors import UsageError


@dataclass(frozen=True)
class Address:
    """Scheme, host, port and path prefix of a server, with the key that every request carries."""

    scheme: str
    host: str
    port: int
    prefix: str
    api_key: str = ""

    @property
    def authority(self) -> str:
        """Host and port as a URL and a Host header write them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def base(self) -> str:
        """The address as a URL without a trailing slash."""
        return f"{self.scheme}://{self.authority}{self.prefix}"

    @property
    def headers(self) -> dict[str, str]:
        """Headers every request carries."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


def parse_address(url: str, allow_host: str = "", api_key_env: str = "") -> Address:
    """Take a server's URL apart; a trailing `/v1` is accepted and dropped.

    Raises:
        UsageError: not an http(s) URL, or a host other than this machine that `allow_host` does not name.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port
    except ValueError:
        raise UsageError(f"{url}: the port is not a number up to 65535") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{url}: not an http or https address; write it as http://127.0.0.1:8000")
    if not _is_loopback(parts.hostname) and parts.hostname != allow_host:
        raise UsageError(
            f"{parts.hostname}: not this machine, and a load test can take a server down; add --allow-host {parts.hostname}"
        )
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    default_port = 443 if parts.scheme == "https" else 80
    return Address(parts.scheme, parts.hostname, port or default_port, prefix, os.environ.get(api_key_env, ""))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
