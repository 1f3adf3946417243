"""Leaves out what only vLLM's Python can import."""

collect_ignore = ["in_vllm.py", "in_trl.py", "price.py"]
