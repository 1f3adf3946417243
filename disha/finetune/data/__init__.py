"""From files of rows to batches.

From bottom to top:

- `rows`: rows, in memory or on disk, one after another
- `stamp`: reads files, and notices if one changes during a run
- `text_files`, `parquet`, `files`: data files of every format as rows
- `splits`: the notation for splits, and which files belong to which
- `order`: the order of rows, set by the seed; with weights, of several data sets
- `dataset`: finds the training rows and the held-out rows that the settings ask for
- `docstrings`: the demo's rows, made from the installed Python standard library
- `examples`: a row as token ids, and which of them count in the loss
- `encoding`: turns rows into examples
- `batches`: puts examples into batches, padded or packed; the batches of every epoch
- `tensors`: rows of numbers and their batches, for models that take no text
"""
