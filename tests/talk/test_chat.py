"""`llmkit chat`: through a pipe, and in a real terminal with a person's keys."""

import codecs
import io
import json
import os
import select
import signal
import subprocess
import sys
import time

import pytest

from llmkit import cli
from llmkit.errors import ConfigError
from llmkit.talk.conversation import Conversation

pty = pytest.importorskip("pty", reason="a terminal needs a system that has pseudo-terminals")


def piped(monkeypatch, capsys, text, *argv):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code = cli.main(["chat", *argv])
    return code, *capsys.readouterr()


def asked(fake):
    return [body["messages"] for _, body in fake.requests]


def test_a_pipe_gets_the_answers_and_nothing_else(monkeypatch, capsys, fake_openai):
    code, out, err = piped(monkeypatch, capsys, "从前 有\nsecond\n\n", "--url", fake_openai.url, "--system", "be brief",
                           "--temperature", "0.5", "--seed", "7", "--choice", "a")  # fmt: skip
    assert (code, out, err) == (0, "从前 有\nsecond\n", "")
    assert [m["content"] for m in asked(fake_openai)[1]] == ["be brief", "从前 有", "从前 有", "second"]
    body = fake_openai.requests[0][1]
    assert (body["temperature"], body["seed"], body["model"], body["structured_outputs"]) == (0.5, 7, "fake", {"choice": ["a"]})


def test_what_fails_is_said_and_the_conversation_goes_on(monkeypatch, capsys, fake_openai):
    code, out, err = piped(monkeypatch, capsys, "please refuse\nhello", "--url", fake_openai.url)
    assert (code, out) == (1, "hello\n")
    assert err == "error: the server answered 400: trouble: please refuse\n"
    assert [m["content"] for m in asked(fake_openai)[1]] == ["hello"]


def test_a_stream_that_breaks_keeps_what_came(monkeypatch, capsys, fake_openai):
    fake_openai.break_after = 2
    code, out, err = piped(monkeypatch, capsys, "one two three\nx", "--url", fake_openai.url)
    assert (code, out) == (1, "one two\nx\n")
    assert "connection broke" in err
    assert [m["content"] for m in asked(fake_openai)[1]] == ["one two three", "one two", "x"]


def test_the_commands(monkeypatch, capsys, fake_openai, tmp_path):
    file = tmp_path / "c.json"
    lines = ["first", "/system be kind", "second", "/retry", f"/save {file}", "/reset", "third", f"/load {file}", "fourth",
             " /not a command", "/exit", "never said"]  # fmt: skip
    code, out, err = piped(monkeypatch, capsys, "\n".join(lines), "--url", fake_openai.url)
    assert (code, out, err) == (0, "first\nsecond\nsecond\nthird\nfourth\n/not a command\n", "")
    contents = [[m["content"] for m in messages] for messages in asked(fake_openai)]
    two = ["be kind", "first", "first", "second"]
    assert contents[:5] == [["first"], two, two, ["be kind", "third"], [*two, "second", "fourth"]]
    saved = json.loads(file.read_text())["messages"]
    assert [m["role"] for m in saved] == ["system", "user", "assistant", "user", "assistant"]


@pytest.mark.parametrize(("line", "message"), [
    ("/sytem x", "there is no command /sytem\n  -> did you mean /system?"),
    ("/save", "/save needs a file"),
    ("/load /no/such", "cannot read /no/such: No such file"),
    ("/save /no/such/file", "cannot write /no/such/file"),
    ("/retry", "there is nothing to ask again"),
])
def test_wrong_commands(line, message, monkeypatch, capsys, fake_openai):
    code, out, err = piped(monkeypatch, capsys, line, "--url", fake_openai.url)
    assert (code, out) == (1, "")
    assert message in err


@pytest.mark.parametrize(("argv", "code", "message"), [
    (["--n", "2"], 2, "one answer at a time"),
    (["--temperature", "-1"], 1, "temperature must be"),
    (["--url", "http://127.0.0.1:9"], 1, "there is no server"),
    (["--url", "x", "--dtype", "float32"], 2, "dtype means nothing to it"),
    (["--load", "/no/such"], 1, "cannot read"),
])
def test_mistakes_come_to_light_first(argv, code, message, monkeypatch, capsys):
    got, _, err = piped(monkeypatch, capsys, "hello", *argv)
    assert got == code
    assert message in err


