"""tools/make_student.py prunes a teacher to the same student as a model that is built without the removed parts."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ddk_ds.commands import distill_rank as distill
from ddk_ds.commands.cut_student_command import main
from ddk_ds.data.tokenizer import EOS_TOKEN, PAD_TOKEN, save_tokenizer
from ddk_ds.engine import narrowing, pruning
from ddk_ds.engine.model_files import read_licence, read_model
from ddk_ds.engine.whole_models import load_model
from tools.bench.small_run import write_config

LAYERS = 6
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": LAYERS}
SLIDING = ["full_attention" if number % 3 else "sliding_attention" for number in range(LAYERS)]
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {
        **{"num_key_value_heads": 2, "tie_word_embeddings": True},
        **{"use_sliding_window": True, "sliding_window": 4, "layer_types": SLIDING},
    },
    "gpt_neox": {"rotary_pct": 0.5},
    "gemma": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {},
    "qwen2_moe": {
        "num_key_value_heads": 2,
        "decoder_sparse_step": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
    },
}
VOCAB = 258
LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b\n" * 12,
    "12 + 30 = 42, " * 20,
]


def random_model(model_type: str, **extra: Any) -> Any:
    torch.manual_seed(5)
    values = {**SIZES, "vocab_size": VOCAB, "initializer_range": 0.2, **ARCHITECTURES[model_type], **extra}
    config = AutoConfig.for_model(model_type, **values)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, shape, generator=generator) for shape in ((2, 12), (1, 12))]


def built_without(model: Any, kept: Sequence[int]) -> Any:
    """Build a new model of the kept layers only, with its weights copied by name, without using the tool's code."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[number] for number in kept]
    result = AutoModelForCausalLM.from_config(config).eval()
    weights = {}
    for name, value in model.state_dict().items():
        if match := re.search(r"\.layers\.(\d+)\.", name):
            if int(match[1]) not in kept:
                continue
            name = name.replace(match[0], f".layers.{kept.index(int(match[1]))}.")
        weights[name] = value
    result.load_state_dict(weights)
    return result


def loss_of(model: Any, texts: Sequence[torch.Tensor]) -> float:
    """Return the mean loss over tokens, from the loss that transformers computes."""
    with torch.no_grad():
        sums = [float(model(input_ids=ids, labels=ids).loss) * ids[:, 1:].numel() for ids in texts]
    return sum(sums) / sum(ids[:, 1:].numel() for ids in texts)


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


