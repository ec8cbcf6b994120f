"""The element-wise part on a CPU: rows.cpp, compiled once for this machine's processor and called through ctypes.

DeepSpeed needs a C++ compiler anyway. Where there is none, `load` warns once and the eager rows are used.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ddk_ds.kernels.divergences import KIND, teacher_weight
from ddk_ds.kernels.options import Options, Rows, TeacherTopK

_SOURCES = [Path(__file__).with_name(name) for name in ("rows.cpp", "lanes.h", "products.h")]
# No -ffast-math: NaN must show, and the exponential relies on the order of its operations.
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
_ENTRY = {
    torch.float32: "ddk_rows_float32",
    torch.float64: "ddk_rows_float64",
    torch.bfloat16: "ddk_rows_bfloat16",
}


class _Arguments(ctypes.Structure):
    """The struct RowArguments of rows.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("student", "teacher", "grad", "labels", "ce", "divergence")),
        *((name, ctypes.c_int64) for name in ("rows", "classes", "student_stride", "teacher_stride", "grad_stride")),
        *((name, ctypes.c_double) for name in ("ce_weight", "kd_weight", "temperature", "mix")),
        *((name, ctypes.c_double) for name in ("student_scale", "student_cap", "teacher_scale", "teacher_cap")),
        *((name, ctypes.c_int64) for name in ("kind", "half_grad", "threads")),
        *((name, ctypes.c_void_p) for name in ("known_ids", "known_log_probs", "known_log_tail")),
        ("known", ctypes.c_int64),
    ]


def supports(dtype: torch.dtype) -> bool:
    """Return True if this machine has a compiled kernel for logits of `dtype`; the first call compiles it."""
    return dtype in _ENTRY and load() is not None


def native_rows(tensors: Rows, options: Options) -> None:
    """Do what `rows_eager.eager_rows` does, on a CPU.

    `tensors.grad` must have the dtype of the logits; with float32 logits it can be bfloat16.
    """
    student, teacher, labels, ce, divergence, grad = tensors
    library = load()
    assert library is not None, "supports() was not asked"
    dense, known = (None, teacher) if isinstance(teacher, TeacherTopK) else (teacher, None)
    if known is not None:  # float64: a few numbers a row
        known = TeacherTopK(known.ids.contiguous(), *(part.double().contiguous() for part in known[1:]))
    arguments = _Arguments(
        student=student.data_ptr(),
        teacher=None if dense is None else dense.data_ptr(),
        grad=None if grad is None else grad.data_ptr(),
        labels=labels.data_ptr(),
        ce=ce.data_ptr(),
        divergence=divergence.data_ptr(),
        rows=student.shape[0],
        classes=options.vocab_size,
        student_stride=student.stride(0),
        teacher_stride=0 if dense is None else dense.stride(0),
        grad_stride=0 if grad is None else grad.stride(0),
        ce_weight=options.ce_weight,
        kd_weight=options.kd_weight / options.temperature,
        temperature=options.temperature,
        mix=teacher_weight(options.divergence, options.coefficient),
        student_scale=options.student_form.scale,
        student_cap=options.student_form.softcap,
        teacher_scale=options.teacher_form.scale,
        teacher_cap=options.teacher_form.softcap,
        kind=0 if teacher is None else KIND[options.divergence],
        half_grad=grad is not None and grad.dtype != student.dtype,
        threads=torch.get_num_threads(),
        known_ids=None if known is None else known.ids.data_ptr(),
        known_log_probs=None if known is None else known.log_probs.data_ptr(),
        known_log_tail=None if known is None else known.log_tail.data_ptr(),
        known=0 if known is None else known.ids.shape[1],
    )
    failed = getattr(library, _ENTRY[student.dtype])(ctypes.byref(arguments))
    assert not failed, f"rows.cpp does not know {options.divergence} of this teacher"
    if grad is not None:
        grad[:, options.vocab_size :] = 0


def add_half(total: Tensor, part: Tensor, *, keep: bool) -> None:
    """Set total (float32) to part + total, or to part if `keep` is false; both are contiguous and on a CPU.

    A bfloat16 `part` goes through the compiled kernel if there is one.
    """
    library = load() if part.dtype == torch.bfloat16 and total.dtype == torch.float32 else None
    if library is None:
        total.add_(part) if keep else total.copy_(part)
        return
    assert total.is_contiguous() and part.is_contiguous() and total.shape == part.shape
    library.ddk_add_bfloat16(*_span(total, part), ctypes.c_int64(keep), _threads())


def scaled_half(grad: Tensor, scale: Tensor) -> Tensor | None:
    """Return grad * scale rounded to bfloat16; None unless `grad` is float32 on a CPU that has the compiled kernel."""
    if grad.device.type != "cpu" or grad.dtype != torch.float32 or (library := load()) is None:
        return None
    out = torch.empty_like(grad, dtype=torch.bfloat16)
    assert grad.is_contiguous() and out.is_contiguous()
    library.ddk_to_bfloat16(*_span(out, grad), ctypes.c_double(float(scale)), _threads())
    return out


def _span(out: Tensor, source: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]:
    return ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(source.data_ptr()), ctypes.c_int64(out.numel())


def _threads() -> ctypes.c_int64:
    return ctypes.c_int64(torch.get_num_threads())


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """Return the compiled kernel, from the cache if it is there; None, with one warning, if it cannot be compiled."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    try:
        if compiler is None:
            raise OSError("there is no C++ compiler on PATH")
        path = _cache_directory() / f"ddk_ds_rows-{_key(compiler)}.so"
        if not path.is_file():
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        reason = error.stderr.strip().splitlines()[-1] if isinstance(error, subprocess.CalledProcessError) else error
        warnings.warn(
            f"the loss runs without its compiled row kernel, several times slower: {reason}; install g++ for it",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # All ranks can be here at once: each writes its own file, and the rename is atomic.
    partial = path.with_suffix(f".{platform.node()}.{os.getpid()}.partial")
    command = [compiler, *_FLAGS, "-shared", "-fPIC", str(_SOURCES[0]), "-o", str(partial)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    partial.replace(path)


def _key(compiler: str) -> str:
    """Return a hash of source, flags, compiler and processor: machines that share a home directory can differ."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True, timeout=60).stdout
    digest = hashlib.sha256("\n".join([*_FLAGS, compiler, version, platform.machine(), _processor()]).encode())
    for source in _SOURCES:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags"))


def _cache_directory() -> Path:
    """Return the directory in which torch and DeepSpeed keep the extensions that they compile."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
