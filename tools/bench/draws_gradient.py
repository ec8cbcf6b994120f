"""Measure the gradient of a teacher that is known by some tokens against that of the whole teacher.

    python -m tools.bench.draws_gradient --teacher DIR --student DIR --data DIR --json FILE --picture FILE

Of real models and text (`make demo` makes them), by the number of draws: the standard deviation over seeds of the
forward KL's gradient, and a chi-square test of its mean; by the number of largest tokens that are kept: the error of
the gradient, which is the same in every step. Both are shares of the whole gradient's norm, at the hidden states of
each token and at the head's weight, which adds up all tokens of the micro-batch.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddk_ds.command_line import positive
from ddk_ds.data.loader import MixtureDataset
from ddk_ds.data.manifest import load_manifest
from ddk_ds.data.store import LocalStore
from ddk_ds.data.teacher_samples import bytes_a_token
from ddk_ds.drawing import WIDTH, line_style, marker, tidy
from ddk_ds.files import write_text
from ddk_ds.kernels import Options, TeacherTopK, counted_draws, draws_of, linear_kd_loss
from ddk_ds.kernels.linear_kd import top_k_of
from tools.bench.step_setting import describe

Row = dict[str, Any]
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)


class Setting(NamedTuple):
    """Hidden states (n, H) and heads (V, H) of a micro-batch of both models."""

    student: Tensor
    student_head: Tensor
    teacher: Tensor
    teacher_head: Tensor
    samples: Tensor
    options: Options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the rows, and write the JSON file and the picture. Returns 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for name in ("teacher", "student", "data"):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", required=True, help=f"directory: {name}")
    parser.add_argument("--samples", type=positive, default=8, help="samples of the data (default: %(default)s)")
    parser.add_argument("--seeds", type=positive, default=1000, help="draws of each number (default: %(default)s)")
    parser.add_argument(
        "--sizes",
        type=positive,
        nargs="+",
        default=SIZES,
        help="numbers of tokens kept (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="file for a picture; needs matplotlib")
    options = parser.parse_args(arguments)
    setting = make_setting(options)
    whole = [part.detach() for part in gradients(setting, None)]
    rows = [
        row
        for size in options.sizes
        if size <= setting.options.vocab_size
        for row in (of_draws(setting, whole, size, options.seeds), of_largest(setting, whole, size))
    ]
    for row in rows:
        print(json.dumps(row))
    result = {**describe("cpu"), "tokens": len(setting.student), "vocab_size": setting.options.vocab_size}
    result |= {"seeds": options.seeds, "rows": rows}
    if options.json:
        write_text(options.json, json.dumps(result, indent=1) + "\n")
    if options.picture:
        draw(result, options.picture)
    return 0


@torch.no_grad()
def make_setting(options: argparse.Namespace) -> Setting:
    """Return both models' hidden states of the first samples of each domain in turn."""
    from transformers import AutoModelForCausalLM  # tests of what is beside it need not wait for that

    store = LocalStore(options.data)
    dataset = MixtureDataset(store, list(load_manifest(store).domains))
    numbers = [dataset.sample_offsets[i % len(dataset.names)] + i // len(dataset.names) for i in range(options.samples)]
    ids = torch.stack([dataset[int(number)]["input_ids"] for number in numbers])
    hidden, heads = [], []
    for path in (options.student, options.teacher):
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        hidden.append(model.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1))
        heads.append(model.get_output_embeddings().weight.detach())
    vocab_size = min(map(len, heads))
    kernel = Options(vocab_size, gamma=1.0, ce_weight=0.0, chunk_tokens=256)
    return Setting(hidden[0], heads[0], hidden[1], heads[1], torch.tensor(numbers), kernel)


