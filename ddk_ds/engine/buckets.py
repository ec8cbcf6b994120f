"""Sizes of what ZeRO-3 gathers ahead and reduces together. Pure.

DeepSpeed's own defaults know no model: 5e8 gradients a bucket, 1 GB of bf16 that is allocated whole beside 1 GB in
which what is in it is joined, and 5e7 weights gathered ahead, which is less than a matrix of a 14 B model's MLP. A
layer is what computes while communication goes on, so a layer's weights are gathered while the one before computes, and
a layer's gradients are reduced while the one below computes. A tensor larger than a bucket is reduced by itself. No
number of the run depends on either.
"""

from __future__ import annotations

LEAST_BUCKET = 16_000_000
"""Elements: a collective of fewer takes mostly latency."""


def bucket_sizes(largest_layer: int) -> dict[str, int]:
    """DeepSpeed's keys by a model's largest layer, in elements."""
    size = max(LEAST_BUCKET, largest_layer)
    return {"reduce_bucket_size": size, "stage3_prefetch_bucket_size": size}
