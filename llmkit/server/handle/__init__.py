"""A server as its user holds it: `llmkit.serve`, its card, its record on this machine, its log."""
