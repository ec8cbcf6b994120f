"""Estimate memory, time, disks and network of a run before it joins a queue: no GPU, no weights, a few seconds.

    ddk plan --config my.yaml --nodes 2 --gpus-per-node 8 --gpu a100-80g [key=value ...]

The models may be directories with weights, directories with config.json alone, or hub names whose configuration is in
configs/models/ (docs/planning.md says what is assumed, and how far off a plan is).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ddk_ds import planner
from ddk_ds.command_line import command_parser, parse, reports_user_errors
from ddk_ds.config import load_config
from ddk_ds.config.suggestions import dashes_hint
from ddk_ds.errors import ConfigError
from ddk_ds.files import write_text
from ddk_ds.planner.gpus import DEFAULT_MFU, DEFAULT_STORAGE_BYTES_PER_S, GPUS, Cluster, Speed, find_gpu

MODELS = Path(planner.__file__).with_name("models")  # configs/models, which a wheel has here too


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan; return 0, also for a run that does not fit, or 2 for an error that the user can mend."""
    options = _parse(arguments)
    # To a file a table is as wide as it needs.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    if options.known_points:
        from ddk_ds.planner import plan_page
        from ddk_ds.planner.known_points import known_points

        console.print(plan_page.known_points_table(known_points()))
    else:
        _plan(options, console)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, dashes_hint, _lacking)
    parser.add_argument("--config", type=Path, help="YAML file of the run")
    parser.add_argument("--nodes", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--gpu", help=f"one of {', '.join(GPUS)}, or a YAML file of its figures (docs/planning.md)")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--mfu", type=float, help=f"share of the GPU's peak that a step reaches (default {DEFAULT_MFU})")
    speed.add_argument("--tokens-per-s-per-gpu", type=float, help="measured speed of this run, instead of an MFU")
    parser.add_argument("--link-gb-s", type=float, help="network between nodes, GB/s for each GPU, one direction")
    storage = DEFAULT_STORAGE_BYTES_PER_S / 1e9
    parser.add_argument(
        "--storage-gb-s", type=float, default=storage, help="GB/s at which checkpoints are written (%(default)s)"
    )
    parser.add_argument(
        "--models", type=Path, action="append", default=[], help="directory of <model>.json, before configs/models"
    )
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--scaling", type=Path, help="simulate 2 to 1,024 GPUs and draw that (.png, .svg or .pdf)")
    parser.add_argument(
        "--layouts", type=Path, help="simulate every place of the teacher's weights on 8 to 1,024 GPUs and draw that"
    )
    parser.add_argument(
        "--vary",
        action="append",
        metavar="key=value,value,...",
        help="print the simulated step alone, for every combination of these values; can be repeated",
    )
    parser.add_argument("--known-points", action="store_true", help="print simulated and published throughputs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values")
    return parse(parser, arguments)


def _lacking(options: argparse.Namespace) -> str:
    complete = options.known_points or None not in (options.config, options.gpu)
    return "" if complete else "--config and --gpu are needed, except with --known-points"


def _plan(options: argparse.Namespace, console: Console) -> None:
    cluster, speed, model_dirs = _cluster(options), _speed(options), (*options.models, MODELS)
    if not options.vary:  # the values that are varied may be what makes the configuration right
        config = load_config(options.config, options.overrides)
    # They import torch and transformers, which takes seconds that --help and a wrong option should not take.
    from ddk_ds.planner import plan_page
    from ddk_ds.planner.plan_inputs import find_inputs
    from ddk_ds.planner.run_plan import make_plan, plan_json
    from ddk_ds.planner.simulations import simulate_layouts, simulate_scaling, simulate_variants

    storage = speed.storage_bytes_per_s
    if options.vary:
        variants = simulate_variants(
            options.config,
            options.overrides,
            options.vary,
            cluster,
            model_dirs=model_dirs,
            storage_bytes_per_s=storage,
        )
        console.print(plan_page.variants_table(variants, cluster))
        _write_json(options.json, {"variants": [asdict(variant) for variant in variants]})
        return
    models, data = find_inputs(config, model_dirs)
    plan = make_plan(config, models, data, cluster, speed)
    curves, points = [], []
    for table in plan_page.plan_tables(plan):
        console.print(table)
    if options.layouts:
        points = simulate_layouts(config, models, cluster, domains=data.domains, storage_bytes_per_s=storage)
        console.print(plan_page.layouts_table(points))
        plan_page.draw_layouts(points, plan, options.layouts)
        console.print(f"{options.layouts}", soft_wrap=True)
    if options.scaling:
        curves = simulate_scaling(config, models, cluster, domains=data.domains, storage_bytes_per_s=storage)
        console.print(plan_page.scaling_table(curves))
        plan_page.draw_scaling(curves, plan, options.scaling)
        console.print(f"{options.scaling}", soft_wrap=True)
    series = {"scaling": [asdict(curve) for curve in curves], "layouts": [asdict(point) for point in points]}
    _write_json(options.json, {**plan_json(plan), **series})


def _cluster(options: argparse.Namespace) -> Cluster:
    for name in ("nodes", "gpus_per_node"):
        value = getattr(options, name)
        if value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: give 1 or more")
    gpu = find_gpu(options.gpu)
    if options.link_gb_s is not None:
        gpu = gpu.model_copy(update={"network_bytes_per_s": 1e9 * _above_0("--link-gb-s", options.link_gb_s)})
    return Cluster(gpu, options.nodes, options.gpus_per_node)


def _speed(options: argparse.Namespace) -> Speed:
    storage = 1e9 * _above_0("--storage-gb-s", options.storage_gb_s)
    if options.tokens_per_s_per_gpu is not None:
        measured = _above_0("--tokens-per-s-per-gpu", options.tokens_per_s_per_gpu)
        return Speed(None, measured, storage)
    mfu = DEFAULT_MFU if options.mfu is None else options.mfu
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu:g}: give a share of the peak, above 0 and at most 1 (0.4 is 40 %)")
    return Speed(mfu, None, storage)


def _above_0(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} {value:g}: give a number above 0")
    return value


def _write_json(path: Path | None, values: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        write_text(path, json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot be written: {error.strerror}") from error
