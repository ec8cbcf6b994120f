"""The training of a run: loop, interval, step, evaluation, guard, checkpoints, ledger and results."""
