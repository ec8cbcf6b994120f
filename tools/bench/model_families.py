"""Try every causal language model family of the installed transformers as teacher and as student.

    python -m tools.bench.model_families [--only llama gemma3_text ...] [--json FILE] [--workers 2]

Of a file that exists already, the families that are tried are written anew. `python -m tools.bench.models_page` makes
the table of docs/models.md from the files of both versions of transformers.

For each family a model of two small layers is made with random weights. It is loaded as a run loads it, in float32 and
in bf16, and its logits are compared with those of plain transformers in float32; the student's export is loaded again
by transformers, and the student makes a step. Then documents are kept apart: loss and gradients of a micro-batch of
samples that have several are compared with those of plain transformers in float64, each document in a pass of its own.
Each family has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from deepspeed.utils import safe_get_full_grad
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.nn import functional
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from ddk_ds.config import Config, make_config
from ddk_ds.engine.attention import check_apart
from ddk_ds.engine.export import Companions, export_student
from ddk_ds.engine.head import OutputHead
from ddk_ds.engine.model_files import read_model
from ddk_ds.engine.runtime import Runtime, start_runtime
from ddk_ds.engine.split_check import check_documents, check_split
from ddk_ds.engine.student import Student, load_student
from ddk_ds.engine.teacher import Teacher, load_teacher
from ddk_ds.engine.unloaded_models import without_memory
from ddk_ds.engine.weights import persistent_buffers
from ddk_ds.engine.wrapped_models import text_part
from ddk_ds.errors import UserError
from ddk_ds.kernels.reference import reference_logits, reference_nll
from ddk_ds.launcher import free_port
from tools.bench.forked import rank_environment

VOCAB, LENGTH = 205, 24
LARGEST = 20_000_000
"""Parameters of the largest model that is made."""
TRIALS = ("teacher fp32", "teacher bf16", "student fp32", "student bf16", "export", "documents")
LIMIT_S = 180
# Largest difference of logits over the largest logit: rounding, and in bf16 that of two layers' activations too.
_LIMITS = {"fp32": 1e-4, "bf16": 0.1}
# Positions that must be within it. In bf16 a router or an indexer of random weights chooses otherwise at some.
_POSITIONS = {"fp32": 1.0, "bf16": 0.8}
DOCUMENTS = [[9, 1, 14], [5, 5, 5, 5, 4]]
"""Lengths of the documents of two samples."""
# Largest error of the loss, relative, and of the gradients, over the largest one.
_APART = 5e-5
# What a summary leaves out of a message: where the model lies and its role, and by how much logits differ.
_OWN = re.compile(
    r"((teacher|student)(\.path)?|path): |\S*/model(:| (?=cannot)|/(?=config)) ?|(?<=choose another) (teacher|student)"
)
_NUMBERS = re.compile(r", but differ by up to .*| \(another last token [^)]*\)")
_NOT_APART = re.compile(r".* keep documents apart: (\w+ \(\w+\) )?(.*?)( by [\d.e+-]+ where the .*|: set data\..*)")
_SERVER = multiprocessing.get_context("forkserver")

# A value for whichever of these keys a family's configuration has.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("out_hidden_size", "projection_dim", "output_hidden_size", "vision_output_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("depth", "num_global_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_groups"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "attention_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "moe_layer_start_index"), 1),
    **dict.fromkeys(("sliding_window", "attention_window_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "mamba_d_conv"), 4),
    **{"mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1, "lru_width": 64, "rotary_dim": 8},
    **{"vocab_size": VOCAB + 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2},
    **{"index_head_dim": 16, "index_n_heads": 2, "index_topk": 20},
    **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB + 3, "laurel_rank": 8},
    "is_decoder": True,
}
# What a family needs beyond that: mostly lengths of lists by layer, and sizes that must divide others.
FURTHER: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"linear_num_heads": 4, "num_expert_group": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64},
    },
    "dots1": {"layer_types": ["full_attention", "full_attention"], "n_shared_experts": 1},
    "gemma3n_text": {"layer_types": ["full_attention", "sliding_attention"], "num_kv_shared_layers": 0},
    "bamba": {"attn_layer_indices": [1], "mamba_n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_oss": {"rope_scaling": None},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "layers_block_type": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "qwen2_moe": {"decoder_sparse_step": 1},
    "qwen3_moe": {"decoder_sparse_step": 1},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1]},
}
_BY_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "block_types")


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the families and print or write what each gave. Returns 1 if one is wrong or crashes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", metavar="FAMILY", help="try only these (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what each family gave")
    parser.add_argument("--workers", type=int, default=2, help="families at a time (default: %(default)s)")
    options = parser.parse_args(arguments)
    families = options.only or all_families()
    # Not at import: a process has one such server, and the tests' has what they need.
    _SERVER.set_forkserver_preload(["tools.bench.model_families", "deepspeed.module_inject"])
    found: dict[str, dict[str, str]] = {"families": {}, "documents": {}}
    with ThreadPoolExecutor(options.workers) as pool:
        for family, result in zip(families, pool.map(try_family, families), strict=True):
            apart = result.pop("documents", "")
            found["families"][family] = summary(result)
            line = f"{family}: {found['families'][family]}"
            if apart:
                found["documents"][family] = _NOT_APART.sub(r"refused: \2", apart)
                line += f"; documents apart: {found['documents'][family]}"
            print(line, flush=True)
    if options.json:
        known = json.loads(options.json.read_text()) if options.json.is_file() else {}
        merged = {}
        for kind, of_kind in found.items():
            others = {family: line for family, line in known.get(kind, {}).items() if family not in found["families"]}
            merged[kind] = dict(sorted({**others, **of_kind}.items()))
        options.json.write_text(json.dumps({"transformers": transformers.__version__, **merged}, indent=1) + "\n")
    lines = [line for of_kind in found.values() for line in of_kind.values()]
    return int(any(word in line for line in lines for word in ("wrong", "crash")))


def all_families() -> list[str]:
    """Return all causal families of transformers, and the wrappers whose text model is one."""
    known = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING]
    for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        with suppress(Exception):  # some have no configuration without values
            if wrapped(name) and CONFIG_MAPPING[name]().get_text_config().model_type in known:
                known.append(name)
    return sorted(set(known))


def summary(result: dict[str, str]) -> str:
    """Return a line on a family: "works", or what each trial that did not work gave, without paths and numbers."""
    by_outcome: dict[str, list[str]] = {}
    for trial, outcome in result.items():
        by_outcome.setdefault(_OWN.sub("", _NUMBERS.sub("", outcome)), []).append(trial)
    if len(by_outcome) > 1 and any(
        "student fp32" in trials for outcome, trials in by_outcome.items() if outcome != "works"
    ):
        by_outcome["works"] = [trial for trial in by_outcome.get("works", []) if trial != "export"]  # there is none
        by_outcome = {outcome: trials for outcome, trials in by_outcome.items() if trials}
    if len(by_outcome) == 1:
        return next(iter(by_outcome))
    return "; ".join(f"{_together(trials)}: {outcome}" for outcome, trials in by_outcome.items())


def _together(trials: list[str]) -> str:
    text = ", ".join(trials)
    for role in ("teacher", "student"):
        text = text.replace(f"{role} fp32, {role} bf16", role)
    return text


def try_family(family: str) -> dict[str, str]:
    """Return the outcome of each trial of a family: "works", "refused: ...", "wrong: ...", "crash: ..."."""
    with tempfile.TemporaryDirectory() as folder:
        environment = rank_environment(0, 1, free_port()) | {"OMP_NUM_THREADS": "1"}
        worker = _SERVER.Process(target=_in_process, args=(family, folder, environment))
        worker.start()
        worker.join(LIMIT_S)
        if worker.is_alive():
            worker.kill()
            worker.join()
        file = Path(folder) / "result.json"
        result: dict[str, str] = json.loads(file.read_text()) if file.is_file() else {}
        if worker.exitcode != 0:
            how = f"crash: the process ended with code {worker.exitcode}"
            result |= {trial: how for trial in TRIALS if trial not in result} if "not made" not in result else {}
        return result


def _in_process(family: str, folder: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with open(os.devnull, "w") as silence:
        os.dup2(silence.fileno(), 1)
        if "DDK_SHOW" not in os.environ:
            os.dup2(silence.fileno(), 2)
    result: dict[str, str] = {}

    def note(name: str, outcome: str) -> None:
        result[name] = outcome
        (Path(folder) / "result.json").write_text(json.dumps(result))

    try:
        expected = make_model(family, Path(folder))
    except Exception as error:
        note("not made", _unmade(family, error))
        return
    runtime = start_runtime()
    for role, load in (("teacher", load_teacher), ("student", load_student)):
        for precision in ("fp32", "bf16"):
            trial = partial(try_model, role, load, precision, Path(folder), expected, runtime)
            note(f"{role} {precision}", outcome_of(trial))
    note("export", outcome_of(partial(try_export, Path(folder), expected)))
    if (Path(folder) / "export").is_dir():
        note("documents", outcome_of(partial(try_documents, Path(folder), runtime)))
    os._exit(0)


def _unmade(family: str, error: Exception) -> str:
    """Return the refusal of a family of which no small model can be made, or else why it cannot."""
    classes = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if wrapped(family) else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    try:
        text_part({**CONFIG_MAPPING[family]().to_dict(), "architectures": [classes[family]]}, {}, "path")
    except UserError as refusal:
        return f"refused: {_line(refusal)}"
    except (StrictDataclassClassValidationError, ValueError):  # some have no configuration without values
        pass
    return f"not tried, since no small model can be made of it here: {_line(error)}"


def outcome_of(trial: Callable[[], str]) -> str:
    """Return what a trial returns, or how it failed."""
    try:
        return trial()
    except UserError as error:
        return f"refused: {_line(error)}"
    except Exception as error:
        if "DDK_SHOW" in os.environ:
            traceback.print_exc()
        return f"crash: {type(error).__name__}: {_line(error)}"


def _line(error: Exception) -> str:
    first, *further = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join([first, *(further[:1] if first.endswith(":") else [])])[:300]


def small_config(family: str) -> Any:
    """Return a family's configuration with two small layers."""
    return CONFIG_MAPPING[family](**_small_values(CONFIG_MAPPING[family]()))


