"""What most ranks would import or build in their first second: the server that they are forked from has it."""

from __future__ import annotations

from contextlib import suppress

import transformers.models.llama.modeling_llama  # noqa: F401

with suppress(ImportError):  # transformers 4 has no table of conversions
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")
