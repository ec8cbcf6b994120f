"""Students cut out of tiny trained models of today's families: experts, heads, sliding windows, Gemma's norms.

The text has a structure that each model has learnt, so that a loss means something: a cut student's is far below that
of random weights, and below that of a student which kept the parts that are used least.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ddk_ds.commands.cut_student_command import main
from ddk_ds.data.tokenizer import save_tokenizer
from ddk_ds.engine import narrowing, pruning
from ddk_ds.engine.expert_pruning import drop_experts
from ddk_ds.engine.model_files import read_model
from ddk_ds.engine.whole_models import load_model
from tests.unit.test_make_student import logits_of, loss_of

VOCAB, LENGTH, LAYERS, EXPERTS = 64, 24, 4, 8
SIZES = {
    **{"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"intermediate_size": 64, "num_hidden_layers": LAYERS, "vocab_size": VOCAB, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
KINDS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
EXPERT = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"layer_types": KINDS, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {"layer_types": KINDS, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "qwen3_moe": {**EXPERT, "num_experts": EXPERTS, "norm_topk_prob": True, "decoder_sparse_step": 1},
    "qwen2_moe": {
        **{**EXPERT, "num_experts": EXPERTS, "decoder_sparse_step": 2, "mlp_only_layers": []},
        "shared_expert_intermediate_size": 16,
    },
    "mixtral": {"num_experts_per_tok": 2, "num_local_experts": EXPERTS, "intermediate_size": 32},
    "deepseek_v3": {
        **{**EXPERT, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2},
        **{"topk_group": 2, "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
        **{"v_head_dim": 8, "num_key_value_heads": 4, "head_dim": 4},
    },
    "gpt_oss": {
        **{"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "intermediate_size": 32, "head_dim": 8},
        **{"layer_types": KINDS, "sliding_window": 6},
    },
}
MORE = pytest.mark.long("further families, 30 s of CPU; those of the short tests differ most")


def texts(seed: int, rows: int) -> torch.Tensor:
    """Return token ids: each row counts on by a step of its own, and a tenth of the tokens are any."""
    draw = torch.Generator().manual_seed(seed)
    start, step = (torch.randint(1, 8, (rows, 1), generator=draw) for _ in range(2))
    ids = (start * 9 + step * torch.arange(LENGTH)) % VOCAB
    noise = torch.rand(rows, LENGTH, generator=draw) < 0.1
    return torch.where(noise, torch.randint(VOCAB, (rows, LENGTH), generator=draw), ids)


def few(seed: int, rows: int) -> torch.Tensor:
    """Return a text of eight tokens alone, for which routers use a part of their experts."""
    return texts(seed, rows) // 8 * 8


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread: for matrices this small, others only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def trained_once(family: str) -> Any:
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    for name, parameter in model.named_parameters():
        if name.endswith((".gate.weight", ".router.weight")):
            parameter.data.normal_()  # each token has experts of its own from the start
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(60):
        ids = (texts, few)[step % 2 if "num_experts_per_tok" in FAMILIES[family] else 0](1000 + step, 16)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


def trained(family: str) -> Any:
    """Return a model that has learnt the text, a copy of its own."""
    return copy.deepcopy(trained_once(family))


def random_loss(family: str, held_out: list[torch.Tensor]) -> float:
    torch.manual_seed(4)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    return loss_of(AutoModelForCausalLM.from_config(config).eval(), held_out)


CALIBRATION, HELD_OUT = [texts(1, 8), texts(2, 8)], [texts(3, 32)]


def of_experts(model: Any, kept: dict[int, Sequence[int]], changes: dict[str, Any]) -> Any:
    """Build a model of these experts of each layer alone, by names and shapes of its weights."""
    config = type(model.config).from_dict({**model.config.to_dict(), **changes})
    result = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    weights = {}
    for name, value in model.state_dict().items():
        layer = re.search(r"\.layers\.(\d+)\.(mlp|block_sparse_moe)\.", name)
        experts = list(kept.get(int(layer[1]), ())) if layer else []
        if (module := re.search(r"\.experts\.(\d+)\.", name)) and experts:
            if int(module[1]) not in experts:
                continue
            name = name.replace(module[0], f".experts.{experts.index(int(module[1]))}.")
        elif experts and re.search(r"\.(experts|gate|router)\.", name) and value.shape[0] == EXPERTS:
            value = value[experts]
        weights[name] = value
    result.load_state_dict(weights)
    return result


@pytest.mark.parametrize(
    "family",
    [
        *("qwen3_moe", "deepseek_v3", "gpt_oss"),
        *(pytest.param(family, marks=MORE) for family in ("qwen2_moe", "mixtral")),
    ],
)
def test_the_experts_that_a_text_uses_are_kept(family: str) -> None:
    whole, model, held_out = trained(family), trained(family), [few(3, 32)]
    changes, uses = drop_experts(model, [few(1, 8), few(2, 8)], 4, 2)
    student = pruning.reconfigured(model, changes)
    # The layers that have experts, and as many uses as tokens have experts.
    expected = {"deepseek_v3": [1, 2, 3], "qwen2_moe": [1, 3]}.get(family, [0, 1, 2, 3])
    assert list(uses) == expected and all(sum(use.counts) == 16 * LENGTH * 2 for use in uses.values())
    built = of_experts(whole, {layer: use.kept for layer, use in uses.items()}, changes)
    torch.testing.assert_close(logits_of(student, HELD_OUT[0]), logits_of(built, HELD_OUT[0]), rtol=1e-5, atol=1e-5)
    rest = {layer: [e for e in range(EXPERTS) if e not in use.kept] for layer, use in uses.items()}
    wrong = of_experts(whole, rest, changes)
    full, ours, theirs = (loss_of(each, held_out) for each in (whole, student, wrong))
    # Half of the experts do nearly all of the work.
    assert full - 0.05 < ours < theirs and ours < full + 0.1
    assert ours < random_loss(family, held_out) - 1


def grouped_counts(use: Any, groups: int) -> list[int]:
    size = EXPERTS // groups
    return [sum(expert // size == group for expert in use.kept) for group in range(groups)]


def test_groups_of_experts_stay_alike() -> None:
    changes, uses = drop_experts(trained("deepseek_v3"), CALIBRATION, 4, 1)
    assert all(grouped_counts(use, 2) == [2, 2] for use in uses.values())
    assert (changes["n_routed_experts"], changes["num_experts_per_tok"]) == (4, 1)
    with pytest.raises(Exception, match=r"--experts is 3: .* out of 2 equal groups: give a multiple of 2"):
        drop_experts(trained("deepseek_v3"), CALIBRATION, 3, 1)


@pytest.mark.parametrize(
    ("family", "narrow", "size"),
    [
        ("llama", "narrow_heads", 1),
        ("llama", "narrow_mlp", 16),
        ("gemma3_text", "narrow_hidden", 24),
        *[pytest.param(family, "narrow_heads", 1, marks=MORE) for family in ("qwen3", "gemma3_text")],
        *[pytest.param(family, "narrow_mlp", 16, marks=MORE) for family in ("gemma2", "gemma3_text")],
        *[pytest.param(family, "narrow_hidden", 24, marks=MORE) for family in ("llama", "qwen3", "gemma2")],
    ],
)
def test_the_widths_that_are_active_are_kept(
    family: str, narrow: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = trained(family), trained(family)
    changes = getattr(narrowing, narrow)(right, CALIBRATION, size)
    monkeypatch.setattr(narrowing, "_largest", lambda totals, size: (-totals).topk(size).indices.sort().values)
    getattr(narrowing, narrow)(wrong, CALIBRATION, size)
    ours, theirs = (loss_of(pruning.reconfigured(model, changes), HELD_OUT) for model in (right, wrong))
    assert loss_of(trained(family), HELD_OUT) < ours < theirs
    assert ours < random_loss(family, HELD_OUT)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_oss", "qwen3_moe"])
def test_heads_that_put_out_nothing_go_first(family: str) -> None:
    model, ids = random_model(family), HELD_OUT[0][:4]
    for number, layer in enumerate(model.model.layers):
        group = slice(8 * (number % 2), 8 * (number % 2) + 8)
        for name, parameter in layer.self_attn.v_proj.named_parameters():
            assert name in ("weight", "bias")
            parameter[group] = 0
    before = logits_of(model, ids)
    student = pruning.reconfigured(model, narrowing.narrow_heads(model, CALIBRATION, 1))
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (2, 1)
    torch.testing.assert_close(logits_of(student, ids), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "gemma", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("tied", [True, False])
def test_channels_that_are_zero_change_nothing(family: str, tied: bool) -> None:
    torch.manual_seed(2)
    sizes = {**SIZES, **FAMILIES.get(family, {}), "tie_word_embeddings": tied, "rms_norm_eps": 1e-12}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(torch.rand_like(parameter))
    silent = [0, 5, 9, 14, 20, 21, 30, 31]
    model.model.embed_tokens.weight[:, silent] = 0
    for layer in model.model.layers:
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            part.weight[silent] = 0
    ids = HELD_OUT[0][:4]
    before = logits_of(model, ids)
    student = pruning.reconfigured(model, narrowing.narrow_hidden(model, CALIBRATION, 24))
    assert student.config.hidden_size == 24 and student.get_input_embeddings().weight.shape[1] == 24
    torch.testing.assert_close(logits_of(student, ids), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "family", ["gemma3_text", "gpt_oss", "deepseek_v3", *(pytest.param(f, marks=MORE) for f in ("gemma2", "qwen2_moe"))]
)
def test_kept_layers_stay_of_their_kinds(family: str) -> None:
    whole, model = trained(family), trained(family)
    kept = [0, 2, 3] if family != "qwen2_moe" else [0, 1, 3]
    changes = pruning.keep_layers(model, kept)
    student = pruning.reconfigured(model, changes)
    expected = {
        "deepseek_v3": {"first_k_dense_replace": 1},
        "qwen2_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [0]},
    }.get(family, {"layer_types": [KINDS[number] for number in kept]})
    assert expected.items() <= changes.items() and changes["num_hidden_layers"] == 3
    # The whole model, without the layer that is dropped.
    if getattr(whole.config, "layer_types", None):  # transformers 5 takes kinds from there, by places
        whole.config.layer_types = [whole.config.layer_types[number] for number in kept]
    whole.model.layers = torch.nn.ModuleList(whole.model.layers[number] for number in kept)
    ids = HELD_OUT[0]
    expected_logits = whole(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits_of(student, ids), expected_logits, rtol=1e-5, atol=1e-5)
    assert loss_of(student, HELD_OUT) < random_loss(family, HELD_OUT)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    lines = ["Counting on by three: 3 6 9 12 15 18 21 24.", "def f(x):\n    return x + 1\n" * 8]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def save(model: Any, folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=258, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def random_model(family: str, **sizes: Any) -> Any:
    torch.manual_seed(6)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], "vocab_size": 258, **sizes})
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.2)
    return model


def cut(teacher: Path, text: Path, out: Path, *options: str) -> int:
    size = ["--samples", "4", "--sequence-length", "32"]
    return main(["--teacher", str(teacher), "--out", str(out), "--text", str(text), *size, *options])


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_the_files_are_those_of_a_checkpoint(family: str, text: Path, tmp_path: Path) -> None:
    model = random_model(family)
    teacher, out = save(model, tmp_path / "teacher"), tmp_path / "student"
    names = set(load_file(teacher / "model.safetensors"))
    assert cut(teacher, text, out, "--layers", "3", "--experts", "4", "--experts-per-token", "1") == 0
    # One matrix an expert, as every version of transformers reads it.
    last = {name for name in names if ".layers.3." in name}
    fourth = {name for name in names if re.search(r"experts\.[4-7]\.", name)}
    assert set(load_file(out / "model.safetensors")) == names - last - fourth and fourth
    config, old = (json.loads((path / "config.json").read_text()) for path in (out, teacher))
    number = next(key for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in old)
    changed = {number: 4, "num_experts_per_tok": 1, "num_hidden_layers": 3}
    assert {key: config[key] for key in changed} == changed
    report = json.loads((out / "pruning.json").read_text())
    assert set(report["experts"]) == {"deepseek_v3": {"1", "2"}}.get(family, {"0", "1", "2"})
    assert all(len(use["kept"]) == 4 and sum(use["counts"]) == 256 for use in report["experts"].values())
    assert load_model(out).config.num_hidden_layers == 3


def write_mxfp4(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Save a gpt-oss model as its makers do: experts in MXFP4, the rest in bf16; return the weights that these are."""
    save(model.to(torch.bfloat16), folder)
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    draw, stored, plain = torch.Generator().manual_seed(7), {}, {}
    for name, value in load_file(folder / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")) or "experts" not in name:
            stored[name] = plain[name] = value
            continue
        experts, inside, outside = value.shape
        blocks = torch.randint(256, (experts, outside, inside // 32, 16), dtype=torch.uint8, generator=draw)
        scales = torch.randint(122, 125, (experts, outside, inside // 32), dtype=torch.uint8, generator=draw)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        pairs = torch.stack((numbers[(blocks & 15).long()], numbers[(blocks >> 4).long()]), -1).flatten(-2)
        full = (pairs * 2.0 ** (scales.double() - 127)[..., None]).flatten(-2)
        plain[name] = full.transpose(1, 2).bfloat16().contiguous()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    return plain


def test_a_student_of_gpt_oss_in_mxfp4(text: Path, tmp_path: Path) -> None:
    teacher, out = tmp_path / "teacher", tmp_path / "student"
    plain = write_mxfp4(random_model("gpt_oss", hidden_size=64, intermediate_size=32), teacher)
    assert cut(teacher, text, out, "--layers", "3", "--experts", "4") == 0
    report, config = (json.loads((out / name).read_text()) for name in ("pruning.json", "config.json"))
    assert "quantization_config" not in config and config["num_local_experts"] == 4
    kept = report["kept"]
    assert config["layer_types"] == [KINDS[number] for number in kept]
    written = load_file(out / "model.safetensors")
    for name, value in written.items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        expected = plain[name if layer is None else name.replace(layer[0], f".layers.{kept[int(layer[1])]}.")]
        if ".experts." in name or ".router." in name:
            assert layer is not None
            expected = expected[report["experts"][layer[1]]["kept"]]
        assert value.dtype == torch.bfloat16 and torch.equal(value, expected), name
    assert len(written) == sum(".layers.3." not in name for name in plain)
    # It is a student for a run: its files are read as any model's.
    assert not read_model(out, "student").quantized


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("llama", "--layers 3 --experts 2", "--experts is 2: must be at least 1 and less than the teacher's 0"),
        ("qwen3_moe", "--layers 3 --experts 8", "--experts is 8: must be at least 1 and less than the teacher's 8"),
        ("qwen3_moe", "--layers 3 --experts 4 --experts-per-token 3", "at most the teacher's 2, and at most --experts"),
        ("qwen3_moe", "--layers 3 --experts-per-token 1", "--experts-per-token goes with --experts"),
        ("qwen3_moe", "--layers 3 --intermediate 8", "--intermediate: Qwen3MoeForCausalLM is not made like Llama"),
        ("llama", "--layers 3 --kv-heads 2", "--kv-heads is 2: must be at least 1 and less than the teacher's 2"),
        ("deepseek_v3", "--layers 3 --kv-heads 2", "--kv-heads: DeepseekV3ForCausalLM is not made like Llama"),
    ],
)
def test_refused(
    family: str, options: str, expected: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, out = save(random_model(family), tmp_path / "teacher"), tmp_path / "student"
    assert cut(teacher, text, out, *options.split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and expected in error, error
    assert not out.exists()


def test_keys_and_values_shared_between_layers_are_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save(random_model("llama"), tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"num_kv_shared_layers": 2}))
    assert cut(teacher, text, tmp_path / "student", "--layers", "3") == 2
    assert "shares keys and values between layers (num_kv_shared_layers)" in capsys.readouterr().err
