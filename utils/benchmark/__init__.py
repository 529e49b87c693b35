"""Throughput measurements."""
