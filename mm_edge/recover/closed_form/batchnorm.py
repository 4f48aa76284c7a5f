"""BatchNorm re-estimation: the running statistics of a pruned network, measured anew on calibration images.

    mean = sum_b mean_b / B,   var = sum_b var_b / B          over B batches (PyTorch's cumulative average)

Pruning changes what every BatchNorm reads, so that its old statistics shift and scale the features wrongly. Weights
are not touched, so masks hold.

torch.optim.swa_utils.update_bn computes the same averages, but it puts the whole module into training mode: dropout
and stochastic depth would then disturb the statistics.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def has_batch_norm(module: nn.Module) -> bool:
    """Return whether `module` has running statistics to re-estimate."""
    return any(isinstance(part, _BatchNorm) and part.running_mean is not None for part in module.modules())


def reestimate_batch_norm_(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the running statistics of `module`, in place, by those of `batches` (N, C, H, W).

    A batch of one image is left out, because it has no variance where a map has one position. The module is left in
    eval mode.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]
    momenta = [part.momentum for part in norms]
    module.eval()
    for part in norms:
        part.reset_running_stats()
        part.momentum = None
        part.train()
    try:
        with torch.no_grad():
            for images in batches:
                if len(images) > 1:
                    module(images)
    finally:
        for part, momentum in zip(norms, momenta, strict=True):
            part.momentum = momentum
        module.eval()
