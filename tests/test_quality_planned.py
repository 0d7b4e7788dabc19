"""The planned rows of benchmarks/quality.py, on a small random model."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import quality_methods
import quality_planned


class Small:
    """Random weights, the last block's outputs all but switched off: it need not be kept."""

    name = "small"
    exclude: tuple[str, ...] = ()
    output = None

    def __init__(self) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 200}
        config = BertConfig(num_hidden_layers=2, num_attention_heads=4, **sizes)
        self.model = BertModel(config, add_pooling_layer=False).eval()
        for name, parameter in self.model.named_parameters():
            if name.startswith("encoder") and parameter.dim() == 2:
                parameter.data.mul_(1e-3 if name.startswith("encoder.layer.1") else 3)

    def layers(self, model: nn.Module) -> list[str]:
        return [n for n, m in model.named_modules() if "layer" in n and hasattr(m, "in_features")]

    def calibration(self, seed: int) -> list[dict[str, torch.Tensor]]:
        torch.manual_seed(seed)
        return [{"input_ids": torch.randint(0, 200, (8, 32))} for _ in range(4)]

    def planning(self, seed: int) -> list[dict[str, torch.Tensor]]:
        return self.calibration(seed)

    def tokens(self, batches: list[dict[str, torch.Tensor]]) -> int:
        return sum(batch["input_ids"].numel() for batch in batches)

    def lost(self, model: nn.Module) -> float:
        ids = self.calibration(7)[0]["input_ids"]
        with torch.no_grad():
            wanted, got = (m(ids).last_hidden_state for m in (self.model, model))
        return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("planned", "uniform"),
    [
        ("learned sketch, planned", "learned sketch"),
        (
            "activation-aware SVD, outputs weighed, planned",
            "activation-aware SVD, outputs weighed",
        ),
    ],
)
def test_a_plan_spends_no_more_and_loses_less(tmp_path, monkeypatch, planned, uniform):
    monkeypatch.setattr(quality_planned, "DIRECTORY", tmp_path)
    subject, lost = Small(), {}
    dense = quality_methods.held(subject.model, subject)
    for method in (planned, uniform):
        model = copy.deepcopy(subject.model)
        left = quality_methods.METHODS[method](model, subject, 2, 0)
        assert left <= dense / 2
        lost[method] = subject.lost(model)
        if "sketch" in method:
            assert left == quality_methods.held(model, subject)
    # what is all but switched off leaves nearly the whole budget to the first block
    assert lost[planned] < 0.8 * lost[uniform]
    kept = quality_planned.planned(subject, 2, 0)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}
    assert kept.fraction <= 0.5


def test_errors_of_the_svd_are_those_on_held_out_rows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    batches = [torch.randn(40, 24, dtype=torch.float64) for _ in range(4)]
    found = quality_planned.calibrate(
        model, batches, names=["0.weight"], held_out=True, weigh_outputs=True, progress=False
    )["0.weight"]
    weight = model[0].weight.detach()
    errors = quality_planned.svd_errors(weight, found, True, [2, 5, 15])
    assert errors == sorted(errors, reverse=True)
    kept, unseen = torch.cat(batches[:3]), batches[3]
    target = quality_planned.Target.of(found.without_held_out(), True, weight.device)
    rows = quality_planned.weighed_rows([weight], [found.gradients], target)
    moment = quality_planned.baselines.damped(kept.T.cov(correction=0))
    approximation = quality_planned.baselines.weighed_svd(weight, moment, 5, rows)
    x = unseen - unseen.mean(0)
    wanted, got = x @ weight.T, x @ approximation.T
    assert errors[1] == pytest.approx(float((wanted - got).norm() / wanted.norm()), rel=1e-6)
