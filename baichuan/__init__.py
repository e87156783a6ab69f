"""Run Baichuan checkpoints: one model definition, several executors."""

__version__ = "0.1.0"
