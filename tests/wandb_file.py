"""The numbers in the files that Weights & Biases leaves when it is offline."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path


def wandb_series(run: Path, key: str) -> dict[int, float]:
    """Return the values of a key by step, over all starts of the run in this directory."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[int, float] = {}
    for path in sorted((run / "monitor/wandb").glob("offline-run-*/*.wandb")):
        for data in _records(path):
            record = Record()
            record.ParseFromString(data)
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if key in items:
                found[int(items["_step"])] = json.loads(items[key])
    return found


def _records(path: Path) -> Iterator[bytes]:
    """Yield the records: blocks of 32 KiB, in them chunks of checksum (4 bytes), length (2), kind (1), data."""
    content, offset, record = path.read_bytes(), 7, b""
    while offset < len(content):
        if (left := -offset % 32768) < 7 and left:
            offset += left  # no room for a head: padding
            continue
        length, kind = struct.unpack_from("<HB", content, offset + 4)
        record += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield record
            record = b""
