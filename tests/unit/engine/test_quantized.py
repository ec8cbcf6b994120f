"""Linear layers in 8 bits, beside a rounding in float64 that is written out here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ddk_ds.config import make_config
from ddk_ds.config.sections import Teacher
from ddk_ds.engine.eight_bits import FORMATS, product_fault, skipped_layers
from ddk_ds.engine.quantized import QuantizedLinear, quantize, quantize_layers
from ddk_ds.errors import ConfigError

E4M3 = np.concatenate(  # all its numbers from 0 up: 7 subnormal, then 8 in each of 15 powers of two, but 480 is NaN
    [np.arange(8) / 8 * 2.0**-6, *((1 + np.arange(8) / 8) * 2.0**power for power in range(-6, 9))]
)[:-1]


def nearest(values: np.ndarray) -> np.ndarray:
    """Round float64 `values` to the nearest number of E4M3, to the even one of two that are equally near."""
    size = np.abs(values)[..., None]
    above = np.clip(np.searchsorted(E4M3, size[..., 0]), 1, len(E4M3) - 1)
    low, high = E4M3[above - 1], E4M3[above]
    middle = (low + high) / 2
    up = (size[..., 0] > middle) | ((size[..., 0] == middle) & (above % 2 == 0))
    return np.copysign(np.where(up, high, low), values)


def exact_product(kind: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> np.ndarray:
    """Return the product in float64 of both matrices rounded to 8 bits; the weight's scales are stored in bf16."""
    highest = {"fp8": 448, "int8_dynamic": 127}[kind]

    def rounded(values: torch.Tensor, scale_dtype: torch.dtype) -> np.ndarray:
        largest = values.abs().amax(-1, keepdim=True).double()
        scale = torch.where(largest > 0, (largest.float() / highest).to(scale_dtype).double(), 1.0)
        # The quotient is one of float32, as the layer's.
        quotient = (values.float() / scale.float()).double().numpy()
        small = nearest(quotient) if kind == "fp8" else np.clip(np.rint(quotient), -127, 127)
        return small * scale.numpy()

    product = rounded(x, torch.float32) @ rounded(weight, torch.bfloat16).T
    return product if bias is None else product + bias.double().numpy()


def layer_and_inputs(rows: int, columns: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows * columns + outputs)
    x, weight = torch.randn(rows, columns), torch.randn(outputs, columns) * torch.rand(outputs, 1)
    return x.bfloat16(), weight.bfloat16(), torch.randn(outputs).bfloat16()


@pytest.mark.parametrize("kind", ["fp8", "int8_dynamic"])
@pytest.mark.parametrize(("rows", "columns", "outputs"), [(5, 64, 48), (1, 16, 16), (17, 48, 32), (130, 1024, 96)])
def test_it_is_the_product_of_the_rounded_matrices(kind: str, rows: int, columns: int, outputs: int) -> None:
    x, weight, bias = layer_and_inputs(rows, columns, outputs)
    x[0, 3] = 3e4  # an outlier, beside which most of its row is subnormal or 0
    weight[2] = 0
    if rows > 1:
        x[1] = 0
    for add in (bias, None):
        found = QuantizedLinear(weight, add, FORMATS[kind])(x)
        exact = exact_product(kind, x, weight, add)
        assert found.dtype == torch.bfloat16
        # Sums in float32 are rounded to bf16 once, to 2^-8 of the result; they err only where that is a near thing.
        largest = np.abs(exact).max(-1, keepdims=True)
        assert (np.abs(found.double().numpy() - exact) <= 2.0**-8 * np.abs(exact) + 1e-6 * largest).all()
        assert (found == torch.from_numpy(exact).bfloat16()).float().mean() > 0.99
    if rows > 1:
        assert (QuantizedLinear(weight, bias, FORMATS[kind])(x)[1] == bias).all()


