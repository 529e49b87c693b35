"""Processes, collectives and stop signals."""
