"""Graphs that are placed for each replica, which share what is the same."""

import collections

import numpy as np
import pytest
import tensorflow as tf

from distfit._keras import graphs
from distfit._keras.templates import Template

DEVICES = ["CPU:0", "CPU:1"]


def template(function):
    """The template of a function of two scalars, whose results are its outputs."""
    spec = (tf.TensorSpec(()), tf.TensorSpec(()))
    graph = graphs.trace(lambda given: tf.nest.flatten(function(*given)), spec)
    return Template(graph, graph.inputs, graph.outputs)


def placed(made):
    """The results of a template on two devices, and their graph."""

    @tf.function(autograph=False)
    def run():
        given = [[tf.constant(a), tf.constant(b)] for a, b in ((2.0, 3.0), (4.0, 5.0))]
        return made.place(given, DEVICES)

    concrete = run.get_concrete_function()
    return tf.nest.map_structure(np.asarray, run()), concrete.graph


def types(graph):
    return collections.Counter(op.type for op in graph.get_operations())


def test_each_device_computes_with_what_it_is_given():
    results, graph = placed(template(lambda a, b: (a * b, a, tf.constant(7.0))))
    assert results == [[6, 2, 7], [20, 4, 7]]
    found = {op.device for op in graph.get_operations() if op.type == "Mul"}
    assert found == {"/device:CPU:0", "/device:CPU:1"}


def test_what_is_computed_twice_is_merged_and_what_nobody_needs_is_left_out():
    def function(a, b):
        tf.exp(a)
        return tf.sin(a + 1.0) * tf.sin(a + 1.0), tf.sin(b + 1.0)

    results, graph = placed(template(function))
    np.testing.assert_allclose(results[0], [np.sin(3) ** 2, np.sin(4)], rtol=1e-6)
    found = types(graph)
    assert "Exp" not in found
    assert found["Sin"] == found["AddV2"] == 2 * len(DEVICES)


def test_draws_and_effects_are_never_merged_or_left_out():
    counter = tf.Variable(0.0)

    def function(a, b):
        counter.assign_add(a)
        counter.assign_add(a)
        return tf.random.uniform(()), tf.random.uniform(())

    made = template(function)

    @tf.function(autograph=False)
    def run():
        given = [tf.constant(2.0), tf.constant(3.0), counter.handle]
        return made.place([given], DEVICES[:1])[0]

    first, second = run()
    assert first != second
    assert counter.numpy() == 4


def test_what_is_taken_from_outside_must_be_given():
    variable = tf.Variable(1.0)
    spec = (tf.TensorSpec(()),)
    graph = graphs.trace(lambda given: given[0] * variable, spec)
    with pytest.raises(AssertionError, match="captures unfed tensors"):
        Template(graph, graph.inputs[:1], graph.outputs)