def test_an_unknown_model_is_named(monkeypatch, capsys, fake_openai):
    assert "did you mean fake?" in piped(monkeypatch, capsys, "x", "fkae", "--url", fake_openai.url)[2]


ODD = '{"messages": [{"role": "robot", "content": "x"}]}'


@pytest.mark.parametrize("text", ["{", "[1]", ODD, '[{"role": "user", "content": 1}]'])
def test_what_is_no_conversation_is_said(text, tmp_path):
    (tmp_path / "c").write_text(text)
    with pytest.raises(ConfigError, match=r"not JSON|no conversation"):
        Conversation.load(tmp_path / "c")


def test_a_model_in_this_process_answers(monkeypatch, capsys, dummy_folder):
    options = ["--load-format", "dummy", "--max-model-len", "256", "--max-tokens", "5", "--ignore-eos"]
    code, out, _ = piped(monkeypatch, capsys, "hello\nagain\n/retry\n", str(dummy_folder), *options)
    assert code == 0
    assert len(out) > 3


# ---- in a terminal


class Person:
    """Types into a real terminal, and reads what is on it."""

    def __init__(self, *argv, home):
        self.terminal, other = pty.openpty()
        self.child = subprocess.Popen([sys.executable, "-m", "llmkit", "chat", *argv], stdin=other, stdout=other, stderr=other,
                                      start_new_session=True, env=os.environ | {"LLMKIT_HOME": str(home), "TERM": "dumb"},
                                      preexec_fn=self._own_terminal)  # fmt: skip
        os.close(other)
        self.seen, self.decoder = "", codecs.getincrementaldecoder("utf-8")()

    @staticmethod
    def _own_terminal():
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def type(self, text):
        os.write(self.terminal, text.encode())

    def wait_for(self, text, seconds=20):
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.terminal], [], [], 0.1)[0]:
                self.seen += self.decoder.decode(os.read(self.terminal, 65536))
        before, _, self.seen = self.seen.partition(text)
        return before

    def interrupt_until(self, text):
        """Press Ctrl-C as often as it takes: readline misses one that comes while it writes its prompt."""
        for _ in range(10):
            self.type("\x03")
            try:
                return self.wait_for(text, 2)
            except AssertionError:
                continue
        raise AssertionError(f"no {text!r}: {self.seen!r}")

    def leave(self):
        self.type("/exit\r")
        try:
            return self.child.wait(20)
        finally:
            os.close(self.terminal)


def test_a_person_stops_an_answer_and_goes_on(fake_openai, tmp_path):
    fake_openai.delay = 0.02
    person = Person("--url", fake_openai.url, home=tmp_path)
    person.wait_for("/help lists the commands")
    person.wait_for("> ")
    person.type("word " * 300 + "\r")
    person.wait_for("\r\nword word word")
    person.type("\x03")
    person.wait_for("stopped")
    person.wait_for("> ")
    person.interrupt_until("Ctrl-D or /exit leaves")
    fake_openai.delay = 0
    person.type("one\\\r")
    person.wait_for("… ")
    person.type("two\r")
    person.wait_for("tokens/s")
    assert person.leave() == 0
    messages = asked(fake_openai)[1]
    assert messages[1]["role"] == "assistant"
    assert 3 <= len(messages[1]["content"].split()) < 300
    assert messages[2]["content"] == "one\ntwo"
    assert fake_openai.left == 1
    assert "two" in (tmp_path / "chat_history").read_text()


def test_an_interrupted_pipe_ends(fake_openai):
    fake_openai.delay = 0.05
    argv = [sys.executable, "-m", "llmkit", "chat", "--url", fake_openai.url]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(argv, text=True, **pipes) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("word " * 100 + "\nsecond\n")
        child.stdin.flush()
        assert child.stdout.read(4) == "word"
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=20)
    assert (child.returncode, err) == (130, "\ninterrupted\n")
    assert len(fake_openai.requests) == 1
