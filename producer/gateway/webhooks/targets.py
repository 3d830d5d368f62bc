"""Where webhooks may go: http(s) URLs whose every address is a public one. Sends nothing.

The host is resolved and checked when an endpoint is registered, and again before each request, which then goes to the
very address that was checked: a name that answers differently the second time gains nothing.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx2

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], Awaitable[list[str]]]  # host and port to addresses

MAX_URL_CHARS = 2048
RESOLVE_SECONDS = 5.0
DEFAULT_PORTS = {"http": 80, "https": 443}

_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # an IPv4 address in its last 32 bits, as networks without IPv4 give it
_NEVER_PUBLIC = (ipaddress.ip_network("2002::/16"), ipaddress.ip_network("3fff::/20"))  # 6to4, documentation


class TargetError(ValueError):
    """The URL may not be called; the message says why, and begins with `url`."""


@dataclass(frozen=True, slots=True)
class Target:
    """A URL, and the addresses of its host that were checked."""

    url: httpx2.URL
    addresses: tuple[str, ...]


class TargetRules:
    """`allows_private`: machines of one's own network may be called as well; for trusted callers alone."""

    def __init__(self, *, allows_private: bool, resolve: Resolver | None = None) -> None:
        self._allows_private = allows_private
        self._resolve = resolve or resolve_host

    async def check(self, text: str) -> Target:
        """Raises TargetError."""
        url = _parse(text)
        host = url.raw_host.decode("ascii")
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                addresses = await self._resolve(host, url.port or DEFAULT_PORTS[url.scheme])
        except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
            raise TargetError(f"url: the host {host} cannot be resolved: {_reason(error)}") from error
        if not addresses:
            raise TargetError(f"url: the host {host} has no address")
        for address in addresses:
            if not self._allows_private and not is_public(ipaddress.ip_address(address)):
                raise TargetError(
                    f"url: the host {host} is at {address}, which is not a public address; with "
                    "--webhook-private-targets gateways and `promptmill webhooks add` take those, too"
                )
        return Target(url, tuple(dict.fromkeys(addresses)))


async def resolve_host(host: str, port: int) -> list[str]:
    """As the system does it, which also reads the odd forms of addresses (decimal, octal, short)."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def is_public(address: Address) -> bool:
    """Neither loopback, private, link-local, multicast nor reserved, also where IPv6 wraps an IPv4 address."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast and not address.is_reserved
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    if address in _NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    is_special = any(address in network for network in _NEVER_PUBLIC)
    return address in _GLOBAL_UNICAST and address.is_global and not is_special


def _parse(text: str) -> httpx2.URL:
    if len(text) > MAX_URL_CHARS:
        raise TargetError(f"url: must have at most {MAX_URL_CHARS} characters; got {len(text)}")
    try:
        url = httpx2.URL(text)
    except (httpx2.InvalidURL, UnicodeError) as error:
        raise TargetError(f"url: is not a valid URL: {error}") from error
    if url.scheme not in DEFAULT_PORTS or not url.host:
        raise TargetError(f"url: must begin with https:// or http:// and name a host; got {text[:80]!r}")
    if url.port is not None and not 0 < url.port <= 65535:
        raise TargetError(f"url: the port must be 1 to 65535; got {url.port}")
    if url.userinfo:
        raise TargetError("url: must hold no user and password; receivers check the signature")
    if url.fragment:
        raise TargetError("url: must have no fragment (#…); it would not be sent")
    return url


def _reason(error: BaseException) -> str:
    return f"no answer within {RESOLVE_SECONDS:.0f} s" if isinstance(error, TimeoutError) else str(error)
