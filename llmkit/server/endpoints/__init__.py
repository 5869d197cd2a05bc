"""The routes, one API family a file; those of other makers are translated to chat requests."""
