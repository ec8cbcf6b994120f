"""Removal of credentials from text that is written or shown."""

from __future__ import annotations

import re

_SECRET = re.compile(
    r"(?i)(//)[^/@\s\"']+(?=@)"
    r"|((?:secret|token|signature|credential|password|api_?key|accesskey\w*)[=:]\s*)(?!\*\*\*)[^&\s,;\"']+"
)
_SECRET_NAME = re.compile(r"(?i)(^|_)(secret|token|password|credential|api_?key)s?(_key)?$")


def redact(text: str) -> str:
    """Return `text` with *** for user names and passwords in URLs, and for the values of keys that name a secret."""
    return _SECRET.sub(lambda match: (match.group(1) or match.group(2)) + "***", text)


def names_a_secret(key: str) -> bool:
    """Return True if the name of a configuration key says that its value is a secret."""
    return _SECRET_NAME.search(key) is not None
