"""Does Bone converge faster than LoRA here, and is BAT better than Bone? A study you can rerun.

    python -m benchmarks.convergence           trains every method on every task
    python -m benchmarks.convergence.costs     measures seconds and memory of a training step
    python -m benchmarks.convergence.report    writes docs/evidence.md from the results alone

Each run is added to the file of results when it ends, so the study continues where it was stopped.

    tasks/       what is learned: model, rows, losses, and what must not be forgotten
    methods.py   every method, with equally many trainable parameters
    runs.py      a cell (task, method, sizes), a run (cell, learning rate, seed), the results file
    training.py  one run
    plan.py      the learning rates and seeds that the study needs next
    __main__.py  does the runs, several at once
    costs.py     seconds and bytes of a step, measured on a quiet machine
    findings.py  what the results say, as numbers
    curves.py    the same as pictures
    report.py    the same as a page
"""
