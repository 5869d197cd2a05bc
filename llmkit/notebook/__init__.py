"""At home in Jupyter: checks and records a notebook leaves behind, headless runs, and the builder of committed notebooks."""
