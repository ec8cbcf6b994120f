"""Checkpoints: written, found, restored, rolled back to."""
