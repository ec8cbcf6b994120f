"""Functions that every rank of test_loading.py runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ddk_ds.engine.attention import Attention
from ddk_ds.engine.export import CheckpointExport, Companions, export_student
from ddk_ds.engine.head import OutputHead
from ddk_ds.engine.model_files import ModelFiles, read_model
from ddk_ds.engine.process_memory import held_bytes, peak_bytes, reset_peak
from ddk_ds.engine.runtime import Runtime
from ddk_ds.engine.split_check import check_split
from ddk_ds.engine.student import load_student
from ddk_ds.engine.teacher import load_teacher
from ddk_ds.engine.whole_models import load_model
from ddk_ds.engine.zero_shards import MODEL_FILE, load_shard
from ddk_ds.errors import CheckpointError, ConfigError
from ddk_ds.kernels.reference import reference_logits
from tests.dist.tiny import ARCHITECTURES, VOCAB, save_model, tiny_config


def logits_of_architectures(
    runtime: Runtime, folder: str, kinds: Sequence[str] = tuple(ARCHITECTURES), ties: Sequence[bool] = (False, True)
) -> dict[str, float]:
    """Return by architecture the largest difference between logits of teacher, student or export and those of plain
    transformers with the models' own ("eager") attention."""
    errors = {}
    for model_type in kinds:
        for tied in ties:
            root = Path(folder) / f"{model_type}-{tied}"
            if runtime.comm.rank == 0:
                for name in ("student", "teacher"):
                    save_model(root / name, model_type=model_type, vocab=VOCAB + 3, tied=tied, seed=3)
            runtime.comm.barrier()
            errors[root.name] = _logits_error(root, runtime)
    return errors


def _logits_error(root: Path, runtime: Runtime) -> float:
    config = tiny_config(root)
    ids = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(5))

    def logits(hidden: torch.Tensor, head: OutputHead) -> torch.Tensor:
        assert head.bias is None
        return reference_logits(hidden, head.weight, None, len(head.weight), head.form).float()

    def plain(directory: Path) -> torch.Tensor:
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")(ids).logits.flatten(
                0, 1
            )

    expected = plain(root / "student")
    worst = 0.0
    for name, load in (("student", load_student), ("teacher", load_teacher)):
        files = read_model(root / name, f"{name}.path")
        model: Any = load(config, files, VOCAB, runtime.comm)
        check_split(model, ids, VOCAB, name, runtime.comm)
        with model.evaluating():
            worst = max(worst, float((model(ids, logits) - expected).abs().max()))
        if name == "student":
            export_student(model, root / "export", runtime.comm, partial(Companions, files, "", {}))
            assert read_model(root / "export", "export").tensors.keys() == files.tensors.keys()
            worst = max(worst, float((plain(root / "export") - expected).abs().max()))
            if runtime.comm.rank == 0:
                _export_of_these_weights(model, files, root / "later")
                worst = max(worst, float((plain(root / "later") - expected).abs().max()))
            runtime.comm.barrier()
    return worst


def _export_of_these_weights(student: Any, files: ModelFiles, directory: Path) -> None:
    """Write the export of a checkpoint that holds the weights of `files`."""
    whole = load_model(files.directory)
    own = {id(p): name for name, p in student.whole.named_parameters()}
    held = {n: dict(whole.named_parameters())[own[id(p)]].detach() for n, p in student.engine.module.named_parameters()}
    shards: Any = SimpleNamespace(
        shapes={name: tensor.shape for name, tensor in held.items()},
        read=lambda name, dtype: held[name].flatten().to(dtype),
    )
    work = CheckpointExport(shards, files, torch.float32, trusted=False)
    assert {n: spec.shape for n, spec in work.specs.items()} == {n: t.shape for n, t in files.tensors.items()}
    work.write(directory, Companions(files, "", {}), 10_000, lambda _: None, overwrite=False)


def split_of_another_form(runtime: Runtime, folder: str) -> list[str]:
    """Return what is said of a student and a teacher with a layer between backbone and head.

    Others in bf16 must pass: sharded within a GPU, in 8 bits, GPT-J, whose class makes float32 of bf16 logits, Mamba,
    whose backbone gives float32, and one whose layers make much of a product's rounding."""
    root = Path(folder)
    ids = torch.randint(0, VOCAB, (2, 128), generator=torch.Generator().manual_seed(5))
    said = []
    for name, load in (("student", load_student), ("teacher", load_teacher)):
        with pytest.MonkeyPatch.context() as patch:
            # With transformers 5 the choice of attention sees it first.
            patch.setattr("ddk_ds.engine.student.choose_attention", lambda *_: Attention("eager"))
            model: Any = load(tiny_config(root), read_model(root / name, f"{name}.path"), VOCAB, runtime.comm)
        try:
            check_split(model, ids, VOCAB, name, runtime.comm)
        except ConfigError as error:
            said.append(str(error))
    int8 = {"quantize": "int8", "micro_batches_per_pass": 4}
    for name, section in (
        ("usual", {}),
        ("usual", {"shard_within": "gpu"}),
        ("usual", int8),
        ("gptj", {}),
        ("mamba", {}),
        ("wide", {}),
    ):
        config = tiny_config(root, train={"precision": "bf16"}, teacher={"path": str(root / name), **section})
        teacher = load_teacher(config, read_model(root / name, "teacher.path"), VOCAB, runtime.comm)
        check_split(teacher, ids, VOCAB, "teacher", runtime.comm)
    config = tiny_config(root, train={"precision": "bf16"}, student={"path": str(root / "mamba")})
    student = load_student(config, read_model(root / "mamba", "student.path"), VOCAB, runtime.comm)
    check_split(student, ids, VOCAB, "student", runtime.comm)
    assert {parameter.dtype for parameter in student.parameters.values()} == {torch.bfloat16}
    return said


