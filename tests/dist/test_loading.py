"""Sharded loading puts each weight in its place, and no rank ever holds a complete model."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from ddk_ds.engine.model_files import read_model
from tests.dist.ranks import run_ranks
from tests.dist.tiny import MIXTURES, VOCAB, save_model

SLACK_BYTES = 24 * 2**20  # for the allocator and buffers; the model is 12 times as large


@pytest.mark.long("every architecture, 33 s of CPU; parity loads one")
def test_architectures_tied_and_untied(tmp_path: Path) -> None:
    errors = run_ranks("tests.dist.loading_worker:logits_of_architectures", 2, folder=str(tmp_path))
    assert len(errors) == 20
    assert max(errors.values()) < 1e-5, errors


def test_a_soft_cap_in_attention_other_names_of_parts_and_sizes_and_buffers_in_files(tmp_path: Path) -> None:
    kinds = ["gemma2", "gemma3", "gpt_neo", "glm4_moe"]  # Gemma 3 with vision: the text model is taken out of it
    worker = "tests.dist.loading_worker:logits_of_architectures"
    errors = run_ranks(worker, 2, folder=str(tmp_path), kinds=kinds, ties=[True])
    assert len(errors) == 4
    assert max(errors.values()) < 1e-5, errors


_STORED = {"qwen3_moe": "mlp.experts.11.up_proj", "mixtral": "block_sparse_moe.experts.11.w3"}
_STORED |= {"deepseek_v3": "mlp.experts.11.down_proj"}
_OTHERS = pytest.param(sorted(MIXTURES.keys() - _STORED.keys()), marks=pytest.mark.long("the same conversion, 20 s"))


@pytest.mark.parametrize("kinds", [list(_STORED), _OTHERS], ids=["three", "others"])
def test_experts_that_are_stored_one_by_one(tmp_path: Path, kinds: list[str]) -> None:
    # transformers 5 joins a layer's experts to one tensor when it loads them, 4.57 does not. The files are the same.
    worker = "tests.dist.loading_worker:logits_of_architectures"
    errors = run_ranks(worker, 2, folder=str(tmp_path), kinds=kinds, ties=[False])
    assert len(errors) == len(kinds)
    assert max(errors.values()) < 1e-5, errors
    for kind in kinds:
        for directory in ("student", "export", "later"):
            stored = read_model(tmp_path / f"{kind}-False" / directory, "student.path").tensors
            assert f"model.layers.1.{_STORED.get(kind, _STORED['qwen3_moe'])}.weight" in stored


def test_a_layer_between_backbone_and_head_is_refused(tmp_path: Path) -> None:
    # BERT's decoder: a dense layer and a norm before the projection. Without them it is another model.
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "is_decoder": True}
    for seed, name in enumerate(("student", "teacher")):
        save_model(tmp_path / name, model_type="bert", vocab=VOCAB, tied=True, seed=seed, **shape)
    save_model(tmp_path / "usual", vocab=VOCAB + 3, tied=True, seed=3)
    old = {"n_layer": 2, "n_head": 4, "rotary_dim": 4}
    save_model(tmp_path / "gptj", model_type="gptj", vocab=VOCAB + 3, tied=False, seed=3, **old)
    mamba = {"num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4}  # has parameters and activations in float32
    save_model(tmp_path / "mamba", model_type="mamba", vocab=VOCAB + 3, tied=True, seed=3, **mamba)
    # Its logits differ by 3 % of the largest between a batch of one row and one of two, as SmolLM2-135M's do.
    wide = {"num_hidden_layers": 12, "intermediate_size": 1536, "num_key_value_heads": 1, "initializer_range": 0.2}
    save_model(tmp_path / "wide", hidden=576, vocab=VOCAB + 3, tied=False, seed=3, max_position_embeddings=128, **wide)
    said = run_ranks("tests.dist.loading_worker:split_of_another_form", 2, folder=str(tmp_path))
    assert len(said) == 2, said
    for message, name in zip(said, ("student", "teacher"), strict=True):
        assert message.startswith(f"{name}.path: BertLMHeadModel cannot be distilled: its logits"), message


def test_a_model_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    # XLNet's attention is causal only by masks that a language model's loss does not give it.
    shape = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
    save_model(tmp_path / "teacher", model_type="xlnet", vocab=VOCAB, tied=True, seed=1, **shape)
    said = run_ranks("tests.dist.loading_worker:refusal_of_the_teacher", 1, folder=str(tmp_path))
    assert said.startswith("teacher.path: XLNetLMHeadModel cannot be distilled: its tokens see later ones"), said


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4's cannot be told to keep no cache")
def test_the_gradients_of_layers_that_return_a_list_reach_the_optimizer(tmp_path: Path) -> None:
    # With a list torch calls none of ZeRO-3's hooks: the layers kept their weights, but for the decay of 1e-5.
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    save_model(tmp_path / "student", model_type="openai-gpt", vocab=VOCAB, tied=True, seed=1, **shape)
    change, said = run_ranks("tests.dist.loading_worker:first_changes", 1, folder=str(tmp_path))
    assert change > 5e-4  # the first step of Adam is the rate in each number
    assert said.startswith("student.path: the gradients of 24 parameters, backbone.h.0.") and "whole_layers" in said


def test_buffers_keep_their_precision(tmp_path: Path) -> None:
    # Rotary frequencies in bf16 would be wrong by full turns at long positions. A router's correction, which decides
    # between experts that are nearly equal, is float32 in a bf16 model.
    save_model(tmp_path / "teacher", model_type="glm4_moe", vocab=VOCAB, tied=True, seed=1)
    assert run_ranks("tests.dist.loading_worker:differing_buffers", 2, folder=str(tmp_path)) == []


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path: Path) -> None:
    # As another version of transformers would write it, which joins experts: DeepSpeed goes by the places of numbers.
    save_model(tmp_path / "student", vocab=VOCAB, tied=True, seed=1)
    said = run_ranks("tests.dist.loading_worker:checkpoint_of_other_names", 2, folder=str(tmp_path))
    assert "LlamaForCausalLM in transformers" in said and "continue with the version that wrote it" in said


_DENSE = {"num_hidden_layers": 24, "intermediate_size": 2048, "num_key_value_heads": 4}
_MIXTURE = {"num_hidden_layers": 12, "num_experts": 16, "moe_intermediate_size": 256}


@pytest.mark.parametrize(
    ("kind", "shape", "joined"),
    [
        ("llama", _DENSE, 1),
        # transformers 5 joins two matrices of each of 16 experts; the parts are there until the whole is.
        pytest.param("qwen3_moe", _MIXTURE, 2 * 32, marks=pytest.mark.long("300 MB are written and read")),
    ],
)
def test_a_rank_holds_its_shards_and_one_tensor(tmp_path: Path, kind: str, shape: dict[str, int], joined: int) -> None:
    # The models are written in this process, so that no rank has held a complete model; all tensors are equally large.
    save_model(tmp_path / "small", model_type=kind, vocab=VOCAB, tied=True, seed=1)
    save_model(tmp_path / "teacher", model_type=kind, hidden=512, vocab=VOCAB, tied=True, seed=1, **shape)
    for rank in run_ranks("tests.dist.loading_worker:growth_while_loading", 2, folder=str(tmp_path)):
        bound = rank["total"] // 2 + joined * rank["largest"] + SLACK_BYTES
        assert rank["total"] > 10 * SLACK_BYTES, "the model is too small to tell"
        assert rank["grown"] < bound, rank
