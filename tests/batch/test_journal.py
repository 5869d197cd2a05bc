"""The journal: at whatever byte a run was cut off, the next one neither loses nor repeats an answer."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit.batch.journal import Journal
from llmkit.batch.tasks import read_tasks
from llmkit.errors import ConfigError

URL = "/v1/completions"


def line(i, **changes):
    return json.dumps({"custom_id": f"a{i}", "method": "POST", "url": URL, "body": {"prompt": f"第{i}"}} | changes)


def answer(task):
    return task.failed("invalid_line", task.wrong) if task.wrong else task.answered(200, "r", {"text": task.body["prompt"]})


def ids(path):
    return [json.loads(text)["id"] for text in path.read_bytes().splitlines()]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(cuts=st.lists(st.integers(0, 3000), max_size=4), group=st.integers(1, 4))
def test_no_answer_is_lost_or_repeated_at_any_cut(cuts, group, tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch")
    source, target = folder / "in", folder / "out"
    source.write_text("\n".join([line(0), line(0), "{torn", line(1, url="/x"), "", line(2), line(3), line(3), "{torn"]))
    tasks = list(read_tasks(source))
    for cut in [*cuts, None]:
        journal = Journal(target)
        left = [task for task in tasks if task.id not in journal.done]
        for start in range(0, len(left), group):
            journal.append(answer(task) for task in left[start : start + group])
        journal.close()
        if cut is not None:
            data = target.read_bytes()
            target.write_bytes(data[: cut % (len(data) + 1)])
    assert sorted(ids(target)) == sorted(task.id for task in tasks)


def test_a_second_run_knows_lines_by_what_they_say(tmp_path):
    path = tmp_path / "in"
    path.write_text("\n".join([line(1), line(2), line(2)]))
    before = [t.id for t in read_tasks(path)]
    path.write_text("\n" + "\r\n".join([line(9), line(2), line(1), line(2)]) + "\n")
    after = [t.id for t in read_tasks(path)]
    assert len(set(before)) == 3
    assert {after[1], after[2], after[3]} == set(before)


@pytest.mark.parametrize(("text", "wrong"), [
    ("[1]", "not a JSON object"),
    ('{"custom_id": "a"', "not JSON"),
    (line(1, custom_id=7), "custom_id must be a text"),
    (line(1, method="GET"), "method must be POST; got 'GET'"),
    (line(1, url="/v1/images"), "url must be one of /v1/chat/completions"),
    (line(1, body=[1]), "body must be an object"),
    (line(1, body={"stream": True}), "stream must be false"),
])
def test_what_is_wrong_with_a_line_is_said(text, wrong, tmp_path):
    path = tmp_path / "in"
    path.write_text(text)
    assert wrong in str(next(read_tasks(path)).wrong)


def test_a_custom_id_belongs_to_one_line(tmp_path):
    path = tmp_path / "in"
    path.write_text("\n".join([line(1), "", line(1, body={})]))
    assert [t.wrong for t in read_tasks(path)] == [None, "custom_id 'a1' is that of line 1 too"]


@pytest.mark.parametrize("text", ["hello\nworld", "hello", '{"id": "batch_req_', '{"id": "batch_req_x"}\n{"id": "y"}\n', "[]\n"])
def test_a_file_of_something_else_is_left_alone(text, tmp_path):
    path = tmp_path / "out"
    path.write_text(text)
    if text.startswith('{"id": "batch_req_') and "\n" not in text:  # what a crash leaves is no more than this
        Journal(path).close()
        assert path.read_text() == ""
        return
    with pytest.raises(ConfigError, match="not a file of batch answers"):
        Journal(path)
    assert path.read_text() == text


def test_only_one_process_writes(tmp_path):
    journal = Journal(tmp_path / "out")
    with pytest.raises(ConfigError, match="another process"):
        Journal(tmp_path / "out")
    journal.close()
    Journal(tmp_path / "out").close()


def test_errors_are_forgotten_when_they_are_to_be_tried_again(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text("\n".join([line(1), line(2), "x"]))
    good, bad, none = read_tasks(source)
    journal = Journal(target)
    journal.append([answer(good), bad.answered(500, "", {}), none.failed("invalid_line", "x")])
    journal.close()
    assert journal.failed == 2
    again = Journal(target, retry_failed=True)
    assert (again.done, again.failed) == ({good.id}, 0)
    again.append([answer(bad)])
    again.close()
    assert ids(target) == [good.id, bad.id]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
