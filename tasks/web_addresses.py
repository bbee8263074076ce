"""The normal form of hosts (UTS #46 without transitional mappings, as in browsers) and paths
(RFC 3986, 5.2.4), for every stage that compares or asks for addresses."""

import ipaddress
import re
import socket
from urllib.parse import urlsplit

import idna

_ASCII_HOST = re.compile(r"[a-z0-9._-]*[a-z0-9_-]")
_LONGEST_LABEL = 63
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_HOST_RULE = re.compile(
    r"\|\|(?:\*\.)?([^/^$|*]+)\^?\|?(?:\$(?:important|all|document|doc))?"
    r"|(?:address|server|local)=/([^/]+)/\S*"
)
_COMMENT = re.compile(r"(?:^|\s)#.*")


def normalise_host(host: str) -> str | None:
    """A host name in lower-case ASCII without the root's dot, an IP address in its usual spelling
    (`0x7f.1` is `127.0.0.1`); none when it has no such form."""
    name = host.lower()
    if name.startswith("["):
        address = _parse_address(name.strip("[]"))
        if not isinstance(address, ipaddress.IPv6Address):
            return None
        low = int(address) & 0xFFFFFFFF  # since 3.13 Python writes it with dots
        mapped = f"::ffff:{low >> 16:x}:{low & 0xFFFF:x}"
        return f"[{mapped if address.ipv4_mapped else address.compressed}]"
    if not name.isascii():
        try:
            mapped = idna.uts46_remap(host, std3_rules=False, transitional=False)
            labels = [
                label if label.isascii() else f"xn--{label.encode('punycode').decode()}"
                for label in mapped.split(".")
            ]
        except UnicodeError:
            return None
        if any(len(label) > _LONGEST_LABEL for label in labels) or not all(labels[:-1]):
            return None
        name = ".".join(labels).lower()
    name = name.removesuffix(".")
    if not _ASCII_HOST.fullmatch(name):
        return None
    if _NUMBER.fullmatch(name.rpartition(".")[2]):  # as in a browser; a top-level domain is a word
        try:
            return socket.inet_ntoa(socket.inet_aton(name))
        except OSError:
            return None
    return name


def remove_dot_segments(path: str) -> str:
    """A path with its query, `.` and `..` carried out; it begins with a slash."""
    path, question, query = path.partition("?")
    kept: list[str] = []
    segments = path.split("/")[1:]
    for segment in segments:
        if segment == "..":
            kept[-1:] = []
        elif segment != ".":
            kept.append(segment)
    if segments[-1] in (".", ".."):
        kept.append("")
    return f"/{'/'.join(kept)}{question}{query}"


def normalise_web_address(url: str) -> str:
    """`url` with its host and path in normal form; as it is where they are already, or have none.
    ValueError: it cannot be taken apart."""
    parts = urlsplit(url)
    if not parts.netloc:
        return url
    credentials, at, authority = parts.netloc.rpartition("@")
    name, colon, port = authority.partition(":")
    if authority.startswith("["):
        name, colon, port = re.match(r"([^]]*]?)(:?)(.*)", authority).groups()  # type: ignore[union-attr]
    host = normalise_host(name)
    netloc = f"{credentials}{at}{host}{colon}{port}" if host else parts.netloc
    path = re.sub("%2e", ".", parts.path, flags=re.IGNORECASE)
    if not re.search(r"/\.\.?(?:/|$)", path):
        path = parts.path
    elif path.startswith("/"):
        path = remove_dot_segments(path)
    return parts._replace(netloc=netloc, path=path).geturl()


def read_host_entry(line: str) -> list[str] | None:
    """The host names that a line of a domain blocklist means; none when it cannot be understood.
    Known are plain names, `.name` or `*.name`, hosts files (an address, then names), addresses of
    sites, rules of ad blockers for whole hosts (`||name^`, `||name^$important`) and of dnsmasq
    (`address=/name/0.0.0.0`), with comments behind # or !."""
    words = [] if line.startswith(("!", "[Adblock")) else _COMMENT.sub("", line).split()
    if len(words) > 1:
        if not _parse_address(words[0]):
            return None
        words = words[1:]
    names = []
    for word in words:
        rule = _HOST_RULE.fullmatch(word)
        word = rule[1] or rule[2] if rule else word.removeprefix("*").removeprefix(".")
        scheme, separator, rest = word.partition("://")
        if separator:
            word = rest.removesuffix("/") if scheme.lower() in ("http", "https") else ""
        bare = word.strip("[]")
        name = normalise_host(f"[{bare}]" if ":" in bare else word)
        if name is None:
            return None
        names.append(name)
    return names


def _parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
