"""Which lines written to stderr while TensorFlow is imported are shown."""

import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.integration

ROOT = pathlib.Path(__file__).resolve().parents[2]
BANNER = "I0000 00:00:1.5 77 port.cc:153] oneDNN custom operations are on."
CAUSE = "compiled to use AVX instructions, but these aren't available"

PREAMBLE = f"""
import os, signal, sys, time
from launch.run import quiet

def say(*lines):
    if sys.stderr is not None:
        os.write(2, "".join(line + chr(10) for line in lines).encode())

with quiet.tensorflow_import():
    say({BANNER!r}, {CAUSE!r})
"""


def start(script, *command):
    """Starts a process that runs `script` in place of the import."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    del environ["TF_CPP_MIN_LOG_LEVEL"]
    return subprocess.Popen(
        [*command, sys.executable, "-c", PREAMBLE + "    " + script],
        env=environ,
        stderr=subprocess.PIPE,
        text=True,
    )


def stderr_of(process):
    try:
        return process.communicate(timeout=30)[1]
    finally:
        process.kill()


@pytest.mark.parametrize("end", ["os.abort()", "os._exit(1)", "signal.raise_signal(9)"])
def test_what_was_said_before_a_crash_is_shown(end):
    assert CAUSE in stderr_of(start(end))


def test_what_is_no_banner_is_shown_at_once():
    process = start("time.sleep(60)")
    began = time.monotonic()
    try:
        assert process.stderr.readline() == CAUSE + "\n"
        assert time.monotonic() - began < 20
    finally:
        process.kill()
        assert process.communicate(timeout=30)[1] == ""


def test_the_order_of_lines_is_kept_up_to_the_last_that_has_no_end():
    script = "say(*map(str, range(9999))); sys.stderr.write('no end')"
    shown = stderr_of(start(script + "\nsay(' after')")).splitlines()
    assert shown == [CAUSE, *map(str, range(9999)), "no end after"]


def test_process_1_of_a_container_shows_all():
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"]).returncode:
        pytest.skip("no namespace of processes can be made here")
    shown = stderr_of(start("assert os.getpid() == 1; os._exit(1)", *command))
    assert shown.splitlines() == [BANNER, CAUSE]


def test_a_closed_stderr_is_left_alone():
    process = start("sys.exit(7)", "/bin/sh", "-c", '"$@" 2>&-', "sh")
    assert stderr_of(process) == "" and process.returncode == 7
