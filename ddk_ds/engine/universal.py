"""DeepSpeed's universal checkpoint, which any number of ranks can load, made from the ZeRO-3 shards of another number.

    <target>/zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt    one whole tensor each
    <target>/zero/optimizer_state.pt                          what all shards share
    <target>/zero_pp_rank_0_mp_rank_00_model_states.pt        the run's own state

DeepSpeed's converter is for one machine, writes everything twice and unpickles. Here every rank writes its share of the
parameters straight from the mapped shards; the files are equal (tests/dist/test_universal.py).
"""

from __future__ import annotations

from pathlib import Path

from ddk_ds.engine.shard_files import ShardWriter
from ddk_ds.engine.zero_shards import MODEL_FILE, ZeroShards


def write_universal(
    source: Path, target: Path, *, source_ranks: int, rank: int, world_size: int
) -> tuple[dict[Path, tuple[int, str]], str]:
    """Write this rank's share of `target` from what `source_ranks` ranks saved in `source`.

    Returns its files with their bytes and xxh64, and why one could not be written ("": all were).
    """
    shards = ZeroShards(source, source_ranks)
    writer = ShardWriter()
    writer.begin(background=False)
    for number, name in enumerate(shards.shapes):
        if number % world_size == rank:
            for key in ("fp32", "exp_avg", "exp_avg_sq"):
                writer.save(shards.read(name, key), str(target / "zero" / name / f"{key}.pt"))
    if rank == 0:
        writer.save(shards.common(), str(target / "zero" / "optimizer_state.pt"))
        writer.save(shards.model, str(target / MODEL_FILE))
    return writer.wait()
