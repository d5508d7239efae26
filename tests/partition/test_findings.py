"""What every replica computes in full: counted, merged by line, put into one line."""

import pytest
import tensorflow as tf

from distfit._keras import graphs
from distfit.partition.findings import (
    Finding,
    InFull,
    elements_of,
    merged,
    not_partitioned,
    percent,
)
from distfit.partition.tracing import Flat


def nodes_of(function, *shape):
    graph = graphs.trace(function, tf.TensorSpec(shape, tf.float32))
    return {node.type: node for node in Flat(graph).nodes}


def test_an_operation_counts_what_it_reads_or_writes_whichever_is_more():
    nodes = nodes_of(lambda x: tf.reduce_sum(tf.tile(x, [4, 1])), 5, 3)
    assert elements_of(nodes["Tile"]) == 60
    assert elements_of(nodes["Sum"]) == 60 + 2  # And the axes.


def test_an_open_size_counts_as_some_rows():
    nodes = nodes_of(tf.nn.relu, None, 3)
    assert elements_of(nodes["Relu"]) == 32 * 3


def test_findings_of_a_line_are_merged_the_largest_first():
    findings = [
        Finding("Sort", "a.py:1  sort(x)", 10),
        Finding("Svd", "a.py:2  svd(x)", 50),
        Finding("Sort", "a.py:1  sort(x)", 20),
    ]
    assert merged(findings, 200) == [
        InFull("Svd", "a.py:2  svd(x)", 0.25),
        InFull("Sort", "a.py:1  sort(x)", 0.15),
    ]


def test_shares_are_never_more_than_the_step():
    (entry,) = merged([Finding("While", "a.py:1", 300)], 200)
    assert entry.share == 1


def test_one_line_says_what_is_not_partitioned():
    findings = [Finding("Svd", "a.py:2  svd(x)", 50), Finding("Sort", "a.py:1", 10)]
    text = not_partitioned(findings, 200)
    assert "30 % of the step is computed in full on every replica" in text
    assert "Svd at a.py:2  svd(x) and 1 other." in text
    assert "\n" not in text


@pytest.mark.parametrize("findings", [[], [Finding("Svd", "a.py:2", 1)]])
def test_a_trifle_is_not_worth_a_word(findings):
    assert not_partitioned(findings, 200) is None


def test_shares_as_text():
    assert [percent(s) for s in (1, 0.256, 0.001)] == ["100 %", "26 %", "under 1 %"]
