"""DDK: distil a large language model into a small one by domain knowledge, on DeepSpeed ZeRO-3."""
