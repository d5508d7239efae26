"""The local launcher with real processes: small scripts for workers, no TensorFlow."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.integration

ROOT = pathlib.Path(__file__).resolve().parents[2]
SECONDS = 30  # a hard limit; each takes one or two on an idle machine

PARENT = """
import pathlib, sys
from launch.supervisor import supervisor
supervisor.GRACE = 1.0
command = [sys.executable, "worker.py"]
sys.exit(supervisor.run(["--flag=1"], num_workers={num_workers},
    workdir=pathlib.Path("out"), tee="{tee}", stop_timeout={save_grace},
    command=command))
"""

# Each leaves a file with its process id, so that a test can find it.
PREAMBLE = """
import json, os, pathlib, signal, subprocess, sys, threading, time
config = json.loads(os.environ["TF_CONFIG"])
index = config["task"]["index"]
count = len(config["cluster"]["worker"])
pathlib.Path(f"pid-{index}-{os.getpid()}").touch()

def fail(error, code=1):
    from launch.supervisor import root_cause
    try:
        raise error
    except Exception as raised:
        root_cause.record(pathlib.Path("out"), index, raised, code)
    sys.exit(code)

def started(number):
    while not list(pathlib.Path().glob(f"pid-{number}-*")):
        time.sleep(0.01)

def ready(number):
    while not pathlib.Path(f"ready-{number}").exists():
        time.sleep(0.01)

def ignore_and_sleep():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    pathlib.Path(f"deaf-{index}").touch()
    time.sleep(60)

def deaf(number):
    while not pathlib.Path(f"deaf-{number}").exists():
        time.sleep(0.01)

