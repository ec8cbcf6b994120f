"""Each shape has its graph, none is left out in silence, and a compilation that comes late is noticed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from ddk_ds.engine.compiling import CompileWatch, compile_layers, compile_whole, uncompiled


class Layer(nn.Linear):
    """A layer as transformers has them: all of them, of all models, share the code of their forward."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + super().forward(hidden).relu()


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(4, 4) for _ in range(3))

    def forward(self, hidden: torch.Tensor) -> SimpleNamespace:
        for layer in self.layers:
            hidden = layer(hidden)
        return SimpleNamespace(last_hidden_state=hidden)


CONFIG = SimpleNamespace(to_dict=lambda: {"model_type": "llama"})


@pytest.fixture(autouse=True)
def traced_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace and guard as in a run, but leave the making of kernels out."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def run(model: Backbone, length: int) -> torch.Tensor:
    with torch.inference_mode():
        states: torch.Tensor = model(torch.arange(8.0 * length).reshape(2, length, 4) / 9).last_hidden_state
        return states


def whole(model: Backbone) -> None:
    compile_whole(model, CONFIG, "cpu")


def by_layer(model: Backbone) -> None:
    compile_layers(model.layers, CONFIG)


@pytest.mark.parametrize("compile_it", [by_layer, whole])
def test_every_shape_is_compiled_once_for_all_layers(compile_it: Callable[[Backbone], None]) -> None:
    model, plain, watch = Backbone(), Backbone(), CompileWatch()
    compile_it(model)
    lengths = range(4, 14)  # more than torch's limit of 8
    for length in (*lengths, *lengths):
        assert torch.equal(run(model, length), run(plain, length))
    assert counters["stats"]["unique_graphs"] == len(lengths)
    assert counters["frames"]["total"] == counters["frames"]["ok"], "some ran uncompiled"
    assert watch.news() == "", "what came before is known"
    run(model, 5)
    with uncompiled():
        run(model, 20)
    assert watch.news() == ""
    run(model, 20)
    said = watch.news()
    assert said.startswith("warning: compile_layers: 1 graphs were compiled after the first interval: ")
    run(model, 21)
    assert watch.news() == "", "one line is enough"


def test_what_runs_uncompiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddk_ds.engine.compiling._MOST_GRAPHS", 2)
    model, watch = Backbone(), CompileWatch()
    by_layer(model)
    run(model, 4)
    assert watch.news() == ""
    for length in (5, 6):
        run(model, length)
    assert "1 graphs were compiled after the first interval, and 1 functions could not be" in watch.news()


def test_results_are_copied_out_of_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay writes its results to the same memory; here a function that does."""
    memory, modes = torch.zeros(1, 2, 3), []

    def compiled(forward: Any, mode: str | None = None, **_: Any) -> Any:
        modes.append(mode)

        def replay(*given: Any) -> Any:
            output = forward(*given)
            memory.add_(1)
            output.last_hidden_state = memory
            return output

        return replay

    monkeypatch.setattr(torch, "compile", compiled)
    model = Backbone()
    compile_whole(model, CONFIG, "cuda")
    first, second = run(model, 4), run(model, 4)
    assert first.unique().tolist() == [1.0] and second.unique().tolist() == [2.0]
    assert modes == ["reduce-overhead"]
