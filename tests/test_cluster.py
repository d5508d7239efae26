"""Which cluster a process is in, what is refused, and what `launch` does with it."""

import importlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import types

import pytest

from launch.__main__ import main
from launch.cluster import discovery, slurm
from launch.cluster.discovery import Cluster
from launch.errors import UsageError
from launch.supervisor import failure_report, root_cause
from launch.watchdog import stall

ROOT = pathlib.Path(__file__).resolve().parents[1]
VARIABLES = ("TF_CONFIG", "SLURM_", "JOB_COMPLETION_INDEX", "KUBERNETES_SERVICE_HOST")
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")


@pytest.fixture(autouse=True)
def clean_session():
    """Nothing here uses Keras, whose session takes longer to clear than these tests."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Starts each test in an empty folder and outside of any cluster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in list(os.environ):
        if name.startswith((*VARIABLES, *PROXIES)):
            monkeypatch.delenv(name)
    return tmp_path


def tf_config(jobs, kind="worker", index=0, **more):
    """Returns an environment with a TF_CONFIG."""
    config = {"cluster": jobs, "task": {"type": kind, "index": index}, **more}
    return {"TF_CONFIG": json.dumps(config)}


def slurm_step(rank, local, nodes="n[1-2]", tasks="2(x2)", total=4, **more):
    """Returns an environment as `srun` gives it to a task."""
    return {
        "SLURM_JOB_ID": "42",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(total),
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(local),
        **more,
    }


TWO = {"worker": ["a:1", "b:2"]}


# TF_CONFIG


def test_workers_of_tf_config_are_in_its_order_and_worker_0_is_the_chief():
    first = discovery.discover(tf_config(TWO))
    second = discovery.discover(tf_config(TWO, index=1))
    assert first == Cluster(("a:1", "b:2"), 0, "TF_CONFIG")
    assert (second.workers, second.index) == (("a:1", "b:2"), 1)
    assert (first.is_chief, second.is_chief) == (True, False)


@pytest.mark.parametrize("chief", ["chief", "master"])
def test_a_chief_comes_before_the_workers(chief):
    jobs = {"worker": ["a:1", "b:2"], chief: ["c:3"]}
    found = [
        discovery.discover(tf_config(jobs, kind, index))
        for kind, index in [(chief, 0), ("worker", 0), ("worker", 1)]
    ]
    assert {one.workers for one in found} == {("c:3", "a:1", "b:2")}
    assert [one.index for one in found] == [0, 1, 2]
    assert [one.is_chief for one in found] == [True, False, False]


def test_what_vertex_and_kubeflow_add_is_passed_over():
    environ = {
        "TF_CONFIG": json.dumps(
            {
                "cluster": {**TWO, "ps": [], "evaluator": ["e:1"]},
                "task": {"type": "worker", "index": "1", "cloud": "x", "trial": ""},
                "environment": "cloud",
                "job": "{}",
            }
        )
    }
    assert discovery.discover(environ) == Cluster(("a:1", "b:2"), 1, "TF_CONFIG")


def test_an_evaluator_need_not_be_in_the_cluster():
    found = discovery.discover(tf_config(TWO, "evaluator", 3))
    assert found.evaluator and not found.is_chief


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "{}",
        '{"cluster": {}}',
        '{"cluster": null}',
        '{"cluster": {"worker": []}}',
    ]
    + ['{"environment": "cloud", "task": {"type": "worker", "index": 0}}'],
)
def test_a_tf_config_without_a_cluster_describes_none(text):
    assert discovery.discover({"TF_CONFIG": text}) is None


def test_a_cluster_of_one_worker_is_a_cluster():
    assert discovery.discover(tf_config({"worker": ["a:1"]})).num_workers == 1


def test_workers_on_one_host_know_their_place_on_it():
    jobs = {"worker": ["a:1", "b:1", "A:2", "a:3"]}
    found = discovery.discover(tf_config(jobs, index=2))
    assert (found.local_index, found.local_workers) == (1, 3)


def test_what_tensorflow_is_told_has_the_chief_as_worker_0():
    jobs = {"chief": ["c:3"], "worker": ["a:1"]}
    environment = discovery.discover(tf_config(jobs, "worker", 0)).environment()
    assert json.loads(environment.pop("TF_CONFIG")) == {
        "cluster": {"worker": ["c:3", "a:1"]},
        "task": {"type": "worker", "index": 1},
    }
    assert environment == {}


@pytest.mark.parametrize("name", PROXIES)
@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, "a,::1"),
        ({"no_proxy": ".org,10.0.0.0/8"}, ".org,10.0.0.0/8,a,::1"),
        ({"no_proxy": ".org", "no_grpc_proxy": "b"}, "b,a,::1"),
        ({"no_proxy": "c,a", "no_grpc_proxy": ""}, "c,a,::1"),
    ],
)
def test_workers_are_reached_without_the_proxy(name, given, expected):
    jobs = {"worker": ["a:1", "a:2", "[::1]:1"]}
    environment = discovery.discover(tf_config(jobs)).environment(
        {name: "http://proxy:3128", **given}
    )
    assert environment.pop("TF_CONFIG")
    assert environment == {"no_grpc_proxy": expected}


def test_without_a_proxy_none_is_passed_by():
    found = discovery.discover(tf_config(TWO))
    environment = found.environment({"http_proxy": "", "no_proxy": "a"})
    assert set(environment) == {"TF_CONFIG"}


@pytest.mark.parametrize(
    "gpus, shares",
    [
        ("0123", ["0,1", None, "2,3"]),
        ("012", ["0", None, "1"]),
        ("", [None, None, None]),
        ("0", [None, None, None]),  # as in containers with a GPU each
    ],
)
@pytest.mark.parametrize("by_flags", [False, True])
def test_workers_on_one_host_share_its_gpus(gpus, shares, by_flags):
    workers = ["a:1", "b:1", "A:2"]

    def find(index, **environ):
        if by_flags:
            given = {"workers": ",".join(workers), "worker_index": index}
        else:
            given = {}
            environ.update(tf_config({"worker": workers}, index=index))
        return discovery.discover(environ, gpus=lambda: list(gpus), **given)

    found = [find(index) for index in range(3)]
    assert [one.gpus for one in found] == shares
    told = [one.environment().get("CUDA_VISIBLE_DEVICES") for one in found]
    assert told == shares
    for value in ("0,1,2,3", "-1", ""):  # if it is set, they are divided already
        assert find(0, CUDA_VISIBLE_DEVICES=value).gpus is None


def task(kind="worker", index=0, jobs=TWO):
    return tf_config(jobs, kind, index)["TF_CONFIG"]


def addresses(*workers):
    return task(jobs={"worker": workers})


BAD_TF_CONFIGS = {
    "no JSON": ("{'cluster': 1}", "not valid JSON.*Received: TF_CONFIG={'cluster': 1}"),
    "no object": ("[1]", r"not a JSON object. Received: \[1\]"),
    "cluster no object": ('{"cluster": [1]}', r'no object "cluster".*cluster=\[1\]'),
    "no task": (json.dumps({"cluster": TWO}), 'no object "task".*Received: task=None'),
    "no type": (task(None), "Received: task type=None. Give one of chief, master"),
    "unknown type": (task("boss"), "Received: task type='boss'"),
    "task ps": (task("ps"), "Received: task type='ps'"),
    "no index": (task(index=None), "Received: task index=None"),
    "index too large": (task(index=2), "2 of type worker.*Received: task index=2"),
    "index below 0": (task(index=-1), "Received: task index=-1"),
    "index a fraction": (task(index=0.5), "Received: task index=0.5"),
    "index a truth value": (task(index=True), "Received: task index=True"),
    "index a word": (task(index="one"), "Received: task index='one'"),
    "chief that is none": (task("chief"), "0 of type chief"),
    "parameter servers": (
        task(jobs={**TWO, "ps": ["p:1"]}),
        r"Parameter servers are not supported.*Received: ps=\['p:1'\]",
    ),
    "unknown job": (task(jobs={**TWO, "extra": ["p:1"]}), r"Received: extra=\['p:1'\]"),
    "job no list": (task(jobs={"worker": "a:1"}), "Received: worker='a:1'"),
    "job of numbers": (task(jobs={"worker": [1]}), r"Received: worker=\[1\]"),
    "two chiefs": (
        task(jobs={**TWO, "chief": ["c:1"], "master": ["d:1"]}),
        "Received: chief c:1, master d:1",
    ),
    "no port": (addresses("a:1", "b"), "Received: 'b' from TF_CONFIG"),
    "empty port": (addresses("a:1", "b:"), "Received: 'b:'"),
    "port 0": (addresses("a:0"), "Received: 'a:0'"),
    "port too large": (addresses("a:65536"), "Received: 'a:65536'"),
    "port no number": (addresses("a:grpc"), "Received: 'a:grpc'"),
    "no host": (addresses(":1"), "Received: ':1'"),
    "scheme": (addresses("grpc://a:1"), "Received: 'grpc://a:1'"),
    "IPv6 without brackets": (addresses("::1:22"), r"'::1:22'.*Write.*\[::1\]:2222"),
    "empty address": (addresses("a:1", ""), "Received: ''"),
    "address twice": (addresses("a:1", "b:1", "A:1"), "Received: a:1 more than once"),
    "address with a zero": (
        addresses("a:2222", "b:1", "a:02222"),
        "Received: a:2222, a:02222 which are the same from TF_CONFIG",
    ),
}


@pytest.mark.parametrize("text, expected", BAD_TF_CONFIGS.values(), ids=BAD_TF_CONFIGS)
def test_a_malformed_tf_config_is_refused(text, expected):
    with pytest.raises(UsageError, match=expected):
        discovery.discover({"TF_CONFIG": text})


# Flags


def test_flags_win_over_tf_config_over_slurm_over_kubernetes():
    kubernetes = {"JOB_COMPLETION_INDEX": "0"}
    slurm_too = {**kubernetes, **slurm_step(0, 0, total=2, tasks="1(x2)")}
    config_too = {**slurm_too, **tf_config(TWO)}

    def source(environ, **given):
        host = lambda: "j-0.s.n.svc"  # noqa: E731
        return discovery.discover(environ, num_workers=2, hostname=host, **given).source

    assert source(kubernetes) == "Kubernetes indexed Job"
    assert source(slurm_too) == "Slurm"
    assert source({**slurm_too, "TF_CONFIG": "{}"}) == "Slurm"
    assert source(config_too) == "TF_CONFIG"
    assert source(config_too, workers="x:1,y:1", worker_index=1) == "--workers"


def test_workers_by_flags():
    found = discovery.discover({}, workers="x:1, [::1]:2", worker_index=1)
    assert found == Cluster(("x:1", "[::1]:2"), 1, "--workers")


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"workers": "a:1"}, "go together. Received: --workers=a:1 alone"),
        ({"worker_index": 0}, "go together. Received: --worker_index=0 alone"),
        ({"workers": "a:1,b:1", "worker_index": 2}, "--worker_index=2, with 2 in"),
        ({"workers": "a:1,b:1", "worker_index": -1}, "--worker_index=-1"),
        ({"workers": "", "worker_index": 0}, "Received: '' from --workers"),
        ({"workers": "a:1,a:1", "worker_index": 0}, "a:1 more than once"),
        (
            {"workers": "a:1,b:1", "worker_index": 0, "num_workers": 3},
            "--workers describes.*--num_workers=3, and 2 workers a:1, b:1",
        ),
    ],
)
def test_flags_that_describe_no_cluster_are_refused(given, expected):
    with pytest.raises(UsageError, match=expected):
        discovery.discover({}, **given)


def test_the_number_of_workers_has_to_agree_with_any_source():
    assert discovery.discover(tf_config(TWO), num_workers=2).num_workers == 2
    for environ in (tf_config(TWO), slurm_step(0, 0, total=2, tasks="1(x2)")):
        with pytest.raises(UsageError, match="different size.*--num_workers=4, and 2"):
            discovery.discover(environ, num_workers=4)


def test_nothing_describes_a_cluster():
    assert discovery.discover({}) is None
    assert discovery.discover({}, num_workers=3) is None


# Slurm


@pytest.mark.parametrize(
    "text, expected",
    [
        ("login", "login"),
        ("a1,b2", "a1 b2"),
        ("gpu[1-3]", "gpu1 gpu2 gpu3"),
        ("gpu[001-003,007]", "gpu001 gpu002 gpu003 gpu007"),
        ("gpu[8-11]", "gpu8 gpu9 gpu10 gpu11"),
        ("gpu[08-11]", "gpu08 gpu09 gpu10 gpu11"),
        ("cpu[1-2]x[1,3]", "cpu1x1 cpu1x3 cpu2x1 cpu2x3"),
        ("n[1-2].site.org,m", "n1.site.org n2.site.org m"),
        ("gpu[001-002,7],cpu[1]x2,login", "gpu001 gpu002 gpu7 cpu1x2 login"),
    ],
)
def test_node_lists_are_expanded(text, expected):
    assert slurm.expand_nodes(text) == tuple(expected.split())


@pytest.mark.parametrize("text", ["", "a[", "a[]", "a[1-]", "a]", "a,,b", "a[1", "a b"])
def test_what_is_no_node_list_is_refused(text):
    with pytest.raises(UsageError, match="Received: "):
        slurm.expand_nodes(text)


def test_ranks_of_slurm_fill_one_node_after_the_other():
    step = {"nodes": "gpu[01-02],big", "tasks": "1(x2),3", "total": 5}
    places = [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2)]
    found = [discovery.discover(slurm_step(*place, **step)) for place in places]
    port = int(found[0].address.split(":")[1])
    hosts = ["gpu01", "gpu02", "big", "big", "big"]
    expected = [
        f"{h}:{port + place[1]}" for h, place in zip(hosts, places, strict=True)
    ]
    assert all(one.workers == tuple(expected) for one in found)
    assert [one.index for one in found] == [0, 1, 2, 3, 4]
    assert [(c.local_index, c.local_workers) for c in found] == [
        (0, 1),
        (0, 1),
        (0, 3),
        (1, 3),
        (2, 3),
    ]


def test_jobs_and_steps_that_follow_each_other_have_ports_of_their_own():
    def ports(job, step):
        more = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
        environ = slurm_step(0, 0, nodes="n", tasks="16", total=16, **more)
        workers = discovery.discover(environ).workers
        return {int(address.split(":")[1]) for address in workers}

    runs = [ports(job, step) for job in range(900, 920) for step in range(3)]
    assert len(set.union(*runs)) == 16 * 20 * 3
    # Above the ports of services, below those that Linux gives to clients.
    assert all(1024 < port < 32768 for port in ports(2**31, 2**31 - 1))


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # batch script
        slurm_step(0, 0, total=1, tasks="1", nodes="n1"),
        # salloc's own step, in an allocation for several tasks
        {**slurm_step(0, 0, total=1, tasks="1", nodes="n1"), "SLURM_NTASKS": "4"},
    ],
)
def test_a_process_that_is_alone_in_slurm_is_in_no_cluster(environ):
    assert discovery.discover(environ) is None


def test_older_names_of_slurm_are_understood():
    environ = {
        "SLURM_JOBID": "42",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_TASKS_PER_NODE": "1(x2)",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
    }
    expected = slurm_step(1, 0, total=2, tasks="1(x2)")
    assert discovery.discover(environ) == discovery.discover(expected)


@pytest.mark.parametrize("distribution", ["block", "block:cyclic", "block,Pack"])
def test_block_distributions_are_accepted(distribution):
    assert discovery.discover(slurm_step(3, 1, SLURM_DISTRIBUTION=distribution))


@pytest.mark.parametrize(
    "environ, expected",
    [
        (slurm_step(0, 0, SLURM_DISTRIBUTION="cyclic"), "SLURM_DISTRIBUTION=cyclic"),
        (slurm_step(0, 0, SLURM_DISTRIBUTION="plane=2"), "--distribution=block"),
        (slurm_step(0, 0, SLURM_DISTRIBUTION="arbitrary:block"), "arbitrary:block"),
        (slurm_step(1, 0), "task 1 is number 0 on its node. Give srun"),
        (slurm_step(4, 0), "SLURM_PROCID=4"),
        (slurm_step(0, 0, tasks="2,1"), "4 tasks, nodes .*TASKS_PER_NODE=2,1"),
        (slurm_step(0, 0, tasks="4"), "are inconsistent"),
        (slurm_step(0, 0, tasks="2x2"), "SLURM_STEP_TASKS_PER_NODE=2x2"),
        (slurm_step(0, 0, nodes="n[1-"), r"Received: n\[1-"),
        (slurm_step("x", 0), "Received: SLURM_PROCID=x"),
        (slurm_step(0, 0, total="?"), r"Received: SLURM_STEP_NUM_TASKS=\?"),
        (slurm_step(0, 0, SLURM_JOB_ID="?"), r"Received: SLURM_JOB_ID=\?"),
        (
            {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"},
            "Received: no SLURM_STEP_NODELIST",
        ),
    ],
)
def test_a_step_of_slurm_that_is_not_understood_is_refused(environ, expected):
    with pytest.raises(UsageError, match=expected):
        discovery.discover(environ)


@pytest.mark.parametrize(
    "more, shares",
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, ["0,1", "2,3"]),
        ({"SLURM_STEP_GPUS": "4,5"}, ["4", "5"]),
        ({"SLURM_JOB_GPUS": "4,5", "SLURM_STEP_GPUS": "6,7"}, ["6", "7"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f-1,GPU-8f-2"}, ["GPU-8f-1", "GPU-8f-2"]),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPU_BIND": "none"}, ["0", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_TRES_PER_TASK": "cpu=2"}, ["0", "1"]),
        # Nothing to divide:
        ({}, [None, None]),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_GPUS": "0,1"}, [None, None]),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, [None, None]),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, [None, None]),
        # Slurm has bound them:
        ({"CUDA_VISIBLE_DEVICES": "0"}, [None, None]),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, [None, None]),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPU_BIND": "single:1"}, [None, None]),
        (
            {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_TRES_PER_TASK": "gres/gpu=2"},
            [None, None],
        ),
    ],
)
def test_tasks_of_a_node_share_its_gpus_unless_slurm_has_bound_them(more, shares):
    found = [discovery.discover(slurm_step(2 + i, i, **more)) for i in range(2)]
    assert [one.gpus for one in found] == shares
    environments = [one.environment().get("CUDA_VISIBLE_DEVICES") for one in found]
    assert environments == shares


def test_a_task_that_is_alone_on_its_node_has_all_of_its_gpus():
    step = slurm_step(1, 0, total=2, tasks="1(x2)", CUDA_VISIBLE_DEVICES="0,1")
    assert discovery.discover(step).gpus is None


@pytest.mark.parametrize(
    "step, expected",
    [
        (
            slurm_step(0, 0, CUDA_VISIBLE_DEVICES="0,1,2"),
            "for 2 tasks on this node; tasks per node: 2, 2.*--gpus-per-task",
        ),
        (
            slurm_step(2, 0, tasks="2,1", total=3, CUDA_VISIBLE_DEVICES="0,1"),
            "GPUs 0,1 for 1 tasks",
        ),
        (
            slurm_step(0, 0, "n", "3", 3, CUDA_VISIBLE_DEVICES="0,1"),
            "GPUs 0,1 for 3 tasks",
        ),
    ],
)
def test_unequal_shares_of_gpus_are_refused(step, expected):
    with pytest.raises(UsageError, match=expected):
        discovery.discover(step)


# Kubernetes


def in_job(index, host, num_workers=2):
    environ = {"JOB_COMPLETION_INDEX": index}
    return discovery.discover(environ, num_workers=num_workers, hostname=lambda: host)


def test_pods_of_an_indexed_job_are_named_after_it_in_their_service():
    found = in_job("1", "my-job-1.workers.lab.svc.cluster.local.")
    assert found == Cluster(
        (
            "my-job-0.workers.lab.svc.cluster.local:2222",
            "my-job-1.workers.lab.svc.cluster.local:2222",
        ),
        1,
        "Kubernetes indexed Job",
    )


@pytest.mark.parametrize(
    "index, host, num_workers, expected",
    [
        ("0", "job-0.s.n.svc", None, "no --num_workers. Give --num_workers=N"),
        ("2", "job-2.s.n.svc", 2, "JOB_COMPLETION_INDEX=2, --num_workers=2"),
        ("x", "job-x.s.n.svc", 2, "JOB_COMPLETION_INDEX=x"),
        ("1", "job-1", 2, "Received: job-1. Make a headless Service"),
        ("1", "localhost.localdomain", 2, "Received: localhost.localdomain"),
    ],
)
def test_a_pod_whose_peers_cannot_be_named_is_refused(
    index, host, num_workers, expected
):
    with pytest.raises(UsageError, match=expected):
        in_job(index, host, num_workers)


# Reachability


class Time:
    """A clock that advances only by sleeping."""

    def __init__(self):
        self.now = 100.0

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def check(workers, resolve=lambda host, port: [], environ=(), index=0):
    """Returns how many seconds the check has waited."""
    time = Time()
    discovery.check_reachable(
        Cluster((*workers,), index, "TF_CONFIG"),
        environ=dict(environ),
        resolve=resolve,
        clock=time.clock,
        sleep=time.sleep,
    )
    return time.now - 100.0


def test_the_own_port_has_to_be_free_and_only_the_own(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        workers = [f"a:{port}", f"b:{free_port()}"]
        with pytest.raises(UsageError, match=f"in use. Received: worker 0 at a:{port}"):
            check(workers)
        check(workers, index=1)
    check(workers)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
@pytest.mark.parametrize("address", ["::", "::1"])
def test_the_own_port_has_to_be_free_for_ipv6_too(address):
    with socket.socket(socket.AF_INET6) as taken:
        taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            taken.bind((address, 0))
        except OSError as error:
            pytest.skip(f"no IPv6 here: {error}")
        taken.listen()
        with pytest.raises(UsageError, match="This worker's port is in use"):
            check([f"a:{taken.getsockname()[1]}"])


def test_two_names_of_one_address_are_refused():
    port = free_port()
    workers = [f"127.0.0.1:{free_port()}", f"localhost:{port}", f"127.0.0.1:{port}"]
    expected = f"Received: localhost:{port}, 127.0.0.1:{port} which are the same from"
    with pytest.raises(UsageError, match=expected):
        check(workers, resolve=socket.getaddrinfo)
    check(workers[:2], resolve=socket.getaddrinfo)


def test_a_connection_that_was_just_closed_does_not_count():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            server.accept()[0].close()  # the side that closes first keeps TIME_WAIT
    check([f"a:{port}"])


def test_every_host_has_to_resolve_and_addresses_do_not_need_a_name_server():
    asked = []
    check(
        [f"a:{free_port()}", "10.0.0.1:1", "[::1]:2", "b:3"],
        resolve=lambda *address: asked.append(address) or [],
    )
    assert asked[1:] == [("10.0.0.1", 1), ("::1", 2), ("b", 3)]
    workers = [f"127.0.0.1:{free_port()}", "[::1]:2", "localhost:3"]
    assert check(workers, resolve=socket.getaddrinfo) == 0


@pytest.mark.parametrize(
    "environ, seconds", [({}, 10), ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, 60)]
)
def test_a_host_without_an_address_is_refused_after_a_while(environ, seconds, capsys):
    def resolve(host, port):
        if host in ("x", "y"):
            raise socket.gaierror(-2, "Name or service not known")
        return []

    workers = [f"a:{free_port()}", "x:1", "b:1", "y:2"]
    time = Time()
    with pytest.raises(UsageError, match="Received: x:1, y:2 from TF_CONFIG"):
        discovery.check_reachable(
            Cluster((*workers,), 0, "TF_CONFIG"),
            environ=environ,
            resolve=resolve,
            clock=time.clock,
            sleep=time.sleep,
        )
    assert time.now - 100.0 == seconds
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"up to {seconds} s" in err and "x:1, y:2" in err


def test_a_host_that_starts_late_is_waited_for(capsys):
    answers = iter([OSError, OSError, UnicodeError, None])

    def resolve(host, port):
        answer = next(answers) if host == "late" else None
        if answer is not None:
            raise answer
        return []

    assert check([f"a:{free_port()}", "late:1"], resolve) == 3
    assert capsys.readouterr().err.count("\n") == 1


# What `launch` does with a cluster


PACKAGES = {"worker": "launch.run", "supervisor": "launch.supervisor"}


@pytest.fixture
def replace(monkeypatch):
    """Replaces run() of the worker, or of the supervisor, by a function."""
    monkeypatch.setenv("TF_CONFIG", "")  # so that it is restored after each test
    # The stacks of a crash, in any later test, go where pytest wants them.
    monkeypatch.setattr("launch.watchdog.stall.enable_stack_dumps", lambda: None)

    def replace(name, run):
        package = importlib.import_module(PACKAGES[name])
        module = types.ModuleType(f"{package.__name__}.{name}")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(package, name, module, raising=False)

    return replace


@pytest.fixture
def calls(replace):
    """Records what the worker and the supervisor are called with."""
    made = []

    def worker(command_line, model, found, watch):
        made.append((model, found, os.environ["TF_CONFIG"]))
        return True

    def supervisor(arguments, **options):
        made.append((arguments, options))
        return 7

    replace("worker", worker)
    replace("supervisor", supervisor)
    return made


def set_workers(monkeypatch, count, index=0):
    """Sets TF_CONFIG for workers on this host and returns their addresses."""
    workers = [f"localhost:{free_port()}" for _ in range(count)]
    for name, value in tf_config({"worker": workers}, index=index).items():
        monkeypatch.setenv(name, value)
    return workers


def test_without_a_cluster_this_process_does_the_work(calls, capsys):
    assert main(["--model=gan"]) == 0
    assert calls == [("gan", None, "")]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("index", [0, 1])
def test_a_worker_is_told_its_cluster_which_the_chief_announces(
    index, calls, monkeypatch, capsys
):
    workers = set_workers(monkeypatch, 2, index)
    assert main(["--num_workers=2", "--strategy=multi_worker"]) == 0
    [(model, found, text)] = calls
    assert (model, found.workers, found.index) == ("gan", tuple(workers), index)
    assert json.loads(text)["task"] == {"type": "worker", "index": index}
    line = f"cluster: 2 workers, from TF_CONFIG; this is worker 0 at {workers[0]}\n"
    assert capsys.readouterr().out == (line if index == 0 else "")


def test_flags_replace_a_tf_config_for_the_worker_too(calls, monkeypatch):
    set_workers(monkeypatch, 3)
    worker = f"localhost:{free_port()}"
    assert main([f"--workers={worker}", "--worker_index=0"]) == 0
    assert json.loads(calls[0][2])["cluster"] == {"worker": [worker]}


def test_a_number_of_workers_alone_starts_them(calls, capsys):
    arguments = ["--num_workers=3", "--tee=all", "--workdir=here/run"]
    assert main(arguments) == 7
    options = {"num_workers": 3, "tee": "all", "workdir": pathlib.Path("here/run")}
    alone = {"index": None, "max_restarts": 0, "stop_timeout": 25.0}
    assert calls == [(arguments, {**options, **alone})]
    assert not pathlib.Path("here").exists()


def test_an_evaluator_has_nothing_to_do(calls, monkeypatch, capsys):
    for name, value in tf_config(TWO, "evaluator").items():
        monkeypatch.setenv(name, value)
    assert main([]) == 0
    assert calls == []
    assert capsys.readouterr().out.count("\n") == 1


def test_verify_makes_replicas_of_its_own_in_any_cluster(calls, monkeypatch):
    set_workers(monkeypatch, 2)
    assert main(["verify", "--model=gan"]) == 0
    assert calls[0][:2] == ("gan", None)


REFUSED = {
    "no cluster": ({}, "--strategy=multi_worker", "Give --num_workers=N"),
    "alone on one device": (
        tf_config(TWO),
        "--strategy=one_device",
        "would train alone. Received: --strategy=one_device, cluster: 2 workers",
    ),
    "alone on many": (slurm_step(0, 0), "--strategy=mirrored", "4 workers, from Slurm"),
    "mirrored workers": (
        {},
        "--strategy=mirrored --num_workers=2",
        "Received: --strategy=mirrored, --num_workers=2",
    ),
    "virtual devices of workers": (
        {},
        "--virtual_devices=2 --num_workers=2",
        "exactly one replica. Received: --virtual_devices=2",
    ),
    "virtual devices in a cluster": (
        tf_config(TWO),
        "--virtual_devices=2",
        "Give --num_workers=N instead",
    ),
    "virtual devices of one worker": (
        tf_config({"worker": ["a:1"]}),
        "--strategy=multi_worker --virtual_devices=2",
        "Received: --virtual_devices=2",
    ),
    "malformed": ({"TF_CONFIG": "{"}, "", "TF_CONFIG is not valid JSON"),
    "malformed over lines": ({"TF_CONFIG": '{"cluster":\n 1}'}, "", "cluster=1"),
    "disagreement": (tf_config(TWO), "--num_workers=3", "--num_workers=3, and 2"),
    "half a description": ({}, "--workers=a:1,b:1", "--workers=a:1,b:1 alone"),
    "pod": ({"JOB_COMPLETION_INDEX": "0"}, "", "no --num_workers"),
    # The flags and the settings are checked before any worker is started.
    "bad setting": ({}, "--num_workers=2 --epochs=0", "epochs=0"),
    "bad model": ({}, "--num_workers=2 --model=gann", "Did you mean gan?"),
}


@pytest.mark.parametrize("environ, arguments, expected", REFUSED.values(), ids=REFUSED)
def test_what_no_cluster_can_train_with_is_refused_in_one_line(
    environ, arguments, expected, calls, monkeypatch, capsys
):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("launch: ")
    assert "Received: " in err and expected in err
    assert calls == []


def test_clusters_are_refused_and_workers_started_without_tensorflow(folder):
    script = (
        "import json, os, sys\n"
        "from launch.supervisor import supervisor\n"
        "from launch.__main__ import main\n"
        "supervisor.run = lambda *arguments, **options: 2\n"
        "for environ, arguments in json.loads(sys.argv[1]):\n"
        "    os.environ.update(environ)\n"
        "    assert main(arguments.split()) == 2, (environ, arguments)\n"
        "    for name in environ: del os.environ[name]\n"
        "assert not {'tensorflow', 'keras', 'distfit'} & set(sys.modules)\n"
    )
    cases = [(environ, arguments) for environ, arguments, _ in REFUSED.values()]
    subprocess.run(
        [sys.executable, "-c", script, json.dumps([*cases, ({}, "--num_workers=2")])],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        check=True,
        capture_output=True,
    )


def test_one_worker_may_use_any_strategy(calls, monkeypatch):
    set_workers(monkeypatch, 1)
    assert main(["--strategy=mirrored", "--virtual_devices=2"]) == 0
    assert calls[0][1].num_workers == 1


def failure(folder, index):
    return json.loads((folder / f"runs/gan/logs/worker-{index}.error.json").read_text())


@pytest.mark.parametrize(
    "error, code",
    [
        (UsageError("Bad. Received: x=1."), 2),
        (FloatingPointError("NaN"), 1),
        (ValueError("mistake"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_ends_a_worker_is_recorded(
    error, code, replace, monkeypatch, folder, capsys
):
    def run(command_line, model, found, watch):
        raise error

    replace("worker", run)
    set_workers(monkeypatch, 2, index=1)
    assert main([]) == code
    recorded = failure(folder, 1)
    assert recorded["type"] == type(error).__name__
    assert (recorded["worker"], recorded["code"]) == (1, code)
    assert recorded["message"] == str(error)
    workdir, shown = folder / "runs/gan", capsys.readouterr().err
    end = root_cause.End(1, code, 1.0, failure=root_cause.read(workdir, 1))
    told = failure_report.text(end, workdir, shown=shown)
    assert "Traceback" not in told  # That has been shown.


def test_a_port_that_is_taken_is_recorded_too(calls, monkeypatch, folder, capsys):
    workers = set_workers(monkeypatch, 2)
    with socket.create_server(("", int(workers[0].split(":")[1]))):
        assert main([]) == 2
    assert "port is in use" in failure(folder, 0)["message"]
    assert calls == []


def test_a_process_without_peers_records_nothing(replace, monkeypatch, folder, capsys):
    def run(command_line, model, found, watch):
        raise ValueError("mistake")

    replace("worker", run)
    assert main([]) == 1
    set_workers(monkeypatch, 1)
    assert main([]) == 1
    assert not (folder / "runs").exists()


ALONE = {
    "a debugger": ((), None, False),
    "asked to": (("--stall_timeout=5",), 5.0, False),
    "asked not to": (("--max_restarts=1", "--stall_timeout=0"), 0.0, True),
    "started again": (("--max_restarts=1",), stall.TIMEOUT, True),
}


@pytest.mark.parametrize("arguments, timeout, is_supervised", ALONE.values(), ids=ALONE)
@pytest.mark.parametrize("workers", [None, 1])
def test_a_stall_ends_a_process_without_peers_where_that_was_asked_for(
    arguments, timeout, is_supervised, workers, replace, monkeypatch, folder
):
    made = []

    def watchdog(*arguments):
        made.append(arguments)
        return Watchdog(*arguments)

    Watchdog = stall.Watchdog
    monkeypatch.setattr(stall, "Watchdog", watchdog)
    replace("worker", lambda *_: True)
    if workers:
        set_workers(monkeypatch, workers)
    if is_supervised:
        monkeypatch.setenv("DISTFIT_WORKER_LOG", "worker-0.log")
    assert main([*arguments, "--workdir=out"]) == 0
    workdir = pathlib.Path("out") if is_supervised else None
    assert made == [(workdir, 0, 1, timeout)]


def test_a_worker_that_is_told_to_end_exits_with_143(replace, monkeypatch, folder):
    cleaned = []

    def run(command_line, model, found, watch):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            cleaned.append(True)

    replace("worker", run)
    set_workers(monkeypatch, 2)
    before = signal.getsignal(signal.SIGTERM)
    assert main([]) == 143 and cleaned == [True]
    assert failure(folder, 0)["code"] == 143
    assert signal.getsignal(signal.SIGTERM) is before
