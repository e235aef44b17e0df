"""Weights in and out: checkpoint formats, loading, export."""
