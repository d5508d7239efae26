"""A hand-written loop in PyTorch: DistributedDataParallel over gloo.

It uses what is fast: tensors cut into batches instead of a DataLoader, and fused Adam.
Layers are initialised as in Keras. A worker alone uses the plain model.
"""

import json
import os

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


def prepare(workload, strategy, fused):
    torch.set_num_threads(1)
    rank, size = _join()
    batches = _batches(workload, rank, size)
    build, loss_fn, metric_name, metric_fn = _PARTS[workload.name]
    model = build().apply(_start_as_keras)
    if size > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-7, fused=True)

    def step(x, y):
        optimizer.zero_grad()
        y_pred = model(x)
        loss = loss_fn(y_pred, y)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            return torch.stack([loss, metric_fn(y_pred, y)])

    def train():
        sums = torch.zeros(2)
        for _ in range(workload.epoch_steps):
            sums += step(*next(batches))
        if size > 1:
            distributed.all_reduce(sums)
        loss, metric = (sums / (workload.epoch_steps * size)).tolist()
        return {"loss": loss, metric_name: metric}

    return train


def _join() -> tuple[int, int]:
    """Joins the workers that TF_CONFIG lists; returns this one's rank, and how many."""
    config = json.loads(os.environ.get("TF_CONFIG") or "null")
    if config is None:
        return 0, 1
    workers = config["cluster"]["worker"]
    rank = config["task"]["index"]
    if not distributed.is_initialized():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        distributed.init_process_group(
            "gloo",
            init_method=f"tcp://{workers[0]}",
            rank=rank,
            world_size=len(workers),
        )
    return rank, len(workers)


def _batches(workload, rank: int, size: int):
    """This worker's rows of the global batches, endlessly."""
    x, y = workload.arrays()
    if x.ndim == 4:
        x = x.transpose(0, 3, 1, 2)  # Channels come first.
    rows = workload.batch_size // size
    starts = range(
        rank * rows, len(x) - workload.batch_size + 1 + rank * rows, workload.batch_size
    )
    x, y = torch.from_numpy(x).contiguous(), torch.from_numpy(y)
    if y.dtype == torch.int32:
        y = y.long()
    while True:
        for start in starts:
            yield x[start : start + rows], y[start : start + rows]


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))


def _cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for channels, filters in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 7 * 7, 10))


def _start_as_keras(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)


def _absolute_error(y_pred, y):
    return (y_pred - y).abs().mean()


def _accuracy(y_pred, y):
    return (y_pred.argmax(1) == y).float().mean()


_PARTS = {
    "mlp": (_mlp, nn.functional.mse_loss, "mae", _absolute_error),
    "cnn": (_cnn, nn.functional.cross_entropy, "accuracy", _accuracy),
}
