"""The files in configs/cluster: well-formed, and what they start finds its cluster."""

import argparse
import json
import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

from launch.cluster import discovery
from launch.settings import checks, configuration, flags

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs" / "cluster"
PORT = discovery.KUBERNETES_PORT
NCCL = {"protocol": "TCP", "port": 32768, "endPort": 60999}


@pytest.fixture(autouse=True)
def clean_session():
    """Nothing here uses Keras, whose session takes longer to clear than these tests."""


def documents(name):
    """Returns the objects of a Kubernetes manifest by their kind."""
    loaded = list(yaml.safe_load_all((FOLDER / name).read_text()))
    kinds = {one["kind"]: one for one in loaded}
    assert len(kinds) == len(loaded)
    return kinds


def discovered(arguments, environ, **options):
    """Returns the cluster that a process started like this finds."""
    command_line = flags.parse(arguments)
    config = configuration.preview(command_line)
    given = command_line.cluster
    known = {name: given.get(name) for name in ("workers", "num_workers")}
    found = discovery.discover(environ, **known, **options)
    checks.check_cluster(config, found, known["num_workers"])
    return found


def assert_ranks(found, count):
    """Asserts that the processes are all of the workers of one cluster."""
    assert [one.index for one in found] == list(range(count))
    assert {one.workers for one in found} == {found[0].workers}
    assert found[0].num_workers == count


def test_every_file_is_looked_at_here():
    names = {path.name for path in FOLDER.iterdir()}
    manifests = {"slurm.sbatch", "kubernetes.yaml", "kubeflow.yaml", "compose.yaml"}
    assert names == manifests | {"ray_train.py"}


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda p: p.name)
def test_every_file_says_how_it_is_run_and_that_the_port_is_open_to_code(path):
    text = " ".join(path.read_text().replace("#", " ").split())
    assert f"configs/cluster/{path.name}" in text
    assert "password" in text and "run code in" in text


# Kubernetes


API_VERSIONS = {
    "Service": "v1",
    "PersistentVolumeClaim": "v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "Job": "batch/v1",
    "TFJob": "kubeflow.org/v1",
}


@pytest.mark.parametrize("name", ["kubernetes.yaml", "kubeflow.yaml"])
def test_objects_have_the_versions_that_kubernetes_serves(name):
    for kind, one in documents(name).items():
        assert one["apiVersion"] == API_VERSIONS[kind]
        assert set(one) == {"apiVersion", "kind", "metadata", "spec"}
        assert re.fullmatch(
            r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", one["metadata"]["name"]
        )


def assert_admits_only(policy, labels):
    """Asserts that pods with these labels can be reached only by each other."""
    assert policy["spec"] == {
        "podSelector": {"matchLabels": labels},
        "policyTypes": ["Ingress"],
        "ingress": [
            {
                "from": [{"podSelector": {"matchLabels": labels}}],
                "ports": [{"protocol": "TCP", "port": PORT}, NCCL],
            }
        ],
    }


def assert_runs_in_the_working_folder(pod, command_line):
    [container] = pod["containers"]
    [mount] = container["volumeMounts"]
    [volume] = pod["volumes"]
    assert volume["name"] == mount["name"]
    workdir = command_line.settings["workdir"]
    assert pathlib.PurePosixPath(mount["mountPath"]) in map(
        pathlib.PurePosixPath, pathlib.PurePosixPath(workdir).parents
    )
    assert pod["automountServiceAccountToken"] is False


