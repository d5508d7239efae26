"""The example for Ray Train, with a real Ray, where the extra `ray` is installed."""

import json
import pathlib
import subprocess
import sys
import tempfile

import job
import marked
import pytest

pytestmark = pytest.mark.integration

EXAMPLE = job.ROOT / "configs" / "cluster" / "ray_train.py"
SECONDS = 180  # a hard limit; half a minute on an idle machine
ONE_DEVICE = (
    "import json, ray_train; print(json.dumps(ray_train.train({'strategy': 'auto'})))"
)


@pytest.fixture
def python(tmp_path):
    """`python(*arguments)` returns what it prints; leaves no process."""
    pytest.importorskip("ray", reason="needs the extra ray: pip install -e '.[ray]'")
    path = {"PYTHONPATH": f"{job.ROOT}:{EXAMPLE.parent}"}
    # In a folder of pytest's, the names of Ray's sockets would be too long.
    with tempfile.TemporaryDirectory(prefix="ray-") as sockets:
        variables = {**job.variables(), **path, "RAY_TMPDIR": sockets}
        with marked.environment(**variables) as environ:
            yield lambda *arguments: _run(arguments, tmp_path, environ)


def _run(arguments: tuple[str, ...], folder: pathlib.Path, environ: dict) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert result.returncode == 0, result.stderr
    assert not marked.left(environ, within=10)
    return result.stdout


def _losses(output: str) -> list[float]:
    (line,) = [x for x in output.splitlines() if x.startswith(("loss by epoch:", "["))]
    return json.loads(line.removeprefix("loss by epoch:"))


def test_workers_of_ray_train_to_the_numbers_of_one_device(python):
    several = _losses(python(str(EXAMPLE)))
    one = _losses(python("-c", ONE_DEVICE))
    assert len(one) == 3 and one[-1] < one[0]
    assert several == pytest.approx(one, rel=1e-5)