def checkpoint_of_other_names(runtime: Runtime, folder: str) -> str:
    """Return what is said of a checkpoint with the same numbers of elements whose experts have the other form."""
    root = Path(folder)
    files = read_model(root / "student", "student.path")
    student = load_student(tiny_config(root), files, VOCAB, runtime.comm)
    student.save(root, "zero", {"run": {}}, background=False)
    student.wait_for_save()
    runtime.comm.barrier()
    student.load(root, "zero", 2)
    if runtime.comm.rank == 0:
        states = load_shard(root / "zero" / MODEL_FILE)
        for group in states["param_shapes"]:
            for name in [name for name in group if name.endswith("down_proj.weight")]:
                group[name.replace("mlp", "mlp.experts.0")] = group.pop(name)
        torch.save(states, root / "zero" / MODEL_FILE)
    runtime.comm.barrier()
    with pytest.raises(CheckpointError) as raised:
        student.load(root, "zero", 2)
    return str(raised.value)


def differing_buffers(runtime: Runtime, folder: str) -> list[str]:
    """Return the names of buffers of the model in folder/teacher that differ from plain transformers' in bf16."""
    directory = Path(folder) / "teacher"
    config = tiny_config(Path(folder), train={"precision": "bf16"})
    teacher = load_teacher(config, read_model(directory, "teacher.path"), VOCAB, runtime.comm)
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).base_model
    ours, expected = dict(teacher.engine.module.named_buffers()), dict(plain.named_buffers())
    assert ours.keys() == expected.keys() and ours
    return [name for name in ours if ours[name].dtype != expected[name].dtype or (ours[name] != expected[name]).any()]


def growth_while_loading(runtime: Runtime, folder: str) -> list[dict[str, int]]:
    """Return for each rank by how many bytes its peak grew while folder/teacher was loaded, and the model's sizes."""
    root = Path(folder)
    config = tiny_config(root)
    # A small model goes first, because memory that libraries take on their first use is not the loader's.
    load_teacher(config, read_model(root / "small", "teacher.path"), VOCAB, runtime.comm)
    files = read_model(root / "teacher", "teacher.path")
    total = 4 * sum(torch.Size(tensor.shape).numel() for tensor in files.tensors.values())
    before = held_bytes("cpu")
    reset_peak("cpu")
    load_teacher(config, files, VOCAB, runtime.comm)
    grown = peak_bytes("cpu") - before
    largest = 4 * max(torch.Size(tensor.shape).numel() for tensor in files.tensors.values())
    mine = {"grown": grown, "total": total, "largest": largest, "rank": runtime.comm.rank}
    return runtime.comm.gather_objects(mine)


def first_changes(runtime: Runtime, folder: str) -> tuple[float, str]:
    """Make AdamW's first step with a rate of 1e-3; return the least largest change of a parameter.

    Then let the layers return a list after all that comes after them, and return the error of a second step.
    """
    files = read_model(Path(folder) / "student", "student.path")
    student: Any = load_student(tiny_config(Path(folder)), files, VOCAB, runtime.comm)
    ids = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(5))

    def loss(hidden: torch.Tensor, head: OutputHead) -> torch.Tensor:
        logits = reference_logits(hidden, head.weight, None, VOCAB, head.form).float()
        return torch.nn.functional.cross_entropy(logits, ids.flatten().roll(-1))

    def step() -> None:
        passes = student.engine.gradient_accumulation_steps()
        for number in range(passes):
            student.backward(student(ids, loss), last=number == passes - 1)
        student.update(1e-3, torch.zeros(0, dtype=torch.float64))

    parameters = list(student.engine.module.parameters())
    before = [parameter.ds_tensor.clone() for parameter in parameters]
    step()
    pairs = zip(parameters, before, strict=True)
    changes = [float((parameter.ds_tensor - old).abs().max()) for parameter, old in pairs]
    for layer in student.engine.module.backbone.h:
        layer.register_forward_hook(lambda _layer, _given, output: list(output))
    try:
        step()
    except ConfigError as error:
        return min(changes), str(error)
    return min(changes), ""


def refusal_of_the_teacher(runtime: Runtime, folder: str) -> str:
    """Return what is said of a teacher at a run's start."""
    files = read_model(Path(folder) / "teacher", "teacher.path")
    teacher = load_teacher(tiny_config(Path(folder)), files, VOCAB, runtime.comm)
    ids = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(5))
    try:
        check_split(teacher, ids, VOCAB, "teacher", runtime.comm)
    except ConfigError as error:
        return str(error)
    return ""
