"""Text to packed token shards (prepare.py and what it uses), and shards to micro-batches (loader.py)."""
