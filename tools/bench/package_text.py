"""Readers of plain text from a package's files, one for each format of documentation."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

from ddk_ds.errors import DataError

Format = Literal["text", "html", "man", "json", "metamath", "r_data", "sword"]

_SKIPPED_TAGS = frozenset({"head", "script", "style", "nav", "header", "footer", "aside", "svg", "noscript", "note"})
_SKIPPED_CLASSES = frozenset(
    {"sphinxsidebar", "related", "headerlink", "prev-next-area", "navheader", "navfooter", "toc"}
)
_BLOCK_TAG = re.compile(
    "p|li|ul|ol|dl|dd|dt|h[1-6]|div|tr|table|pre|br|section|article|blockquote|title|chapter|lg|l"  # OSIS
)
_ARTICLE = re.compile(r"<(article|main)\b.*</\1>", re.DOTALL | re.IGNORECASE)
_BLANKS = re.compile(r"[ \t\r\n\f\v]+")
_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")  # the next line keeps its indentation
_LINE_ENDS = re.compile(r"[ \t]+(?=\n)")


def read_text(path: Path, form: Format, keys: Sequence[str] = ()) -> str | None:
    """Read a file's text; return None if it is not UTF-8. Files with suffix `.gz` and `.dz` are decompressed.

    Args:
        form: `text`, unchanged; `html`, without tags, navigation and scripts; `man`, without roff's macros; `json`,
            the strings under `keys`; `metamath`, without proofs; `r_data`, the strings of an R database (`.rdb`);
            `sword`, a SWORD text of blocks compressed by zlib, in OSIS markup.

    Raises:
        DataError: the file is damaged.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix in (".gz", ".dz") else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    try:
        if form == "r_data":
            return tidy("\n\n".join(map(_r_strings, _zlib_streams(data))))
        if form == "sword":
            return tidy("\n\n".join(strip_html(block.decode()) for block in _zlib_streams(data)))
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    if form == "json":
        try:
            return tidy("\n".join(_json_lines(json.loads(text), keys)))
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not JSON: {error}") from error
    return tidy(_CLEANERS[form](text))


def tidy(text: str) -> str:
    """Remove blanks at the ends of lines, and leave one blank line between paragraphs."""
    return _BLANK_LINES.sub("\n\n", _LINE_ENDS.sub("", text.replace("\r\n", "\n"))).strip("\n").rstrip()


def strip_html(text: str) -> str:
    """Return the visible text of a page, a line per block, without navigation, scripts and footnotes.

    If the page marks an article, only the article's text is returned.
    """
    article = _ARTICLE.search(text)
    text = article[0] if article else text
    page = _Page()
    page.feed(text)
    page.close()
    return "".join(page.parts)


class _Page(HTMLParser):
    """A parser that collects the visible text of HTML, or of XML that resembles it."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipped: str | None = None  # the tag whose content is skipped, and the number of open tags of its kind
        self._depth = 0
        self._verbatim = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if self._skipped:
            self._depth += tag == self._skipped
            return
        classes = set((dict(attributes).get("class") or "").split())
        if tag in _SKIPPED_TAGS or classes & _SKIPPED_CLASSES:
            self._skipped, self._depth = tag, 1
            self.parts.append(" ")
        elif _BLOCK_TAG.fullmatch(tag):
            self.parts.append("\n")
        self._verbatim += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            self._depth -= tag == self._skipped
            if self._depth == 0:
                self._skipped = None
            return
        if _BLOCK_TAG.fullmatch(tag):
            self.parts.append("\n")
        self._verbatim = max(0, self._verbatim - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.parts.append(data if self._verbatim else _BLANKS.sub(" ", data))


_ROFF_COMMENT = re.compile(r"^[.'][ \t]*\\[\"#].*$", re.MULTILINE)
_ROFF_ESCAPE = re.compile(r"\\(?:f(?:\[[^\]]*\]|\(..|.)|s[+-]?\d+|\((..)|(.))")
_ROFF_MACRO = re.compile(r"^[.'][ \t]*([A-Za-z]+)[ \t]*(.*)$", re.MULTILINE)
_ROFF_CHARACTERS = {
    "-": "-",
    "e": "\\",
    " ": " ",
    ".": ".",
    "'": "'",
    "aq": "'",
    "bu": "*",
    "em": "\u2014",
    "en": "\u2013",
}
_ROFF_WITH_TEXT = re.compile("SH|SS|B|I|BR|RB|BI|IB|IR|RI|SM|IP|Sh|Ss|Nm|Fl|Ar|Op|Nd|Xr|Pa|It")


def _strip_roff(text: str) -> str:
    def macro(match: re.Match[str]) -> str:
        name, rest = match.groups()
        return rest.replace('"', "") if _ROFF_WITH_TEXT.fullmatch(name) else ""

    def character(match: re.Match[str]) -> str:
        return _ROFF_CHARACTERS.get(match[1] or match[2] or "", "")

    return _ROFF_ESCAPE.sub(character, _ROFF_MACRO.sub(macro, _ROFF_COMMENT.sub("", text)))


def _strip_proofs(text: str) -> str:
    """Return Metamath's comments and statements, without the proofs `$= ... $.`, which are labels."""
    return re.sub(r"\$=.*?\$\.", "$.", text, flags=re.DOTALL)


