"""Credentials in text: found, and struck out of whatever is written or shown."""

from __future__ import annotations

import re

_SECRET = re.compile(
    r"(?i)(//)[^/@\s\"']+(?=@)"
    r"|((?:secret|token|signature|credential|password|api_?key|accesskey\w*)[=:]\s*)(?!\*\*\*)[^&\s,;\"']+"
)
_SECRET_NAME = re.compile(r"(?i)(^|_)(secret|token|password|credential|api_?key)s?(_key)?$")


def redact(text: str) -> str:
    """The text, with *** for user names and passwords in URLs and for values of keys that name a secret."""
    return _SECRET.sub(lambda found: (found.group(1) or found.group(2)) + "***", text)


def names_a_secret(key: str) -> bool:
    """Whether a configuration key's own name says that its value is one."""
    return _SECRET_NAME.search(key) is not None
