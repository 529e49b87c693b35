"""Checkpoints and weight files."""
