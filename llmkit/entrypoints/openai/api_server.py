"""`python -m llmkit.entrypoints.openai.api_server --model ...`: `llmkit serve`, by the name that tutorials know."""

from __future__ import annotations

import sys

from llmkit.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
