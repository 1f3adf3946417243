"""Speed and memory of the adapters, compared with the frozen base and other libraries.

python -m benchmarks                 measures, and writes a file of results
python -m benchmarks.gpu             tests and measures an accelerator
python -m benchmarks.report          writes the tables of all pages from the results that are kept
python -m benchmarks.convergence     trains the methods on five tasks
python -m benchmarks.zoo             tries adapters in hundreds of architectures
"""
