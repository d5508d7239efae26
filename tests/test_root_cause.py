"""What a worker records of its failure, and which failure caused the others."""

import dataclasses
import functools
import json
import os
import traceback

import pytest

from launch import run_files
from launch.errors import UsageError
from launch.supervisor import failure_report, out_of_memory, root_cause
from launch.supervisor.root_cause import End, Failure


def failure(worker=0, time=1.0, type="ValueError", message="wrong", code=1):
    traceback = f"Traceback of {type}\n"
    return Failure(worker, time, type, message, traceback, code)


def caught(error):
    try:
        raise error
    except BaseException as raised:
        return raised


def test_a_recorded_error_is_read_with_its_traceback(tmp_path):
    root_cause.record(tmp_path, 2, caught(ValueError("\x1b[1mwrong\x1b[0m")), 1)
    found = root_cause.read(tmp_path, 2)
    assert (found.worker, found.type, found.message, found.code) == (
        2,
        "ValueError",
        "wrong",
        1,
    )
    assert "test_root_cause.py" in found.traceback and "\x1b" not in found.traceback
    assert [p.name for p in (tmp_path / "logs").iterdir()] == ["worker-2.error.json"]


@pytest.mark.parametrize("error", [UsageError("bad"), FloatingPointError("nan")])
def test_errors_that_explain_themselves_are_kept_without_traceback(tmp_path, error):
    root_cause.record(tmp_path, 0, caught(error), 2)
    assert root_cause.read(tmp_path, 0).traceback == ""


def test_a_long_message_is_cut_and_its_traceback_whole(tmp_path):
    root_cause.record(tmp_path, 0, caught(RuntimeError("x" * 5000)), 1)
    found = root_cause.read(tmp_path, 0)
    assert len(found.message) == 2000 and "x" * 5000 in found.traceback


def test_an_error_that_cannot_be_recorded_is_said_and_not_raised(tmp_path, capsys):
    (tmp_path / "logs").write_text("a file in the way")
    root_cause.record(tmp_path, 0, ValueError("wrong"), 1)
    assert "could not be recorded" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"worker": 0}', '{"other": 1}'])
def test_a_missing_or_broken_record_reads_as_none(tmp_path, text):
    assert root_cause.read(tmp_path, 0) is None
    path = run_files.error(tmp_path, 0)
    path.parent.mkdir()
    path.write_text(text)
    assert root_cause.read(tmp_path, 0) is None


def test_a_failed_write_leaves_the_former_file_and_no_draft(tmp_path, monkeypatch):
    path = run_files.error(tmp_path, 0)
    run_files.write_json(path, {"a": 1})

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        run_files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("lasts", [True, False])
def test_a_result_is_on_the_disk_before_and_after_it_is_renamed(
    tmp_path, monkeypatch, lasts
):
    done, replace = [], os.replace

    def note_sync(descriptor):
        synced = os.readlink(f"/proc/self/fd/{descriptor}")
        done.append("folder" if synced == str(tmp_path) else "draft")

    def note_renaming(*paths):
        replace(*paths)
        done.append("renamed")

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_renaming)
    run_files.write_json(tmp_path / "model.json", {"a": 1}, lasts=lasts)
    assert done == (["draft", "renamed", "folder"] if lasts else ["renamed"])


@pytest.mark.parametrize(
    "type, message, follows",
    [
        ("UnavailableError", "anything", True),
        ("AbortedError", "", True),
        ("CancelledError", "", True),
        ("DeadlineExceededError", "", True),
        ("InternalError", "Connection reset by peer", True),
        ("InvalidArgumentError", "Collective ops is aborted by: bad shape", True),
        ("RuntimeError", "the coordination service has an error", True),
        ("UnknownError", "task has missed its heartbeat", True),
        ("InternalError", "cuDNN failed to initialize", False),
        ("InvalidArgumentError", "Incompatible shapes: [2] vs. [3]", False),
        ("ValueError", "no column 'peer'", False),
        ("StallError", "No progress for 60 s", False),
    ],
)
def test_what_the_failure_of_a_peer_looks_like(type, message, follows):
    assert failure(type=type, message=message).follows == follows


LOST = failure(0, 1.0, "UnavailableError", "Connection reset by peer")

