"""The merge in plain Python, row by row: slow, obvious, and written apart from the SQL."""

from __future__ import annotations

import hashlib
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple
from urllib.parse import quote

from tasks.merge.config import FilterConfig, MergeConfig
from tasks.web_addresses import normalise_host

UNRESERVED = string.ascii_letters + string.digits + "-._~"
Row = dict[str, Any]


class Candidate(NamedTuple):
    """A row that passed the filters."""

    address: str
    preference: tuple[Any, ...]
    output: Row


def address_and_url(raw: str) -> tuple[str, str] | None:
    """(what duplicates share, what is fetched), or none when it is no web address."""
    text = re.sub("[\t\n\r]", "", raw.strip("".join(map(chr, range(33)))))
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in ("http", "https"):
        return None
    rest = rest.partition("#")[0]
    end = min((rest.index(mark) for mark in "/?" if mark in rest), default=len(rest))
    host, port = _host_and_port(rest[:end])
    if host is None or port == "bad":
        return None
    shown = "" if port == {"http": "80", "https": "443"}[scheme] or not port else f":{port}"
    path = rest[end:] if rest[end:].startswith("/") else "/" + rest[end:]
    address = host + shown + _path(path)
    return address, f"{scheme}://{address}"


def _host_and_port(authority: str) -> tuple[str | None, str]:
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:@\[\]\\]+)(?::([0-9]{0,5}))?", authority)
    if not match:
        return None, ""
    host, port = match[1].lower(), match[2] or ""
    if port and not 1 <= int(port) <= 65535:
        return None, "bad"
    if host.startswith("[") or re.fullmatch(r"[0-9]+|0x[0-9a-f]*", host.rstrip(".").split(".")[-1]):
        host = normalise_host(match[1])  # type: ignore[assignment]
    else:
        named = host.removesuffix(".") if host.isascii() else normalise_host(match[1])
        if named is None or not re.fullmatch(r"[a-z0-9._-]+", named) or named.endswith("."):
            return None, ""
        host = named
    return host, str(int(port)) if port else ""


def _path(path: str) -> str:
    def escape(match: re.Match[str]) -> str:
        letter = chr(int(match[0][1:], 16))
        return letter if letter in UNRESERVED else match[0].upper()

    path = re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", path)
    path = re.sub(r"%[0-9A-Fa-f]{2}", escape, path)
    path, mark, query = quote(path, safe=UNRESERVED + "!$&'()*+,;=:@/?%").partition("?")
    walked = ""
    while path:
        if path.startswith("/../") or path == "/..":
            path, walked = "/" + path[4:], walked.rpartition("/")[0]
        elif path.startswith("/./") or path == "/.":
            path = "/" + path[3:]
        else:
            piece = re.match("/[^/]*", path)[0]  # type: ignore[index]
            path, walked = path[len(piece) :], walked + piece
    return walked + mark + query


def tidy(caption: str) -> str:
    """White space and control characters as single spaces."""
    kinds = (unicodedata.category(letter) for letter in caption)
    spaced = "".join(
        " " if kind[0] == "Z" or kind == "Cc" else letter
        for letter, kind in zip(caption, kinds, strict=True)
    )
    return re.sub(" +", " ", spaced).strip(" ")


class Blocked(NamedTuple):
    """The entries of the blocklists."""

    urls: Sequence[str] = ()
    domains: Sequence[str] = ()
    hashes: Sequence[str] = ()


NOTHING_BLOCKED = Blocked()


def blocked(row: Row, lists: Blocked) -> str | None:
    """Which blocklist a row with a good URL is on."""
    address, url = address_and_url(row["url"])  # type: ignore[misc]
    if address in {found[0] for found in map(address_and_url, lists.urls) if found}:
        return "blocked_url"
    host = re.match(r"\[[^\]]*\]|[^/:]*", address)[0]  # type: ignore[index]
    labels = host.split(".")
    above = {".".join(labels[place:]) for place in range(len(labels))}
    if above & {domain.lower() for domain in lists.domains}:
        return "blocked_domain"
    marks = {
        algorithm(text.encode()).hexdigest()
        for algorithm in (hashlib.md5, hashlib.sha256)
        for text in (url, row["url"])
    }
    marks.add((row.get("image_hash") or "").strip(" ").lower())
    return "blocked_hash" if marks & {entry.lower() for entry in lists.hashes} else None


