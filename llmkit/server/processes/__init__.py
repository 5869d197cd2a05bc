"""A server as processes: launcher, fronts, the engine, and how they talk, watch each other and end."""
