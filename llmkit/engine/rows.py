"""The running requests as arrays: one row each, so that a step costs the same few numpy calls for 1 request and for 256."""

from __future__ import annotations

import numpy as np

from llmkit.engine.request import Request


class Rows:
    """Struct of arrays over rows 0..num_rows-1.

    token_ids: int32 [rows, max_len], prompt then generated. num_prompt, num_tokens (known), num_pending (chosen by a step under
    way, not known yet), num_computed (in the KV cache when all that was launched is done), num_blocks (held), max_total (where
    generation must end): int32 [rows]. block_table: int32 [rows, max_blocks].
    pooled: bool [rows], those that want a vector and no tokens. read_along: bool [rows], as `Request.read_along`. may_stop: bool
    [rows], those that a stop id or a stop string may end before max_total.
    stop_ids: int32 [rows, width], padded with -1; `stop_from` int32 [rows]: no stop id counts before this length.
    """

    def __init__(self, num_rows: int, max_len: int, block_size: int) -> None:
        self.block_size = block_size
        self.requests: list[Request | None] = [None] * num_rows
        self.released: list[int] = []  # given back since the runner last looked
        self.grown: set[int] = set()  # whose block table has changed since the runner last looked
        self._free = list(range(num_rows - 1, -1, -1))
        self.token_ids = np.zeros((num_rows, max_len), np.int32)
        self.num_prompt = np.zeros(num_rows, np.int32)
        self.num_tokens = np.zeros(num_rows, np.int32)
        self.num_pending = np.zeros(num_rows, np.int32)
        self.num_computed = np.zeros(num_rows, np.int32)
        self.num_blocks = np.zeros(num_rows, np.int32)
        self.num_hashed = np.zeros(num_rows, np.int32)
        self.max_total = np.zeros(num_rows, np.int32)
        self.pooled, self.read_along, self.may_stop = np.zeros((3, num_rows), bool)
        self.block_table = np.zeros((num_rows, -(-max_len // block_size)), np.int32)
        self.stop_ids = np.full((num_rows, 4), -1, np.int32)
        self.stop_from = np.zeros(num_rows, np.int32)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, request: Request) -> int:
        """Give a request a row, filled from what the request holds."""
        row = self._free.pop()
        tokens = request.tokens
        self.requests[row] = request
        self.token_ids[row, : len(tokens)] = tokens
        self.num_prompt[row], self.num_tokens[row] = len(request.prompt), len(tokens)
        self.num_pending[row] = self.num_computed[row] = self.num_blocks[row] = self.num_hashed[row] = 0
        self.max_total[row] = request.max_total
        self.pooled[row], self.read_along[row] = request.pooling is not None, request.read_along
        self.may_stop[row] = bool(request.stop_ids or request.params.stop)
        self._set_stop_ids(row, request)
        request.row = row
        return row

    def give_back(self, request: Request) -> None:
        """Save what was generated into the request and free its row."""
        row = request.row
        request.generated = self.generated(row).copy()
        self.requests[row] = None
        request.row = -1
        self._free.append(row)
        self.released.append(row)

    def generated(self, row: int) -> np.ndarray:
        """What the request of this row has generated so far, int32; a view."""
        return self.token_ids[row, self.num_prompt[row] : self.num_tokens[row]]

    def add_blocks(self, row: int, blocks: list[int]) -> None:
        """Append to a row's block table."""
        start = self.num_blocks[row]
        self.block_table[row, start : start + len(blocks)] = blocks
        self.num_blocks[row] += len(blocks)
        self.grown.add(row)

    def append(self, rows: np.ndarray, token_ids: np.ndarray) -> None:
        """The tokens that were pending for `rows`."""
        self.token_ids[rows, self.num_tokens[rows]] = token_ids
        self.num_tokens[rows] += 1
        self.num_pending[rows] -= 1

    def num_coming(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of each row, those that are pending with them."""
        return self.num_tokens[rows] + self.num_pending[rows]

    def missing_blocks(self, rows: np.ndarray, num_new: np.ndarray) -> np.ndarray:
        """How many blocks each row lacks to compute `num_new` more tokens."""
        return -(-(self.num_computed[rows] + num_new) // self.block_size) - self.num_blocks[rows]

    def ended(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For rows that have just got a token: (bool: it is a stop id, bool: it is the last that fits)."""
        length = self.num_tokens[rows]
        last = self.token_ids[rows, length - 1]
        stopped = (self.stop_ids[rows] == last[:, None]).any(axis=1) & (length > self.stop_from[rows])
        return stopped, length >= self.max_total[rows]

    def _set_stop_ids(self, row: int, request: Request) -> None:
        width = self.stop_ids.shape[1]
        if len(request.stop_ids) > width:
            grown = np.full((len(self.requests), len(request.stop_ids)), -1, np.int32)
            grown[:, :width] = self.stop_ids
            self.stop_ids = grown
        self.stop_ids[row] = -1
        self.stop_ids[row, : len(request.stop_ids)] = request.stop_ids
        self.stop_from[row] = len(request.prompt) + request.params.min_tokens
