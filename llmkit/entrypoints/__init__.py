"""vLLM's module names, for commands that were written for it."""
