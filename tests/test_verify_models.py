"""The reference models match one device on any number of replicas."""

import keras
import pytest
from breadth import pick
from test_global_models import SMALL

import distfit
from distfit import datasets, models

pytestmark = pytest.mark.slow

ROWS, BATCH = 27, 9

# test_models.py, test_global_models.py and tests/programs have what the others do.
FEW = ["distillation"]


@pytest.mark.parametrize("name", pick(FEW, models.NAMES))
def test_reference_model_is_that_of_one_device(name):
    module = models.get(name)
    config = module.get_config()
    config.update(SMALL.get(name, {}))
    load = getattr(module, "data", lambda c: datasets.load(c.dataset, c))
    train, _ = load(config)
    report = distfit.verify(
        lambda: module.build(config),
        keras.tree.map_structure(lambda array: array[:ROWS], train),
        batch_size=BATCH,
        replicas=pick([4], [1, 2, 4, 8]),
    )
    assert report.ok, str(report)
    assert report.problems == []