CAUSES = {
    "none": ([End(0, 0, 1.0), End(1, 0, 2.0)], None),
    "the earliest of two": (
        [End(0, 1, 5.0, None, failure(0, 4.0)), End(1, 1, 6.0, None, failure(1, 3.0))],
        1,
    ),
    "an own error after one that follows": (
        [End(0, 1, 1.0, None, LOST), End(1, 1, 3.0, None, failure(1, 2.0))],
        1,
    ),
    "a death after an error that follows": (
        [End(0, 1, 1.0, None, LOST), End(1, -9, 3.0)],
        1,
    ),
    "one that follows if there is nothing else": (
        [End(0, 1, 1.0, None, LOST), End(1, -15, 3.0, 2.0)],
        0,
    ),
    "recorded before the parent's signal": (
        [End(0, 1, 3.0, None, LOST), End(1, -15, 5.0, 4.0, failure(1, 3.5))],
        1,
    ),
    "not what the parent's signal has done": (
        [End(0, 1, 3.0, None, LOST), End(1, 1, 5.0, 4.0, failure(1, 4.5))],
        0,
    ),
    "not one that ended well": (
        [End(0, 0, 1.0), End(1, -9, 3.0, 2.0), End(2, 7, 2.0)],
        2,
    ),
}


@pytest.mark.parametrize("case", CAUSES)
def test_root_cause(case):
    ends, expected = CAUSES[case]
    found = root_cause.root_cause(ends)
    assert (found and found.worker) == expected


@pytest.mark.parametrize(
    "code, recorded, expected",
    [
        (1, None, 1),
        (2, None, 2),
        (130, None, 130),
        (143, None, 143),
        (7, None, 1),
        (-9, None, 1),
        (-15, 2, 2),
    ],
)
def test_exit_code_of_the_parent(code, recorded, expected):
    found = None if recorded is None else failure(code=recorded)
    assert End(0, code, 1.0, failure=found).exit_code == expected


def test_report_ends_with_the_worker_and_its_error(tmp_path):
    end = End(1, 1, 2.0, failure=failure(1, message="a\n  long\nstory"))
    lines = failure_report.text(end, tmp_path).splitlines()
    assert lines[0].startswith("Worker 1 (see ") and "worker-1.log" in lines[0]
    assert lines[1:] == [
        "Traceback of ValueError",
        "launch: worker 1 failed first, with ValueError: a long story",
    ]


@pytest.mark.parametrize(
    "error, code, last_line",
    [
        (SystemExit("no data"), 1, "worker 1 failed first, with SystemExit: no data"),
        (SystemExit(3), 3, "worker 1 ended with exit code 3"),
        (KeyboardInterrupt(), 130, "worker 1 ended with exit code 130"),
        (SystemExit(143), 143, "a worker got SIGTERM: all stop with exit code 143"),
    ],
)
def test_report_of_a_worker_that_ends_itself(tmp_path, error, code, last_line):
    root_cause.record(tmp_path, 1, caught(error), code)
    end = End(1, code, 2.0, failure=root_cause.read(tmp_path, 1))
    assert root_cause.root_cause([End(0, 1, 1.0, None, LOST), end]) is end
    assert failure_report.text(end, tmp_path) == f"launch: {last_line}\n"


def test_report_of_one_process_speaks_of_no_worker(tmp_path):
    report = functools.partial(failure_report.text, workdir=tmp_path, alone=True)
    log = run_files.log(tmp_path, 0)
    assert report(End(0, 1, 2.0, failure=failure())) == (
        f"The process (see {log}):\nTraceback of ValueError\n"
        "launch: the process failed, with ValueError: wrong\n"
    )
    assert report(End(0, -11, 2.0)) == (
        f"The process, the end of {log}:\nlaunch: the process was killed by SIGSEGV\n"
    )
    quits = dataclasses.replace(failure(), type="SystemExit", message="3", code=3)
    last = "launch: the process ended with exit code 3\n"
    assert report(End(0, 3, 2.0, failure=quits)) == last


def test_report_does_not_repeat_what_is_shown(tmp_path):
    end = End(0, 1, 2.0, failure=failure())
    line = "launch: worker 0 failed first, with ValueError: wrong\n"
    assert failure_report.text(end, tmp_path, shown="Traceback of ValueError\n") == line
    assert failure_report.text(end, tmp_path, shown="x\n" + line) == ""


