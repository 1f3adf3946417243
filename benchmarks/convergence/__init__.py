"""Does Bone converge faster than LoRA here, and is BAT better than Bone? A study you can rerun.

python -m benchmarks.convergence           trains every method on every task
python -m benchmarks.report                writes the tables and pictures of the pages

tasks/       what is learned: model, rows, losses, and what must not be forgotten
methods.py   every method, with equally many trainable parameters
runs.py      a cell (task, method, sizes), a run (cell, learning rate, seed), the results file
study.py     the methods of each task, and how the learning rate is searched
findings.py  what the results say, as numbers; tables.py and curves.py show it
"""
