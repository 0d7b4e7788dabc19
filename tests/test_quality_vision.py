"""The images that benchmarks/quality_vision.py reads."""

import gzip
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import quality_vision

from ss1_compile.errors import MissingPackageError


def test_images_and_labels_are_those_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(quality_vision, "IMAGES", tmp_path)
    with pytest.raises(MissingPackageError, match="dataset-fashion-mnist"):
        quality_vision.read_images("train")
    torch.manual_seed(0)
    images = torch.randint(256, (5, 28, 28), dtype=torch.uint8)
    labels = torch.randint(10, (5,))
    for kind, head, data in (("images-idx3", 16, images), ("labels-idx1", 8, labels.byte())):
        path = tmp_path / f"train-{kind}-ubyte.gz"
        path.write_bytes(gzip.compress(bytes(head) + data.numpy().tobytes()))
    found = quality_vision.read_images("train")
    assert torch.equal(found[0], images)
    assert torch.equal(found[1], labels)
    assert found[1].dtype == torch.int64
