"""Pretraining: the Lightning module, the run folder, what keeps a run from being lost."""
