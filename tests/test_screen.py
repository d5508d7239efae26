"""How lines of several workers come to one screen, and what a slow screen holds up."""

import os
import re
import subprocess
import sys
import threading

import pytest

from launch.supervisor import screen
from launch.supervisor.screen import Lines, Screen


@pytest.fixture(autouse=True)
def clean_session():
    """Nothing here uses Keras, whose session takes longer to clear than these tests."""


@pytest.mark.parametrize(
    "chunks, expected",
    [
        (["a\n", "b\n"], "> a\n> b\n"),
        (["a", "b\nc", "\n"], "> ab\n> c\n"),
        (["a\r\n"], "> a\n"),
        (["a\r", "\nb\n"], "> a\n> b\n"),
        (["1/3\r", "2/3\r3/3", " done\n"], "> 3/3 done\n"),
        (["no end"], "> no end\n"),
        (["\n\n"], "> \n> \n"),
    ],
)
def test_only_whole_lines_are_passed_each_behind_its_prefix(chunks, expected):
    shown = []
    lines = Lines(b"> ", shown.append)
    for chunk in chunks:
        lines.write(chunk.encode())
    lines.close()
    assert b"".join(shown).decode() == expected


@pytest.fixture
def pipe():
    """The ends of a pipe, to read from and to write to."""
    reading, writing = os.pipe()
    ends = [os.fdopen(reading, "rb"), os.fdopen(writing, "wb")]
    yield ends
    for end in ends:
        end.close()


def written(shown):
    return b"".join(b"%d\n" % i for i in range(shown))


def test_a_screen_that_nobody_reads_holds_up_nobody_and_loses_nothing(pipe):
    reading, writing = pipe
    made = Screen(writing.fileno())
    expected = written(100_000)  # more than a pipe holds
    for i in range(0, len(expected), 1000):
        made.write(expected[i : i + 1000])
    assert not made.flush(0.05)
    got = []
    reader = threading.Thread(target=lambda: got.append(reading.read()))
    reader.start()
    assert made.flush(10)
    writing.close()
    reader.join(10)
    assert got == [expected]


def test_what_is_too_much_for_a_screen_is_dropped_with_a_note(pipe, monkeypatch):
    monkeypatch.setattr(screen, "_MOST_WAITING", 200_000)
    reading, writing = pipe
    made = Screen(writing.fileno())
    for _ in range(5):
        made.write(b"x" * 100_000)
    got = []
    reader = threading.Thread(target=lambda: got.append(reading.read()))
    reader.start()
    assert made.flush(10)
    made.write(b"more")
    assert made.flush(10) and made.begun
    writing.close()
    reader.join(10)
    xs, note, more = got[0].split(b"\n")
    dropped = int(re.search(rb"launch: (\d+) bytes were dropped", note)[1])
    assert more == b"more" and 0 < dropped == 500_000 - len(xs)


def test_a_screen_whose_reader_has_gone_takes_all_and_shows_nothing(pipe):
    reading, writing = pipe
    made = Screen(writing.fileno())
    reading.close()
    for _ in range(3):
        made.write(b"x" * 100_000)
        assert made.flush(10)


def test_a_screen_knows_whether_its_line_has_ended(pipe):
    made = Screen(pipe[1].fileno())
    assert not made.begun
    for data, begun in ((b"a", True), (b"", True), (b"b\n", False), (b"", False)):
        made.write(data)
        assert made.begun == begun
    assert made.flush(10)


PRINTS = """
import os, sys
from launch.supervisor.output import outlast_readers
outlast_readers()
print("first", flush=True)
sys.stdin.readline()
for _ in range(3):
    print("nobody reads this", flush=True)
    sys.stdout.write("nor this")
print("read", file=sys.stderr)
"""


@pytest.mark.parametrize("options", [(), ("-u",)], ids=["buffered", "unbuffered"])
def test_a_process_outlasts_who_reads_it(options):
    with subprocess.Popen(
        [sys.executable, *options, "-c", PRINTS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout.readline() == "first\n"
            process.stdout.close()
            _, errors = process.communicate("go on\n", timeout=30)
        finally:
            process.kill()
    assert (process.returncode, errors) == (0, "read\n")
