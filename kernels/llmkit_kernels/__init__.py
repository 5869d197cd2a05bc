"""The kernels of llmkit: one family a file, each beside its plain-torch meaning in `reference.py`.

`llmkit.ops` is the only module that imports from here. The folder above must stay a plain folder: a top-level package called
`kernels` would hide the one that transformers looks for (a test guards this).
"""
