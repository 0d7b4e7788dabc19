"""Second moments of the gradients that layers send back to their inputs."""

import copy
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from statistics_support import Attention, Conv1D
from torch import nn

from ss1_compile import SS1Config, compress
from ss1_compile.calibration import sequential
from ss1_compile.calibration.sequential import SequentialCalibration
from ss1_compile.calibration.statistics import Statistics, calibrate, statistics_of
from ss1_compile.compression.layers import find_layers
from ss1_compile.errors import CalibrationError

K = 12


class Block(nn.Module):
    """In-place operators behind linears, one weight used twice, one spelt ``[K, N]``."""

    def __init__(self):
        super().__init__()
        self.first, self.twice = nn.Linear(K, 2 * K), nn.Linear(2 * K, 2 * K)
        self.attention = Attention(2 * K)
        self.last = Conv1D(5, 2 * K)

    def forward(self, x, attention_mask=None):
        h = self.first(x).relu_()
        h = h + torch.tanh_(self.twice(h))
        h = self.attention(self.twice(h))
        h += 1
        return self.last(h)


def make(seed=0):
    torch.manual_seed(seed)
    return Block().double().eval()


def weighed(model, data, **options):
    return calibrate(model, data, weigh_outputs=True, progress=False, **options)


def reference(model, x, keep):
    """``E[g gᵀ]`` by hooks that keep outputs, for the same random signs."""
    kept = {}

    def hook(name):
        def forward(module, args, y):
            y.retain_grad()
            kept.setdefault(name, []).append(y)
            return y.clone()

        return forward

    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    handles = [m.register_forward_hook(hook(n)) for n, m in layers.items()]
    out = model(x)[keep]
    signs = torch.randint(0, 2, out.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (out * signs).sum().backward()
    for handle in handles:
        handle.remove()
    moments = {}
    for name, layer in layers.items():
        w = layer.weight.detach()
        w = w.t() if isinstance(layer, Conv1D) else w
        g = torch.cat([y.grad[keep] for y in kept[name]]) @ w
        moments[f"{name}.weight"] = g.t() @ g / len(g)
    return moments


@pytest.mark.parametrize("masked", [False, True])
def test_moments_are_those_of_autograd(masked):
    model, x = make(), torch.randn(3, 7, K, dtype=torch.float64)
    keep = torch.ones(3, 7, dtype=torch.bool)
    batch = (x,)
    if masked:
        keep[1, 4:] = keep[2, :2] = False
        batch = {"x": x, "attention_mask": keep.long()}
    wanted = reference(copy.deepcopy(model), x, keep)
    found = weighed(model, [batch])
    assert found.unweighed is None
    assert set(found) == set(wanted)
    for name, moment in wanted.items():
        torch.testing.assert_close(found[name].gradients, moment)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    # the moments of the inputs are what they are without, and still shared
    plain = calibrate(copy.deepcopy(model), [batch], progress=False)
    for name, entry in plain.items():
        assert entry.gradients is None
        assert torch.equal(entry.second_moment, found[name].second_moment)
    q, v = found["attention.query.weight"], found["attention.value.weight"]
    assert q.second_moment is v.second_moment
    assert not torch.equal(q.gradients, v.gradients)


def test_the_loss_of_logits_is_that_of_labels_drawn_from_the_model():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3, bias=False)

        def forward(self, x):
            return SimpleNamespace(logits=self.layer(x), hidden=x)

    model = Classifier().double()
    x = torch.tensor([[1.0, 0.5, -1.0, 2.0]], dtype=torch.float64).expand(20_000, 4)
    w = model.layer.weight.detach()
    p = (x[0] @ w.t()).softmax(0)
    fisher = w.t() @ (torch.diag(p) - torch.outer(p, p)) @ w
    found = weighed(model, [x])["layer.weight"].gradients  # the draws are the same in every run
    torch.testing.assert_close(found, fisher, rtol=0.05, atol=0.05 * fisher.abs().max().item())


class Language(nn.Module):
    """An output embedding behind two layers, found as in Hugging Face's models."""

    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(K, K), nn.Linear(K, 6)
        self.lm_head = nn.Linear(6, 40)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, x):
        return SimpleNamespace(logits=self.lm_head(self.last(torch.tanh(self.layer(x)))))


def test_of_a_language_model_what_the_output_embedding_reads_counts():
    torch.manual_seed(0)
    model = Language().double()
    x = torch.randn(5, 9, K, dtype=torch.float64)
    found = weighed(model, [x])
    headless = nn.Sequential(model.layer, nn.Tanh(), model.last)
    wanted = weighed(headless, [x])
    for name, same in (("layer.weight", "0.weight"), ("last.weight", "2.weight")):
        torch.testing.assert_close(found[name].gradients, wanted[same].gradients)
    assert found["lm_head.weight"].gradients is None  # nothing of it is in the loss
    assert not model.lm_head._forward_pre_hooks


