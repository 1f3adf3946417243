"""What is done to a whole model: plan, inject, control, merge, check, summarise.

- `view`: one walk over a model: clean names, aliases, wrappers, adapted layers
- `plan`: what an injection would do. Made by `target_plans` or `file_plans`, from a `selection`
  of the model's weights and the `reasons` against adapting some of them
- `inject`, `control`, `many`, `merge`, `state`, `check`, `summary`: the public functions
- `check_runs`, `check_merges`, `check_report`: how a check runs the model, compares it with the
  merged one, and prints what it has found
- `records`: what a file says of an adapted weight
- `buffers`: which buffers training has changed
"""
