"""Compile variants of the Triton row kernel without a GPU; print the assembler's figures as JSON.

The arguments are those of a real call of the loss on a CPU, with the kernel replaced by a recorder: their hints (sizes
and addresses that are multiples of 16) decide how wide the loads are.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ddk_ds.kernels import (
    DIVERGENCES,
    LogitForm,
    Options,
    TeacherTopK,
    chunked,
    known_rows_triton,
    linear_kd_loss,
    rows_triton,
)
from ddk_ds.kernels.options import LogitsDtype

_PTXAS = Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"
_WIDTH = {"b32": 4, "b64": 8, "b16": 2}
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.float64: "*fp64"}
_FORMS = {0: LogitForm(), 2: LogitForm(0.8, 30.0)}
_KERNELS = {False: rows_triton.row_kernel, True: known_rows_triton.known_row_kernel}
Signature = tuple[tuple[str, str], ...]


class _Recorder:
    """The kernel's place in `triton_rows`: it keeps the arguments of the launch and computes nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> _Recorder:
        return self

    def __call__(self, *arguments: Any, **constants: Any) -> None:
        self.arguments, self.constants = arguments, constants


def launched(vocab_size: int, kind: int, one_softmax: bool, form: int, known: int, logits: LogitsDtype) -> _Recorder:
    """Return the arguments with which a GPU's call starts the kernel: logits in float32 or bf16, gradients in bf16.

    `known` is the number of the teacher's tokens that are known, 0 for a teacher that is there.
    """
    options = Options(
        vocab_size,
        gamma=float(kind > 0),
        temperature=1.0 if one_softmax else 2.0,
        divergence=DIVERGENCES[max(0, kind - 1)],
        student_form=_FORMS[form],
        teacher_form=_FORMS[form],
        logits_dtype=logits,
        engine="triton",
    )
    hidden, weight = torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(vocab_size, 8, dtype=torch.bfloat16)
    chunked.has_fast_half = lambda weight: True
    rows_triton.row_kernel = known_rows_triton.known_row_kernel = recorder = _Recorder()
    labels, valid = torch.zeros(2, dtype=torch.int64), torch.tensor(2)
    teacher = (None, None) if known else (hidden, weight)
    ids = torch.arange(known).repeat(2, 1)
    topk = TeacherTopK(ids, torch.zeros(2, known), torch.zeros(2)) if known else None
    trained = weight.requires_grad_()
    linear_kd_loss(hidden, trained, *teacher, labels, num_valid=valid, options=options, teacher_topk=topk)
    return recorder


def compile_variant(
    vocab_size: int, kind: int, one_softmax: bool, form: int, known: int, logits: LogitsDtype = "float32"
) -> list[dict[str, Any]]:
    """Compile one variant for sm_80 and sm_90; return its registers, spills, instructions and bytes moved."""
    kernel = _KERNELS[known > 0]
    call = launched(vocab_size, kind, one_softmax, form, known, logits)
    signature: list[tuple[str, str]] = []
    hints = []
    for parameter, value in zip(kernel.params, call.arguments, strict=False):
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if isinstance(value, float):
            signature.append((parameter.name, "fp32"))
            continue
        signature.append((parameter.name, _POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"))
        if number % 16 == 0 and not parameter.do_not_specialize:
            hints.append(parameter.num)
    constants = {key: value for key, value in call.constants.items() if key != "num_warps"}
    record = {"vocab_size": vocab_size, "kind": kind, "form": form, "one_softmax": one_softmax}
    record |= {"known": known, "logits": logits}
    sizes = (known > 0, tuple(signature), tuple(hints), tuple(constants.items()))
    return [{**record, "capability": sm, **_compiled(sm, *sizes)} for sm in (80, 90)]


@cache
def _compiled(
    capability: int, known: bool, signature: Signature, hints: tuple[int, ...], constants: tuple[tuple[str, int], ...]
) -> dict[str, Any]:
    function = _KERNELS[known]
    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={**dict(signature), **dict.fromkeys(dict(constants), "constexpr")},
        constexprs={(names.index(name),): value for name, value in constants},
        attrs={(place,): [["tt.divisibility", 16]] for place in hints},
    )
    warps = {"num_warps": rows_triton.NUM_WARPS}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=warps)
    ptx = kernel.asm["ptx"]
    counted = not known and capability == 90 and dict(constants)["KIND"] == 1  # disassembling takes a while
    return {"shared_bytes": kernel.metadata.shared, **_assemble(ptx, counted), **_moved(ptx)}


def _assemble(ptx: str, counted: bool) -> dict[str, Any]:
    found = re.search(r"\.target (\w+)", ptx)
    assert found is not None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [_PTXAS, f"-arch={found.group(1)}", "-v", file, "-o", Path(folder) / "kernel.cubin"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        command = [_PTXAS.with_name("nvdisasm"), "-c", Path(folder) / "kernel.cubin"]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout if counted else ""
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill", report)
    assert registers is not None and spills, report
    found = {"registers": int(registers.group(1)), "spill_bytes": sum(map(int, spills))}
    return {**found, **_executed(code)} if counted else found


def _executed(code: str) -> dict[str, float]:
    """Return what the loops that compute exponentials execute by element: all instructions, and exponentials.

    `code` is the assembly of a kernel; a loop ends with a jump to a label above it.
    """
    labels: dict[str, int] = {}
    names: list[str] = []
    loops = []
    for label, name, target in re.findall(r"(?m)^\s*(?:(\.L\w+):|/\*\w+\*/ +(?:@!?U?P\w+ +)?(\S+)(.*?);)", code):
        if label:
            labels[label] = len(names)
            continue
        names.append(name)
        jump = re.search(r"`\((\.L\w+)\)", target)
        if name == "BRA" and jump and jump.group(1) in labels:
            loops.append(names[labels[jump.group(1)] :])
    loops = [loop for loop in loops if "MUFU.EX2" in loop]
    by_element = rows_triton.NUM_WARPS * 32 / rows_triton.BLOCK
    return {
        "instructions_per_element": sum(map(len, loops)) * by_element,
        "exponentials_per_element": sum(loop.count("MUFU.EX2") for loop in loops) * by_element,
    }


def _moved(ptx: str) -> dict[str, Any]:
    """Return bytes of vector loads and stores by element of a block, and the numbers of scalar loads and stores."""
    block_threads = rows_triton.NUM_WARPS * 32 / rows_triton.BLOCK
    moved = {"ld": 0.0, "st": 0.0}
    scalar = {"ld": 0, "st": 0}
    for operation, vector, width in re.findall(r"(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.(b\d+)", ptx):
        if vector:
            moved[operation] += int(vector) * _WIDTH[width] * block_threads
        else:
            scalar[operation] += 1
    return {
        "load_bytes_per_element": moved["ld"],
        "store_bytes_per_element": moved["st"],
        "scalar_loads": scalar["ld"],
        "scalar_stores": scalar["st"],
    }


if __name__ == "__main__":
    variants = [(151_646, kind, one, 0, 0) for kind in range(7) for one in (True, False)]
    variants += [(151_646, 1, True, 2, 0), (151_646, 5, False, 2, 0)]
    variants += [(vocab_size, 1, True, 0, 0) for vocab_size in (50_257, 151_936)]
    variants += [(151_646, 1, one, form, 64) for one, form in ((True, 0), (False, 0), (True, 2))]
    variants += [(50_257, 1, True, 0, 200)]
    records = [record for variant in variants for record in compile_variant(*variant)]
    print(json.dumps(records + compile_variant(151_936, 1, True, 0, 0, "model")))
