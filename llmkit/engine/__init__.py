"""The engine: schedule, run, process.

Read in this order: request (what is asked), kv_cache (blocks), rows (what runs, as arrays), scheduler (who runs next),
batch (one step's arrays), runner (forward and sample), memory (how much fits), engine (the loop).
"""
