"""`llmkit chat`: a conversation in a terminal, or through a pipe.

In this order: conversation (what was said), partners (who answers), terminal (lines in, text out), loop (turns, commands).
"""
