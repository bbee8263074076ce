"""The addresses that an untrusted list of URLs may make us connect to.

Covers: the rule, as a pure function of one address.
Not here: resolving names, connecting (tasks/download/fetch.py asks for every connection it opens).
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

_NAT64 = IPv6Network("64:ff9b::/96")
_NEVER_PUBLIC = tuple(
    ip_network(network)
    for network in (
        "100.64.0.0/10",  # carrier-grade NAT
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # 6to4 relays
        "64:ff9b:1::/48",  # local NAT64
        "100::/64",  # discard
    )
)


def address_is_allowed(ip: str, allowed_networks: Sequence[str] = ()) -> bool:
    """Whether `ip` is public, or inside one of `allowed_networks`.

    IPv6 addresses that carry an IPv4 address (mapped, 6to4, Teredo, NAT64) are judged by it, too.
    """
    address = _unmap_address(ip_address(ip.partition("%")[0]))
    if any(address in ip_network(network) for network in allowed_networks):
        return True
    return _is_public(address) and all(map(_is_public, _embedded_addresses(address)))


def _unmap_address(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """`::ffff:a.b.c.d` reaches the host a.b.c.d, so it is that host."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _embedded_addresses(address: IPv4Address | IPv6Address) -> list[IPv4Address]:
    """IPv4 addresses that a gateway may turn this IPv6 address into."""
    if isinstance(address, IPv4Address):
        return []
    found = [address.sixtofour, *(address.teredo or ())]
    if address in _NAT64:
        found.append(IPv4Address(int(address) & 0xFFFFFFFF))
    return [ip for ip in found if ip is not None]


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    # 6to4, Teredo and NAT64 prefixes are no addresses of their own: _carried decides about them
    carrier = bool(_embedded_addresses(address))
    return (
        (carrier or address.is_global)
        and not address.is_multicast
        and not (address.is_reserved and not carrier)
        and not (isinstance(address, IPv6Address) and address.is_site_local)
        and not any(address in network for network in _NEVER_PUBLIC)
    )
