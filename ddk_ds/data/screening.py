"""Screening: what is looked for in each complete document beside exact copies, in the processes that tokenise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ddk_ds.data.contamination import Contamination
from ddk_ds.data.near_duplicates import NearKeys


class Marks(NamedTuple):
    """The keys of each document, by which near ones are found, and the benchmark that it has text of ("": none)."""

    keys: list[list[int]]
    benchmarks: list[str]


@dataclass(frozen=True)
class Screening:
    """A function from texts to their marks; None: it is not looked for."""

    near: NearKeys | None = None
    contamination: Contamination | None = None

    def __bool__(self) -> bool:
        return self.near is not None or self.contamination is not None

    def __call__(self, texts: Sequence[str]) -> Marks:
        keys: list[list[int]] = self.near(texts) if self.near is not None else [[] for _ in texts]
        return Marks(keys, self.contamination(texts) if self.contamination is not None else [""] * len(texts))