def reason(row: Row, filters: FilterConfig, has: set[str], lists: Blocked) -> str | None:
    """The first rule, in the documented order, that a row with common names fails."""
    if not (row["url"] or "").strip("".join(map(chr, range(33)))):
        return "missing_url"
    if address_and_url(row["url"]) is None:
        return "unsupported_url"
    listed = blocked(row, lists)
    if listed:
        return listed
    caption = tidy(row["caption"] or "")
    if not caption:
        return "missing_caption"
    if len(caption) < filters.min_caption_chars:
        return "short_caption"
    if filters.max_caption_chars is not None and len(caption) > filters.max_caption_chars:
        return "long_caption"
    if filters.languages and "language" in has:
        language = (row["language"] or "").strip(" ")
        if language and language not in filters.languages:
            return "language"
        if not language and filters.unknown_language == "drop":
            return "unknown_language"
    sides = [side for side in (row["width"], row["height"]) if side is not None and side > 0]
    if sides and filters.min_side is not None and min(sides) < filters.min_side:
        return "small_image"
    if sides and filters.max_aspect is not None and max(sides) > filters.max_aspect * min(sides):
        return "extreme_aspect"
    if filters.min_similarity is not None and "similarity" in has:
        similarity = _cosine(row["similarity"])
        if similarity is None and filters.unknown_similarity == "drop":
            return "unknown_similarity"
        if similarity is not None and similarity < filters.min_similarity:
            return "low_similarity"
    scores = row["unsafe_scores"]
    limit = filters.max_unsafe
    if limit is not None and any(score is not None and score > limit for score in scores):
        return "unsafe"
    tags = [(tag or "").strip(" ").upper() for tag in row["unsafe_tags"]]
    if any(tag in filters.unsafe_tags for tag in tags):
        return "unsafe"
    if filters.unknown_unsafe == "drop":
        known = {"UNLIKELY", "UNSURE", "NSFW", *filters.unsafe_tags}
        if limit is not None and None in scores:
            return "unknown_unsafe"
        if filters.unsafe_tags and any(tag not in known for tag in tags):
            return "unknown_unsafe"
    if filters.max_watermark is not None and "watermark" in has:
        if row["watermark"] is not None and row["watermark"] > filters.max_watermark:
            return "watermark"
        if row["watermark"] is None and filters.unknown_watermark == "drop":
            return "unknown_watermark"
    return None


def _cosine(value: float | None) -> float | None:
    return value if value is not None and not math.isnan(value) and -1 <= value <= 1 else None


def merge(
    config: MergeConfig,
    rows: Mapping[str, Sequence[Sequence[Row]]],
    has: Mapping[str, set[str]],
    lists: Blocked = NOTHING_BLOCKED,
    cleaned: Mapping[str, set[str]] | None = None,
    entries: Sequence[str] = (),
) -> tuple[dict[str, list[Row]], dict[str, Counter[str]]]:
    """(selected rows of every source in order, dropped rows of every source by reason).

    `rows`: source name -> files -> rows with common names; `has`: the columns a source has;
    `cleaned`: source name -> addresses of the edition it is compared with; `entries`: by which
    `config.balance` balances.
    """
    compared = cleaned or {}
    survivors: dict[str, dict[str, Candidate]] = {}
    dropped = {source.name: Counter[str]() for source in config.sources}
    taken: set[str] = set()
    unique: dict[str, list[Candidate]] = {}
    selected: dict[str, list[Candidate]] = {}
    for source in config.sources:
        best: dict[str, Candidate] = {}
        for file, content in enumerate(rows[source.name]):
            for place, row in enumerate(content):
                why = reason(row, config.filters, has[source.name], lists)
                if why:
                    dropped[source.name][why] += 1
                    continue
                candidate = _candidate(source.name, row, (file, place))
                if candidate.address not in compared.get(source.name, {candidate.address}):
                    dropped[source.name]["withdrawn"] += 1
                    continue
                rival = best.get(candidate.address)
                if rival is not None:
                    dropped[source.name]["duplicate_in_source"] += 1
                if rival is None or candidate.preference < rival.preference:
                    best[candidate.address] = candidate
        survivors[source.name] = best
        fresh = [value for key, value in best.items() if key not in taken]
        dropped[source.name]["duplicate_across_sources"] += len(best) - len(fresh)
        taken |= set(best)
        unique[source.name] = fresh
    if config.balance:
        balance(unique, dropped, entries, config.balance.t)
    for source in config.sources:
        fresh = sorted(unique[source.name], key=lambda one: rank(config.seed, one.address))
        left = fresh[source.skip_count :]
        wanted = source.target_count and math.ceil(source.target_count / source.expected_success)
        chosen = left[:wanted]
        dropped[source.name]["given_before"] += len(fresh) - len(left)
        dropped[source.name]["not_selected"] += len(left) - len(chosen)
        selected[source.name] = chosen
    outputs = {
        name: [
            {
                **candidate.output,
                "also_in": ",".join(
                    other
                    for other, best in survivors.items()
                    if other != name and candidate.address in best
                ),
            }
            for candidate in chosen
        ]
        for name, chosen in selected.items()
    }
    return outputs, {name: +counts for name, counts in dropped.items()}


