"""The OpenAI-compatible server: an HTTP front that tokenises and detokenises, and the engine in a process of its own."""