def counted(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return draws (n, draws), ascending in each row, as `counted_draws` takes them: each token once, and its count."""
    counts = torch.searchsorted(ids, ids, right=True) - torch.searchsorted(ids, ids)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    return ids.masked_fill(again, -1), counts.masked_fill(again, 0)


def gradients(setting: Setting, known: TeacherTopK | None) -> list[Tensor]:
    """Return the forward KL's gradients at the student's hidden states and head; `known` in place of the teacher."""
    hidden, head = (part.clone().requires_grad_() for part in (setting.student, setting.student_head))
    teacher = setting.teacher if known is None else None
    labels = torch.zeros(len(hidden), dtype=torch.long)
    found = linear_kd_loss(
        hidden,
        head,
        teacher,
        None if teacher is None else setting.teacher_head,
        labels,
        num_valid=torch.tensor(len(labels)),
        options=setting.options,
        teacher_topk=known,
    )
    return list(torch.autograd.grad(found.loss.sum(), [hidden, head]))


def of_draws(setting: Setting, whole: list[Tensor], draws: int, seeds: int) -> Row:
    """Return the deviation of the gradient over seeds, and the mean chi-square of its average at the hidden states."""
    squares = [0.0, 0.0]
    sums, sums_of_squares = torch.zeros_like(whole[0]), torch.zeros_like(whole[0])
    for seed in range(seeds):
        drawn = draws_of(
            setting.teacher, setting.teacher_head, setting.samples, draws, seed=seed, options=setting.options
        )
        known = counted_draws(*counted(drawn.ids), drawn.entropy, draws)[0]
        errors = [found.detach() - exact for found, exact in zip(gradients(setting, known), whole, strict=True)]
        squares = [so_far + float(error.double().square().sum()) for so_far, error in zip(squares, errors, strict=True)]
        sums += errors[0]
        sums_of_squares += errors[0].square()
    variance = sums_of_squares / seeds
    tested = variance > 0
    # Each is the square of a normal number if the gradient is right on average: their mean is 1. Those of the head
    # would not be: a row of it gets its share in the few seeds in which its token is drawn.
    chi_squares = (sums[tested] / seeds).square() / (variance[tested] / seeds)
    return {
        "kind": "draws",
        "size": draws,
        "bytes_a_token": bytes_a_token("sampled", draws, setting.options.vocab_size),
        **_shares([math.sqrt(square / seeds) for square in squares], whole),
        "chi_square_mean": float(chi_squares.mean()),
        "coordinates": int(tested.sum()),
    }


def of_largest(setting: Setting, whole: list[Tensor], size: int) -> Row:
    """Return the error of the gradient from the largest probabilities and the sum of all others."""
    known = top_k_of(setting.teacher, setting.teacher_head, size, options=setting.options)
    found = gradients(setting, known)
    errors = [float((part - exact).norm()) for part, exact in zip(found, whole, strict=True)]
    return {"kind": "largest", "size": size, **_shares(errors, whole)}


def _shares(errors: list[float], whole: list[Tensor]) -> Row:
    names = ("of_hidden_gradient", "of_head_gradient")
    return {name: error / float(part.norm()) for name, error, part in zip(names, errors, whole, strict=True)}


def draw(result: Row, path: Path) -> None:
    """Write a picture of both errors by the number of tokens to `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    lines = [
        ("draws", "of_hidden_gradient", "deviation with draws, at each token"),
        ("draws", "of_head_gradient", "deviation with draws, all tokens together"),
        ("largest", "of_hidden_gradient", "error with the largest, at each token"),
        ("largest", "of_head_gradient", "error with the largest, all tokens together"),
    ]
    for number, (kind, key, label) in enumerate(lines):
        rows = [row for row in result["rows"] if row["kind"] == kind]
        style = {**line_style(number), "marker": marker(number), "markersize": 5}
        axes.plot([row["size"] for row in rows], [row[key] for row in rows], label=label, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = {
        row["size"]: f"{row['size']}\n{row['bytes_a_token']:,.0f}" for row in result["rows"] if row["kind"] == "draws"
    }
    axes.set_xticks(list(sizes), list(sizes.values()))
    axes.minorticks_off()
    axes.set_xlabel("tokens kept at a position; most bytes of draws")
    axes.set_ylabel("share of the gradient's norm")
    tidy(axes, "y")
    figure.legend(loc="outside upper left", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
