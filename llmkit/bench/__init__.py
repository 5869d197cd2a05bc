"""`llmkit bench`: how fast, and what share of what this machine could do.

Read in this order: workload (what is asked), contenders (who runs it), ceilings (what the machine can do), limits (what the
work needs at least), latency / throughput / startup (the measurements), report (what is shown), cli (the command).
A server under load: asks (what is asked), load (when it is sent), serve (what comes of it), serve_report, serve_cli.
"""