def _small_values(config: Any) -> dict[str, Any]:
    """Return the values of a small configuration; a wrapper's parts have their own below their names."""
    names = set(config.to_dict())
    values: dict[str, Any] = {name: value for name, value in SMALL.items() if name in names}
    chances = {name for name in names if "drop" in name or "jitter" in name}
    chances = {name for name in chances if isinstance(getattr(config, name, None), float)}
    values |= dict.fromkeys(chances, 0.0)  # a student's gradients are compared as it trains
    if "qk_rope_head_dim" in names:  # latent attention
        values |= {"head_dim": SMALL["qk_rope_head_dim"], "num_key_value_heads": SMALL["num_attention_heads"]}
    for name in _BY_LAYER:
        kinds = getattr(config, name, None)
        place = getattr(type(config), config.attribute_map.get(name, name), None)
        if isinstance(kinds, list) and not isinstance(place, property):
            kinds = list(dict.fromkeys(kinds))  # one layer of each of two kinds
            values[name] = (kinds + kinds)[:2]
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            values[name] = _small_values(part) | ({"model_type": part.model_type} if part.model_type else {})
    return values | FURTHER.get(config.model_type, {})


def wrapped(family: str) -> bool:
    """Return True for a family that wraps a text model."""
    return bool(CONFIG_MAPPING[family].sub_configs) and family in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def make_model(family: str, folder: Path) -> dict[str, torch.Tensor]:
    """Write a random model of a family to folder/model; return plain transformers' logits (L, V) in each precision.

    Those in bf16 are left out where transformers cannot compute them.
    """
    torch.manual_seed(3)
    config = small_config(family)
    auto = AutoModelForImageTextToText if wrapped(family) else AutoModelForCausalLM
    size = without_memory(partial(auto.from_config, config)).num_parameters()
    if size > LARGEST:
        raise ValueError(f"it has {size:,} parameters")
    model = auto.from_config(config, attn_implementation="eager").eval()
    for buffer in persistent_buffers(model).values():  # such as a router's correction, which is zero at first
        if buffer.dtype.is_floating_point and buffer.dim() == 1:  # and not MiniMax's decays, whose zeros are its mask
            buffer.add_(torch.rand_like(buffer) * 0.1)
    model.save_pretrained(folder / "model")
    plain = _plain(folder / "model", auto)
    expected = {"fp32": _logits(plain), "fp32 throughout": _logits(plain.float())}  # Apertus keeps numbers in bf16
    other = _ids()
    other[0, -1] += 1
    if not torch.allclose(_logits(plain, other)[:-1], expected["fp32 throughout"][:-1], atol=1e-3):
        with suppress(Exception):  # Moshi's own attention has no mask in 4.57
            expected["fp32 sdpa"] = _logits(_plain(folder / "model", auto, kernel="sdpa"))
    for kernel in ("eager", "sdpa"):
        with suppress(Exception):
            expected[f"bf16 {kernel}"] = _logits(_plain(folder / "model", auto, torch.bfloat16, kernel))
    return expected