"""


class Launch:
    """A supervisor in a process of its own, in an empty folder.

    `files` are its stdout and stderr; `before` is called in it first.
    """

    def __init__(
        self,
        folder,
        script,
        num_workers=2,
        tee="chief",
        save_grace=1.0,
        files=(subprocess.PIPE, subprocess.PIPE),
        before=lambda: None,
        environ=(),
    ):
        (folder / "worker.py").write_text(PREAMBLE + script)
        self.folder = folder
        parent = PARENT.format(num_workers=num_workers, tee=tee, save_grace=save_grace)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **dict(environ)}
        environment.pop("CUDA_VISIBLE_DEVICES", None)

        def prepare():
            # If the tests run in the background, children would ignore these signals.
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            before()

        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-c", parent],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=files[0],
            stderr=files[1],
            preexec_fn=prepare,
        )

    def wait(self):
        out, err = self.process.communicate(timeout=SECONDS)
        self.seconds = time.monotonic() - self.began
        self.out, self.err = (out or b"").decode(), (err or b"").decode()
        self.last = self.err.splitlines()[-1] if self.err else ""
        return self.process.returncode

    def log(self, index):
        return (self.folder / "out" / "logs" / f"worker-{index}.log").read_text()

    def pids(self):
        return [int(p.name.split("-")[-1]) for p in self.folder.glob("pid-*")]

    def wait_for(self, pattern, count):
        deadline = time.monotonic() + SECONDS
        while len(list(self.folder.glob(pattern))) < count:
            assert time.monotonic() < deadline, f"{pattern}: too few"
            time.sleep(0.01)

    def clean_up(self):
        self.process.kill()
        self.process.communicate()
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def launch(tmp_path):
    """Starts one supervisor and leaves no process behind."""
    made = []

    def start(script, **options):
        made.append(Launch(tmp_path, script, **options))
        return made[-1]

    yield start
    for each in made:
        each.clean_up()


def is_alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state.split()[0] != "Z"


def check_nothing_is_left(run, within=0.0):
    """Checks the process ids, and that the ports can be bound again."""
    assert run.pids()
    deadline = time.monotonic() + within
    while left := [pid for pid in run.pids() if is_alive(pid)]:
        assert time.monotonic() < deadline, f"left: {left}"
        time.sleep(0.02)
    for path in run.folder.glob("ports-*"):
        for address in json.loads(path.read_text()):
            host, port = address.split(":")
            with socket.socket() as bound:
                bound.bind((host, int(port)))


def test_workers_get_their_place_and_the_arguments_and_all_end_with_0(launch):
    run = launch("print(index, count, sys.argv[1:], flush=True)", num_workers=3)
    assert run.wait() == 0
    assert (run.out, run.err) == ("0 3 ['--flag=1']\n", "")
    assert [run.log(i) for i in range(3)] == [f"{i} 3 ['--flag=1']\n" for i in range(3)]


def test_ports_are_free_and_differ(launch):
    run = launch(
        "import socket\n"
        "addresses = config['cluster']['worker']\n"
        "host, port = addresses[index].split(':')\n"
        "server = socket.create_server((host, int(port)))\n"
        "print(json.dumps(addresses))",
        num_workers=4,
    )
    assert run.wait() == 0
    assert len(set(json.loads(run.out))) == 4


def test_the_chiefs_output_and_errors_go_to_the_screen_and_all_to_logs(launch):
    run = launch(
        "print(f'out {index}\\rbar', end='')\n"
        "sys.stdout.flush()\n"
        "time.sleep(0.2)\n"
        "print(f'err {index}', file=sys.stderr)"
    )
    assert run.wait() == 0
    assert (run.out, run.err) == ("out 0\rbar", "err 0\n")
    logs = run.folder / "out" / "logs"
    assert (logs / "worker-0.log").read_bytes() == b"out 0\rbarerr 0\n"
    assert (logs / "worker-1.log").read_bytes() == b"out 1\rbarerr 1\n"


def test_the_chiefs_output_comes_as_it_is_written(launch):
    run = launch("print('begun'); time.sleep(60)")
    assert run.process.stdout.read(5) == b"begun"
    assert time.monotonic() - run.began < 20


def test_tee_all_shows_whole_lines_behind_the_name_of_their_worker(launch):
    script = (
        "for i in range(200):\n"
        "    os.write(1, b'%d-' % i)\n"
        "    os.write(1, b'%d\\n' % i)\n"
        "os.write(1, b'no end')"
    )
    run = launch(script, num_workers=3, tee="all")
    assert run.wait() == 0
    expected = [f"{i}-{i}" for i in range(200)] + ["no end"]
    for index in range(3):
        name = f"[worker {index}] "
        lines = [x for x in run.out.splitlines() if x.startswith(name)]
        assert [line.removeprefix(name) for line in lines] == expected
    assert len(run.out.splitlines()) == 3 * len(expected)


def test_a_large_output_arrives_whole(launch):
    run = launch("sys.stdout.write('x' * 3_000_000 + 'end')")
    assert run.wait() == 0
    assert len(run.out) == len(run.log(1)) == 3_000_003


def test_the_first_failure_ends_workers_that_ignore_sigterm(launch):
    run = launch(
        "if index == 1:\n"
        "    deaf(0), deaf(2)\n"
        "    fail(ValueError('a mistake'))\n"
        "ignore_and_sleep()",
        num_workers=3,
    )
    assert run.wait() == 1
    assert run.seconds < 10
    check_nothing_is_left(run)
    assert run.last == "launch: worker 1 failed first, with ValueError: a mistake"
    assert "Traceback" in run.err and "worker.py" in run.err


def test_the_cause_is_the_earliest_error_that_follows_from_no_other(launch):
    run = launch(
        "class UnavailableError(Exception): pass\n"
        "if index == 0:\n"
        "    fail(UnavailableError('Connection reset by peer'))\n"
        "started(0)\n"
        "time.sleep(0.1 * index)\n"
        "fail(KeyError('cause') if index == 2 else RuntimeError('heartbeat timeout'))",
        num_workers=3,
    )
    assert run.wait() == 1
    assert run.last == "launch: worker 2 failed first, with KeyError: 'cause'"


def test_a_worker_that_records_its_error_and_hangs_is_the_cause(launch):
    run = launch(
        "from launch.supervisor import root_cause\n"
        "if index == 1:\n"
        "    root_cause.record(pathlib.Path('out'), index, OSError('disk'), 1)\n"
        "time.sleep(60)"
    )
    assert run.wait() == 1
    assert run.last == "launch: worker 1 failed first, with OSError: disk"
    assert run.seconds < 15


def test_a_usage_error_of_all_is_one_line_and_code_2(launch):
    run = launch(
        "from launch.errors import UsageError\n"
        "if index == 0:\n"
        "    print('launch: bad. Received: x=1.', file=sys.stderr)\n"
        "fail(UsageError('bad. Received: x=1.'), 2)",
        num_workers=3,
    )
    assert run.wait() == 2
    assert run.err == "launch: bad. Received: x=1.\n"


def test_the_chiefs_traceback_is_not_shown_twice(launch):
    run = launch(
        "import traceback\n"
        "from launch.supervisor import root_cause\n"
        "if index: time.sleep(60)\n"
        "try:\n"
        "    raise ValueError('mine')\n"
        "except ValueError as error:\n"
        "    root_cause.record(pathlib.Path('out'), index, error, 1)\n"
        "    traceback.print_exc()\n"
        "    sys.exit(1)"
    )
    assert run.wait() == 1
    assert run.err.count("Traceback") == 1
    assert run.last == "launch: worker 0 failed first, with ValueError: mine"


def test_a_worker_killed_from_outside_is_named_with_the_signal(launch):
    run = launch(
        "if index == 1:\n"
        "    started(0)\n"
        "    print('the last words')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(60)"
    )
    assert run.wait() == 1
    assert run.last.startswith("launch: worker 1 was killed by SIGKILL")
    assert "memory" in run.last and "the last words" in run.err


@pytest.mark.parametrize(
    "end, code, expected",
    [
        ("os._exit(7)", 1, "worker 1 ended with exit code 7"),
        ("os._exit(2)", 2, "worker 1 ended with exit code 2"),
        ("os._exit(143)", 143, "worker 1 ended with exit code 143"),
        ("os.abort()", 1, "worker 1 was killed by SIGABRT"),
    ],
)
def test_a_death_without_a_record_says_how_and_ends_with(launch, end, code, expected):
    run = launch(f"if index == 1: {end}\ntime.sleep(60)")
    assert run.wait() == code
    assert expected in run.last


def test_one_that_is_done_early_does_not_end_the_others(launch):
    run = launch("if index == 0: time.sleep(0.5); print('late')")
    assert run.wait() == 0
    assert run.out == "late\n"


PORTS = (
    "ports = json.dumps(config['cluster']['worker'])\n"
    "pathlib.Path(f'ports-{index}').write_text(ports)\n"
)


@pytest.mark.parametrize(
    "number, code, last",
    [
        (signal.SIGINT, 130, "launch: interrupted"),
        (signal.SIGTERM, 143, "launch: terminated"),
        (signal.SIGHUP, 143, "launch: terminated"),
    ],
)
@pytest.mark.parametrize("how", ["time.sleep(60)", "ignore_and_sleep()"])
def test_a_signal_to_the_parent_ends_everything(launch, number, code, last, how):
    run = launch(PORTS + "pathlib.Path(f'ready-{index}').touch()\n" + how)
    run.wait_for("ready-*", 2)
    run.process.send_signal(number)
    assert run.wait() == code
    assert run.err == last + "\n"
    check_nothing_is_left(run)


def test_a_second_interrupt_kills_at_once(launch):
    run = launch("ignore_and_sleep()", save_grace=8.0)
    run.wait_for("deaf-*", 2)
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.7)  # Within half a second it would be the first one again.
    began = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == 130
    assert time.monotonic() - began < 4  # without it: 7.3 s more of the grace period
    check_nothing_is_left(run)


def test_sigterm_leaves_time_to_save(launch):
    run = launch(
        "def save(number, frame):\n"
        "    time.sleep(1.5 if index == 0 else 0.1)\n"
        "    pathlib.Path(f'saved-{index}').touch()\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path(f'ready-{index}').touch()\n"
        "time.sleep(60)",
        save_grace=20,
    )
    run.wait_for("ready-*", 2)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 143
    assert len(list(run.folder.glob("saved-*"))) == 2


def test_an_error_while_saving_is_told_and_sets_the_code(launch):
    run = launch(
        "def save(number, frame):\n"
        "    fail(OSError('disk full')) if index else sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path(f'ready-{index}').touch()\n"
        "time.sleep(60)",
    )
    run.wait_for("ready-*", 2)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 1
    assert run.last == "launch: worker 1 failed first, with OSError: disk full"


CHILD = """
code = "import os, pathlib, time; pathlib.Path(f'pid-child-{os.getpid()}').touch(); "
subprocess.Popen([sys.executable, "-c", code + "time.sleep(60)"])
while len(list(pathlib.Path().glob("pid-child-*"))) < count:
    time.sleep(0.01)
