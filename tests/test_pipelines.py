"""Data go on from any place of any pipeline with the batches that were left."""

import json
import re

import pytest
import tensorflow as tf
from breadth import examples
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from distfit.training.global_batches import GlobalBatches

EPOCHS = 3

sizes, seeds = st.integers(1, 9), st.integers(0, 3)
STAGES = st.one_of(
    st.tuples(st.just("shuffle"), st.integers(1, 30), seeds),
    st.tuples(st.just("shuffle once"), st.integers(1, 30), seeds),
    st.tuples(st.just("repeat"), st.integers(1, 3)),
    st.tuples(st.sampled_from(["take", "skip", "shard", "prefetch", "window"]), sizes),
    st.tuples(st.sampled_from(["map", "parallel map", "filter", "cache", "zip"])),
    st.tuples(st.sampled_from(["flat_map", "interleave", "rebatch", "concatenate"])),
)


def _with(dataset, stage):
    match stage:
        case "shuffle", size, seed:
            return dataset.shuffle(size, seed=seed)
        case "shuffle once", size, seed:
            return dataset.shuffle(size, seed=seed, reshuffle_each_iteration=False)
        case "repeat" | "take" | "skip" | "prefetch" as name, number:
            return getattr(dataset, name)(number)
        case "shard", number:
            return dataset.shard(number, number - 1)
        case "window", size:
            return dataset.window(size).flat_map(lambda rows: rows)
        case ("map",):
            return dataset.map(lambda x: x + 100)
        case ("parallel map",):
            return dataset.map(lambda x: x + 10, num_parallel_calls=2)
        case ("filter",):
            return dataset.filter(lambda x: x % 5 != 1)
        case ("cache",):
            return dataset.cache()
        case ("zip",):
            return tf.data.Dataset.zip(dataset, dataset).map(lambda x, y: x + y)
        case ("flat_map",):
            return dataset.flat_map(lambda x: tf.data.Dataset.from_tensors(x).repeat(2))
        case ("interleave",):
            return dataset.interleave(
                lambda x: tf.data.Dataset.range(x, x + 2),
                cycle_length=3,
                num_parallel_calls=2,
            )
        case ("rebatch",):
            return dataset.batch(3).prefetch(1).unbatch()
        case ("concatenate",):
            return dataset.concatenate(dataset)
    raise AssertionError(stage)


def _made(stages, endless, steps):
    dataset = tf.data.Dataset.range(11)
    for stage in stages:
        dataset = _with(dataset, stage)
    if endless:
        dataset = dataset.repeat()
    data = GlobalBatches(dataset.batch(4), steps_per_epoch=steps)
    data.take_notes()
    return data


def _read(data, epoch, step, places):
    """The batches from a place on, by epoch and step; their places are noted."""
    found = {}
    for number in range(epoch, EPOCHS):
        total = data.go_on_with_epoch() if step else data.start_epoch()
        while (total is None or step < total) and data.has_next():
            batch = data.take_next().get_value()
            data.put_next(None)
            found[number, step] = batch.numpy().tolist()
            step += 1
            data.ran(step)
            more = (total is None or step < total) and data.has_next()
            if more:
                places[number, step] = _place(data)
        data.end_epoch(step)
        step = 0
        places[number + 1, 0] = _place(data)
    data.release()
    return found


def _place(data):
    return json.loads(json.dumps(data.position())), data.iterator_place()


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@settings(max_examples=examples(40, 1000))
@given(st.lists(STAGES, max_size=4), st.booleans(), st.data())
def test_data_go_on_from_any_place(stages, endless, draw):
    steps = (
        draw.draw(st.integers(1, 4)) if endless or draw.draw(st.booleans()) else None
    )
    places = {}
    try:
        data = _made(stages, endless, steps)
        data.restart()
        whole = _read(data, 0, 0, places)
    except (ValueError, tf.errors.InvalidArgumentError) as error:
        assert re.search("no batch at all|does not have a value", str(error))
        reject()  # A pass has no rows, or would go on endlessly without any.
    place = draw.draw(st.sampled_from(sorted(places)))
    data = _made(stages, endless, steps)
    data.move_to(*places[place])
    rest = _read(data, *place, {})
    assert rest == {key: batch for key, batch in whole.items() if key >= place}
