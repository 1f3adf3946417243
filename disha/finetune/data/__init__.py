"""From files of rows to batches.

From bottom to top:

- `rows`: files and folders as sequences of rows, and which of them a split names
- `docstrings`: the rows of the demo, made from the machine's own standard library
- `examples`: a row as token ids, and which of them are learned
- `encoding`: rows to examples
- `batches`: examples side by side
- `sources`: the batches of every epoch, in an order that the seed decides
"""
