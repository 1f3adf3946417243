"""What the adapters cost, measured side by side with the frozen base, the floors and the peers.

`python -m benchmarks` measures and writes a file of results; `python -m benchmarks.report` makes
tables and plots of one.
"""
