"""Triton device code, one file per operation."""