"""


def test_a_parent_that_is_killed_leaves_no_worker_nor_what_it_has_started(launch):
    run = launch(PORTS + CHILD + "ignore_and_sleep()")
    run.wait_for("deaf-*", 2)
    assert len(run.pids()) == 4
    run.process.kill()
    run.wait()
    check_nothing_is_left(run, within=5)


def test_what_workers_have_started_ends_with_them(launch):
    run = launch(CHILD + "print('done')")
    assert run.wait() == 0
    assert run.out == "done\n" and run.seconds < 20
    check_nothing_is_left(run, within=1)


WATCHED = """
from launch.watchdog import stall
stall.enable_stack_dumps()
def between_steps(step):
    {callback}
with stall.Watchdog(pathlib.Path("out"), index, count, {timeout}) as watchdog:
    for step in range(1, 100):
        watchdog.note(step, stall.IN_STEP)
        # As a collective: no worker leaves a step before all have entered it.
        pathlib.Path(f"entered-{{index}}-{{step}}").touch()
        while len(list(pathlib.Path().glob(f"entered-*-{{step}}"))) < count:
            time.sleep(0.01)
        watchdog.note(step, stall.BETWEEN_STEPS)
        between_steps(step)
"""


def test_a_stalled_callback_is_named_with_its_step_and_all_stacks_are_logged(launch):
    callback = "time.sleep(60 if (index, step) == (1, 7) else 0.01)"
    run = launch(WATCHED.format(callback=callback, timeout=2), num_workers=3)
    assert run.wait() == 1
    assert run.last.startswith("launch: No progress for 2 s. Received: worker 1")
    assert (
        "worker 1 between steps after step 7, while workers 0, 2 wait in step 8."
        in run.last
    )
    assert "in between_steps" in run.log(1)
    for index in range(3):
        assert "Thread 0x" in run.log(index) and "worker.py" in run.log(index)
    assert run.err.count("launch: ") == 1
    check_nothing_is_left(run)


def test_a_stopped_worker_is_named_and_leaves_its_stack(launch):
    stop = "(os.kill(os.getpid(), signal.SIGSTOP), time.sleep(60))"
    callback = f"(index, step) == (2, 5) and {stop}"
    run = launch(WATCHED.format(callback=callback, timeout=3), num_workers=3)
    assert run.wait() == 1
    assert "Received: worker 2 not responding since" in run.last
    assert "while workers 0, 1 wait in step 6" in run.last
    assert "in between_steps" in run.log(2)
    check_nothing_is_left(run)


def test_a_stopped_worker_ends_when_another_fails(launch):
    run = launch(
        "if index == 0:\n"
        "    pathlib.Path('stopping').touch()\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "while not pathlib.Path('stopping').exists(): time.sleep(0.01)\n"
        "time.sleep(0.1)\n"
        "fail(ValueError('after'))"
    )
    assert run.wait() == 1
    assert run.last == "launch: worker 1 failed first, with ValueError: after"
    check_nothing_is_left(run)


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores to divide",
)
def test_cores_are_divided(launch):
    run = launch(
        "pathlib.Path(f'cores-{index}').write_text("
        "json.dumps(sorted(os.sched_getaffinity(0))))"
    )
    assert run.wait() == 0
    shares = [json.loads((run.folder / f"cores-{i}").read_text()) for i in (0, 1)]
    assert sum(shares, []) == sorted(os.sched_getaffinity(0))
    assert all(shares)


def test_files_of_a_former_run_are_removed_and_others_kept(launch, tmp_path):
    logs = tmp_path / "out" / "logs"
    logs.mkdir(parents=True)
    old = ["worker-7.log", "worker-7.error.json", "worker-0.progress.json"]
    for name in [*old, "notes.txt"]:
        (logs / name).write_text("{}")
    assert launch("pass").wait() == 0
    assert sorted(p.name for p in logs.iterdir()) == [
        "notes.txt",
        "worker-0.log",
        "worker-1.log",
    ]


def test_logs_of_former_runs_are_set_aside(launch, tmp_path):
    out = tmp_path / "out"
    for text in ("trained", "evaluated", "refused"):
        assert launch(f"print('{text}', index)", tee="all").wait() == 0
    found = {
        str(path.relative_to(out)): path.read_text() for path in out.rglob("*.log")
    }
    assert found == {
        f"{folder}/worker-{index}.log": f"{text} {index}\n"
        for folder, text in (
            ("logs-1", "trained"),
            ("logs-2", "evaluated"),
            ("logs", "refused"),
        )
        for index in range(2)
    }


def test_workers_know_their_logs_and_are_reached_without_a_proxy(launch):
    names = ["DISTFIT_WORKER_LOG", "no_grpc_proxy", "no_proxy"]
    run = launch(
        f"os.chdir('/'); print([os.environ.get(name) for name in {names}], flush=True)",
        environ={"http_proxy": "http://127.0.0.1:9", "no_proxy": "example.org"},
    )
    assert run.wait() == 0
    for index in range(2):
        log = str(run.folder / "out" / "logs" / f"worker-{index}.log")
        expected = [log, "example.org,127.0.0.1", "example.org"]
        assert run.log(index) == f"{expected}\n"


# More than a pipe or a terminal holds. The last file shows that the pipe is empty.
TALKS = (
    "for i in range(10_000 if index == 0 else 0): print(i, 'x' * 99)\n"
    "sys.stdout.flush()\n"
    "pathlib.Path(f'ready-{index}').touch()\n"
)


@pytest.fixture
def terminal():
    """The ends of a terminal, to read from and to write to."""
    ends = os.openpty()
    yield ends
    for end in ends:
        os.close(end)


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
@pytest.mark.parametrize(
    "end, number, code, last",
    [
        ("time.sleep(60)", signal.SIGTERM, 143, "launch: terminated"),
        ("time.sleep(60)", signal.SIGINT, 130, "launch: interrupted"),
        (
            "if index: ready(0), fail(ValueError('mine'))\ntime.sleep(60)",
            None,
            1,
            "launch: worker 1 failed first, with ValueError: mine",
        ),
    ],
)
def test_a_screen_that_nobody_reads_keeps_nothing_from_its_end(
    launch, terminal, kind, end, number, code, last
):
    out = subprocess.PIPE if kind == "pipe" else terminal[1]
    run = launch(TALKS + end, files=(out, subprocess.PIPE))
    run.wait_for("ready-*", 2)
    if number is not None:
        run.process.send_signal(number)
    assert run.process.wait(SECONDS) == code
    assert time.monotonic() - run.began < 15
    assert run.process.stderr.read().decode().splitlines()[-1] == last
    assert run.log(0).count("x\n") == 10_000
    check_nothing_is_left(run)


def test_a_screen_that_is_read_late_shows_all(launch):
    run = launch(TALKS)
    run.wait_for("ready-*", 2)
    time.sleep(0.5)
    assert run.process.poll() is None
    assert run.wait() == 0
    assert run.out == run.log(0) and len(run.out.splitlines()) == 10_000


def test_the_last_line_stands_alone_below_what_the_chief_has_begun(launch):
    script = """
