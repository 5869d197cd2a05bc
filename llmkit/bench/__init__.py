"""`llmkit bench`: how fast, and what share of what this machine could do.

Read in this order: workload (what is asked), contenders (who runs it), ceilings (what the machine can do), limits (what the
work needs at least), latency / throughput / startup (the measurements), report (what is shown), cli (the command). h100 and suite
(`--suite h100`) are the rows by which engines on one H100 are compared; engines says whose may do that work (`--against vllm`),
fresh_process is what those rows need of another process.
parity (and its texts) times nothing: whose tokens differ from whose. timeline_cli: how busy the device is, by llmkit.Timeline.
A server under load: asks (what is asked), load (when it is sent), serve (what comes of it), serve_report, serve_cli.
"""
