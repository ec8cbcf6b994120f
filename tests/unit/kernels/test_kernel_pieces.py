"""The head's pieces alone: its choice of a row kernel, its memory, its checks, the compiler and its cache."""

from __future__ import annotations

import ctypes
import shutil
import stat
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddk_ds.errors import ConfigError
from ddk_ds.kernels import Options, TeacherTopK, chunked, products_native, rows_eager, rows_native, top_k_of
from ddk_ds.kernels.chunked import Call, Head, HeadInput, Wanted, has_fast_half, row_kernel, run_chunks
from ddk_ds.kernels.rows_native import add_half, scaled_half
from tests.unit.kernels.kd_case import assert_agrees, make

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_fastest_row_kernel_that_a_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    triton, native, eager = chunked.triton_rows, rows_native.native_rows, rows_eager.eager_rows

    def chosen(device: torch.device, dtype: torch.dtype, engine: Any = "auto") -> Any:
        return row_kernel(device, dtype, Options(7, 0.5, engine=engine))

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert chosen(CUDA, dtype) is triton
    assert chosen(CUDA, torch.float64) is eager
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert chosen(CPU, dtype) is chosen(CPU, dtype, "native") is native
    assert chosen(CPU, torch.float16) is eager
    assert chosen(torch.device("meta"), torch.float32) is eager
    assert chosen(CPU, torch.float32, "eager") is chosen(CUDA, torch.float32, "eager") is eager
    assert chosen(CPU, torch.float32, "triton") is triton
    for device, dtype in ((CUDA, torch.float32), (CPU, torch.float16)):
        with pytest.raises(ConfigError, match="engine is 'native': it has no kernel"):
            chosen(device, dtype, "native")
    monkeypatch.setattr(chunked, "triton_rows", None)
    assert chosen(CUDA, torch.float32) is eager
    with pytest.raises(ConfigError, match="engine is 'triton': it has no kernel"):
        chosen(CPU, torch.float32, "triton")


def test_memory_is_taken_once_for_each_use() -> None:
    like = torch.empty(0)
    first = chunked._workspace("test", (6, 10), torch.float32, like)
    assert (first.shape, first.dtype) == ((6, 10), torch.float32)
    place = first.data_ptr()
    for shape, dtype in (((6, 10), torch.float32), ((3, 2), torch.float64), ((60, 2), torch.bfloat16)):
        assert chunked._workspace("test", shape, dtype, like).data_ptr() == place  # 240 bytes hold each of them
    second = chunked._workspace("test", (61, 1), torch.float32, like)
    assert second.shape == (61, 1) and len(chunked._kept.test) == 244
    assert chunked._workspace("other", (61, 1), torch.float32, like).data_ptr() != second.data_ptr()
    assert chunked._workspace("meta", (2, 3), torch.float32, torch.empty(0, device="meta")).device.type == "meta"


@pytest.mark.parametrize(("vocab_size", "stride"), [(1, 64), (64, 64), (65, 128), (211, 256)])
def test_rows_of_a_buffer_begin_on_a_cache_line_and_hold_no_nan_behind_their_end(vocab_size: int, stride: int) -> None:
    like = torch.empty(0)
    chunked._workspace("aligned", (5, 256), torch.float32, like).fill_(float("nan"))
    buffer = chunked.row_buffer("aligned", 5, vocab_size, torch.float32, like)
    assert (buffer.shape, buffer.stride()) == ((5, stride), (stride, 1))
    assert not buffer[:, vocab_size:].isnan().any()


def test_half_precision_is_fast_where_the_processor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(3, 2, dtype=torch.bfloat16)
    for avx, amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert has_fast_half(weight) is (avx or amx)
        assert Head(weight, None, 3, torch.float32).grad_dtype == (torch.bfloat16 if avx or amx else torch.float32)
        assert not has_fast_half(weight.float()) and not has_fast_half(weight.half())


