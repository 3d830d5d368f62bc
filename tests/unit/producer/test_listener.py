"""The socket that a gateway listens on: addresses of both families, and what cannot be listened on."""

import socket

import pytest

from producer.errors import PortTakenError, SettingsError
from producer.listener import listen

has_ipv6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="the machine has no IPv6")


def reaches(listener: socket.socket, host: str) -> bool:
    try:
        socket.create_connection((host, listener.getsockname()[1])).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("127.0.0.1", {"127.0.0.1"}),
        ("localhost", {"127.0.0.1"}),
        ("0.0.0.0", {"127.0.0.1"}),
        pytest.param("::1", {"::1"}, marks=has_ipv6),
        pytest.param("::", {"127.0.0.1", "::1"}, marks=has_ipv6),
    ],
)
def test_a_host_is_listened_on_at_its_own_addresses(host: str, reached: set[str]) -> None:
    with listen(host, 0) as listener:
        assert {address for address in ("127.0.0.1", "::1") if reaches(listener, address)} == reached


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", pytest.param("::", marks=has_ipv6)])
def test_a_port_that_somebody_else_has_is_told_apart(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"^port {port} is taken: .* another --http-port$"):
            listen(host, port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "a..b", ""])
def test_a_host_that_is_none_of_this_machines_is_named(host: str) -> None:
    with pytest.raises(SettingsError, match=f"^--http-host {host}: .+; name an address of this machine$"):
        listen(host, 0)
