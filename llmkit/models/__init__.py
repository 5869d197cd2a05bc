"""Models: config.json -> `ModelConfig`, weight files -> tensors, and the decoder that runs them."""
