"""The checks of a run's files that a login node can make: no GPU, no rank, no download of weights."""

from __future__ import annotations

from pathlib import Path

from ddk_ds.config import Config
from ddk_ds.data.manifest import load_manifest
from ddk_ds.engine.model_files import check_hub_name
from ddk_ds.errors import UserError
from ddk_ds.train.inputs import check_files
from ddk_ds.train.preflight.path_checks import model_files
from ddk_ds.train.run_dir import check_run_dir, run_identity


def check_on_login_node(config: Config, ranks: int, *, own_directory: bool) -> None:
    """Raise UserError if models, tokenizers, shards or the run's directory show that the run cannot start.

    Of a model of the hub it asks for config.json alone, and data behind a cache are left to the job. It reads headers
    and indices, no weights.

    Args:
        ranks: number of ranks of the job.
        own_directory: True if the run writes into `config.run_dir`, False if only into others, as an array's tasks do.
    """
    config.check_paths()
    models = {"student": config.student, **({} if config.teacher is None else {"teacher": config.teacher})}
    for key, model in models.items():
        if not Path(model.path).is_dir():
            check_hub_name(model.path, f"{key}.path", config.path_note(f"{key}.path"))
    here = {key: Path(model.path) for key, model in models.items() if Path(model.path).is_dir()}
    for key, directory in here.items():
        row = model_files(directory, key)
        if row.status == "fail":
            raise UserError(f"{row.found}; {row.fix}")
    if config.data.cache_dir is not None:
        return
    if len(here) < len(models):
        load_manifest(config.data.path)
        return
    inputs = check_files(config, here["student"], here.get("teacher"), ranks)
    if own_directory:
        check_run_dir(config, run_identity(config, inputs.fingerprints))