def test_half_precision_and_inputs_without_gradients():
    model = make().float()
    x = torch.randn(8, 5, K)
    wanted = weighed(copy.deepcopy(model), [x])
    found = weighed(copy.deepcopy(model).bfloat16(), [x.bfloat16()])
    for name, entry in wanted.items():
        gap = found[name].gradients - entry.gradients
        assert found[name].gradients.dtype == torch.float64
        assert gap.norm() < 0.1 * entry.gradients.norm(), name


class Detached(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.layer, self.other = how, nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        if self.how == "no_grad":
            with torch.no_grad():
                return self.other(self.layer(x))
        if self.how == "integers":
            return self.other(self.layer(x)).argmax(-1)
        h = torch.tanh(self.layer(x))  # tanh's gradient needs its output, which is changed in place
        h *= 2
        return self.other(h)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("no_grad", "nothing that the model returns"),
        ("integers", "nothing that"),
        ("in place", "RuntimeError: one of the variables needed for gradient computation"),
    ],
)
@pytest.mark.parametrize("walk", [False, True])
def test_a_model_that_does_not_allow_it_goes_without_and_says_why(how, reason, walk):
    torch.manual_seed(0)
    model = Detached(how)
    data = [torch.randn(50, 32) for _ in range(2)]
    assert reason in weighed(model, data).unweighed
    report = compress(copy.deepcopy(model), reduction=2, calibration=data, sequential=walk,
                      warn_error=2.0, progress=False)  # fmt: skip
    assert len(report.notes) == 1
    assert reason in report.notes[0]
    assert reason[:20] in str(report)
    assert {row.projection for row in report.compressed} == {"learned"}
    off = compress(model, reduction=2, calibration=data, weigh_outputs=False, sequential=walk,
                   warn_error=2.0, progress=False)  # fmt: skip
    assert off.notes == []
    assert [row.error for row in off] == [row.error for row in report]


@pytest.mark.parametrize("at_once", [2**32, 1])
def test_sequentially_they_are_those_of_the_dense_model(at_once, monkeypatch):
    monkeypatch.setattr(sequential, "_GRADIENT_BYTES", at_once)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, K), nn.Tanh(), nn.Linear(K, 2 * K), nn.Linear(2 * K, 3))
    data = [torch.randn(9, K) for _ in range(3)]
    wanted = weighed(copy.deepcopy(model), data)
    layers = find_layers(model, SS1Config(min_features=1), {})
    seen = []
    with SequentialCalibration(
        model, layers, data, paired=False, held_out=False, weigh_outputs=True
    ) as walk:
        for group in walk.groups(progress=False):
            for layer, statistics in group:
                found = statistics.gradients
                torch.testing.assert_close(found, wanted[layer.weight_name].gradients)
                seen.append(layer.name)
                layer.replacement = nn.Linear(*layer.shape[::-1])
    assert seen == ["0", "2", "3"]


def test_they_are_of_the_weights_as_they_were():
    model = nn.Linear(5, 4)
    found = weighed(model, [torch.randn(20, 5)])["weight"]
    assert statistics_of(model.weight) is found
    with torch.no_grad():
        model.weight.mul_(2)
    left = statistics_of(model.weight)
    assert left.gradients is None
    assert left.second_moment is found.second_moment
    assert statistics_of(model.weight) is left


def test_they_are_saved_and_loaded(tmp_path):
    path = tmp_path / "statistics.safetensors"
    found = weighed(make(), [torch.randn(4, 3, K, dtype=torch.float64)])
    found.save(path)
    loaded = Statistics.load(path)
    for name, entry in found.items():
        assert torch.equal(loaded[name].gradients, entry.gradients)
    q, v = loaded["attention.query.weight"], loaded["attention.value.weight"]
    assert q.second_moment is v.second_moment
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    assert sum(n.endswith("second_moment") for n in tensors) == len(found) - 2  # q, k, v share one
    save_file({n: t for n, t in tensors.items() if n != "gradients.0"}, path, header)
    with pytest.raises(CalibrationError, match="gradients are missing"):
        Statistics.load(path)
    tensors["gradients.0"] = tensors["gradients.0"].float()
    save_file(tensors, path, header)
    with pytest.raises(CalibrationError, match="gradients are torch.float32"):
        Statistics.load(path)


def test_statistics_without_them_are_combined_without():
    model, x = nn.Linear(5, 4), torch.randn(40, 5)
    half = [weighed(model, [part])["weight"] for part in (x[:10], x[10:])]
    both = half[0].combine(half[1])
    torch.testing.assert_close(both.gradients, 0.25 * half[0].gradients + 0.75 * half[1].gradients)
    assert half[0].combine(calibrate(model, [x])["weight"]).gradients is None
