"""transformers' mapping of a checkpoint's tensors to a model's, under the names of version 5 in both versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

__all__ = ["dot_natural_key", "get_model_conversion_mapping", "rename_source_key", "revert_weight_conversion"]

# mypy sees one of the two versions.
if int(transformers.__version__.partition(".")[0]) >= 5:
    from transformers.conversion_mapping import (  # type: ignore[import-not-found,unused-ignore]
        get_model_conversion_mapping,
    )
    from transformers.core_model_loading import (  # type: ignore[import-not-found,unused-ignore]
        dot_natural_key,
        rename_source_key,
        revert_weight_conversion,
    )
else:
    dot_natural_key = str  # type: ignore[assignment,unused-ignore]

    class _Renaming:
        """The names that a class of transformers 4.57 gives to stored tensors."""

        def __init__(self, model: Any) -> None:
            self._model = model

        def was_used(self) -> bool:
            """Return True: the class's names hold for every checkpoint."""
            return True

        def rename(self, name: str) -> str:
            """Return the model's name of a stored tensor."""
            names: dict[str, str] = self._model._get_key_renaming_mapping(
                [name], self._model._checkpoint_conversion_mapping
            )
            return names[name]

    def get_model_conversion_mapping(model: Any) -> list[Any]:  # type: ignore[misc,unused-ignore]
        """Return the renaming of the model's class: transformers 4.57 takes tensors as they are stored."""
        return [_Renaming(model)]

    def rename_source_key(  # type: ignore[misc,unused-ignore]
        name: str, renamings: list[Any], _converters: list[Any], prefix: str, known: Mapping[str, Any]
    ) -> tuple[str, None]:
        """Return the model's name of a tensor: some checkpoints of the hub leave out the backbone's prefix."""
        for renaming in renamings:
            name = renaming.rename(name)
        return f"{prefix}.{name}" if name not in known and f"{prefix}.{name}" in known else name, None

    def revert_weight_conversion(  # type: ignore[misc,unused-ignore]
        _model: Any, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the tensors as they are."""
        return tensors
