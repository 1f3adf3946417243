"""Speed and memory of the adapters, compared with the frozen base and other libraries.

python -m benchmarks                 measures, and writes a file of results
python -m benchmarks.report FILES    writes docs/performance.md's box and the tables from such files
python -m benchmarks.gpu             tests and measures an accelerator
python -m benchmarks.gpu_page FILE   writes a page of results and README's table from that
python -m benchmarks.quantized       a training step over a base in 8 or 4 bits, beside PEFT
python -m benchmarks.convergence     trains the methods on five tasks
python -m benchmarks.zoo             tries adapters in hundreds of architectures
"""
