"""The drawings of the shard layouts, made by the library's own indexing code.

`python -m docs.drawings` writes docs/assets/shards*.svg. The block of a real adapted layer is
filled with distinct numbers; a cell of dW is drawn in the colour of the number that arrives there.

- `landing`: which number of a block arrives in which cell of dW
- `canvas`: SVG as text, the same bytes each time
- `colours`: a colour for each number of a block
- `grids`: blocks and weights as grids of cells
- `figures`: one drawing per kind, and the overview
"""
