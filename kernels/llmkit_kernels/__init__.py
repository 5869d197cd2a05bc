"""The kernels of llmkit: one family a file, each beside its plain-torch meaning in `reference.py`.

Layers know them by `llmkit.ops` alone; the engine's GPU path, its sampler and its attention back ends import from here. The
folder above must stay a plain folder: a top-level package called `kernels` would hide the one that transformers looks for (a test
guards this).
"""
