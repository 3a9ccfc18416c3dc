"""Run diffusers' `train_dreambooth_lora_flux_advanced.py` as it stands, also where torchvision cannot be imported.

    python tools/bench/reference.py SCRIPT [its own arguments]

The script takes five transforms from torchvision; where that does not import beside the torch that is here, these do
the same with PIL. They run once per picture, when the data set is opened, so they change nothing that is timed.
"""

from __future__ import annotations

import random
import runpy
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any


class Compose:
    def __init__(self, parts: Sequence[Callable[[Any], Any]]) -> None:
        self.parts = parts

    def __call__(self, image: Any) -> Any:
        for part in self.parts:
            image = part(image)
        return image


class Resize:
    def __init__(self, size: int, interpolation: Any = None) -> None:
        self.size, self.interpolation = size, interpolation

    def __call__(self, image: Any) -> Any:
        scale = self.size / min(image.size)
        return image.resize(tuple(max(self.size, round(side * scale)) for side in image.size), self.interpolation)


class CenterCrop:
    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Any) -> Any:
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))


class RandomCrop(CenterCrop):
    @staticmethod
    def get_params(image: Any, size: tuple[int, int]) -> tuple[int, int, int, int]:
        high, wide = size
        return random.randint(0, image.height - high), random.randint(0, image.width - wide), high, wide


class RandomHorizontalFlip:
    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Any) -> Any:
        from PIL import ImageOps

        return ImageOps.mirror(image) if random.random() < self.p else image


class ToTensor:
    def __call__(self, image: Any) -> Any:
        import numpy as np
        import torch

        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


class Normalize:
    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = mean[0], std[0]

    def __call__(self, tensor: Any) -> Any:
        return (tensor - self.mean) / self.std


def crop(image: Any, top: int, left: int, height: int, width: int) -> Any:
    return image.crop((left, top, left + width, top + height))


def stand_in() -> None:
    from PIL import Image

    modes = {name: getattr(Image.Resampling, name) for name in ("BILINEAR", "BICUBIC", "LANCZOS", "NEAREST")}
    kinds = (Compose, Resize, CenterCrop, RandomCrop, RandomHorizontalFlip, ToTensor, Normalize)
    torchvision, transforms = types.ModuleType("torchvision"), types.ModuleType("torchvision.transforms")
    functional = types.ModuleType("torchvision.transforms.functional")
    functional.crop = crop  # type: ignore[attr-defined]
    transforms.functional, transforms.InterpolationMode = functional, types.SimpleNamespace(**modes)  # type: ignore[attr-defined]
    for kind in kinds:
        setattr(transforms, kind.__name__, kind)
    torchvision.transforms = transforms  # type: ignore[attr-defined]
    for module in (torchvision, transforms, functional):
        sys.modules[module.__name__] = module


def main() -> None:
    import diffusers
    import transformers

    libraries = [diffusers, transformers]
    if "--dataset_name" in sys.argv:  # then the script imports it itself
        import datasets

        libraries.append(datasets)
    for library in libraries:  # they look for torchvision while they are imported, and shall not find this one
        assert library.__version__
    try:
        import torchvision.transforms  # noqa: F401
    except (ImportError, RuntimeError):
        stand_in()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
