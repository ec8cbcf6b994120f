"""Text becomes packed token shards (prepare.py), and shards become micro-batches (loader.py)."""
