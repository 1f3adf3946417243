"""From files of rows to batches.

From bottom to top:

- `rows`: rows, and sequences of rows, in memory or on disk
- `stamp`: reading files that must not change meanwhile
- `text_files`, `parquet`, `files`: data files of every format as rows
- `splits`: the notation for splits, and which files belong to which
- `order`: the order of rows, which the seed decides
- `dataset`: from the settings to rows, and rows held out to measure on
- `docstrings`: the rows of the demo, made from the machine's own standard library
- `examples`: a row as token ids, and which of them are learned
- `encoding`: rows to examples
- `batches`: examples side by side, or packed into rows
- `sources`: the batches of every epoch, from memory and from disk
- `tensors`: rows of numbers and their batches, for models that take no text
"""
