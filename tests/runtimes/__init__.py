"""What vLLM and SGLang make of exported adapters: `python -m tests.runtimes`."""
