"""The user's own training loss (--loss FILE.py:CALLABLE), whose gradient the signals gradient and product score by.

    def masks(outputs, batch):               # FILE.py, given as --loss FILE.py:masks
        wanted = read_masks(batch.names)     # the names of the photos; batch.inputs and batch.labels are there too
        return functional.cross_entropy(outputs, wanted, reduction="sum")

A loss is called with what the module returned for a batch, and the batch. It returns a tensor of one number that
gradients can be taken of: the sum over the images, so that every image counts alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mm_edge.errors import UsageError, first_line
from mm_edge.load.data import ImageSet
from mm_edge.load.user_code import import_stated
from mm_edge.plan.scores import Inputs, Loss
from mm_edge.run.options import type_name


@dataclass(frozen=True)
class LossBatch:
    """What the outputs belong to.

    Attributes:
        inputs: what the module was given, (images, channels, height, width); a tuple for several inputs.
        labels: class indices (images,); None for images without labels.
        names: the names of the photos: their paths inside the data, or numbers of ready inputs.
    """

    inputs: Inputs
    labels: torch.Tensor | None
    names: tuple[str, ...]


@dataclass(frozen=True)
class UserLoss:
    """A loss of the user.

    Attributes:
        code: FILE.py:CALLABLE as it was given.
        function: takes the outputs and a LossBatch, and returns a tensor of one number.
        digest: the hash of the file.
    """

    code: str
    function: Callable[[Any, LossBatch], Any]
    digest: str

    def on(self, images: ImageSet) -> Loss:
        """Return the loss for batches of `images` in their order.

        Calling it raises UsageError where the user's code raises or returns no number that gradients can be taken of.
        """

        def loss(outputs: object, inputs: Inputs, labels: torch.Tensor | None, before: int) -> torch.Tensor:
            count = len(inputs[0] if isinstance(inputs, tuple) else inputs)
            # Images found unreadable so far are left out of the names, as they are of the batches.
            return self._call(outputs, LossBatch(inputs, labels, images.names[before : before + count]))

        return loss

    def _call(self, outputs: object, batch: LossBatch) -> torch.Tensor:
        try:
            found = self.function(outputs, batch)
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise UsageError(f"--loss {self.code} failed: {first_line(error)}") from error
        if not isinstance(found, torch.Tensor):
            raise UsageError(f"--loss {self.code} returned {type_name(found)}; {_ALLOWED}")
        if found.numel() != 1 or not found.requires_grad:
            kind = "without a gradient" if found.numel() == 1 else f"of shape {tuple(found.shape)}"
            raise UsageError(f"--loss {self.code} returned a tensor {kind}; {_ALLOWED}")
        if not bool(torch.isfinite(found)):
            raise UsageError(f"--loss {self.code} returned {float(found.detach())}; {_ALLOWED}")
        return found.reshape(())


_ALLOWED = "return the sum of the images' losses, a tensor of one finite number computed from the outputs"


def open_loss(code: str) -> UserLoss:
    """Import the loss FILE.py:CALLABLE, which runs the file.

    Raises:
        UsageError: `code` is not written so, the file cannot be imported, or it has no such callable.
    """
    return UserLoss(code, *import_stated(code, "--loss", "train.py:loss"))
