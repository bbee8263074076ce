"""One normal form of hosts and paths, and the published forms of domain blocklists."""

from __future__ import annotations

import pytest

from tasks.web_addresses import normalise_host, normalise_web_address, read_host_entry


@pytest.mark.parametrize(
    ("host", "normal"),
    [
        ("A.Example.", "a.example"),
        ("faß.example", "xn--fa-hia.example"),
        ("１.example。com", "1.example.com"),
        ("ä..example", None),
        ("a" * 63 + "ä.example", None),
        ("", None),
        (".", None),
        ("0x7F.1", "127.0.0.1"),
        ("2130706433.", "127.0.0.1"),
        ("1.2.3.4.5", None),
        ("a.09", None),
        ("[::FFFF:0:0001]", "[::ffff:0:1]"),
        ("[a]", None),
    ],
)
def test_a_host_has_one_normal_form(host: str, normal: str | None) -> None:
    assert normalise_host(host) == normal


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("http://A.example./x/%2e%2E/private/b?q=/../", "http://a.example/private/b?q=/../"),
        ("https://u:p@bücher.example:80/x", "https://u:p@xn--bcher-kva.example:80/x"),
        ("http://[::01]:80/../a", "http://[::1]:80/a"),
        ("http://[::01]/a", "http://[::1]/a"),
        ("data:,x", "data:,x"),
    ],
)
def test_an_address_is_asked_for_in_its_normal_form(url: str, normal: str) -> None:
    assert normalise_web_address(url) == normal


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("bücher.example", ["xn--bcher-kva.example"]),
        (".bad.example", ["bad.example"]),
        ("*.bad.example  # spam", ["bad.example"]),
        ("http://bad.example/", ["bad.example"]),
        ("0.0.0.0 bad.example www.bad.example", ["bad.example", "www.bad.example"]),
        ("||bad.example^", ["bad.example"]),
        ("! title of a list", []),
        ("::1", ["[::1]"]),
        ("||bad.example^$important", ["bad.example"]),
        ("||bad.example^$third-party", None),
        ("address=/bad.example/0.0.0.0", ["bad.example"]),
        ("fe80::1%lo0 localhost", ["localhost"]),
        ("@@||good.example^", None),
        ("bad.example/path", None),
        ("two words", None),
    ],
)
def test_a_line_of_a_domain_blocklist_is_read_or_refused(
    line: str, names: list[str] | None
) -> None:
    assert read_host_entry(line) == names