def test_fp8_rounds_the_inputs_too() -> None:
    """By hand: 17 of 448 is halfway between 16 and 18, and a quotient of even mantissa wins."""
    weight, x = torch.zeros(16, 16).bfloat16(), torch.zeros(1, 16).bfloat16()
    weight[0, :2], x[0, :2] = torch.tensor([448.0, 17.0]), torch.tensor([17.0, 448.0])
    assert QuantizedLinear(weight, None, FORMATS["fp8"])(x)[0, 0] == 2 * 16 * 448


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_integers_have_exact_sums_for_any_number_of_tokens(rows: int) -> None:
    """torch._int_mm has them on a CPU too, and takes no fewer than 17 rows on CUDA: the largest sum of all, by hand."""
    width = 4096
    weight, x = torch.full((8, width), 1.0), torch.full((rows, width), 1.0)
    weight[1], x[:, ::2] = -1.0, -1.0
    weight[2, ::2] = -1.0
    y = QuantizedLinear(weight, None, FORMATS["int8_dynamic"])(x)
    assert y.shape == (rows, 8) and y.dtype == torch.float32
    torch.testing.assert_close(y[:, :3], torch.tensor([[0.0, 0.0, width]]).expand(rows, 3), rtol=1e-6, atol=0)
    integers = [torch.randint(-127, 128, (size, width), dtype=torch.int8) for size in (rows, 24)]
    sums = integers[0].long() @ integers[1].long().T
    assert torch.equal(torch._int_mm(integers[0], integers[1].t()).long(), sums)
    assert FORMATS["int8_dynamic"].longest == 133_144 and 133_144 * 127**2 < 2**31 <= 133_145 * 127**2
    assert FORMATS["int8_dynamic"].fits((8, 133_144), 2) and not FORMATS["int8_dynamic"].fits((8, 133_152), 2)
    assert FORMATS["int8"].fits((8, 133_152), 2)


def test_the_rows_that_cuda_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    product = torch._int_mm

    def counted(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return product(rows, columns)

    monkeypatch.setattr(torch, "_int_mm", counted)
    x, weight, bias = layer_and_inputs(30, 64, 48)
    layer = QuantizedLinear(weight, bias, FORMATS["int8_dynamic"])
    assert torch.equal(torch.cat([layer(x[:1]), layer(x[1:17]), layer(x[17:])]), layer(x))
    assert seen == [17, 17, 17, 30]


@pytest.mark.parametrize("kind", ["fp8", "int8_dynamic"])
def test_a_token_does_not_depend_on_the_others(kind: str) -> None:
    x, weight, bias = layer_and_inputs(64, 96, 48)
    layer = QuantizedLinear(weight, bias, FORMATS[kind])
    whole = layer(x.view(4, 16, 96))
    assert whole.shape == (4, 16, 48)
    assert torch.equal(whole[2, 5:], layer(x[37:48])) and torch.equal(layer(x[:0]), whole[:0, 0])


@pytest.mark.long("compiling takes 20 s; a GPU's layers are worth compiling in 8 bits")
@pytest.mark.parametrize("kind", ["fp8", "int8_dynamic"])
def test_compiled_it_differs_by_rounding(kind: str) -> None:
    x, weight, bias = layer_and_inputs(48, 96, 48)
    layer = QuantizedLinear(weight, bias, FORMATS[kind])
    found = torch.compile(layer)(x)
    torch.testing.assert_close(found, layer(x), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["int8", "int8_dynamic", "fp8"])
def test_what_is_not_finite_stays_so(kind: str, bad: float) -> None:
    """In its own row of the results, or its own column, and nowhere else."""
    x, weight, bias = layer_and_inputs(6, 64, 48)
    right = QuantizedLinear(weight, bias, FORMATS[kind])(x)
    x[1, 7] = bad
    found = QuantizedLinear(weight, bias, FORMATS[kind])(x)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2, 3, 4, 5]], right[[0, 2, 3, 4, 5]])
    x[1, 7], weight[4, 9] = 1.0, bad
    found = QuantizedLinear(weight, bias, FORMATS[kind])(x)
    assert not found[:, 4].isfinite().any() and found[:, :4].isfinite().all() and found[:, 5:].isfinite().all()


