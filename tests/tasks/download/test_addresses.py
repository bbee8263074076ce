"""The rule about addresses, as a function; nothing is connected to."""

from __future__ import annotations

import pytest

from tasks.download.fetch import address_is_allowed

PUBLIC = [
    "8.8.8.8",
    "1.1.1.1",
    "151.101.1.69",
    "2606:4700::1111",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
]
NOT_PUBLIC = [
    "127.0.0.1",
    "127.0.0.2",
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.8",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.7",
    "203.0.113.9",
    "224.0.0.1",
    "239.1.1.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fe80::1",
    "fe80::1%eth0",
    "fc00::1",
    "fd12:3456::1",
    "fec0::1",
    "ff02::1",
    "2001:db8::1",
    "100::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::7f00:1",
    "64:ff9b::a00:1",
    "64:ff9b:1::1",
    "2002:7f00:1::",
    "2002:c0a8:101::1",
    "2001:0:0:0:0:0:80ff:fffe",  # Teredo client 127.0.0.1
]


@pytest.mark.parametrize("ip", PUBLIC)
def test_public_addresses_are_allowed(ip: str) -> None:
    assert address_is_allowed(ip)


@pytest.mark.parametrize("ip", NOT_PUBLIC)
def test_addresses_that_are_not_public_are_refused(ip: str) -> None:
    assert not address_is_allowed(ip)


def test_an_allowed_network_opens_itself_and_nothing_else() -> None:
    allowed = ("127.0.0.1/32", "fd00:1::/32")
    assert address_is_allowed("127.0.0.1", allowed)
    assert address_is_allowed("::ffff:127.0.0.1", allowed)
    assert address_is_allowed("fd00:1::5", allowed)
    assert not address_is_allowed("127.0.0.2", allowed)
    assert not address_is_allowed("::1", allowed)
    assert not address_is_allowed("10.0.0.1", allowed)
