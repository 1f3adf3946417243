"""Adapters in the formats of others, and base checkpoints on disk."""
