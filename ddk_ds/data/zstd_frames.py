"""The bytes of .zst files, of any number of frames."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, BinaryIO

import zstandard

# Zstandard makes up to 32,000 bytes of one, and gives all of them at once.
_ZSTD_BYTES = 1 << 12


class ZstdFrames(io.RawIOBase):
    """The uncompressed bytes of a .zst file with any number of frames and with long windows.

    Parallel compressors and appending write several frames. A file that ends inside a frame raises EOFError, where
    zstandard's own stream_reader raises nothing.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._chunks = _decompress(stream)
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._ready = memoryview(chunk)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _decompress(stream: BinaryIO) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None
    while data := stream.read(_ZSTD_BYTES):
        while data:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends inside a compressed frame")