_CLEANERS: dict[str, Callable[[str], str]] = {
    "text": str,
    "html": strip_html,
    "man": _strip_roff,
    "metamath": _strip_proofs,
}


def _zlib_streams(data: bytes) -> Iterator[bytes]:
    """Yield the zlib streams in a file, in order; bytes between them, such as R's lengths, are skipped."""
    start = data.find(b"x\x9c")
    while start >= 0:
        stream = zlib.decompressobj()
        try:
            block = stream.decompress(data[start:])
        except zlib.error:  # the two bytes did not begin a stream
            start = data.find(b"x\x9c", start + 1)
            continue
        yield block
        start = data.find(b"x\x9c", len(data) - len(stream.unused_data)) if stream.eof else -1


def _r_strings(data: bytes) -> str:
    """Return the first vector of strings in a serialized R object, one per line.

    A vector is its type (16) and length, a string its flags (the low byte 9) and length, -1 for NA, and its bytes; all
    numbers big-endian, four bytes.
    """
    start = data.find(b"\x00\x00\x00\x10")
    if start < 0:
        return ""
    lines, position = [], start + 8
    for _ in range(int.from_bytes(data[start + 4 : position], "big")):
        length = int.from_bytes(data[position + 4 : position + 8], "big", signed=True)
        position += 8 + max(0, length)
        lines.append(data[position - length : position].decode() if length > 0 else "")
    return "\n".join(lines)


def _json_lines(value: Any, keys: Sequence[str]) -> Iterator[str]:
    """Yield the strings under `keys` in their order, then those of deeper levels, with their key as a heading."""
    if isinstance(value, list):
        for item in value:
            yield from _json_lines(item, keys)
    elif isinstance(value, dict):
        for key in (key for key in keys if key in value):
            texts = value[key] if isinstance(value[key], list) else [value[key]]
            yield from (tidy(strip_html(text)).strip() for text in texts if isinstance(text, str))
        if any(key in value for key in keys):
            yield ""
        for key, item in value.items():
            deeper = [] if key in keys else list(_json_lines(item, keys))
            if deeper:
                yield from (str(key), *deeper)


def cjk_lines(text: str, least: float) -> str:
    """Return the lines in which at least the share `least` of the characters is Chinese, blanks not counted."""
    return tidy("\n".join(line for line in text.splitlines() if not line.strip() or _cjk_share(line) >= least))


def _cjk_share(line: str) -> float:
    characters = "".join(line.split())
    return len(_CJK.findall(characters)) / len(characters)


_CJK = re.compile("[\u3000-\u303f\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")


def split_documents(text: str, min_chars: int, max_chars: int) -> Iterator[str]:
    """Yield pieces of `min_chars` to `max_chars` characters, cut at blank lines, else at line ends, else anywhere."""
    piece: list[str] = []
    length = 0
    for part in _parts(text, max_chars):
        if piece and length + len(part) + 2 > max_chars:
            yield from (document for document in ["\n\n".join(piece)] if len(document) >= min_chars)
            piece, length = [], 0
        piece.append(part)
        length += len(part) + 2
    yield from (document for document in ["\n\n".join(piece)] if len(document) >= min_chars)


def _parts(text: str, max_chars: int) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        while len(paragraph) > max_chars:
            cut = paragraph.rfind("\n", 0, max_chars)
            cut = cut if cut > 0 else max_chars
            yield paragraph[:cut]
            paragraph = paragraph[cut:].lstrip("\n")
        if paragraph.strip():
            yield paragraph
