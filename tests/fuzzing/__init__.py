"""Hostile adapter files, killed saves and full disks: `python -m tests.fuzzing` runs them all."""
