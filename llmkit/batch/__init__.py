"""`llmkit batch IN.jsonl OUT.jsonl`: OpenAI's batch files, answered here or by a server, and resumed whatever happens.

Read in this order: tasks (what a line asks), journal (what is answered, on disk), answerers (who answers), run (the loop).
"""
