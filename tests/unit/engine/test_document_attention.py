"""Attention inside documents, one after the other: numbers of each document alone, with any way to run a layer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ddk_ds.config.sections import Student
from ddk_ds.data.loader import document_positions
from ddk_ds.engine.attention_masks import backbone_pass, use_own_masks
from ddk_ds.engine.compiling import compile_layers, compile_whole
from ddk_ds.engine.document_attention import by_masks
from ddk_ds.engine.layers import LayerByLayer, checkpoint_layers
from ddk_ds.engine.unloaded_models import backbone_of
from tests.unit.engine.test_attention import SMALL

# Documents of four samples: one of one token, one that fills its sample.
LENGTHS = [[9, 1, 14], [24], [5, 5, 14], [1, 23]]
POSITIONS = document_positions([np.array(lengths) for lengths in LENGTHS])
IDS = torch.randint(50, (4, 24), generator=torch.Generator().manual_seed(1))
WEIGHTS = torch.randn(
    4, 24, 32, generator=torch.Generator().manual_seed(2)
)  # the last norm fixes plain sums of squares
DOCUMENTS = [part[None] for row, lengths in zip(IDS, LENGTHS, strict=True) for part in row.split(lengths)]
WINDOWS = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},  # two heads of keys for four of queries
    "gemma3_text": WINDOWS,
    "falcon": {"new_decoder_architecture": True},  # has attention of its own
}


@pytest.fixture(autouse=True)
def _own_masks() -> Iterator[None]:
    tables = ALL_MASK_ATTENTION_FUNCTIONS, ALL_ATTENTION_FUNCTIONS
    before = [table["sdpa"] for table in tables], transformers.masking_utils.find_packed_sequence_indices
    use_own_masks()
    yield
    for table, function in zip(tables, before[0], strict=True):
        table["sdpa"] = function
    transformers.masking_utils.find_packed_sequence_indices = before[1]


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    shape = {key: value for key, value in SMALL.items() if kind != "falcon" or key != "head_dim"}
    config = AutoConfig.for_model(kind, **shape, **KINDS[kind], initializer_range=0.2)
    return backbone_of(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"))


def states(backbone: Any, positions: torch.Tensor | None = POSITIONS, ids: torch.Tensor = IDS) -> torch.Tensor:
    with backbone_pass(backbone, ids, positions) as given:
        found: torch.Tensor = backbone(**given, use_cache=False).last_hidden_state
    return found


def gradients(backbone: Any) -> list[torch.Tensor]:
    (states(backbone.train()) * WEIGHTS).sum().backward()
    return [parameter.grad for parameter in backbone.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_states_and_gradients_are_those_of_each_document_alone(kind: str) -> None:
    if kind == "falcon" and transformers.__version__ < "5":
        pytest.skip("4.57's makes its masks by itself: it is refused when it is loaded (engine/split_check.py)")
    backbone, alone = model_of(kind), model_of(kind).double()
    alone.config._attn_implementation = "eager"
    ours = gradients(backbone)
    right = torch.cat([alone(ids, use_cache=False).last_hidden_state for ids in DOCUMENTS], 1)[0]
    (right * WEIGHTS.flatten(0, 1)).sum().backward()
    torch.testing.assert_close(states(backbone).flatten(0, 1).double(), right, rtol=1e-4, atol=1e-4)
    for found, parameter in zip(ours, alone.parameters(), strict=True):
        limit = 1e-5 * float(parameter.grad.abs().max())
        torch.testing.assert_close(found.double(), parameter.grad, rtol=1e-4, atol=limit)
    assert (states(backbone, None) - states(backbone)).abs().max() > 0.1, "joined is something else"


def test_masks_are_made_where_a_document_is_longer_than_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def noted(*arguments: Any, **options: Any) -> torch.Tensor:
        seen.append(options["attn_mask"] is not None)
        return attention(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    number = len(DOCUMENTS)
    states(model_of("llama"))
    assert seen == [False] * 2 * number
    seen.clear()
    states(model_of("gemma3_text"))
    assert seen == [True] * number + [False] * number
    seen.clear()
    states(model_of("gemma3_text"), document_positions([np.array([8, 8, 8])] * 4))
    assert not any(seen) and len(seen) == 24
    seen.clear()
    states(model_of("llama"), document_positions([np.array([24])] * 4))
    assert seen == [False, False], "samples of one document go together"
    seen.clear()
    padded = document_positions([np.array([20, 1, 1, 1, 1])] * 4)
    found = states(model_of("llama"), padded)
    assert len(seen) == 2 * 4 * 2, "what fills a sample up is one more"
    alone = document_positions([np.array([20])] * 4)
    torch.testing.assert_close(found[:, :20], states(model_of("llama"), alone, IDS[:, :20]))


def test_masks_alone_keep_documents_apart_too() -> None:
    backbone = model_of("gemma3_text")
    with by_masks():
        found = states(backbone)
    torch.testing.assert_close(found, states(backbone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_recomputed_layers_have_the_same_documents(kind: str) -> None:
    kept = gradients(model_of(kind))
    for mode in (True, "selective"):
        backbone = model_of(kind)
        checkpoint_layers(backbone, Student(path="s", gradient_checkpointing=mode))
        for found, right in zip(gradients(backbone), kept, strict=True):
            assert torch.equal(found, right), mode


def test_micro_batches_of_one_pass_have_their_own_documents() -> None:
    assert POSITIONS is not None
    backbone = model_of("llama").eval()
    apart = torch.cat([states(backbone, POSITIONS[rows], IDS[rows]) for rows in (slice(0, 2), slice(2, 4))])
    layers = LayerByLayer(backbone.layers)
    with layers.parts(2):
        assert torch.equal(states(backbone), apart)


@pytest.mark.long("torch's compiler is imported and run, 10 s")
@pytest.mark.parametrize("whole", [False, True])
def test_what_is_compiled_has_its_graphs_for_all_documents(monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    backbone = model_of("gemma3_text").eval().requires_grad_(False)
    other = document_positions([np.array([13, 11])] * 4)
    right = states(backbone), states(backbone, other), states(backbone, None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compile_whole(backbone, backbone.config, "cpu") if whole else compile_layers(backbone.layers, backbone.config)
    torch.testing.assert_close(states(backbone), right[0])
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    torch.testing.assert_close(states(backbone, other), right[1])
    assert counters["stats"]["unique_graphs"] == graphs
    torch.testing.assert_close(states(backbone, None), right[2])
    torch.testing.assert_close(states(backbone), right[0])