def test_report_does_not_repeat_a_traceback_that_was_caught_further_out(tmp_path):
    def fails():
        raise ValueError("wrong")

    def recorded():
        try:
            fails()
        except ValueError as error:
            root_cause.record(tmp_path, 0, error, 1)
            raise

    try:
        recorded()
    except ValueError:
        shown = traceback.format_exc()
    end = End(0, 1, 2.0, failure=root_cause.read(tmp_path, 0))
    line = "launch: worker 0 failed first, with ValueError: wrong\n"
    assert failure_report.text(end, tmp_path, shown=shown) == line
    elsewhere = shown.replace("in fails", "in another")
    assert "in fails" in failure_report.text(end, tmp_path, shown=elsewhere)


def test_report_of_a_stall_that_the_chief_has_seen_from_its_side_is_not_repeated(
    tmp_path,
):
    """Both wait, and either may be the first to record it."""
    message = "No progress for 2 s. Received: worker 1 between steps after step 7"
    stall = failure(worker=2, type="StallError", message=message)
    end = End(2, 1, 2.0, failure=dataclasses.replace(stall, traceback=""))
    shown = "its stacks\nlaunch: No progress for 2 s. Received: worker 1, no answer\n"
    assert failure_report.text(end, tmp_path, shown=shown) == ""
    assert failure_report.text(end, tmp_path) == f"launch: {message}\n"


def test_an_error_of_the_only_process_is_not_that_of_a_lost_one(tmp_path):
    error = caught(ConnectionError("socket closed by a peer"))
    root_cause.record(tmp_path, 0, error, 1)
    failure = root_cause.read(tmp_path, 0)
    assert not failure.follows and "socket closed by a peer" in failure.traceback
    report = failure_report.text(End(0, 1, 2.0, failure=failure), tmp_path, alone=True)
    assert report.endswith("with ConnectionError: socket closed by a peer\n")


def test_report_names_a_worker_that_did_not_answer_and_no_graph(tmp_path, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", "{}")
    lost = caught(RuntimeError("a graph\n" * 50 + "socket closed by a peer\nmore"))
    root_cause.record(tmp_path, 0, lost, 1)
    end = End(0, 1, 2.0, failure=root_cause.read(tmp_path, 0))
    text = failure_report.text(end, tmp_path, silent=["worker 1 (stopped)"])
    assert text == (
        "launch: worker 1 (stopped) did not answer, and worker 0 ended with "
        "RuntimeError: socket closed by a peer\n"
    )


def test_report_of_a_death_has_the_last_lines_of_the_log(tmp_path):
    log = run_files.log(tmp_path, 1)
    log.parent.mkdir()
    log.write_text("".join(f"line {i}\n" for i in range(100)))
    text = failure_report.text(End(1, -11, 2.0), tmp_path)
    assert "line 99\n" in text and "line 80\n" not in text
    assert text.endswith("launch: worker 1 was killed by SIGSEGV\n")


def test_report_tells_a_kill_for_lack_of_memory(tmp_path):
    end = End(1, -9, 2.0)
    assert "out of memory, according to" in failure_report.text(
        end, tmp_path, out_of_memory=True
    )
    assert "perhaps by the kernel" in failure_report.text(end, tmp_path)


@pytest.mark.parametrize(
    "cgroup, counter, text",
    [
        ("0::/a/b", "a/b/memory.events", "low 0\noom 3\noom_kill 2\n"),
        ("4:cpu,memory:/a", "memory/a/memory.oom_control", "under_oom 0\noom_kill 2\n"),
        ("0::/of/the/host", "memory.events", "oom_kill 2\n"),
    ],
    ids=["version 2", "version 1", "container"],
)
def test_kills_for_lack_of_memory_are_counted(tmp_path, cgroup, counter, text):
    assert out_of_memory.kills(tmp_path) is None
    for path, content in (
        ("proc/self/cgroup", f"9:name=systemd:/\n{cgroup}\n"),
        (f"sys/fs/cgroup/{counter}", text),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    assert out_of_memory.kills(tmp_path) == 2


@pytest.mark.parametrize(
    "error, expected",
    [
        (ValueError("a peer is wrong"), None),
        (RuntimeError("a mistake in the step"), None),
        (
            RuntimeError("Graph execution error:\n\n  x\nConnection reset by peer\n"),
            "RuntimeError: Connection reset by peer",
        ),
        (ConnectionResetError("socket closed"), "ConnectionResetError: socket closed"),
    ],
)
def test_the_loss_of_a_peer_is_told_in_one_line(error, expected):
    assert root_cause.lost_peer(error) == expected
