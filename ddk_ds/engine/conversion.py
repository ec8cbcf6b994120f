"""A checkpoint's tensors and the model's tensors that they become, by transformers' own mapping, in both directions.

transformers 5 joins all experts of a layer to one tensor, joins or cuts other products, and renames. transformers 4.57
takes each tensor as it is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn

from ddk_ds.engine.model_files import ModelFiles
from ddk_ds.engine.stored_names import (
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
    revert_weight_conversion,
)
from ddk_ds.errors import ConfigError


class _Sizes:
    """The model as transformers' conversions look at it: its configuration, and parameters of complete shape."""

    def __init__(self, model: Any, transforms: list[Any]) -> None:
        self.config = model.config
        self.prefix: str = model.base_model_prefix
        self.tensors = {
            name: torch.empty(getattr(tensor, "ds_shape", tensor.shape), dtype=tensor.dtype, device="meta")
            for name, tensor in model_tensors(model).items()
        }
        self._weight_conversions = transforms

    def get_parameter(self, name: str) -> torch.Tensor:
        """Return a parameter without memory; transformers calls this."""
        return self.tensors[name]

    def renamed(self, source: str) -> tuple[str, str | None]:
        """Return the model's name of a stored tensor, and the pattern that it fits if it must be converted."""
        converters = [transform for transform in self._weight_conversions if hasattr(transform, "operations")]
        renamings = [transform for transform in self._weight_conversions if not hasattr(transform, "operations")]
        name, pattern = rename_source_key(source, renamings, converters, self.prefix, self.tensors)
        if name not in self.tensors and source in self.tensors:
            name, pattern = rename_source_key(source, [], [], self.prefix, self.tensors)
        return name, pattern

    def converters(self) -> dict[str, Any]:
        """Return the converters by pattern, and keep only the transforms that `renamed` used, which are reverted."""
        self._weight_conversions = [transform for transform in self._weight_conversions if transform.was_used()]
        converters = [transform for transform in self._weight_conversions if hasattr(transform, "operations")]
        return {pattern: converter for converter in converters for pattern in converter.source_patterns}


@dataclass(frozen=True)
class Conversion:
    """Tensors of a checkpoint and the tensors of the model that they become together; mostly one and the same."""

    sources: dict[str, tuple[int, ...]]
    """Shapes by the names in the files."""
    targets: dict[str, tuple[int, ...]]
    """Shapes by the model's names."""
    _patterns: tuple[str | None, ...]
    """Which of the transform's patterns each source fits."""
    _transform: Any
    """transformers' WeightConverter; None where one tensor is taken as it is stored."""
    _sizes: _Sizes

    @property
    def plain(self) -> bool:
        """Return True if one stored tensor is the model's as it is."""
        return self._transform is None

    def to_model(self, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the model's tensors by name, from those of the files, which `read` returns by name."""
        if self.plain:
            [source], [target] = self.sources, self.targets
            return {target: read(source)}
        first = next(iter(self.targets))
        transform = deepcopy(self._transform)
        for source, pattern in zip(self.sources, self._patterns, strict=True):
            transform.add_tensor(first, source, pattern, read(source))
        return _unlisted(transform.convert(first, model=self._sizes, config=self._sizes.config))

    def to_files(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors of the files by name, in the order of `sources`, from the model's `tensors` by name.

        `tensors` is emptied on the way, since both can be large.
        """
        if self.plain:
            [source], [target] = self.sources, self.targets
            return {source: tensors.pop(target)}
        sizes: Any = self._sizes
        found = revert_weight_conversion(sizes, {name: tensors.pop(name) for name in self.targets})
        # The files can leave out the backbone's prefix.
        return {source: found.get(source, found.get(f"{self._sizes.prefix}.{source}")) for source in self.sources}

    def check_reversible(self, key: str) -> None:
        """Raise ConfigError, naming the configuration `key`, if the files' tensors cannot be made from the model's."""
        if self.plain:
            return
        try:
            tensors = self.to_files({name: self._sizes.tensors[name] for name in self.targets})
            reversible = {name: tuple(tensor.shape) for name, tensor in tensors.items()} == self.sources
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError):
            reversible = False
        if not reversible:
            raise ConfigError(
                f"{key}: transformers {transformers.__version__} cannot write {next(iter(self.targets))} as its files "
                "store it, so it could not be exported: choose another student, or install transformers<5"
            )


def conversions(model: Any, files: ModelFiles) -> list[Conversion]:
    """Return how the tensors of `files` become those of `model`, in the model's order; tied tensors come once.

    The model can be sharded or without memory. Tensors of the files that it lacks are left out, as transformers does.
    Raises ConfigError if shapes do not fit.
    """
    sizes = _Sizes(model, get_model_conversion_mapping(model))
    sources: dict[str, dict[str, str | None]] = {}
    for source in sorted(files.tensors, key=dot_natural_key):
        name, pattern = sizes.renamed(source)
        if name in sizes.tensors:
            sources.setdefault(name, {})[source] = pattern
    converters = sizes.converters()
    tensors, covered, results = model_tensors(model), set[int](), list[Conversion]()
    for name, tensor in tensors.items():
        if name in sources and id(tensor) not in covered:
            result = _conversion(name, sources[name], converters, files, sizes)
            covered |= {id(tensors[target]) for target in result.targets}
            results.append(result)
    return results


def _conversion(
    name: str, patterns: dict[str, str | None], converters: Mapping[str, Any], files: ModelFiles, sizes: _Sizes
) -> Conversion:
    """Return the conversion that begins with the model's tensor `name`; `patterns` are those of its sources."""
    last = name if name in patterns else next(reversed(patterns))
    converter = converters.get(patterns[last] or "")
    chosen = patterns if converter is not None else {last: None}
    shapes = {source: files.tensors[source].shape for source in chosen}
    draft = Conversion(shapes, {name: ()}, tuple(chosen.values()), converter, sizes)
    where = f"{files.tensors[last].file}: {last}"
    try:
        found = draft.to_model(lambda source: torch.empty(shapes[source], device="meta"))
    except (RuntimeError, ValueError, LookupError) as error:
        raise ConfigError(f"{where} and {len(chosen) - 1} more cannot be joined to {name}: {error}") from error
    for target, tensor in found.items():
        expected = tuple(sizes.tensors[target].shape) if target in sizes.tensors else None
        if tuple(tensor.shape) != expected:
            become = "" if draft.plain else f" and with {len(chosen) - 1} more becomes {target} {tuple(tensor.shape)}"
            raise ConfigError(f"{where} has shape {shapes[last]}{become}, config.json gives {expected}: not a pair")
    return replace(draft, targets={target: tuple(tensor.shape) for target, tensor in found.items()})


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the model's parameters, tied ones under each of their names, and its buffers."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def _unlisted(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value[0] if isinstance(value, list) else value for name, value in tensors.items()}