@pytest.mark.parametrize("vocab_size", [400, 507])
def test_gradients_of_four_chunks_and_of_tiles_of_the_vocabulary(
    monkeypatch: pytest.MonkeyPatch, vocab_size: int
) -> None:
    """10 chunks of 16 tokens are 3 groups; a vocabulary of 507 is 3 tiles of 200 rows."""
    monkeypatch.setattr(chunked, "has_fast_half", lambda weight: weight.dtype == torch.bfloat16)
    monkeypatch.setattr(products_native, "supports", lambda weight: False)  # as with another torch
    monkeypatch.setattr(chunked, "TILE_ROWS", 200)
    groups = []
    add = Head.add_weight_grad

    def spy(self: Head, grad: torch.Tensor, *arguments: Any, **options: Any) -> None:
        groups.append(len(grad))
        add(self, grad, *arguments, **options)

    monkeypatch.setattr(Head, "add_weight_grad", spy)
    case = make(150, vocab_size, (64, 96), std=3.0, dtype=torch.bfloat16, bias=True, padded=(5, 0))
    with warnings.catch_warnings():  # torch's, if a part of the product had the wrong size
        warnings.simplefilter("error")
        assert_agrees(case, 5e-7, 5e-3, engine="native", chunk_tokens=16)
    assert groups == [64, 64, 22]
    groups.clear()
    single = make(150, vocab_size, (64, 96))  # float32 gradients lie over the logits: no groups
    assert_agrees(single, 5e-7, 1e-6, engine="native", chunk_tokens=16)
    assert groups == [16] * 9 + [6]


