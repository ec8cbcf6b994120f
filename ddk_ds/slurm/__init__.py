"""Runs on Slurm: the batch script, and the snapshot of code and configuration that it uses."""
