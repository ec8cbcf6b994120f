"""The text model inside a wrapper, such as Gemma 3 with vision: its configuration, and its tensors by its own names.

A run distils text. What a wrapper adds for images or sound is left in its files.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ddk_ds.engine.config_sizes import LOGIT_KEYS
from ddk_ds.engine.stored_names import get_model_conversion_mapping, rename_source_key
from ddk_ds.engine.stored_tensors import StoredTensor
from ddk_ds.engine.unloaded_models import backbone_of, hf_config_of, meta_model, without_memory
from ddk_ds.errors import ConfigError


def text_part(
    config: dict[str, Any], tensors: dict[str, StoredTensor], where: str
) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Return the config.json and the tensors of the text model in a wrapper; those of any other model as they are.

    The names of tensors are those of a checkpoint of the text model alone, and `stored_name` keeps the one in the file.
    Raises ConfigError, which begins with `where`, if transformers has no causal language model for the text part.
    """
    family = str(config.get("model_type"))
    if family not in CONFIG_MAPPING or not CONFIG_MAPPING[family].sub_configs:
        return config, tensors
    name = next(iter(config.get("architectures") or ()), f"a {family}")
    if family == "paligemma":  # version 4 does not say it in the text model's config.json (attention_masks.py)
        raise ConfigError(f"{where}: in {name} tokens of a prompt see later ones: choose a text model of its family")
    try:
        hf_config = hf_config_of(config)
        text_config = hf_config.get_text_config()
        if text_config is hf_config:
            return config, tensors
        if text_config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ConfigError(
                f"{where}: {name} wraps a text model ({text_config.model_type}) that transformers does not have by "
                "itself as a causal language model: choose a text model of the same family"
            )
        if not hasattr(transformers, name):
            raise ValueError("config.json does not name a class of transformers (architectures)")
        wrapper = without_memory(lambda: getattr(transformers, name)(hf_config))
        text = meta_model(text_config)
        places = _places(wrapper, text)
    except (ValueError, TypeError, AttributeError, ImportError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__  # such as a package that the wrapper needs
        raise ConfigError(f"{where}: the text model in {name} cannot be taken out: {reason}") from error
    code = inspect.getsource(type(wrapper))
    for key in chain.from_iterable(LOGIT_KEYS.values()):
        if getattr(text_config, key, None) not in (None, 0, 1) and key not in code:
            raise ConfigError(
                f"{where}: transformers {transformers.__version__} computes the logits of {name} without {key}, which "
                "its text model alone has: choose a text model"
            )
    found = dict(_moved(_renamed(wrapper, tensors), tensors, places))
    embedding, head = wrapper.get_input_embeddings(), wrapper.get_output_embeddings()
    dtype = config.get("dtype") or config.get("torch_dtype")
    return {
        **text_config.to_dict(),
        "architectures": [type(text).__name__],
        "tie_word_embeddings": head is not None and head.weight is embedding.weight,
        **({"dtype": dtype} if dtype else {}),
    }, found


def _renamed(wrapper: Any, names: Iterable[str]) -> dict[str, str]:
    """Map each name in a checkpoint to the name in the wrapper, but for what is renamed inside of its parts."""
    whole: list[Any] = [
        transform
        for transform in get_model_conversion_mapping(wrapper)
        if not hasattr(transform, "operations") and not getattr(transform, "scope_prefix", None)
    ]
    present = wrapper.state_dict()
    return {name: rename_source_key(name, whole, [], wrapper.base_model_prefix, present)[0] for name in names}


def _places(wrapper: Any, text: Any) -> dict[str, str]:
    """Map the prefixes of names in the wrapper to those of the same parts in the text model."""
    whole = [name for name, module in wrapper.named_modules() if type(module) is type(text)]
    if whole:
        return {whole[0]: ""}
    backbone, head = backbone_of(text), wrapper.get_output_embeddings()
    inside = [name for name, module in wrapper.named_modules() if type(module) is type(backbone)]
    if len(inside) != 1:
        raise ValueError(f"it has {len(inside)} parts that are a {type(backbone).__name__}")
    heads = {} if head is None else {_name(wrapper, head): _name(text, text.get_output_embeddings())}
    return {inside[0]: _name(text, backbone), **heads}


def _name(model: Any, part: Any) -> str:
    return next(name for name, module in model.named_modules() if module is part)


def _moved(
    renamed: Mapping[str, str], tensors: Mapping[str, StoredTensor], places: Mapping[str, str]
) -> Iterator[tuple[str, StoredTensor]]:
    for source, name in renamed.items():
        for outside, inside in places.items():
            if name.startswith(f"{outside}."):
                text_name = f"{inside}.{name.removeprefix(f'{outside}.')}".removeprefix(".")
                yield text_name, tensors[source]._replace(stored_name=tensors[source].stored_name or source)
