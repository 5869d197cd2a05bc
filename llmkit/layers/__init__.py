"""Layers of a decoder. They hold tensors, not nn.Modules: a step calls some two hundred of them, and each call counts."""
