"""The run: loop, step, interval, evaluation, checkpoints, ledger."""
