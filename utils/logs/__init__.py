"""Logging, metrics, plots and the output folder."""
