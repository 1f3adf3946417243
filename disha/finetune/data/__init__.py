"""From files of rows to batches.

From bottom to top:

- `rows`: rows, and sequences of rows, in memory or on disk
- `storage`, `records`, `parquet`, `files`: data files of every format as rows
- `splits`, `folders`: the notation for splits, and which files belong to which
- `held_out`: rows set aside to measure on
- `dataset`: from the settings to rows
- `docstrings`: the rows of the demo, made from the machine's own standard library
- `examples`: a row as token ids, and which of them are learned
- `encoding`: rows to examples
- `packing`: several short examples in a row
- `batches`: examples side by side
- `order`: the order of rows, which the seed decides
- `sources`, `streaming`: the batches of every epoch, from memory and from disk
- `tensors`: rows of numbers and their batches, for models that take no text
"""
