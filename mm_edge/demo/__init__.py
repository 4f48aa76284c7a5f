"""The network and the images of `mm-edge demo`, which benchmarks/train_demo.py made.

MODEL is a folder in the form timm reads (config.json, model.safetensors); IMAGES is a tar of class folders, images of
Fashion-MNIST's test set, which the network was not trained on. NOTICE.md holds their licences.
"""

from __future__ import annotations

from pathlib import Path

MODEL = Path(__file__).parent / "model"
IMAGES = Path(__file__).parent / "images.tar"
