"""Many small models of one architecture, trained as one batched model.

Example:
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> models = torchmb.BatchModule(net, seeds=range(100))
    >>> optimizer = torch.optim.SGD(models.parameters(), lr=0.1)
    >>> x, classes = torch.randn(32, 4), torch.randint(2, (32,))
    >>> loss = torchmb.batch_loss(models(torchmb.shared(x)), torchmb.shared(classes))
    >>> loss.shape
    torch.Size([100])
    >>> loss.sum().backward()
    >>> optimizer.step()
"""

from .base import AbstractBatchModule, inner_batch_size, merge_batch, register_batch_module, split_batch
from .batch_module import BatchModule
from .check import check
from .functional import batch_accuracy, batch_loss, batch_topk, clip_grad_norm_, per_model_lr
from .layers import (
    BatchBatchNorm1d,
    BatchBatchNorm2d,
    BatchBatchNorm3d,
    BatchConv1d,
    BatchConv2d,
    BatchConv3d,
    BatchConvTranspose1d,
    BatchConvTranspose2d,
    BatchConvTranspose3d,
    BatchEmbedding,
    BatchGroupNorm,
    BatchLayerNorm,
    BatchLinear,
)
from .shared import shared

__all__ = [
    "AbstractBatchModule",
    "BatchBatchNorm1d",
    "BatchBatchNorm2d",
    "BatchBatchNorm3d",
    "BatchConv1d",
    "BatchConv2d",
    "BatchConv3d",
    "BatchConvTranspose1d",
    "BatchConvTranspose2d",
    "BatchConvTranspose3d",
    "BatchEmbedding",
    "BatchGroupNorm",
    "BatchLayerNorm",
    "BatchLinear",
    "BatchModule",
    "batch_accuracy",
    "batch_loss",
    "batch_topk",
    "check",
    "clip_grad_norm_",
    "inner_batch_size",
    "merge_batch",
    "per_model_lr",
    "register_batch_module",
    "shared",
    "split_batch",
]