def others(number: int) -> list[int]:
    return [layer for layer in range(LAYERS) if layer != number]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that makes one token of each byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    result = Tokenizer(models.BPE())
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [EOS_TOKEN, PAD_TOKEN]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet, special_tokens=special)
    result.train_from_iterator([], trainer)
    save_tokenizer(result, folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    return path


def save(model: Any, tokenizer: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


def cut(teacher: Path, text: Path, out: Path, *options: str) -> int:
    """Run the tool on 4 samples of 32 tokens, and return its exit code."""
    size = ["--samples", "4", "--sequence-length", "32"]
    return main(["--teacher", str(teacher), "--out", str(out), "--text", str(text), *size, *options])


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt_neox", "gemma"])
def test_losses_without_a_layer_are_those_of_models_without_it(model_type: str) -> None:
    model, texts = random_model(model_type), batches()
    whole, without = pruning.losses_without_each(model, texts)
    assert whole == pytest.approx(loss_of(model, texts), rel=1e-5)
    expected = [loss_of(built_without(model, others(number)), texts) for number in range(LAYERS)]
    assert without == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == LAYERS
    assert len(model.base_model.layers) == LAYERS


def test_leaving_out_a_layer_computes_the_layers_after_it_alone() -> None:
    model, calls = random_model("llama"), list[int]()
    for number, layer in enumerate(model.base_model.layers):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    pruning.losses_without_each(model, batches()[:1])
    # Layer n is computed in the complete model's pass, and once for each of the n layers before it that is left out.
    assert [calls.count(number) for number in range(LAYERS)] == [1 + number for number in range(LAYERS)]


@pytest.mark.parametrize("greedy", [False, True])
def test_ranking_is_that_of_every_model_built(greedy: bool) -> None:
    model, texts, kept, dropped = random_model("llama"), batches(), list(range(LAYERS)), list[int]()
    losses = {number: loss_of(built_without(model, others(number)), texts) for number in range(LAYERS)}
    while len(kept) > 3:
        if greedy:
            losses = {n: loss_of(built_without(model, [m for m in kept if m != n]), texts) for n in kept}
        worst = min((number for number in kept if number not in (0, 1, LAYERS - 1)), key=losses.__getitem__)
        kept.remove(worst)
        dropped.append(worst)
    ranking = pruning.rank_layers(model, texts, 3, greedy=greedy)
    assert (ranking.kept, ranking.dropped) == ([0, 1, LAYERS - 1], dropped)
    assert pruning.rank_layers(model, texts, 5, greedy=greedy).dropped == dropped[:1]


def test_a_cut_model_in_memory_fills_its_cache_in_order() -> None:
    model, ids = random_model("qwen2"), batches()[0]
    assert pruning.keep_layers(model, [0, 1, 3, 5])["layer_types"] == [SLIDING[number] for number in (0, 1, 3, 5)]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :8], use_cache=True).past_key_values
        rest = model(input_ids=ids[:, 8:], past_key_values=cache).logits
    torch.testing.assert_close(rest, logits_of(model, ids)[:, 8:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt_neox"])
def test_the_student_is_the_model_of_the_layers_kept(
    model_type: str, tokenizer: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_model(model_type)
    teacher, out = save(model, tokenizer, tmp_path / "teacher"), tmp_path / "student"
    assert cut(teacher, text, out, "--layers", "4", "--json", str(tmp_path / "ranking.json")) == 0
    ranking = json.loads((out / "pruning.json").read_text())
    assert (tmp_path / "ranking.json").read_text() == (out / "pruning.json").read_text()
    kept = ranking["kept"]
    assert len(kept) == 4 and {0, 1, LAYERS - 1} <= set(kept)
    assert ranking["ranking"][:2] == [number for number in ranking["ranking"] if number not in kept]
    student, expected = load_model(out), built_without(model, kept)
    ids = batches()[0]
    torch.testing.assert_close(logits_of(student, ids), logits_of(expected, ids), rtol=0, atol=0)
    assert student.config.num_hidden_layers == 4
    own = AutoTokenizer.from_pretrained(out)
    joined = [token for line in LINES for token in (*own(line).input_ids, own.eos_token_id)]
    rows = [torch.tensor(joined[:128]).view(4, 32)]
    losses = ranking["loss"], ranking["student_loss"]
    assert losses == pytest.approx((loss_of(model, rows), loss_of(expected, rows)), rel=1e-5)
    shown = capsys.readouterr().out
    assert f"of the student {ranking['student_loss']:.4f}" in shown and shown.count("always") == 3
    assert shown.count(" yes") == 1 and shown.count(" no") == 2
    assert [path.name for path in tmp_path.glob(".partial*")] == []


def test_weights_keep_their_dtype_and_bits(tokenizer: Path, text: Path, tmp_path: Path) -> None:
    model = random_model("llama").to(torch.bfloat16)
    teacher, out = save(model, tokenizer, tmp_path / "teacher"), tmp_path / "student"
    (teacher / "README.md").write_text("---\nlicense: other\nlicense_name: gemma\n---\n# Teacher\n")
    (teacher / "LICENSE").write_text("terms")
    out.mkdir()  # an empty directory is accepted
    assert cut(teacher, text, out, "--layers", "3") == 0
    # The weights are the teacher's, and so is their licence: the card of a run with this student names it.
    assert read_licence(read_model(out, "student")) == {"license": "other", "license_name": "gemma"}
    assert (out / "LICENSE").read_text() == "terms" and not (out / "README.md").exists()
    stored = load_file(out / "model.safetensors")
    expected = built_without(model, [0, 1, LAYERS - 1]).to(torch.bfloat16).state_dict()
    assert stored.keys() == expected.keys()
    assert all(value.dtype == torch.bfloat16 and torch.equal(value, expected[name]) for name, value in stored.items())


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_neurons_that_do_nothing_go_first(model_type: str) -> None:
    model, ids = random_model(model_type), batches()[0]
    for number, layer in enumerate(model.base_model.layers):
        silent = torch.randperm(48, generator=torch.Generator().manual_seed(number))[:20]
        layer.mlp.gate_proj.weight[silent] = 0  # silu(0) = 0
    before = logits_of(model, ids)
    assert narrowing.narrow_mlp(model, batches(), 28) == {"intermediate_size": 28}
    torch.testing.assert_close(logits_of(model, ids), before, rtol=1e-5, atol=1e-5)
    assert narrowing.narrow_mlp(model, batches(), 27)
    assert not torch.allclose(logits_of(model, ids), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_channels_that_are_zero_go_first(tied: bool) -> None:
    model, ids = random_model("llama", tie_word_embeddings=tied, rms_norm_eps=1e-9), batches()[0]
    silent = [1, 5, 8, 13, 14, 21, 30, 31]
    model.model.embed_tokens.weight[:, silent] = 0
    for layer in model.model.layers:
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            part.weight[silent] = 0
    before = logits_of(model, ids)
    assert narrowing.narrow_hidden(model, batches(), 24) == {"hidden_size": 24, "head_dim": 8}
    torch.testing.assert_close(logits_of(model, ids), before, rtol=1e-4, atol=1e-4)


def test_a_narrower_student_in_all_directions(tokenizer: Path, text: Path, tmp_path: Path) -> None:
    teacher = save(random_model("qwen2"), tokenizer, tmp_path / "teacher")
    values = json.loads((teacher / "config.json").read_text())
    out, size = tmp_path / "student", ["--layers", "4", "--intermediate", "32", "--hidden", "24", "--greedy"]
    assert cut(teacher, text, out, *size) == 0
    student = load_model(out)
    config = json.loads((out / "config.json").read_text())
    assert config == values | {
        **{"num_hidden_layers": 4, "intermediate_size": 32, "hidden_size": 24, "head_dim": 8},
        "layer_types": [SLIDING[number] for number in json.loads((out / "pruning.json").read_text())["kept"]],
    }
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert student.model.layers[3].mlp.down_proj.weight.shape == (24, 32)
    assert student.model.layers[3].self_attn.q_proj.weight.shape == (32, 24)


def test_a_student_from_shards_is_ready_for_a_run(workspace: Path, tmp_path: Path) -> None:
    teacher = save(random_model("llama", vocab_size=600), workspace / "tokenizer", tmp_path / "teacher")
    shards, out = ["--shards", str(workspace / "shards")], tmp_path / "student"
    size = ["--samples", "4", "--sequence-length", "64"]
    assert main(["--teacher", str(teacher), "--out", str(out), *shards, *size, "--layers", "3"]) == 0
    models = {"student": {"path": str(out)}, "teacher": {"path": str(teacher)}}
    assert distill.main(["--config", str(write_config(workspace, tmp_path, **models)), "--dry-run"]) == 0


def error_of(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """Return the message that the user reads, after checking that it is one line and that the exit code is 2."""
    error = capsys.readouterr().err.splitlines()
    assert code == 2 and error[-1].startswith("error: "), error
    assert sum(line.startswith(("error", "Traceback")) for line in error) == 1, error
    return error[-1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--layers 2", "--layers is 2: must be 3 (first two, last) to the teacher's 6"),
        ("--layers 7", "--layers is 7"),
        ("--layers 6", "nothing is cut"),
        ("--layers 4 --samples 0", "--samples is 0: must be at least 1"),
        ("--layers 4 --sequence-length 1", "--sequence-length is 1: must be at least 2"),
        ("--layers 4 --intermediate 48", "--intermediate is 48: must be at least 1 and less than the teacher's 48"),
        ("--layers 4 --hidden 0", "--hidden is 0"),
        ("--layers 4 --hidden 26", "--hidden 26 is not a multiple of the 4 attention heads; 24 is"),
        ("--layers 4 --samples 400", "tokens: give more, or lower --samples"),
        ("--layers 4 --text nowhere.jsonl", "--text nowhere.jsonl: there is no such file"),
        ("--layers 4 --json nowhere/x.json", "--json nowhere/x.json: there is no such directory"),
        ("--layers 4 --teacher nowhere", "nowhere holds no config.json"),
    ],
)
def test_errors(
    options: str, expected: str, tokenizer: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, out = save(random_model("llama"), tokenizer, tmp_path / "teacher"), tmp_path / "student"
    assert expected in error_of(capsys, cut(teacher, text, out, *options.split()))
    assert not out.exists()


@pytest.mark.parametrize(
    ("model_type", "options", "expected"),
    [
        ("gpt2", "", "config.json has no num_hidden_layers; models like Llama, Qwen2 and GPT-NeoX can be cut"),
        ("gpt_neox", "--intermediate 24", "--intermediate: GPTNeoXForCausalLM is not made like Llama"),
        ("gpt_neox", "--hidden 16", "--hidden: GPTNeoXForCausalLM is not made like Llama"),
    ],
)
def test_models_that_cannot_be_cut_so(
    model_type: str,
    options: str,
    expected: str,
    tokenizer: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher, out = save(random_model(model_type), tokenizer, tmp_path / "teacher"), tmp_path / "student"
    assert expected in error_of(capsys, cut(teacher, text, out, "--layers", "5", *options.split()))
    assert not out.exists() and list(tmp_path.glob(".partial*")) == []


def test_a_student_that_its_files_do_not_give_is_refused(
    tokenizer: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_layers = pruning.keep_layers
    # The changed configuration describes a model with other results.
    monkeypatch.setattr(pruning, "keep_layers", lambda *given: keep_layers(*given) | {"rms_norm_eps": 7.0})
    teacher, out = save(random_model("llama"), tokenizer, tmp_path / "teacher"), tmp_path / "student"
    assert "layers depend on their places" in error_of(capsys, cut(teacher, text, out, "--layers", "4"))
    assert not out.exists() and list(tmp_path.glob(".partial*")) == []


def test_errors_of_directories(tokenizer: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, out = save(random_model("llama"), tokenizer, tmp_path / "teacher"), tmp_path / "student"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "exists and is not empty" in error_of(capsys, cut(teacher, text, out, "--layers", "4"))
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    assert "is quantised" in error_of(capsys, cut(teacher, text, out, "--layers", "4"))
    (teacher / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS + 1}))
    assert "its weights lack" in error_of(capsys, cut(teacher, text, out, "--layers", "4"))
    (teacher / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    assert "cannot be loaded" in error_of(capsys, cut(teacher, text, out, "--layers", "4"))
    (teacher / "model.safetensors").unlink()
    assert "holds no safetensors weights" in error_of(capsys, cut(teacher, text, out, "--layers", "4"))


def test_shards_of_another_tokenizer(
    workspace: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = save(random_model("llama"), tokenizer, tmp_path / "teacher")
    options = ["--teacher", str(teacher), "--out", str(tmp_path / "student"), "--layers", "4"]
    code = main([*options, "--shards", str(workspace / "shards")])
    assert "not of the teacher's tokenizer" in error_of(capsys, code)
