"""Sending from within an event loop, which sends what does not fit at once when there is room."""

from __future__ import annotations

import asyncio

from llmkit.server.processes.wire import Channel, Gone, Message


def post(channel: Channel, message: Message, files: tuple[int, ...] = ()) -> None:
    """Send. Nothing happens when the other end is gone: who reads the channel notices."""
    try:
        channel.send(message, files)
    except Gone:
        return
    if channel.full:
        asyncio.get_running_loop().add_writer(channel, _go_on, channel)


def _go_on(channel: Channel) -> None:
    try:
        channel.flush()
    except Gone:
        stop_posting(channel)
        return
    if not channel.full:
        stop_posting(channel)


def stop_posting(channel: Channel) -> None:
    """Before it is closed."""
    asyncio.get_running_loop().remove_writer(channel)
