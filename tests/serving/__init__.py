"""vLLM serves exported adapters: `python -m tests.serving`."""
