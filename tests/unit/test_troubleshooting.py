"""docs/troubleshooting.md quotes messages that the source really has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
VALUE = "\0"  # stands in a message where a value is put in
NOT_OURS = {"transformers", "CUDA out of memory", "pytorch allocator cache flushes since last step"}


def quotes(text: str) -> list[str]:
    """The message that each entry begins with; entries of a symptom without one begin with a word."""
    return re.findall(r"^- `([^`]+)`", text, flags=re.MULTILINE)


def messages(source: str) -> Iterator[str]:
    """Every text in the source but its docstrings, f-strings too, with VALUE for what is put in."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values)


def occurs(quote: str, known: list[str]) -> bool:
    """Whether a message has the quote in it, `...` being any text."""
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in quote.split("...")), re.DOTALL)
    return any(pattern.search(message) for message in known)


@pytest.fixture(scope="module")
def known() -> list[str]:
    """The messages of the whole project."""
    files = [path for tree in ("ddk_ds", "launch", "tools") for path in (ROOT / tree).rglob("*.py")]
    return [message for path in files for message in messages(path.read_text(encoding="utf-8"))]


def test_each_quote_is_a_message(known: list[str]) -> None:
    found = quotes(PAGE.read_text(encoding="utf-8"))
    assert len(found) > 50
    missing = [quote for quote in found if quote not in NOT_OURS and not occurs(quote, known)]
    assert not missing, "\n".join(missing)


def test_a_quote_that_is_no_message_is_found(known: list[str]) -> None:
    assert occurs("holds another run: ... Set another name", known)
    assert not occurs("holds another run: ... Set yet another name", known)
    assert quotes("- `a ... b`: it\n- Nothing `c`\n") == ["a ... b"]


def test_every_key_named_there_is_one() -> None:
    from tools.bench.config_reference import reference

    text = PAGE.read_text(encoding="utf-8")
    keys = set(re.findall(r"`([a-z]+\.[a-z_]+)(?:=\w+|: [\w.]+)?`", text)) - {"ledger.jsonl", "manifest.json"}
    assert len(keys) > 15
    assert [key for key in sorted(keys) if f"`{key}`" not in reference()] == []
