"""What is done to a whole model: plan, inject, control, merge, check, summarise.

- `inject`: walk, select, describe, check, apply. It asks `selection` which weights a target takes,
  and `reasons` why some of them can't have a block; `plan` is what it would do, and `file_plans`
  makes the same of a file
- `removal`, `training`, `many`, `control`, `routing`, `merge`, `state`, `check` and `summary`: what
  else is done to a model
- `view`: one walk over a model, and what its adapters remember; `found`: what the walk finds
- `buffers`: which buffers training has changed
- `check_runs`, `check_merges`, `check_report`: how a check runs the model, compares it with the
  merged one, and prints what it has found
"""
