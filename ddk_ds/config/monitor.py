"""Section `monitor`: where a run's numbers go beside its ledger."""

from __future__ import annotations

from pydantic import model_validator

from ddk_ds.config.sections import NonNegativeFloat, Section


class Monitor(Section):
    """Where numbers go beside the ledger, everywhere under the same names (docs/monitoring.md has them)."""

    tensorboard: bool = False
    """Event files for TensorBoard, in <run>/monitor/tensorboard."""
    csv: bool = False
    """A file of step and value for each name, in <run>/monitor/csv."""
    wandb_project: str | None = None
    """Project of Weights & Biases; null: none. With WANDB_MODE=offline the run is kept in <run>/monitor/wandb."""
    wandb_entity: str | None = None
    """User or team that has the project; null: the login's own."""
    prometheus_file: str | None = None
    """File <directory>/<name>.prom with the newest values, for node_exporter's textfile collector; null: none."""
    every_s: NonNegativeFloat = 5.0
    """Seconds between two writes, which a thread does; what comes meanwhile is written together."""

    @model_validator(mode="after")
    def _fit(self) -> Monitor:
        if self.wandb_entity is not None and self.wandb_project is None:
            raise ValueError(f"wandb_entity is {self.wandb_entity}: set wandb_project too, or remove it")
        if self.prometheus_file is not None and not self.prometheus_file.endswith(".prom"):
            raise ValueError(f"prometheus_file is {self.prometheus_file}: the collector reads files named *.prom alone")
        return self

    @property
    def packages(self) -> tuple[str, ...]:
        """Python packages that the choice needs, as they are imported."""
        needed = {
            "tensorboard": self.tensorboard,
            "wandb": self.wandb_project is not None,
            "prometheus_client": self.prometheus_file is not None,
        }
        return tuple(name for name, used in needed.items() if used)
