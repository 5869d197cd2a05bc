"""`llmkit bench kernels`: each of our GPU kernels alone, at a model's shapes, beside the machine's limit and torch's own way.

`work` says what is measured and how, `attention`, `products` and `choosing` make it, `cli` runs and shows it.
"""
