"""What transformers 4 and 5 do differently; nothing else asks which of them is there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import transformers

from ddk_ds.errors import ConfigError

# mypy sees one of the two versions.
try:
    from transformers.conversion_mapping import (  # type: ignore[import-not-found,unused-ignore]
        get_model_conversion_mapping as _transforms,
    )
    from transformers.initialization import no_init_weights  # type: ignore[import-not-found,unused-ignore]
except ImportError:
    from transformers.modeling_utils import no_init_weights  # type: ignore[attr-defined,no-redef,unused-ignore]

    def _transforms(model: Any) -> list[Any]:  # type: ignore[misc,unused-ignore]
        return []


__all__ = ["model_names", "no_init_weights"]


def model_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """The model's name of a tensor -> its name in a checkpoint, which transformers 5 may have given another one.

    Raises ConfigError where transformers 5 computes the model's tensors from the stored ones (experts into one).
    """
    transforms = _transforms(model)
    names = {}
    for source in sorted(stored):
        name = source
        for transform in transforms:
            name, pattern = transform.rename_source_key(name)
            if pattern is not None and hasattr(transform, "operations"):
                raise ConfigError(
                    f"{type(model).__name__}: transformers {transformers.__version__} does not take {source} as it is "
                    "stored, and sharded loading cannot convert it; install transformers<5"
                )
        names[name] = source
    return names