def balance(
    rows: dict[str, list[Candidate]],
    dropped: Mapping[str, Counter[str]],
    entries: Sequence[str],
    t: int,
) -> None:
    """Take out of `rows` what MetaCLIP's balancing drops."""
    everyone = [one for candidates in rows.values() for one in candidates]
    held = {one.address: held_entries(one.output["caption"], entries) for one in everyone}
    counts = Counter(entry for found in held.values() for entry in found)
    for name, candidates in rows.items():
        kept = []
        for one in candidates:
            found = held[one.address]
            if any(draw(one.output["uid"], entry) * counts[entry] < t for entry in found):
                kept.append(one)
            else:
                dropped[name]["too_frequent" if found else "no_entry"] += 1
        rows[name] = kept


def held_entries(caption: str, entries: Sequence[str]) -> list[str]:
    """MetaCLIP's published rule: an entry between spaces in the caption between spaces, after
    spaces are put around its punctuation marks."""
    spaced = re.sub("([,.;:?!`])", r" \1 ", f" {caption} ")
    return [entry for entry in entries if f" {entry} " in spaced]


def draw(uid: str, entry: str) -> float:
    """A number in [0, 1) for a row and an entry."""
    bits = int(uid[:16], 16) ^ int(hashlib.md5(entry.encode()).hexdigest()[:16], 16)
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
    return ((bits ^ bits >> 31) >> 11) / 2**53


def derive_entries(captions: Sequence[str], wanted: int) -> list[str]:
    """The words, and pairs of words side by side, that most of the captions hold."""
    counts = Counter[str]()
    for caption in captions:
        words = re.sub("([,.;:?!`])", r" \1 ", caption).split(" ")
        runs = {*words, *map(" ".join, pairwise(words))}
        counts.update(run for run in runs if all(map(_has_letter_or_digit, run.split(" "))))
    return sorted(counts, key=lambda entry: (-counts[entry], entry.encode()))[:wanted]


def _has_letter_or_digit(word: str) -> bool:
    return any(unicodedata.category(letter)[0] in "LN" for letter in word)


def rank(seed: int, address: str) -> str:
    return hashlib.md5(f"{seed}:{address}".encode()).hexdigest()


def _candidate(source: str, row: Row, place: tuple[int, int]) -> Candidate:
    found = address_and_url(row["url"])
    assert found is not None
    address, url = found
    caption = tidy(row["caption"])
    similarity = _cosine(row["similarity"])
    identity = None if row["id"] is None else str(row["id"])
    output = {
        "uid": hashlib.md5(f"{address}\n{caption}".encode()).hexdigest(),
        "source": source,
        "url": url,
        "caption": caption,
        "original_id": identity,
        "similarity": similarity,
        "width_hint": row["width"] if (row["width"] or 0) > 0 else None,
        "height_hint": row["height"] if (row["height"] or 0) > 0 else None,
    }
    preference = (
        math.inf if similarity is None else -similarity,
        identity is None,
        identity or "",
        place,
    )
    return Candidate(address, preference, output)
