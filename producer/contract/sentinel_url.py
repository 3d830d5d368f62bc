"""The URL of a Redis that Sentinels watch over, which redis-py has no form of. Opens no connection."""

import re
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import parse_qsl, unquote

SCHEMES = ("redis+sentinel", "rediss+sentinel")
DEFAULT_PORT = 26379
FORM = "redis+sentinel://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]…]/SERVICE[/DB]"
TLS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs")
_PARTS = re.compile(r"([^/?#]*)([^?#]*)(?:\?([^#]*))?")  # hosts and login, path, query; matches any text


@dataclass(frozen=True, slots=True)
class SentinelUrl:
    """Where the Sentinels are, and which of their services is ours. User and password are the Redis servers'; with
    rediss+sentinel:// TLS is spoken with these and with the Sentinels."""

    sentinels: tuple[tuple[str, int], ...]
    service: str
    options: dict[str, Any]
    """Of a connection to the master, by redis-py's names."""
    tls: dict[str, Any]
    """What of them is for a connection to a Sentinel, too: nothing without TLS."""

    @classmethod
    def parse(cls, url: str) -> Self | None:
        """None for any other URL. Raises ValueError for one that names Sentinels and is not whole."""
        scheme, _, rest = url.partition("://")
        if scheme not in SCHEMES:
            return None
        # Not by urlsplit, which takes one host: an IPv6 address among several is refused since Python 3.14.
        place, path, query = _PARTS.match(rest).groups("")  # type: ignore[union-attr]
        login, _, hosts = place.rpartition("@")
        service, _, db = path.strip("/").partition("/")
        if not service or (db and not db.isdigit()):
            raise ValueError(f"a URL of Sentinels has the form {FORM}")
        tls = _tls_options(query, has_tls=scheme == "rediss+sentinel")
        user, _, password = login.partition(":")
        options = {
            "db": int(db or 0),
            "username": unquote(user) or None,
            "password": unquote(password) or None,
            **tls,
        }
        return cls(tuple(map(_address, hosts.split(","))), service, options, tls)


def _tls_options(query: str, *, has_tls: bool) -> dict[str, Any]:
    named = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := [name for name in named if not has_tls or name not in TLS_OPTIONS]:
        takes = (
            f"the options {', '.join(TLS_OPTIONS)}"
            if has_tls
            else "no options; those of TLS go with rediss+sentinel://"
        )
        raise ValueError(f"a URL of Sentinels takes {takes}; got {unknown[0]}")
    return {"ssl": True, **named} if has_tls else {}


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":") if text.rpartition(":")[2].isdigit() else (text, "", "")
    if not host:
        raise ValueError(f"{text!r} is not the address of a Sentinel: a URL of Sentinels has the form {FORM}")
    return host.strip("[]"), int(port or DEFAULT_PORT)