def test_the_indexed_job_finds_its_pods_by_name():
    objects = documents("kubernetes.yaml")
    job, service = objects["Job"], objects["Service"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 2
    assert pod["restartPolicy"] == "Never"  # Jobs do not accept Always
    assert pod["subdomain"] == service["metadata"]["name"]
    [container] = pod["containers"]
    domain = f"{pod['subdomain']}.default.svc.cluster.local"
    found = [
        discovered(
            container["args"],
            {"JOB_COMPLETION_INDEX": str(index)},
            hostname=lambda i=index: f"{job['metadata']['name']}-{i}.{domain}",
        )
        for index in range(spec["completions"])
    ]
    assert_ranks(found, spec["completions"])
    assert found[0].workers == (
        f"distfit-0.{domain}:{PORT}",
        f"distfit-1.{domain}:{PORT}",
    )
    assert_runs_in_the_working_folder(pod, flags.parse(container["args"]))


def test_the_logs_to_follow_are_those_of_the_chief():
    text = (FOLDER / "kubernetes.yaml").read_text()
    command = text.partition("kubectl logs ")[2].partition("\n# The last")[0]
    selector = shlex.split(command.replace("\\\n#", ""))[-1]
    labels = dict(label.split("=") for label in selector.split(","))
    # Kubernetes gives each pod of an indexed Job its index as a label.
    assert labels.pop("batch.kubernetes.io/job-completion-index") == "0"
    job = documents("kubernetes.yaml")["Job"]
    assert labels == job["spec"]["template"]["metadata"]["labels"]


def test_the_service_names_pods_that_only_just_start():
    objects = documents("kubernetes.yaml")
    service, template = objects["Service"]["spec"], objects["Job"]["spec"]["template"]
    assert service["clusterIP"] == "None"  # headless; YAML's None is a string
    assert service["publishNotReadyAddresses"] is True
    assert service["selector"].items() <= template["metadata"]["labels"].items()
    [port] = service["ports"]
    [container] = template["spec"]["containers"]
    [container_port] = container["ports"]
    assert port["port"] == container_port["containerPort"] == PORT


def test_only_pods_of_the_indexed_job_reach_each_other():
    objects = documents("kubernetes.yaml")
    labels = objects["Job"]["spec"]["template"]["metadata"]["labels"]
    assert objects["Service"]["spec"]["selector"] == labels
    assert_admits_only(objects["NetworkPolicy"], labels)


def test_the_volume_of_the_job_is_one_that_many_write_to():
    objects = documents("kubernetes.yaml")
    claim = objects["PersistentVolumeClaim"]
    [volume] = objects["Job"]["spec"]["template"]["spec"]["volumes"]
    name = volume["persistentVolumeClaim"]["claimName"]
    assert name == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["spec"]["resources"]["requests"]["storage"]


# Kubeflow


def kubeflow_tasks(job):
    """Returns the arguments and the TF_CONFIG that the operator gives to each task."""
    replicas = job["spec"]["tfReplicaSpecs"]
    name = job["metadata"]["name"]
    jobs = {
        kind.lower(): [
            f"{name}-{kind.lower()}-{i}.default.svc:{PORT}"
            for i in range(spec["replicas"])
        ]
        for kind, spec in replicas.items()
    }
    for kind, spec in replicas.items():
        [container] = spec["template"]["spec"]["containers"]
        for index in range(spec["replicas"]):
            task = {"type": kind.lower(), "index": index}
            config = {"cluster": jobs, "task": task, "environment": "cloud"}
            yield container["args"], {"TF_CONFIG": json.dumps(config)}


def test_the_tfjob_gives_every_task_its_place():
    job = documents("kubeflow.yaml")["TFJob"]
    found = [discovered(*task) for task in kubeflow_tasks(job)]
    assert_ranks(found, 3)
    assert found[0].address.startswith("distfit-chief-0")


def test_the_tfjob_has_what_the_operator_looks_for():
    spec = documents("kubeflow.yaml")["TFJob"]["spec"]
    assert set(spec) == {"runPolicy", "tfReplicaSpecs"}
    assert spec["runPolicy"] == {"cleanPodPolicy": "Running", "backoffLimit": 0}
    assert set(spec["tfReplicaSpecs"]) == {"Chief", "Worker"}
    for replica in spec["tfReplicaSpecs"].values():
        assert set(replica) == {"replicas", "restartPolicy", "template"}
        assert replica["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
        pod = replica["template"]["spec"]
        [container] = pod["containers"]
        assert container["name"] == "tensorflow"
        assert container["ports"] == [{"name": "tfjob-port", "containerPort": PORT}]
        assert_runs_in_the_working_folder(pod, flags.parse(container["args"]))


def test_only_pods_of_the_tfjob_reach_each_other():
    objects = documents("kubeflow.yaml")
    name = objects["TFJob"]["metadata"]["name"]
    labels = {"training.kubeflow.org/job-name": name}
    assert_admits_only(objects["NetworkPolicy"], labels)


# Docker compose


SERVICE_FIELDS = {  # those of the Compose specification that the file may use
    "build": str,
    "image": str,
    "command": list,
    "environment": dict,
    "networks": list,
    "volumes": list,
    "stop_grace_period": str,
}


@pytest.fixture
def compose():
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


def test_the_compose_file_has_the_fields_of_its_specification(compose):
    top = {name for name in compose if not name.startswith("x-")}
    assert top == {"name", "services", "networks"}
    for service in compose["services"].values():
        assert set(service) == set(SERVICE_FIELDS)
        for name, value in service.items():
            assert isinstance(value, SERVICE_FIELDS[name]), name
        assert all(isinstance(text, str) for text in service["environment"].values())
        assert (FOLDER / service["build"] / "Dockerfile").is_file()
        [volume] = service["volumes"]
        source, target = volume.split(":")
        assert (FOLDER / source).resolve() == ROOT / "runs"
        workdir = flags.parse(service["command"]).settings["workdir"]
        assert workdir.startswith(f"{target}/")


def test_the_services_are_the_workers_of_one_cluster(compose):
    services = compose["services"]
    found = [discovered(s["command"], s["environment"]) for s in services.values()]
    assert_ranks(found, len(services))
    hosts = [address.partition(":")[0] for address in found[0].workers]
    assert hosts == list(services)  # the network knows services by name


def test_nobody_outside_reaches_the_services(compose):
    assert compose["networks"] == {"workers": {"internal": True}}
    for service in compose["services"].values():
        assert service["networks"] == ["workers"]
        assert "ports" not in service


# Slurm


@pytest.fixture
def script():
    return FOLDER / "slurm.sbatch"


def sbatch_options(text):
    """Returns the #SBATCH options, read as sbatch would."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    for name in ("job-name", "output", "time"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--open-mode", choices=["append", "truncate"])
    parser.add_argument("--signal", required=True)
    parser.add_argument("--requeue", action="store_true")
    for name in ("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task"):
        parser.add_argument(f"--{name}", type=int, required=True)
    # sbatch stops looking at the first line that is neither a comment nor empty.
    head = re.split(r"^(?!#|\s*$)", text, maxsplit=1, flags=re.MULTILINE)[0]
    lines = re.findall(r"^#SBATCH (.*)$", head, flags=re.MULTILINE)
    assert len(lines) == text.count("#SBATCH")
    return parser.parse_args(shlex.split(" ".join(lines)))


def test_the_batch_script_is_bash(script):
    assert script.read_text().startswith("#!/bin/bash\n")
    subprocess.run(["bash", "-n", script], check=True)


def test_the_options_of_the_batch_script_are_those_of_sbatch(script):
    options = sbatch_options(script.read_text())
    assert re.fullmatch(r"\d\d:\d\d:\d\d", options.time)
    assert options.signal == "USR1@120" and options.requeue  # to the tasks, not to bash
    assert options.gpus_per_node % options.ntasks_per_node == 0


def test_tasks_of_the_batch_script_find_their_cluster(script, tmp_path):
    options = sbatch_options(script.read_text())
    command = run_with_a_false_srun(script, tmp_path, ["--epochs=2"])
    place = command.index("python")
    assert "--kill-on-bad-exit=1" in command[:place]
    assert f"--cpus-per-task={options.cpus_per_task}" in command[:place]
    assert command[place : place + 3] == ["python", "-m", "launch"]
    arguments = command[place + 3 :]
    assert flags.parse(arguments).settings == {
        "strategy": "multi_worker",
        "workdir": "runs/slurm-42",
        "epochs": 2,
    }
    found = [discovered(arguments, task) for task in slurm_tasks(options)]
    assert_ranks(found, options.nodes * options.ntasks_per_node)
    assert [one.gpus for one in found] == ["0", "1", "2", "3"] * options.nodes


def run_with_a_false_srun(script, folder, arguments):
    """Runs the script and returns what it would have started with srun."""
    false = folder / "srun"
    false.write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
    false.chmod(0o755)
    environ = {
        "PATH": f"{folder}:/usr/bin:/bin",
        "SLURM_JOB_ID": "42",
        "SLURM_CPUS_PER_TASK": str(sbatch_options(script.read_text()).cpus_per_task),
    }
    done = subprocess.run(
        ["bash", script, *arguments], env=environ, capture_output=True, check=True
    )
    return done.stdout.decode().split("\0")[:-1]


def slurm_tasks(options):
    """Returns the environment of each task of the step."""
    nodes, per_node = options.nodes, options.ntasks_per_node
    step = {
        "SLURM_JOB_ID": "42",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(nodes * per_node),
        "SLURM_STEP_NODELIST": f"gpu[001-{nodes:03}]",
        "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{nodes})",
        "SLURM_DISTRIBUTION": "block",
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(options.gpus_per_node))),
    }
    for rank in range(nodes * per_node):
        local = rank % per_node
        yield {**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local)}
