"""`fit` of distfit."""

import distfit
from benchmarks.contenders import guide


def prepare(workload, strategy, fused):
    return guide.prepare(distfit.Model, workload, strategy, fused)
