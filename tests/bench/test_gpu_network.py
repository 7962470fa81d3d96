"""ResNet's blocks with our norms in them compute what they computed before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from normally import nn as ours_nn
from normally.bench.gpu import network, resnet

CPU = torch.device("cpu")


class Bottleneck(nn.Module):
    """With the names that torchvision and timm give the parts."""

    def __init__(self, before, width, after, activation):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, after, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        setattr(self, activation, nn.ReLU(inplace=True))
        self.activation = activation
        shortcut = nn.Sequential(nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after))
        self.downsample = shortcut if before != after else None

    def forward(self, input):
        relu = getattr(self, self.activation)
        x = relu(self.bn1(self.conv1(input)))
        x = relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x += input if self.downsample is None else self.downsample(input)
        return relu(x)


class Net(nn.Module):
    def __init__(self, activation="relu"):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4, momentum=0.2)
        setattr(self, activation, nn.ReLU(inplace=True))
        self.activation = activation
        self.layer1 = nn.Sequential(
            Bottleneck(4, 4, 8, activation), Bottleneck(8, 4, 8, activation)
        )
        self.fc = nn.Linear(8, 10)

    def forward(self, input):
        x = getattr(self, self.activation)(self.bn1(self.conv1(input)))
        return self.fc(self.layer1(x).mean((2, 3)))


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def gradients(model, images):
    model = model.train()
    output = model(images)
    output.square().sum().backward()
    return output.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("activation", ["relu", "act1"])
@pytest.mark.parametrize("change", [resnet.with_ours, resnet.with_fused])
def test_the_function_is_the_same(change, activation):
    model = Net(activation)
    for norm in norms(model):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    changed = change(model)
    assert len(norms(changed)) == len(norms(model)) == 8
    assert all(isinstance(norm, ours_nn.BatchNorm2d) for norm in norms(changed))
    assert set(changed.state_dict()) == set(model.state_dict())
    images = torch.randn(4, 3, 8, 8)
    output, right = gradients(model, images)
    found, grads = gradients(changed, images)
    # Sums of a few hundred float32 terms, through eight norms.
    torch.testing.assert_close(found, output, rtol=1e-4, atol=1e-4)
    for name, grad in right.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-3, msg=name)
    buffers = dict(changed.named_buffers())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-4, atol=1e-4)


def test_the_model_itself_stays_as_it_is():
    model = Net()
    before = copy.deepcopy(model.state_dict())
    resnet.with_fused(model)
    assert all(type(norm) is nn.BatchNorm2d for norm in norms(model))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_only_the_norms_before_a_relu_have_one():
    fused = resnet.with_fused(Net())
    acts = {name: m.act for name, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert acts.pop("layer1.0.downsample.1") is None
    assert set(acts.values()) == {"relu"}
    assert isinstance(fused.relu, nn.Identity)


def test_a_subclass_of_batch_norm_stays():
    class Other(nn.BatchNorm2d):
        pass

    assert type(resnet.with_ours(nn.Sequential(Other(2)))[0]) is Other


def test_a_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match=r"must have bottleneck blocks\. Got none"):
        resnet.with_fused(nn.Sequential(nn.BatchNorm2d(3)))


def test_the_variants_start_from_the_same_weights():
    found = network.time_variants(Net(), "a library 1.0", 4, 8, CPU)
    assert found.failed == {}
    assert list(found.seconds) == [network.TORCH_NET, network.PLAIN, network.FUSED]
    assert set(found.speedup) == {network.PLAIN, network.FUSED}
    first = found.loss[network.TORCH_NET]
    # bfloat16 under autocast: eight bits, averaged over a batch.
    assert all(abs(loss - first) < 0.05 for loss in found.loss.values())


def test_a_variant_that_raises_is_reported(monkeypatch):
    variants = {**network._VARIANTS, network.FUSED: lambda model: 1 / 0}
    monkeypatch.setattr(network, "_VARIANTS", variants)
    found = network.time_variants(Net(), "a library 1.0", 2, 8, CPU)
    assert found.failed == {network.FUSED: "ZeroDivisionError: division by zero"}
    assert set(found.speedup) == {network.PLAIN}


def test_a_smaller_batch_is_taken_where_there_is_no_memory(monkeypatch):
    batches = []

    def time_variants(model, source, batch, side, device):
        batches.append(batch)
        if batch > 100:
            raise torch.cuda.OutOfMemoryError
        return "measured"

    monkeypatch.setattr(network, "time_variants", time_variants)
    monkeypatch.setattr(resnet, "load", lambda: (Net(), "a library 1.0"))
    before = torch.backends.cudnn.benchmark
    assert network.measure(CPU) == "measured"
    assert batches == [256, 128, 64]
    assert torch.backends.cudnn.benchmark == before
