"""Does Bone converge faster than LoRA here, and is BAT better than Bone? A study you can rerun.

    python -m benchmarks.convergence           trains every method on every task
    python -m benchmarks.convergence.costs     measures seconds and memory of a training step
    python -m benchmarks.report                writes the tables and pictures of the pages

Each run is added to the file of results when it ends, so the study continues where it was stopped.

    tasks/       what is learned: model, rows, losses, and what must not be forgotten
    methods.py   every method, with equally many trainable parameters
    runs.py      a cell (task, method, sizes), a run (cell, learning rate, seed), the results file
    plan.py      the learning rates and seeds that the study needs next
    findings.py  what the results say, as numbers; tables.py and curves.py show it
"""
