"""The routers' loss of every family that transformers has one for is that of its own forward pass, gradient and all."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ddk_ds.engine.head import StudentRoot
from ddk_ds.engine.router_loss import router_loss
from ddk_ds.engine.unloaded_models import backbone_of
from ddk_ds.errors import ConfigError
from ddk_ds.kernels import LogitForm
from tools.bench.model_families import small_config

# All causal families of 4.57 with such a loss, except Doge, whose experts are rows of an embedding.
FAMILIES = ["dbrx", "gpt_oss", "granitemoe", "mixtral", "qwen3_moe"]
FURTHER = ["ernie4_5_moe", "flex_olmo", "granitemoehybrid", "granitemoeshared", "jamba", "minimax", "olmoe", "phimoe"]
FURTHER += ["qwen2_moe", "qwen3_next"]
LONG = pytest.mark.long("15 s; the five families are of each form")


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(family, marks=LONG) for family in FURTHER)])
def test_it_is_the_models_own(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(family), attn_implementation="eager").train()
    router = router_loss(model, "auto")
    assert router is not None and router.weight > 0
    root = StudentRoot(backbone_of(model), model.get_output_embeddings(), LogitForm(), None, 0, router).train()
    ids = torch.randint(0, 50, (2, 16))
    losses = []
    for number in range(2):
        torch.manual_seed(1)  # some families add noise to what a router gets
        if number:
            loss = model(input_ids=ids, use_cache=False, output_router_logits=True).aux_loss
        else:
            root(ids, None)
            assert root.router_loss is not None
            loss = root.router_loss
        model.zero_grad()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        losses.append((loss.detach(), gradients))
    (ours, our_gradients), (theirs, their_gradients) = losses
    assert torch.equal(ours, theirs) and our_gradients.keys() == their_gradients.keys()
    assert any("gate" in name or "router" in name for name in our_gradients)
    assert all(torch.equal(our_gradients[name], gradient) for name, gradient in their_gradients.items())


def test_a_family_without_it() -> None:
    for family in ("llama", "deepseek_v3", "doge"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(small_config(family))
        assert router_loss(model, "auto") is None and router_loss(model, 0.0) is None
        with pytest.raises(ConfigError, match="has no load-balancing loss for"):
            router_loss(model, 0.01)


def test_its_weight() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small_config("mixtral"))
    model.router_aux_loss_coef = 0.02
    own, given = router_loss(model, "auto"), router_loss(model, 0.5)
    assert own is not None and own.weight == 0.02
    assert given is not None and given.weight == 0.5
    assert router_loss(model, 0.0) is None


@pytest.mark.skipif("flint" not in CONFIG_MAPPING, reason="transformers 4 does not have it")
def test_a_model_whose_layers_are_all_dense_has_none() -> None:
    model = AutoModelForCausalLM.from_config(small_config("flint")).train()
    router = router_loss(model, "auto")
    root = StudentRoot(backbone_of(model), model.get_output_embeddings(), LogitForm(), None, 0, router).train()
    root(torch.randint(0, 50, (2, 16)), None)
    assert router is not None and float(root.router_loss or 0.0) == 0
