"""Compile variants of the Triton row kernel without a GPU; print the assembler's figures as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ddk_ds.kernels.rows_triton import BLOCK, NUM_WARPS, row_kernel

_PTXAS = Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"
_WIDTH = {"b32": 4, "b64": 8, "b16": 2}
_POINTERS = {"S": "*fp32", "T": "*fp32", "G": "*bf16", "Y": "*i64", "CE": "*fp64", "D": "*fp64"}
_INTEGERS = ("s_stride", "t_stride", "g_stride", "V")


def compile_variant(kind: int, capability: int, one_softmax: bool, form: int) -> dict[str, Any]:
    """Compile one variant for sm_<capability>; return its registers, spills and bytes moved."""
    names = row_kernel.arg_names
    constants = {
        "KIND": kind,
        "ONE_SOFTMAX": one_softmax,
        "WITH_CE": True,
        "WRITE": True,
        "S_FORM": form,
        "T_FORM": form,
        "BLOCK": BLOCK,
    }
    signature = dict.fromkeys(names, "fp32") | _POINTERS | dict.fromkeys(_INTEGERS, "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*_POINTERS, *_INTEGERS)}
    by_place = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=row_kernel, signature=signature, constexprs=by_place, attrs=aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": NUM_WARPS})
    name = f"sm_{capability} kind {kind} {'T = 1' if one_softmax else 'T'} form {form}"
    record = {"name": name, "kind": kind, "capability": capability, "form": form}
    return {
        **record,
        "shared_bytes": kernel.metadata.shared,
        **_assemble(kernel.asm["ptx"]),
        **_bytes(kernel.asm["ptx"]),
    }


def _assemble(ptx: str) -> dict[str, int]:
    found = re.search(r"\.target (\w+)", ptx)
    assert found is not None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [_PTXAS, f"-arch={found.group(1)}", "-v", file, "-o", Path(folder) / "kernel.cubin"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill", report)
    assert registers is not None and spills, report
    return {"registers": int(registers.group(1)), "spill_bytes": sum(map(int, spills))}


def _bytes(ptx: str) -> dict[str, Any]:
    """Count bytes of the loads and stores that the kernel's loops make for each block, by element of the block."""
    threads = NUM_WARPS * 32
    moved = {"ld": 0.0, "st": 0.0}
    vectorised = True
    for operation, vector, width in re.findall(r"(ld|st)\.global(?:\.v(\d))?\.(b\d+)", ptx):
        if not vector:  # label, logit at the label, the two losses: a few bytes a row
            vectorised = vectorised and width in ("b32", "b64")
            continue
        moved[operation] += int(vector) * _WIDTH[width] * threads / BLOCK
    return {
        "load_bytes_per_element": moved["ld"],
        "store_bytes_per_element": moved["st"],
        "vectorised": vectorised,
    }


if __name__ == "__main__":
    variants = [(kind, one, 0) for kind in range(7) for one in (True, False)] + [(1, True, 2), (5, False, 2)]
    print(json.dumps([compile_variant(kind, sm, one, form) for sm in (80, 90) for kind, one, form in variants]))
