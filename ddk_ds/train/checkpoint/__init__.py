"""Checkpoints: how they are written, found, restored, and rolled back to."""