@pytest.mark.parametrize("tiny", [1e-38, 2.0**-133])
def test_rows_of_tiny_numbers_become_zeros(tiny: float) -> None:
    """Their own scale has lost its digits, and may be 0 in bf16: they would become infinite, or 448 times nothing."""
    values = torch.full((2, 16), tiny).bfloat16()
    assert values.all()
    small, scale = quantize(values, FORMATS["fp8"], torch.bfloat16)
    assert (small.float() == 0).all() and (scale > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_near(dtype: torch.dtype) -> None:
    """Weights are off by half a step at most, and the integers can be read from the dtype that they are stored in."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(24, 64).to(dtype), torch.randn(24).to(dtype), torch.randn(5, 64).to(dtype)
    weight[3] = 0
    integers, scale = quantize(weight, FORMATS["int8"], dtype)
    error = (integers.float() * scale.float()[:, None] - weight.float()).abs()
    rounding = 0.0 if dtype == torch.float32 else 2**-8 * 127  # of the scale itself
    assert (error <= scale.float()[:, None] * (0.5 + rounding) + 1e-7).all() and integers.abs().max() <= 127
    layer = QuantizedLinear(weight, bias, FORMATS["int8"])
    assert torch.equal(layer.packed.view(torch.int8), integers) and layer.packed.dtype == dtype
    assert layer.packed.numel() * layer.packed.itemsize == weight.numel()
    exact = nn.functional.linear(x.float(), integers.float() * scale.float()[:, None], bias.float())
    torch.testing.assert_close(layer(x).float(), exact, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=5e-2)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def layers(*shapes: tuple[int, int]) -> nn.ModuleList:
    """Return three layers of linear modules (in, out)."""
    names = "abcdef"
    return nn.ModuleList(
        nn.ModuleDict({name: nn.Linear(*shape) for name, shape in zip(names, shapes, strict=False)}) for _ in range(3)
    ).bfloat16()


def quantized(found: nn.ModuleList, **section: Any) -> tuple[list[str], list[str]]:
    """Quantize the layers; return what stays as it was, and the names of the quantized modules."""
    left = quantize_layers(found, Teacher(path="t", **section), {}, lambda _: None)
    return left, [name for name, module in found.named_modules() if isinstance(module, QuantizedLinear)]


def test_what_fp8_cannot_multiply_stays_as_it_was() -> None:
    left, names = quantized(layers((32, 64), (24, 16), (16, 40), (48, 48)), quantize="fp8")
    assert left == ["b.weight of 16 x 24", "c.weight of 40 x 16"]
    assert names == [f"{number}.{name}" for number in range(3) for name in "ad"]
    left, names = quantized(layers((32, 64), (24, 16), (12, 40), (20, 48)), quantize="int8_dynamic")
    assert left == ["c.weight of 40 x 12", "d.weight of 48 x 20"] and len(names) == 6
    left, names = quantized(layers((32, 64), (24, 16), (3, 128)), quantize="int8")
    assert left == ["c.weight of 128 x 3"] and len(names) == 6  # rows of 3 bytes are no whole numbers of bf16
    with pytest.raises(ConfigError, match="fp8 would leave 9"):
        quantized(layers((16, 16), (40, 60)), quantize="fp8")


@pytest.mark.parametrize("kind", ["int8", "int8_dynamic", "fp8"])
def test_layers_that_are_skipped(kind: str) -> None:
    left, names = quantized(layers((32, 64)), quantize=kind, quantize_skip_layers=(0, -1))
    assert left == ["layer 0", "layer 2"] and names == ["1.a"]
    for number in (3, -4):
        section = Teacher(path="t", quantize=kind, quantize_skip_layers=(number,))
        with pytest.raises(ConfigError, match=f"names layer {number}: the teacher's are 0 to 2, or -3 to -1"):
            skipped_layers(section, 3)
    with pytest.raises(ValueError, match="without quantize"):
        Teacher(path="t", quantize_skip_layers=(0,))


VALUES: dict[str, Any] = {"name": "n", "student": {"path": "s"}, "data": {"path": "d"}, "stop": {"steps": 3000}}


def test_a_teachers_cache_is_of_one_format() -> None:
    sections = [{}, {"quantize": "int8"}, {"quantize": "int8_dynamic"}, {"quantize": "fp8"}]
    sections += [{"quantize": "fp8", "quantize_skip_layers": [0, -1]}]
    found = []
    for section in sections:
        config = make_config({**VALUES, "teacher": {"path": "t", "cache": {"path": "c"}, **section}}, "a test")
        found.append(config.cache_conditions())
    assert all(one != other for place, one in enumerate(found) for other in found[:place])


def test_fp8_needs_bf16() -> None:
    for precision in ("bf16", "fp32"):
        values = VALUES | {"teacher": {"path": "t", "quantize": "fp8"}, "train": {"precision": precision}}
        if precision == "bf16":
            make_config(values, "a test")
        else:
            with pytest.raises(ConfigError, match=r"fp8 has results in bf16, and train.precision is fp32"):
                make_config(values, "a test")


@pytest.mark.parametrize("kind", ["fp8", "int8_dynamic"])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0)])
def test_devices_without_such_products(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kind: str) -> None:
    fault = capability < {"fp8": (8, 9), "int8_dynamic": (8, 0)}[kind]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "this one")
    section = Teacher(path="t", quantize=kind)
    found = product_fault(section, torch.device("cuda:0"))
    assert bool(found) == fault
    assert not fault or f"this one has compute capability {capability[0]}.{capability[1]}" in found
    assert product_fault(section, torch.device("cpu")) == ""
    for other in (Teacher(path="t"), Teacher(path="t", quantize="int8")):
        assert product_fault(other, torch.device("cuda:0")) == ""