def _plain(directory: Path, auto: Any, dtype: torch.dtype = torch.float32, kernel: str = "eager") -> Any:
    return auto.from_pretrained(directory, attn_implementation=kernel, dtype=dtype).eval()


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    given = _ids() if ids is None else ids
    try:
        logits: torch.Tensor = model(given, use_cache=False).logits[0]
    except (AttributeError, TypeError):  # some wrappers do not run without an image; their text model does
        logits = model.language_model(given, use_cache=False).logits[0]
    return logits.float()


def _ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(5))


def try_model(
    role: str,
    load: Callable[..., Teacher | Student],
    precision: str,
    folder: Path,
    expected: dict[str, torch.Tensor],
    runtime: Runtime,
) -> str:
    """Load the model in a role and compare its logits; a student in float32 is exported, and then makes a step."""
    files = read_model(folder / "model", f"{role}.path")
    model = load(_config(folder, "model", precision), files, VOCAB, runtime.comm)
    check_split(model, _ids(), VOCAB, role, runtime.comm)

    def logits(hidden: torch.Tensor, head: OutputHead) -> torch.Tensor:
        return reference_logits(hidden, head.weight, head.bias, VOCAB, head.form).float()

    with model.evaluating():
        found = model(_ids(), logits)
    # In bf16 a mixture of experts sends some tokens to other experts with another kernel.
    fitting = [values for name, values in expected.items() if precision == "bf16" or name.startswith("fp32")]
    off = min(_difference(found, values, _POSITIONS[precision]) for values in fitting)
    if not off <= _LIMITS[precision]:
        return f"wrong: logits differ by {off:.2g} of the largest"
    if isinstance(model, Student):
        if precision == "fp32":
            export_student(model, folder / "export", runtime.comm, partial(Companions, files, "", {}))
        _step(model)
    return "works"


