"""The OpenAI-compatible server.

Three kinds of processes. The launcher (`launch`) listens on the port, keeps an engine alive (`keeper`) and hears signals. The
engine (`engine_process`) gets token ids and gives token ids, one message a step. A front (`front`, `link`; one lives in the
launcher, more have processes of their own) speaks HTTP (`app` and its routes), tokenises, detokenises, finds stop strings, and
never imports torch. They talk through pairs of sockets (`wire`), whose end is the end of who is behind them; each child also
lives on a pipe that only its parent holds (`lifeline`).
"""
