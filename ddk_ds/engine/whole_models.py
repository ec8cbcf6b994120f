"""Complete causal LMs on one process: loaded from files for tools, and made with random weights for training."""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from ddk_ds.comm import SingleProcess
from ddk_ds.data.tokenizer import load_tokenizer
from ddk_ds.engine.attention import choose_attention
from ddk_ds.engine.attention_masks import backbone_pass
from ddk_ds.engine.companion_files import TOKENIZER_FILES, copy_companions
from ddk_ds.engine.head import HeadFunction, OutputHead
from ddk_ds.engine.model_files import ModelFiles, read_model
from ddk_ds.engine.unloaded_models import backbone_of, no_init_weights
from ddk_ds.engine.weights import load_weights
from ddk_ds.errors import ConfigError
from ddk_ds.files import new_directory, read_object, write_text
from ddk_ds.kernels import LogitForm

# transformers 5 draws a bar for each model that it loads or saves; those of the hub's downloads stay.
_downloads_have_bars = not are_progress_bars_disabled()
disable_progress_bar()
if _downloads_have_bars:
    enable_progress_bars()

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WholeModel:
    """A complete causal LM on one device, called as a student or a teacher is."""

    whole: Any
    """The model as transformers has it."""
    form: LogitForm
    sequence: None = None

    def __call__(self, input_ids: torch.Tensor, function: HeadFunction, positions: torch.Tensor | None = None) -> Any:
        """Return `function(hidden, head)` for token ids (B, L), with hidden states (B*L, H).

        `positions` (B, L), on the CPU, are those of the tokens in their documents, if documents are kept apart.
        """
        backbone, head = backbone_of(self.whole), self.whole.get_output_embeddings()
        with backbone_pass(backbone, input_ids, positions) as given:
            hidden = backbone(**given, use_cache=False).last_hidden_state
        return function(hidden.flatten(0, 1), OutputHead(head.weight, getattr(head, "bias", None), self.form))

    def evaluating(self) -> AbstractContextManager[Any]:
        """Return a context without gradients."""
        return torch.no_grad()


def load_model(directory: Path, dtype: torch.dtype | Literal["auto"] = torch.float32, *, trusted: bool = False) -> Any:
    """Load a causal LM onto the CPU, in evaluation mode and without gradients; "auto" keeps the dtype of its files.

    `trusted` permits Python code of the model's own directory.

    Attention is computed by sdpa, or by eager if sdpa leaves out something of the model's; a warning says so.

    Raises ConfigError if transformers cannot build it, or if the files lack weights.
    """
    files = read_model(directory, "model")
    attention = choose_attention(files.config, directory, str(directory), trusted=trusted)
    if attention.note:
        _log.warning(attention.note)
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "trust_remote_code": trusted}
    options["attn_implementation"] = attention.kernel
    if files.quantized or files.wrapper:
        return _load_as_read(files, dtype, options)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{directory} cannot be loaded: {reason}") from error
    model, info = loaded
    if info["missing_keys"]:
        raise ConfigError(f"{directory}: its weights lack {min(info['missing_keys'])}; is config.json that of these?")
    return model.eval().requires_grad_(False)


def _load_as_read(files: ModelFiles, dtype: torch.dtype | Literal["auto"], options: dict[str, Any]) -> Any:
    """Load a model of FP8 or MXFP4 weights as the numbers that these stand for, or the text model in a wrapper.

    transformers needs a GPU for some of the formats.
    """
    config = files.hf_config(trusted=options["trust_remote_code"])
    chosen = (config.dtype or torch.bfloat16) if dtype == "auto" else dtype
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=chosen,
            attn_implementation=options["attn_implementation"],
            trust_remote_code=options["trust_remote_code"],
        )
    model.tie_weights()
    load_weights(model, files, SingleProcess())
    return model.eval().requires_grad_(False)


def make_random_model(config: Path, tokenizer: Path, out: Path, seed: int, device: str = "cpu") -> int:
    """Write a model with random weights to `out`, together with `tokenizer`; return its number of parameters.

    `config` is a Hugging Face configuration (a JSON file), whose vocabulary size and special tokens are replaced by the
    tokenizer's. The weights are drawn on `device`: one seed gives different weights on a GPU and on a CPU, which takes
    a minute for 1.5 B parameters. `out` appears complete or not at all.

    Raises ConfigError if `out` exists, or if `config` is missing or has no known model_type.
    """
    if out.exists():
        raise ConfigError(f"--out {out} exists already; remove it or name another")
    if not config.is_file():
        raise ConfigError(f"--config {config}: there is no such file")
    info = load_tokenizer(tokenizer)
    values = read_object(config, "name another --config", ConfigError)
    if values.get("model_type") not in CONFIG_MAPPING:
        raise ConfigError(f"--config {config}: model_type is {values.get('model_type')!r}, which transformers lacks")
    values |= {"vocab_size": info.vocab_size, "eos_token_id": info.eos_token_id, "bos_token_id": info.eos_token_id}
    torch.manual_seed(seed)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--config {config}: not the configuration of a causal language model: {error}") from error
    with new_directory(out) as partial:
        model.save_pretrained(partial)
        # With the given keys beside its own, transformers 4.57 reads what transformers 5 writes.
        saved = read_object(partial / "config.json", "")
        theta = (saved.get("rope_parameters") or {}).get("rope_theta")
        old = {} if theta is None else {"rope_theta": theta}
        write_text(partial / "config.json", json.dumps({**old, **saved, **values}, indent=2) + "\n")
        copy_companions(tokenizer, partial, TOKENIZER_FILES)
    return int(model.num_parameters())