print(' 5/10 loss: 1.0', end='', flush=True)
pathlib.Path(f'begun-{index}').touch()
while index and not pathlib.Path('begun-0').exists():
    time.sleep(0.01)
if index:
    os._exit(7)
time.sleep(60)
"""
    run = launch(script, files=(subprocess.PIPE, subprocess.STDOUT))
    assert run.wait() == 1
    lines = run.out.splitlines()
    assert lines[0] == " 5/10 loss: 1.0"
    assert lines[1].startswith("Worker 1, the end of ")
    assert lines[-1].startswith("launch: worker 1 ended with exit code 7")


def test_errors_that_nobody_reads_any_more_change_no_exit_code(launch):
    run = launch("pathlib.Path(f'ready-{index}').touch()\ntime.sleep(60)")
    run.wait_for("ready-*", 2)
    run.process.stderr.close()
    run.process.stderr = None
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 143


def test_a_run_without_an_output_goes_on_and_keeps_its_logs(launch):
    run = launch("print('said')", before=lambda: os.close(1))
    assert run.wait() == 0
    assert (run.err, run.log(0), run.log(1)) == ("", "said\n", "said\n")


def test_the_last_words_of_a_worker_may_come_a_little_late(launch):
    code = "import time; time.sleep(0.1); print('late')"
    run = launch(
        f"command = [sys.executable, '-Ic', {code!r}]\n"
        "subprocess.Popen(command, start_new_session=True)"
    )
    assert run.wait() == 0
    assert (run.out, run.log(1)) == ("late\n", "late\n")


def test_what_is_said_before_a_crash_in_the_import_of_tensorflow_is_shown(launch):
    run = launch(
        "from launch.run import quiet\n"
        "os.environ.pop('TF_CPP_MIN_LOG_LEVEL', None)\n"
        "if index == 0: time.sleep(60)\n"
        "with quiet.tensorflow_import():\n"
        "    os.write(2, b'compiled to use AVX instructions\\n')\n"
        "    os.abort()"
    )
    assert run.wait() == 1
    *_, said, last = run.err.splitlines()
    assert said == run.log(1).strip() == "compiled to use AVX instructions"
    assert last == "launch: worker 1 was killed by SIGABRT"


def test_what_has_left_a_worker_and_writes_on_is_not_waited_for(launch):
    code = "import time\nwhile True: print('on', flush=True); time.sleep(0.01)"
    run = launch(
        f"left = subprocess.Popen([sys.executable, '-c', {code!r}], "
        "start_new_session=True)\n"
        "pathlib.Path(f'pid-left-{left.pid}').touch()"
    )
    assert run.wait() == 0
    assert run.seconds < 20


def test_a_screen_that_is_gone_does_not_end_the_run(launch):
    run = launch("for i in range(50): print('x' * 9999)\npathlib.Path('done').touch()")
    run.process.stdout.close()
    run.process.stdout = None
    assert run.wait() == 0
    assert (run.folder / "done").exists() and len(run.log(0)) == 500_000
