"""Products of bfloat16 matrices with float32 results on a CPU: products.h, around oneDNN's inner kernel inside torch.

torch has no operator for them. Its library exports the kernel for its own operators and for those of extensions, by a
name that contains the types of all arguments: another torch has the same function, or none.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ddk_ds.kernels import rows_native

# at::native::cpublas::brgemm of bfloat16, and brgemm_release, of ATen/native/CPUBlas.h.
_MULTIPLY = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"
_RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"
_ENTRIES = ("ddk_product", "ddk_product_transposed")
# oneDNN compiles its kernel for each size that it meets, and keeps it: numbers of tokens are rounded up to this.
_STEP = 64


class _Arguments(ctypes.Structure):
    """The struct ProductArguments of products.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("multiply", "release", "a", "b", "out")),
        *((name, ctypes.c_int64) for name in ("a_stride", "b_stride", "out_stride", "m", "n", "k", "b_rows")),
        *((name, ctypes.c_int64) for name in ("keep", "threads")),
    ]


def supports(weight: Tensor) -> bool:
    """Return True if products with `weight` (V, H) can be computed here, as fast as torch's own in bfloat16.

    It must be bfloat16, contiguous and on a CPU, and H even; this machine must have a compiler and torch's kernel.
    Intel's processors without AMX multiply bfloat16 no faster than float32: False there.
    """
    fits = weight.dtype == torch.bfloat16 and weight.is_contiguous() and weight.shape[1] % 2 == 0
    fast = torch.cpu._is_amx_tile_supported() or not _is_intel()
    return fits and fast and weight.device.type == "cpu" and _works()


def half_product(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write hidden (m, H) @ weight.T, of bfloat16 numbers, to out (m, V) float32; `supports(weight)` must be true."""
    hidden = hidden.contiguous()
    _call("ddk_product", hidden, weight, out, m=len(hidden), n=len(weight), k=hidden.shape[1])


def add_half_product(grad: Tensor, hidden: Tensor, total: Tensor, *, keep: bool) -> None:
    """Add grad (m, V).T @ hidden (m, H), of bfloat16 numbers, to total (V, H) float32; overwrite it if not `keep`."""
    m, size = hidden.shape
    transposed = hidden.new_zeros(size, -(-m // _STEP) * _STEP)
    transposed[:, :m] = hidden.t()
    sizes = {"m": size, "n": grad.shape[1], "k": transposed.shape[1], "b_rows": m}
    _call("ddk_product_transposed", transposed, grad, total, keep=keep, **sizes)


def _call(entry: str, a: Tensor, b: Tensor, out: Tensor, **sizes: int) -> None:
    assert a.dtype == b.dtype == torch.bfloat16 and out.dtype == torch.float32
    assert a.stride(1) == b.stride(1) == out.stride(1) == 1
    library, addresses = rows_native.load(), _addresses()
    assert library is not None and addresses is not None, "supports() was not asked"
    arguments = _Arguments(
        *addresses,
        *(tensor.data_ptr() for tensor in (a, b, out)),
        *(tensor.stride(0) for tensor in (a, b, out)),
        threads=torch.get_num_threads(),
        **sizes,
    )
    if getattr(library, entry)(ctypes.byref(arguments)):
        raise RuntimeError("oneDNN refused a product of bfloat16 matrices: was torch.backends.mkldnn switched off?")


@lru_cache(maxsize=1)
def _addresses() -> tuple[int, int] | None:
    """Return the addresses of oneDNN's kernel and of its end in torch's library; None if this torch has none."""
    try:
        library = ctypes.CDLL("libtorch_cpu.so")  # it is loaded, so its name is enough
        multiply, release = (ctypes.cast(library[name], ctypes.c_void_p).value for name in (_MULTIPLY, _RELEASE))
    except (OSError, AttributeError):
        return None
    return None if multiply is None or release is None else (multiply, release)


@lru_cache(maxsize=1)
def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@lru_cache(maxsize=1)
def _works() -> bool:
    """Return True if torch's oneDNN multiplies here: it may be switched off, or limited to an older processor."""
    library = rows_native.load()
    if library is None or _addresses() is None or not all(hasattr(library, entry) for entry in _ENTRIES):
        return False
    two = torch.full((2, 2), 2.0, dtype=torch.bfloat16)
    out = torch.empty(2, 2)
    try:
        half_product(two, two, out)
    except RuntimeError:
        return False
    return out.tolist() == [[8.0, 8.0], [8.0, 8.0]]
