"""DeepSpeed engines and Hugging Face models: the only room that imports deepspeed and transformers.

It is quiet: what libraries print about themselves is dropped here, before they are imported. Their errors stay, and all
that a run itself says. (What DeepSpeed's launcher says is up to its --log_level; ddk_ds/launcher.py.)
"""

import logging
import warnings


def _is_told(record: logging.LogRecord) -> bool:
    """Return True for DeepSpeed's errors, and for its warning that the allocator emptied its cache to find memory."""
    return record.levelno >= logging.ERROR or "allocator cache flushes" in str(record.msg)


def _quieten() -> None:
    # Filters, since both loggers set their own level when they are imported, and speak while they are.
    logging.getLogger("DeepSpeed").addFilter(_is_told)
    no_cuda = "No CUDA runtime is found"
    logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: not str(record.msg).startswith(no_cuda))
    # What fails on tensors without values is raised, and caught where a model is tried with them (attention.py).
    logging.getLogger("torch._subclasses.fake_tensor").addFilter(lambda record: False)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*CUDA initialization.*")


_quieten()
