"""The pass of tokens: the documents taken of each block are encoded, and put on the disk with their lengths."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ddk_ds.data.block_keys import Taken, TakenDocuments
from ddk_ds.data.blocks import Block, PartsJob, put, unit_directory
from ddk_ds.data.documents import Dropped, Meter, Position
from ddk_ds.data.encoding import BatchEncoder, batch_encoder
from ddk_ds.data.long_documents import DocumentCutter
from ddk_ds.data.reading import DomainText, Spool
from ddk_ds.data.screening import Screening
from ddk_ds.data.tokenizer import load_tokenizer
from ddk_ds.files import write_text


@dataclass(frozen=True)
class TokensStage:
    """Encodes the taken documents of blocks; a result has the counts of what a block dropped."""

    job: PartsJob
    blocks: Sequence[Block]
    taken: Mapping[int, Taken]
    name: str = "tokens"

    @property
    def weights(self) -> Sequence[int]:
        """Return the stored bytes of the blocks."""
        return [block.num_bytes for block in self.blocks]

    def result(self, unit: int) -> Path:
        """Return the path of a block's counts, which are written after its tokens."""
        return self.job.path("tokens", f"{self.blocks[unit].number}.json")

    def run(self, units: Iterable[int]) -> None:
        """Encode blocks. Raises DataError if the text cannot be read or is another, OSError if the disk is full."""
        info = load_tokenizer(self.job.tokenizer)
        cutter = DocumentCutter(info.text.tokenizer)
        with batch_encoder(info, self.job.dtype, self.job.bos, 1, Screening()) as encode:
            for unit in units:
                self._encode(self.blocks[unit], self.result(unit), cutter, encode)

    def _encode(self, block: Block, result: Path, cutter: DocumentCutter, encode: BatchEncoder) -> None:
        job, taken = self.job, self.taken[block.number]
        text = DomainText(block.domain, 0, job.recipe.domains[block.domain], job.files_of(block), job.seed, cutter)
        position = Position(num_bytes=taken.num_bytes)
        dropped = Dropped(bad_lines=taken.bad_lines)  # skip_bad_lines is a domain's
        control_tokens = 0
        with unit_directory(result) as directory:
            seen = TakenDocuments(job, block, taken)
            batches = text.batches(seen, directory, position, dropped, Meter())
            spool = Spool(directory, "block", job.dtype)
            try:
                for batch, encoded, _ in encode(batches):
                    spool.append_batch(batch, encoded)
                    control_tokens += encoded.control_tokens
                seen.check_end()
                spool.sync()
            finally:
                spool.close()
            for suffix in ("ids", "documents"):
                put(directory / f"block.{suffix}", Path(f"{tokens_stem(job, block)}.{suffix}"))
        dropped.control_tokens, dropped.bad_lines = control_tokens, dropped.bad_lines - taken.bad_lines
        write_text(result, json.dumps(asdict(dropped)))


def tokens_stem(job: PartsJob, block: Block) -> Path:
    """Return the path of a block's pair of files (spooled.py), without the suffix."""
    return job.path("tokens", str(block.number))


def sum_dropped(job: PartsJob, blocks: Sequence[Block]) -> Dropped:
    """Return what encoded blocks dropped together."""
    total = Dropped()
    for block in blocks:
        counts = json.loads(TokensStage(job, [block], {}).result(0).read_text(encoding="utf-8"))
        for name, count in counts.items():
            setattr(total, name, getattr(total, name) + count)
    return total
