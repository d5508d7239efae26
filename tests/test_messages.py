"""The last line of a failed run has the cause and the user's line, but no graph."""

import pytest
import tensorflow as tf

import launch.__main__
from launch import messages
from launch.supervisor import failure_report, root_cause
from launch.supervisor.root_cause import End

# As TensorFlow 2.21 words it for two replicas.
OF_TWO = """Graph execution error:

Detected at node cond/stage2/r0/Assert defined at (most recent call last):
<stack traces unavailable>
Detected at node Assert defined at (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main

  File "/home/peer/mine.py", line 19, in train_step
    tf.debugging.Assert(x < y, ["too far"])

2 root error(s) found.
  (0) INVALID_ARGUMENT:  assertion failed: [too far] [[0.1 0.2]...]
\t [[{{node cond/stage2/r0/Assert}}]]
\t [[AddN/_12]]
  (1) INVALID_ARGUMENT:  assertion failed: [too far] [[0.1 0.2]...]
\t [[{{node Assert}}]]
0 successful operations.
0 derived errors ignored. [Op:__inference_function_664]"""
CAUSE = "assertion failed: [too far] [[0.1 0.2]...]"


def of_two(place="/home/peer/mine.py:19  tf.debugging.Assert(x < y)"):
    error = tf.errors.InvalidArgumentError(None, None, OF_TWO)
    error.add_note(f"In the step, at {place}")
    return error


def _asserts(x):
    tf.debugging.assert_less(x, 0.1, message="too far")
    return x


def _unreadable(x):
    raise ValueError("no picture")


def _calls_python(x):
    return tf.py_function(_unreadable, [x], tf.float32)


@pytest.mark.parametrize(
    "fails, expected",
    {
        "compiled": (lambda: tf.function(_asserts)(tf.ones(2)), "assertion failed: ["),
        "eager": (lambda: tf.gather([1, 2], [7]), "indices[0] = 7 is not in [0, 2)"),
        "data": (
            lambda: list(tf.data.Dataset.from_tensors(1.0).map(_asserts)),
            "assertion failed: [too far] ",
        ),
        "Python": (
            lambda: tf.function(_calls_python)(tf.ones(2)),
            "ValueError: no picture",
        ),
    }.values(),
)
def test_of_the_errors_of_tensorflow_the_cause_is_left(fails, expected):
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        fails()
    found = messages.cause(caught.value)
    assert expected in found
    assert "\n" not in found and not any(each in found for each in ("{{", "Op:", "[["))


def test_a_cause_that_several_nodes_tell_is_told_once():
    assert messages.cause(of_two()) == CAUSE


def test_other_errors_keep_their_message():
    text = "[Op:x] {{node a}}\n\nTraceback (most recent call last):\n mine"
    assert messages.cause(ValueError(f"\x1b[1m{text}\x1b[0m")) == text


def test_the_last_line_of_a_process_is_the_cause_with_the_users_line(
    tmp_path, monkeypatch, capsys
):
    def run(arguments):
        raise of_two(f"{tmp_path}/mine.py:19  tf.debugging.Assert(x < y)")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch.__main__, "_run", run)
    assert launch.__main__.main([]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"launch: failed with InvalidArgumentError: {CAUSE} "
        "(mine.py:19 tf.debugging.Assert(x < y))"
    )


def test_a_report_has_them_too_and_takes_no_path_for_a_lost_peer(tmp_path):
    root_cause.record(tmp_path, 0, of_two(), 1)
    failure = root_cause.read(tmp_path, 0)
    assert not failure.follows
    assert failure_report.text(End(0, 1, 2.0, failure=failure), tmp_path) == (
        f"launch: worker 0 failed first, with InvalidArgumentError: {CAUSE} "
        "(/home/peer/mine.py:19 tf.debugging.Assert(x < y))\n"
    )


def test_a_long_cause_is_cut_and_the_users_line_is_not(tmp_path):
    error = RuntimeError("x" * 1000)
    error.add_note("In the step, at mine.py:19  here")
    root_cause.record(tmp_path, 0, error, 1)
    end = End(0, 1, 2.0, failure=root_cause.read(tmp_path, 0))
    assert failure_report.text(end, tmp_path).endswith("x ... (mine.py:19 here)\n")