def _config(folder: Path, name: str, precision: str) -> Config:
    section = {"path": str(folder / name)}
    values: dict[str, Any] = {
        "name": "trial",
        "output_dir": str(folder / "runs"),
        "student": section,
        "teacher": section,
        "data": {"path": str(folder / "data"), "sequence_length": LENGTH, "validation_samples": 4},
        "train": {"global_batch_samples": 1, "micro_batch_samples": 1, "precision": precision},
        "optimizer": {"warmup_steps": 1},
        "stop": {"steps": 2},
    }
    return make_config(values, "trial")


def _difference(found: torch.Tensor, expected: torch.Tensor, positions: float = 1.0) -> float:
    """Return the largest difference of logits over the largest logit, in the share of `positions` where it is least."""
    by_position = (found[:, :VOCAB] - expected[:, :VOCAB]).abs().amax(1) / expected.abs().max()
    return float(by_position.quantile(positions))


def _step(student: Student) -> None:
    """Make two steps of continued pre-training; raises AssertionError if a loss or gradient is not finite."""

    def loss(hidden: torch.Tensor, head: OutputHead) -> torch.Tensor:
        labels = _ids()[0].roll(-1)
        return reference_nll(hidden, head.weight, labels, vocab_size=VOCAB, bias=head.bias).mean().float()

    for _ in range(2):  # a second one, for what a model keeps from the first
        value = student(_ids(), loss)
        student.backward(value, last=True)
        norm, _ = student.update(1e-3, torch.zeros(0, dtype=torch.float64))
        assert torch.isfinite(value) and 0 < norm < float("inf"), f"loss {float(value):.3g}, gradient norm {norm:.3g}"


