"""Asking any OpenAI server: `response` (reading HTTP/1.1), `connection` (sending it, keep-alive), `openai` (what is said).

No dependency, and a few microseconds a piece: a load generator must not be slower than what it measures.
"""
