"""One step of AdamW on clipped gradients, prepared for being recorded or not."""

import pytest
import torch

from ss1_compile.healing.config import HealConfig
from ss1_compile.healing.update import Update

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make(device, **options):
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 5), (7,), (2, 2))
    values = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    parameters = [torch.nn.Parameter(value) for value in values]
    return parameters, Update(parameters, HealConfig(**options), torch.device(device))


def train(parameters, update, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters[: 3 if step % 2 else 2]:  # the last one has every other
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.to(parameter.device)
        update.set_rate(1 / (1 + step))
        update()


@pytest.mark.parametrize("device", DEVICES)
def test_steps_are_those_of_clipped_adamw(device):
    parameters, update = make(device, learning_rate=0.1, clip=0.5)
    expected = [p.detach().double().cpu() for p in parameters]
    train(parameters, update, 4)
    means, squares, counts = ([torch.zeros_like(p) for p in expected] for _ in range(3))
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        present = range(3 if step % 2 else 2)
        gradients = [torch.randn(expected[i].shape, generator=generator).double() for i in present]
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for i in present:
            g = gradients[i] * min(1.0, 0.5 / (float(norm) + 1e-6))
            counts[i] += 1
            means[i] = 0.9 * means[i] + 0.1 * g
            squares[i] = 0.98 * squares[i] + 0.02 * g * g
            mean, square = means[i] / (1 - 0.9 ** counts[i]), squares[i] / (1 - 0.98 ** counts[i])
            expected[i] -= 0.1 / (1 + step) * mean / (square.sqrt() + 1e-8)
    for parameter, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach().double().cpu(), value, rtol=1e-5, atol=1e-6)
        assert parameter.grad is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("done", [0, 1, 4])
def test_preparing_changes_nothing_that_is_there(done, device):
    """Before the first step, after one that left a parameter out, and after several."""
    (parameters, update), (twins, plain) = make(device), make(device)
    train(parameters, update, done)
    train(twins, plain, done)
    update.prepare()
    for parameter in parameters:
        moments = update.optimizer.state[parameter]
        assert set(moments) == {"step", "exp_avg", "exp_avg_sq"}
        assert float(moments["step"]) == (
            len(range(1, done, 2)) if parameter is parameters[2] else done
        )
    train(parameters, update, 3, first=done)
    train(twins, plain, 3, first=done)
    for parameter, twin in zip(parameters, twins, strict=True):
        assert torch.equal(parameter, twin)


@pytest.mark.gpu
def test_a_recorded_step_goes_on_with_rate_and_moments():
    (parameters, update), (twins, plain) = make("cuda", cuda_graphs=True), make("cuda")
    update.prepare()
    gradients = [torch.zeros_like(p) for p in parameters]

    def step():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * 1
        update()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for factor in (0.1, 1.0, 0.5):
        for gradient, twin in zip(gradients, twins, strict=True):
            twin.grad = gradient.normal_().clone()
        update.set_rate(factor)
        graph.replay()
        plain.set_rate(factor)
        plain()
        for parameter, twin in zip(parameters, twins, strict=True):
            torch.testing.assert_close(parameter, twin, rtol=1e-5, atol=1e-7)
