"""Reading HTTP: the same whatever the network cuts it into."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.client.response import Response
from llmkit.errors import ServerError

BODY = "data: {\"text\": \"从前有座山\"}\r\n\r\n0\r\n\r\ndata: [DONE]\n\n".encode()  # with what looks like an end in it


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%X;x=1\r\n%s\r\n" % (len(p), p) for p in parts) + b"0\r\nTrailer: yes\r\n\r\n"


def cut(data: bytes, places: list[int]) -> list[bytes]:
    places = sorted({p % len(data) for p in places})
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)])]


@given(places=st.lists(st.integers(0, 5000)), size=st.integers(1, 60), how=st.sampled_from(["chunked", "length", "close"]))
def test_the_body_is_whole_wherever_it_was_cut(places, size, how):
    head = {"chunked": b"Transfer-Encoding: chunked\r\n", "length": b"content-length: %d\r\n" % len(BODY), "close": b""}[how]
    body = chunked(BODY, size) if how == "chunked" else BODY
    raw = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 Created\r\n" + head + b"X-Request-ID:  7 \r\n\r\n" + body
    response, pieces = Response(), []
    for part in cut(raw, places):
        assert not response.done
        pieces += response.feed(part)
    assert response.done == (how != "close")
    assert response.end()
    assert (b"".join(pieces), response.status, response.headers["x-request-id"]) == (BODY, 201, "7")
    assert response.keeps_alive == (how != "close")


@pytest.mark.parametrize("raw", [b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/2 200\r\n\r\n", b"x" * 70_000,
                                 b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"])
def test_what_is_not_http_is_said(raw):
    with pytest.raises(ServerError, match="not HTTP"):
        Response().feed(raw)


def test_an_answer_that_breaks_off_is_not_whole():
    response = Response()
    response.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
    assert not response.end()


def test_an_answer_without_a_body_ends_with_its_head():
    response = Response()
    assert response.feed(b"HTTP/1.1 204 No Content\r\n\r\n") == []
    assert response.done
    assert response.keeps_alive