def try_documents(folder: Path, runtime: Runtime) -> str:
    """Compare loss and gradients of samples whose documents are kept apart with those of each document alone."""
    config, files = _config(folder, "export", "fp32"), read_model(folder / "export", "student.path")
    check_apart(files.config, files.directory, "student", config.student)
    student = load_student(config, files, VOCAB, runtime.comm)
    ids = torch.cat([_ids(), _ids().flip(1)])
    check_documents(student, ids, VOCAB, "student", runtime.comm)
    lengths = [length for of_sample in DOCUMENTS for length in of_sample]
    positions = torch.cat([torch.arange(length) for length in lengths]).view_as(ids)
    labels = torch.cat([functional.pad(one[1:], (0, 1), value=-100) for one in ids.flatten().split(lengths)])

    def mean_loss(hidden: torch.Tensor, head: OutputHead) -> torch.Tensor:
        logits = reference_logits(hidden, head.weight, head.bias, VOCAB, head.form)
        return functional.cross_entropy(logits.float(), labels)

    gradients: dict[str, torch.Tensor] = {}

    def note() -> None:
        for name, parameter in student.whole.named_parameters():
            gradients[name] = safe_get_full_grad(parameter) if parameter.requires_grad else torch.zeros(())

    student._check_gradients = note  # type: ignore[method-assign]
    loss = student(ids, mean_loss, positions)
    student.backward(loss, last=True)
    student.update(0.0, torch.zeros(0, dtype=torch.float64))
    try:
        right, of_documents = _alone(folder / "export", ids, lengths, torch.float64)
    except RuntimeError:  # XGLM's mask has no number of float64
        right, of_documents = _alone(folder / "export", ids, lengths, torch.float32)
    off = abs(float(loss.detach()) / right - 1)
    largest = max(float(gradient.abs().max()) for gradient in of_documents.values())
    by_name = {name: float((gradients[name] - right).abs().max()) for name, right in of_documents.items()}
    worst = max(by_name, key=lambda name: by_name[name])
    if not (off <= _APART and by_name[worst] <= _APART * largest):
        return f"wrong: the loss is off by {off:.1g}, the gradient of {worst} by {by_name[worst] / largest:.1g}"
    return "works"


def _alone(
    directory: Path, ids: torch.Tensor, lengths: Sequence[int], dtype: torch.dtype
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return plain transformers' loss and gradients, each document of `ids` in a pass of its own."""
    model = _plain(directory, AutoModelForCausalLM, dtype)
    if hasattr(model, "set_experts_implementation"):  # torch's products of all experts at once have no float64
        model.set_experts_implementation("eager")
    total, count = torch.zeros((), dtype=dtype), sum(lengths) - len(lengths)
    for document in ids.flatten().split(list(lengths)):
        if len(document) > 1:
            logits = model(document[None], use_cache=False).logits[0, :-1, :VOCAB]
            total = total + functional.cross_entropy(logits, document[1:], reduction="sum") / count
    total.backward()
    return float(total.detach()), {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


def try_export(folder: Path, expected: dict[str, torch.Tensor]) -> str:
    """Load the export by transformers and compare its logits."""
    if not (folder / "export").is_dir():
        return "works"  # what refused it has been said
    off = _difference(_logits(_plain(folder / "export", AutoModelForCausalLM)), expected["fp32"])
    return "works" if off <= _LIMITS["fp32"] else f"wrong: logits differ by {off:.2g} of the largest"


if __name__ == "__main__":
    sys.exit(main())
