"""MLLA in dense prediction."""
