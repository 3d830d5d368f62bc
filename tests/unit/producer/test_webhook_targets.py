"""Which addresses webhooks may go to."""

import ipaddress

import pytest

from producer.gateway.webhooks.targets import TargetError, TargetRules, is_public, resolve_host

PRIVATE = [
    *("127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "0.1.2.3"),
    *("100.64.0.1", "192.0.2.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "fe80::1", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "2001:db8::1", "3fff::1", "5f00::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::ffff:224.0.0.1", "::7f00:1"),
    *("64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::1", "2002:7f00:1::", "2001:0:7f00:1::"),
]
PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_inside_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", PUBLIC)
def test_addresses_outside_are(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def rules_of(*addresses: str, allows_private: bool = False) -> TargetRules:
    async def resolve(host: str, port: int) -> list[str]:
        return list(addresses)

    return TargetRules(allows_private=allows_private, resolve=resolve)


async def test_one_private_address_among_public_ones_is_enough_to_refuse() -> None:
    problem = r"at 10\.0\.0\.7, which is not a public address.*--webhook-private-targets .*`promptmill webhooks add`"
    with pytest.raises(TargetError, match=problem):
        await rules_of("8.8.8.8", "10.0.0.7").check("https://example.com/hook")


async def test_private_targets_can_be_allowed() -> None:
    target = await rules_of("10.0.0.7", "10.0.0.7", allows_private=True).check("http://inside:8080/hook?a=b")
    assert target.addresses == ("10.0.0.7",)
    assert (target.url.host, target.url.port, target.url.raw_path) == ("inside", 8080, b"/hook?a=b")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://localhost:6379/",
        "http://2130706433/",  # 127.0.0.1 as one decimal number
        "http://0x7f000001/",
        "http://0177.0.0.1/",
        "http://127.1/",
        "http://0/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:7f00:1]/",
    ],
)
async def test_loopback_is_refused_in_every_spelling(url: str) -> None:
    with pytest.raises(TargetError, match=r"not a public address|is not a valid URL"):
        await TargetRules(allows_private=False).check(url)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://example.com/", "must begin with https:// or http://"),
        ("file:///etc/passwd", "must begin with https:// or http://"),
        ("example.com/hook", "must begin with https:// or http://"),
        ("https:///hook", "name a host"),
        ("https://user:password@example.com/", "no user and password"),
        ("https://example.com/#part", "no fragment"),
        ("https://example.com:99999/", "the port must be 1 to 65535"),
        ("https://exa\tmple.com/", "is not a valid URL"),
        ("https://example.com/" + "a" * 3000, "at most 2048 characters"),
    ],
)
async def test_what_is_no_web_address_is_refused(url: str, reason: str) -> None:
    with pytest.raises(TargetError, match=reason):
        await rules_of("8.8.8.8").check(url)


async def test_a_host_that_cannot_be_resolved_is_refused() -> None:
    with pytest.raises(TargetError, match="has no address"):
        await rules_of().check("https://example.com/")
    with pytest.raises(TargetError, match="cannot be resolved"):
        await TargetRules(allows_private=True).check("http://nowhere.invalid/")


async def test_international_names_are_resolved_as_their_ascii_form() -> None:
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(f"{host}:{port}")
        return ["8.8.8.8"]

    await TargetRules(allows_private=False, resolve=resolve).check("https://exämple.com/")
    assert asked == ["xn--exmple-cua.com:443"]


async def test_the_system_resolves_addresses_to_themselves() -> None:
    assert await resolve_host("127.0.0.1", 80) == ["127.0.0.1"]
