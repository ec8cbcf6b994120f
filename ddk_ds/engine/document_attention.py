"""Attention inside the documents of a sample: sdpa, computed for one document after the other.

Each is a causal sequence of its own, for which sdpa needs no mask. With a mask of all documents it would compute the
complete square of a sample's scores; one by one they take less than half of a square each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_LEAST_ON_GPU = 256
"""Mean length of documents from which on they go one by one on a GPU, where each takes launches of its own: about 50 us
of the host for a layer's pass, in which a GPU of 400 TFLOP/s computes 256 tokens of a layer of 40 M weights."""
_running: list[Documents] = []
"""The documents of the pass that runs; empty if documents are joined."""
_by_masks: list[bool] = []
"""Not empty in a block of `by_masks`."""


@dataclass(frozen=True)
class Documents:
    """The documents of the samples of a pass, which are kept apart in a block `with` them."""

    positions: torch.Tensor
    """(B, L) of the tokens in their documents, on the host."""
    numbers: torch.Tensor
    """(B, L) the number of each token's document in its sample, on the device."""
    one_by_one: bool
    """True if sdpa goes through them one by one, and so needs no mask of them."""

    @cached_property
    def lengths(self) -> list[int]:
        """Return the number of tokens of each document, sample after sample.

        Documents of one token in a row, as padding has them, are one here: no token of theirs has a label, nor is seen
        by others.
        """
        starts = self.positions == 0
        single = starts & torch.cat([starts[:, 1:], starts.new_ones(len(starts), 1)], 1)
        starts[:, 1:] &= ~(single[:, 1:] & single[:, :-1])
        begins = starts.flatten().nonzero().flatten()
        lengths: list[int] = begins.diff(append=begins.new_tensor([self.positions.numel()])).tolist()
        return lengths

    @cached_property
    def _parts(self) -> dict[tuple[int, int], Documents]:
        return {}

    def rows(self, part: slice) -> Documents:
        """Return the documents of some of the samples: for all layers the same, whose lengths are looked up once."""
        place = part.start, part.stop
        if place not in self._parts:
            self._parts[place] = replace(self, positions=self.positions[part], numbers=self.numbers[part])
        return self._parts[place]

    def split(self, heads: torch.Tensor) -> list[torch.Tensor]:
        """Return of a tensor (B, H, L, D) the part (1, H, l, D) of each document."""
        # As one operator: the gradient of a slice would be as large as the whole tensor, for each document.
        parts = heads.transpose(1, 2).flatten(0, 1).split(self.lengths)
        return [part.transpose(0, 1)[None] for part in parts]

    def squares(self) -> Iterator[tuple[int, slice]]:
        """Yield of each document the number of its sample, and its place there."""
        begin, length = 0, self.positions.shape[1]
        for number in self.lengths:
            row, first = divmod(begin, length)
            yield row, slice(first, first + number)
            begin += number

    def __enter__(self) -> None:
        _running.append(self)

    def __exit__(self, *_: object) -> None:
        _running.pop()


def documents_of(backbone: Any, positions: torch.Tensor, on_device: torch.Tensor) -> Documents:
    """Return the documents of a backbone's pass; `positions` (B, L) are on the host, and the same `on_device`.

    A model that does not take its attention from transformers' table has masks of documents alone.
    """
    documents = Documents(positions, (on_device == 0).cumsum(1), one_by_one=False)
    long = on_device.device.type == "cpu" or positions.numel() >= _LEAST_ON_GPU * len(documents.lengths)
    takes_kernels = getattr(backbone, "_can_set_attn_implementation", bool)()
    return replace(documents, one_by_one=takes_kernels and long and not _by_masks)


def documents_now() -> Documents | None:
    """Return the documents of the pass that runs; None if they are joined."""
    return _running[-1] if _running else None


def same_documents() -> AbstractContextManager[None]:
    """Return a context that has the documents of the pass that runs: a layer's, when it is recomputed."""
    return documents_now() or nullcontext()


def documents_in(part: slice) -> AbstractContextManager[None]:
    """Return a context that has the documents of some samples of the pass that runs."""
    documents = documents_now()
    return nullcontext() if documents is None else documents.rows(part)


@contextmanager
def by_masks() -> Iterator[None]:
    """Keep documents apart by masks alone in the block, as those of a GPU that are short."""
    _by_masks.append(True)
    try:
        yield
    finally:
        _by_masks.pop()


def attention_in_documents(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Compute transformers' sdpa, inside each document if they are kept apart.

    query (B, H, L, D), key and value (B, Hkv, L, D) -> (B, L, H, D). A mask, of a window for example, is cut.
    """
    documents = documents_now()
    if documents is None or not documents.one_by_one:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return _one_by_one(documents, module, query, key, value, attention_mask, options)


@torch.compiler.disable  # a graph for each set of lengths would be a graph for each batch
def _one_by_one(
    documents: Documents,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    options: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    shape = documents.positions.shape
    of_samples = all((len(tensor), tensor.shape[2]) == shape for tensor in (query, key, value))
    # Of other tokens than the samples', documents are not known: split_check.py sees a model that has only these.
    if not of_samples or len(documents.lengths) == len(documents.positions):
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    bias = options.pop("position_bias", None)
    outputs = []
    parts = (documents.split(tensor) for tensor in (query, key, value))
    for square, q, k, v in zip(documents.squares(), *parts, strict=True):
        more = options if bias is None else {**options, "position_bias": _cut(bias, *square)}
        outputs.append(sdpa_attention_forward(module, q, k, v, _cut(mask, *square), **more)[0])
    return torch.cat(outputs, 1).unflatten(1, shape)[0], None


def _cut(mask: torch.Tensor | None, row: int, inside: slice) -> torch.Tensor | None:
    """Return the part (1, H, l, l) of a mask (B, H, L, L), in which B and H may be 1; aligned, as kernels need it."""
    if mask is None:
        return None
    return mask[row if len(mask) > 1 else 0, :, inside, inside][None].contiguous()
