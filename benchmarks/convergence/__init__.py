"""Does Bone converge faster than LoRA here, and is BAT better than Bone? A study to be rerun.

`python -m benchmarks.convergence` trains every method on every task. It adds each run to the file of
results when the run has ended, so it continues where it was stopped; `python -m benchmarks.convergence.costs` measures seconds and
memory; `python -m benchmarks.convergence.report` writes docs/evidence.md from the files alone.

    tasks/       what is learned: model, rows, losses, and what must not be forgotten
    methods.py   how: every method at equally many trainable parameters
    runs.py      a cell (task, method, sizes), a run of it (learning rate, seed), and the file of all runs
    training.py  one run
    plan.py      the learning rates and seeds that the study wants next, given what is there
    sweep.py     does them, several at once
    costs.py     seconds and bytes of a step, measured apart, on a quiet machine
    findings.py  what the results say, as numbers
    curves.py    the same as pictures
    report.py    the same as a page
"""