@pytest.mark.parametrize(("elements", "rows"), [(5 * 211 + 210, 5), (211, 1), (10, 1)])
def test_blocks_of_rows_are_as_large_as_their_elements_allow(
    monkeypatch: pytest.MonkeyPatch, elements: int, rows: int
) -> None:
    monkeypatch.setitem(rows_eager._BLOCK_ELEMENTS, "cpu", elements)
    sizes = []
    block = rows_eager._block

    def spy(student: torch.Tensor, *arguments: Any) -> Any:
        sizes.append(len(student))
        return block(student, *arguments)

    monkeypatch.setattr(rows_eager, "_block", spy)
    make(12).run(engine="eager")
    assert sizes == [rows] * (12 // rows) + [12 % rows] * (12 % rows > 0)


def test_no_gradient_is_computed_that_nobody_wants() -> None:
    case = make()
    student = HeadInput(case.student_hidden.detach(), case.student_weight.detach())
    sums = run_chunks(Call(student, None, case.labels), Options(211, 0.0, chunk_tokens=16))
    assert (sums.hidden_grad, sums.weight_grad, sums.bias_grad) == (None, None, None)


@pytest.mark.parametrize("num_tokens", [0, 40])
def test_what_memory_held_before_is_in_no_gradient(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    case = make(num_tokens, padded=(5, 0))
    expected = torch.zeros(216, 24) if num_tokens == 0 else torch.autograd.grad(case.run().loss, case.student_weight)[0]
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: empty_like(*args, **options).fill_(torch.nan))
    student = HeadInput(case.student_hidden.detach(), case.student_weight.detach())
    teacher = HeadInput(case.teacher_hidden, case.teacher_weight)  # type: ignore[arg-type]
    options = Options(211, 0.5, chunk_tokens=16)
    found = run_chunks(Call(student, teacher, case.labels, wanted=Wanted(weight=True)), options).weight_grad
    assert found is not None
    torch.testing.assert_close(found / case.num_valid.clamp_min(1), expected, rtol=1e-5, atol=1e-6)


def test_half_precision_parts_are_added_and_rounded_as_torch_does() -> None:
    generator = torch.Generator().manual_seed(0)
    start, part = (torch.randn(7, 33, generator=generator) for _ in range(2))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for keep in (True, False):
            total = start.clone()
            add_half(total, part.to(dtype), keep=keep)
            assert torch.equal(total, part.to(dtype).float() + (start if keep else 0))
    double = start.double()
    add_half(double, part.bfloat16(), keep=True)
    assert torch.equal(double, start.double() + part.bfloat16().double())
    with pytest.raises(AssertionError):
        add_half(start.t(), part.bfloat16().t(), keep=True)
    with pytest.raises(AssertionError):
        add_half(start, part.bfloat16()[:3], keep=True)
    scale = torch.tensor(0.3)
    rounded = scaled_half(part, scale)
    assert rounded is not None and torch.equal(rounded, (part * scale).bfloat16())
    assert scaled_half(part.double(), scale) is None and scaled_half(part.to("meta"), scale) is None
    with pytest.raises(AssertionError):
        scaled_half(part.t(), scale)


META = "meta"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_valid": torch.ones(0)}, r"num_valid has shape \(0,\)"),
        ({"num_valid": torch.ones((), device=META)}, r"num_valid has shape \(\) on meta"),
        ({"labels": torch.zeros(67, dtype=torch.int64, device=META)}, "labels are torch.int64 .* on meta"),
        (
            {"teacher_hidden": torch.zeros(67, 40, device=META), "teacher_weight": torch.zeros(211, 40, device=META)},
            "on",
        ),
        ({"student_weight": torch.zeros(211, 24, device=META)}, "student_weight torch.float32 on meta"),
        ({"student_weight": torch.zeros(211)}, r"student_weight has shape \(211,\): it must have two axes"),
        ({"student_weight": torch.zeros(211, 23)}, "their second axes"),
        ({"student_bias": torch.zeros(210)}, r"student_bias has shape \(210,\)"),
        ({"teacher_hidden": None}, "one is None"),
        ({"valid_rows": torch.zeros(3, 1, dtype=torch.int64)}, r"valid_rows is torch.int64 \(3, 1\)"),
        ({"weight_grad_buffer": torch.zeros(211, 24, dtype=torch.float64)}, "weight_grad_buffer is torch.float64"),
        ({"weight_grad_buffer": torch.zeros(210, 24)}, r"give float32 \(211, 24\)"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make().run(**changes)


def test_a_scalar_of_any_shape_divides() -> None:
    case = make()
    for count in (torch.tensor(5), torch.tensor([5]), torch.tensor([[5]])):
        assert torch.equal(
            replace(case, num_valid=count).run().loss, replace(case, num_valid=torch.tensor(5)).run().loss
        )


def test_the_ends_of_k() -> None:
    case = make()
    hidden, weight = case.teacher_hidden, case.teacher_weight
    assert hidden is not None and weight is not None
    for k in (1, 211):
        assert top_k_of(hidden, weight, k, options=Options(211, 0.0)).ids.shape == (67, k)
    for k in (0, 212):
        with pytest.raises(ConfigError, match=f"k is {k}: give 1 to vocab_size, 211"):
            top_k_of(hidden, weight, k, options=Options(211, 0.0))
    known = replace(case, teacher_hidden=None, teacher_weight=None)
    found = top_k_of(hidden, weight, 1, options=Options(211, 0.0))
    assert found.log_tail.shape == (67,)
    assert top_k_of(hidden[:1], weight, 4, options=Options(211, 0.0)).log_tail.shape == (1,)
    wrong = TeacherTopK(found.ids.int(), found.log_probs, found.log_tail)
    with pytest.raises(ConfigError, match=r"teacher_topk has ids torch\.int32"):
        replace(known, teacher_topk=wrong).run()
    one_axis = TeacherTopK(*(torch.zeros(67, dtype=dtype) for dtype in (torch.int64, torch.float32, torch.float32)))
    with pytest.raises(ConfigError, match=r"torch\.int64 \(67,\), log_probs \(67,\)"):
        replace(known, teacher_topk=one_axis).run()


COMPILER = """#!/bin/sh
echo "$@" >> {log}
if [ "$1" = --version ]; then echo "fake {version}"; exit 0; fi
if [ -n "{error}" ]; then printf '%s\\n' 'in line 3' '{error}' >&2; exit 1; fi
for last; do :; done
cp {library} "$last"
"""


class Compiler:
    """A program in place of g++: it notes its arguments, and its result is a copy of the kernel compiled before."""

    def __init__(
        self, directory: Path, library: str, name: str = "fake++", version: str = "1", error: str = ""
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.path, self._log = directory / name, directory / f"{name}.log"
        self.path.write_text(COMPILER.format(log=self._log, version=version, error=error, library=library))
        self.path.chmod(self.path.stat().st_mode | stat.S_IXUSR)

    @property
    def compiled(self) -> list[str]:
        """The command lines that compiled something."""
        return [line for line in self._log.read_text().splitlines() if line != "--version"]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return the path of the compiled kernel; the cache is then in a directory that does not exist yet."""
    kernel = rows_native.load()
    assert kernel is not None
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache/of/extensions"))
    rows_native.load.cache_clear()
    yield kernel._name
    rows_native.load.cache_clear()


def loaded() -> ctypes.CDLL | None:
    rows_native.load.cache_clear()
    return rows_native.load()


def test_a_kernel_is_compiled_once_for_each_compiler_and_source(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(tmp_path / "bin", library)
    monkeypatch.setenv("CXX", str(compiler.path))
    assert loaded() is not None and loaded() is not None
    [command] = compiler.compiled
    [file] = (tmp_path / "cache/of/extensions").iterdir()
    assert file.name.startswith("ddk_ds_rows-") and file.suffix == ".so" and len(file.stem) == len("ddk_ds_rows-") + 16
    words = command.split()
    assert words[0] == "-O3" and "-ffast-math" not in words
    assert [word for word in words if word.endswith((".cpp", ".h"))] == [
        str(Path(rows_native.__file__).with_name("rows.cpp"))
    ]
    sources = []
    for path in rows_native._SOURCES:  # a copy of all, to change each
        sources.append(Path(shutil.copy(path, tmp_path)))
    monkeypatch.setattr(rows_native, "_SOURCES", sources)
    assert loaded() is not None and len(compiler.compiled) == 1  # the same text at another place
    for number, path in enumerate(sources, 2):
        path.write_text(path.read_text() + "\n")
        assert loaded() is not None and len(compiler.compiled) == number
    newer = Compiler(tmp_path / "bin", library, version="2")
    assert loaded() is not None and len(newer.compiled) == 5
    monkeypatch.setattr(rows_native, "_processor", lambda: "another")
    assert loaded() is not None and len(newer.compiled) == 6


def test_a_compilers_last_words_are_in_the_warning(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(Compiler(tmp_path / "bin", library, error="no such option").path))
    with pytest.warns(RuntimeWarning, match="several times slower: no such option; install g") as caught:
        assert loaded() is None
    assert caught[0].filename == __file__
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.warns(RuntimeWarning, match="slower: .*No such file or directory: '/nowhere/g"):
        assert loaded() is None


def test_the_compiler_is_cxx_then_gpp_then_cpp(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    first, second = tmp_path / "first", tmp_path / "second"
    gpp, other, given = (
        Compiler(first, library, "g++"),
        Compiler(second, library, "c++"),
        Compiler(second, library, "mine"),
    )
    which, places = shutil.which, [str(second)]
    monkeypatch.setattr(shutil, "which", lambda name: which(name, path=":".join(places)))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # the compiler's own, for sh and cp
    assert loaded() is not None and len(other.compiled) == 1
    places.append(str(first))
    assert loaded() is not None and len(gpp.compiled) == 1
    monkeypatch.setenv("CXX", str(given.path))
    assert loaded() is not None and len(given.compiled) == 1
    assert (len(gpp.compiled), len(other.compiled)) == (1, 1)


def test_the_cache_is_torchs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/one/place")
    assert rows_native._cache_directory() == Path("/one/place")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rows_native._cache_directory() == tmp_path / ".cache/torch_extensions"
