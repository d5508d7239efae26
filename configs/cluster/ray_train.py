"""distfit under Ray Train: two workers on this machine, each an actor of Ray.

    pip install -c constraints.txt -e '.[ray]'
    python configs/cluster/ray_train.py

Ray sets TF_CONFIG in its workers, where `create_strategy("multi_worker")` reads it.
The rest is as without Ray: build in scope, and fit() with the global batch size.
Stock Keras 3 fails in that fit() (github.com/ray-project/ray/issues/47464).

Each worker's TensorFlow listens on all network interfaces without a password: anyone
who reaches its port can run code in the worker. So run it where nobody else can.

Measured with Ray 2.60: loss 7.1581, 6.5169, 5.8986, as on one device, in 73 seconds
on 2 CPU cores that were also busy with other work, 30 of them to start Ray.
"""

import os

# Ray reads these when it is imported. The first turns off usage reports. The second
# keeps its ports on the loopback interface, since anyone who reaches one can run code
# here. Remove it to join more machines by ray.init(address=...), on a closed network.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import ray
import ray.train
from ray.train.tensorflow import TensorflowTrainer

WORKERS = 2


def train(config: dict) -> list[float]:
    """Trains as one of the workers and returns the loss of each epoch."""
    # Not above: the process that only waits for the workers needs no TensorFlow.
    import keras
    import numpy as np

    import distfit

    strategy = distfit.create_strategy(config["strategy"])
    keras.utils.set_random_seed(1)
    x = np.random.normal(size=(1001, 8)).astype("float32")
    with strategy.scope():
        inputs = keras.Input((8,))
        hidden = keras.layers.Dense(16, activation="tanh")(inputs)
        model = distfit.Model(inputs, keras.layers.Dense(1)(hidden))
        model.compile("adam", "mse")
    targets = x.sum(axis=1, keepdims=True)
    history = model.fit(x, targets, batch_size=64, epochs=3, verbose=0)
    distfit.wait_for_all(strategy)
    return history.history["loss"]


def main() -> None:
    ray.init(num_cpus=WORKERS, include_dashboard=False)
    trainer = TensorflowTrainer(
        train,
        train_loop_config={"strategy": "multi_worker"},
        scaling_config=ray.train.ScalingConfig(num_workers=WORKERS),
        run_config=ray.train.RunConfig(storage_path=os.path.abspath("runs/ray")),
    )
    print("loss by epoch:", trainer.fit().return_value)


if __name__ == "__main__":
    main()
