"""The socket that a gateway listens on, for the gateway itself and for whoever starts one."""

import errno
import os
import socket

from producer.errors import PortTakenError, SettingsError


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens: from here on nobody else gets the port, and clients wait until they are served.

    `::` takes IPv4 as well; of a name's addresses the first of IPv4 counts, if it has one. Raises PortTakenError, or
    SettingsError for what can never be listened on.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
        return socket.create_server(address, family=family, dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6())
    except (OSError, UnicodeError) as error:  # the latter of a name that is none
        raise _explained(error, host, port) from error


def _explained(error: OSError | UnicodeError, host: str, port: int) -> PortTakenError | SettingsError:
    number = error.errno if isinstance(error, OSError) and not isinstance(error, socket.gaierror) else None
    if number == errno.EADDRINUSE:
        return PortTakenError(f"port {port} is taken: stop what listens there, or pass another --http-port")
    if number == errno.EACCES:
        return SettingsError(f"--http-port {port}: only root may listen below 1024; pass another")
    reason = os.strerror(number) if number is not None else getattr(error, "strerror", None) or error
    return SettingsError(f"--http-host {host}: {reason}; name an address of this machine")
