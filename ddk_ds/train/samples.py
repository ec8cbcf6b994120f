"""Continuations of fixed prompts by the models of a run: text beside the numbers of the ledger (monitor.samples_every).

They change no number: nothing random is drawn, and the passes are those of an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from ddk_ds.comm import Comm
from ddk_ds.config import Config
from ddk_ds.data.loader import HeldOutBatch
from ddk_ds.data.tokenizer import TokenizerInfo, continuation
from ddk_ds.engine.head import OutputHead
from ddk_ds.engine.sequence_parallel import whole_samples
from ddk_ds.engine.student import Student
from ddk_ds.engine.teacher import Teacher
from ddk_ds.errors import ConfigError
from ddk_ds.files import read_lines
from ddk_ds.train.validation import ValidationBatches

PROMPT_TOKENS = 32
"""Tokens of the prompts that the held-out samples give."""

Prompts = dict[str, list[int]]
"""Token ids of each prompt by its name."""


def given_prompts(config: Config, tokenizer: TokenizerInfo, bos: Sequence[int]) -> Prompts:
    """Return the prompts of `monitor.sample_prompts`, named 1, 2, ...; {} without that option.

    A prompt begins with the ids `bos`, as the documents of the data do.

    Raises ConfigError if the file cannot be read, or if a prompt is empty or too long.
    """
    given, key = config.monitor.sample_prompts, "monitor.sample_prompts"
    if given is None:
        return {}
    if isinstance(given, str):
        given = tuple(read_lines(given, key))
    texts = [tokenizer.text.encode(text) for text in given]
    if not all(texts) or not texts:
        raise ConfigError(
            f"{key}: holds no prompt, or an empty one; leave it out for the held-out samples' first tokens"
        )
    prompts = {str(number): [*bos, *ids] for number, ids in enumerate(texts, 1)}
    length, tokens = config.data.sequence_length, config.monitor.sample_tokens
    for name, ids in prompts.items():
        if len(ids) + tokens > length:
            raise ConfigError(
                f"{key}: prompt {name} has {len(ids)} tokens and monitor.sample_tokens is {tokens}, together more than "
                f"data.sequence_length {length}: shorten the prompt, or lower sample_tokens"
            )
    return prompts


def held_out_prompts(names: Sequence[str], validation: ValidationBatches, config: Config, comm: Comm) -> Prompts:
    """Return the first tokens of each domain's first held-out sample, which rank 0 has. Collective.

    They are of its first document alone if documents are kept apart.
    """
    length = min(PROMPT_TOKENS, config.data.sequence_length - config.monitor.sample_tokens)
    first = [_begin(batches[0], length) for batches in validation] if comm.rank == 0 else None
    return dict(zip(names, comm.broadcast_object(first), strict=True))


def _begin(batch: HeldOutBatch, length: int) -> list[int]:
    ids, positions = batch.input_ids[0, :length], batch.positions
    return ids.tolist() if positions is None else ids[positions[0, :length] == torch.arange(length)].tolist()


class Sampler:
    """Continues the prompts of a run greedily."""

    def __init__(
        self, config: Config, prompts: Prompts, tokenizer: TokenizerInfo, vocab_size: int, device: torch.device
    ) -> None:
        """Store the options; tokens from `vocab_size` on are never written.

        As many prompts go through a model at once as have no more tokens than a micro-batch of the training.
        """
        self._every = config.monitor.samples_every
        self._tokens = config.monitor.sample_tokens
        self._budget = config.train.micro_batch_samples * config.data.sequence_length
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._device = device
        self._teacher: list[str] | None = None

    def due(self, step: int) -> bool:
        """Return True if the prompts are to be continued after `step` steps."""
        return bool(self._every) and step % self._every == 0

    def samples(
        self, student: Student, teacher: Teacher | None, poll: Callable[[], None]
    ) -> list[dict[str, str | None]]:
        """Return each prompt's name and text, and the continuations by student and teacher (None without). Collective.

        The teacher never changes, so it is asked once in a process.

        Args:
            poll: called before each token; an exception that it raises on all ranks ends the sampling.
        """
        if self._teacher is None and teacher is not None:
            self._teacher = self._continue(teacher, poll)
        theirs: Sequence[str | None] = self._teacher or [None] * len(self._prompts)
        ours = self._continue(student, poll)
        return [
            {"name": name, "prompt": self._decode(prompt), "student": by_student, "teacher": by_teacher}
            for (name, prompt), by_student, by_teacher in zip(self._prompts.items(), ours, theirs, strict=True)
        ]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.tokenizer.decode(ids))

    def _continue(self, model: Student | Teacher, poll: Callable[[], None]) -> list[str]:
        prompts = list(self._prompts.values())
        rows = max(1, self._budget // (max(map(len, prompts)) + self._tokens))
        texts = []
        with model.evaluating(), whole_samples(model.sequence):
            for begin in range(0, len(prompts), rows):
                part = prompts[begin : begin + rows]
                new = greedy(model, part, self._tokens, self._vocab_size, self._device, poll)
                texts += [self._text(*pair) for pair in zip(part, new, strict=True)]
        return texts

    def _text(self, prompt: list[int], new: list[int]) -> str:
        end = self._tokenizer.eos_token_id
        return continuation(self._decode, prompt, new[: new.index(end)] if end in new else new)


def greedy(
    model: Student | Teacher,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    vocab_size: int,
    device: torch.device,
    poll: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Return the `tokens` likeliest next tokens of each prompt, one after the other. Collective.

    Each rank computes all of them: no rank can leave the others alone in a gather. There is no cache of keys and
    values, and each pass has the same shape: rows are filled up on the right, where causal attention does not look.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = torch.zeros(len(prompts), int(lengths.max()) + tokens, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, device=device)
    rows = torch.arange(len(prompts), device=device)

    for count in range(tokens):
        poll()
        ends = lengths + count

        def likeliest(hidden: torch.Tensor, head: OutputHead, ends: torch.Tensor = ends) -> torch.Tensor:
            last = hidden.view(*ids.shape, -1)[rows, ends - 1]
            bias = None if head.bias is None else head.bias[:vocab_size]
            # The form of the logits (a positive scale, tanh) does not change which is the largest.
            return functional.linear(last, head.weight[:vocab_size], bias).float().argmax(-1)

        ids[rows, ends] = model(ids, likeliest)
    return [ids[row, len(prompt) : len(prompt) + tokens].tolist() for row, prompt in enumerate(prompts)]
