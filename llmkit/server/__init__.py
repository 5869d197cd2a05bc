"""The OpenAI-compatible server.

Three kinds of processes (`processes/`). The launcher (`launch`) listens on the port, keeps an engine alive (`keeper`) and hears
signals. The engine (`engine_process`) gets token ids and gives token ids, one message a step. A front (`front`, `link`; one lives
in the launcher, more have processes of their own) speaks HTTP, tokenises, detokenises, finds stop strings, and never imports
torch. They talk through pairs of sockets (`wire`), whose end is the end of who is behind them; each child also lives on a pipe
that only its parent holds (`lifeline`), and an engine that hangs is noticed by its silence (`pulse`).

HTTP: `app` puts the routes together; `endpoints/` has one API family a file, `http/` what all of them pass, `served` the model as
requests see it, `tools/`, `message` and `reasoning` what answers are made of, `metrics/` what Prometheus reads, `page/` the chat
page. What they know of the engine is `engine_client`; what they keep lies on a `shelf`. `handle/` is a server as its user holds
it: `llmkit.serve(...)`.
"""
