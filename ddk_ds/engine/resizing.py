"""A checkpoint loaded by another number of ranks than wrote it, without a copy of it in another form.

DeepSpeed's universal form is such a copy; it is written whole, and loading it reads every tensor whole on every rank.
Here DeepSpeed loads as it does on as many ranks as wrote the checkpoint; what it takes for a rank's own file is put
together from the elements of the old files that this rank holds now.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddk_ds.engine.zero_shards import MODEL_FILE, ZeroShards


@contextmanager
def resized(engine: Any, directory: Path, saved_ranks: int) -> Iterator[None]:
    """Let DeepSpeed's `engine` load in the block the checkpoint that `saved_ranks` ranks wrote in `directory`."""
    shards, ranks = ZeroShards(directory, saved_ranks), engine.dp_world_size

    def load(path: str, map_location: Any = None) -> Any:
        if Path(path).name == MODEL_FILE:  # DeepSpeed refuses another number of ranks than its own
            return {**shards.model_states, "dp_world_size": ranks}
        options = list(engine.optimizer.sub_group_to_group_id.values())
        state = shards.resized(engine._get_zero_param_shapes(), options, engine.global_rank, ranks)
        return {"optimizer_state_dict": state}

    engine.checkpoint_engine.load = load
    engine._get_all_ckpt_names = lambda *_: [str(directory / MODEL_FILE)]  # it looks for this rank's own file
    try:
        yield
    finally:
        del engine.checkpoint_engine.load, engine._get_all_ckpt_names
