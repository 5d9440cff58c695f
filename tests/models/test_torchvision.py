"""Every constructor that torchvision has too, at full size, beside torchvision's own module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.ops import StochasticDepth

from funcnets import grad, models, random, tree
from funcnets.model import Model

KEY = random.key(5)


@dataclass(frozen=True)
class Constructor:
    """What a constructor takes in the test.

    Attributes:
        size: of the images; as small as the network allows, and for the efficientnets so large that
            their last norms have more than two values to look at, whose derivatives explode.
        still: options without which our network draws in training.
        hidden: features of the hidden layers of a VGG network, instead of so many that they have
            124 million parameters.
        large: whether the derivatives are left to ``pytest --full``: they take from five to thirty
            seconds, and the blocks are those of its smaller siblings.
        blocks: of a Vision Transformer, the first so many; they are all alike.
    """

    size: int = 32
    still: dict[str, Any] = field(default_factory=dict)
    hidden: int | None = None
    large: bool = False
    blocks: int | None = None

    def model(self, name: str) -> Model:
        """The constructor's network."""
        hidden = {} if self.hidden is None else {"hidden": self.hidden}
        if self.blocks is None:
            return getattr(models, name)(**self.still, **hidden)
        config = getattr(models, name)(image_size=self.size).config
        return models.vit(**vars(config) | {"depth": self.blocks})

    def module(self, name: str) -> nn.Module:
        """Torchvision's network, without values."""
        with torch.device("meta"):
            if self.blocks is None:
                return getattr(torchvision.models, name)()
            module = getattr(torchvision.models, name)(image_size=self.size)
            module.encoder.layers = module.encoder.layers[: self.blocks]
            return module


CONSTRUCTORS = {
    "densenet121": Constructor(),
    "densenet161": Constructor(),
    "densenet169": Constructor(),
    "densenet201": Constructor(),
    "resnet18": Constructor(),
    "resnet34": Constructor(),
    "resnet50": Constructor(),
    "resnet101": Constructor(),
    "resnet152": Constructor(),
    "resnext50_32x4d": Constructor(),
    "resnext101_32x8d": Constructor(large=True),
    "resnext101_64x4d": Constructor(large=True),
    "wide_resnet50_2": Constructor(large=True),
    "wide_resnet101_2": Constructor(large=True),
    "alexnet": Constructor(63, {"dropout": 0.0}),
    "vgg11": Constructor(still={"dropout": 0.0}, hidden=8),
    "vgg11_bn": Constructor(still={"dropout": 0.0}, hidden=8),
    "vgg13": Constructor(still={"dropout": 0.0}, hidden=8),
    "vgg13_bn": Constructor(still={"dropout": 0.0}, hidden=8),
    "vgg16": Constructor(still={"dropout": 0.0}, hidden=8),
    "vgg16_bn": Constructor(still={"dropout": 0.0}, hidden=8),
    "vgg19": Constructor(still={"dropout": 0.0}, hidden=8),
    "vgg19_bn": Constructor(still={"dropout": 0.0}, hidden=8),
    "mobilenet_v2": Constructor(still={"dropout": 0.0}),
    "mobilenet_v3_small": Constructor(still={"dropout": 0.0}),
    "mobilenet_v3_large": Constructor(still={"dropout": 0.0}),
    "efficientnet_b0": Constructor(33, {"dropout": 0.0, "stochastic_depth": 0.0}),
    "efficientnet_b1": Constructor(33, {"dropout": 0.0, "stochastic_depth": 0.0}),
    "efficientnet_b2": Constructor(33, {"dropout": 0.0, "stochastic_depth": 0.0}),
    "efficientnet_b3": Constructor(33, {"dropout": 0.0, "stochastic_depth": 0.0}),
    "efficientnet_b4": Constructor(33, {"dropout": 0.0, "stochastic_depth": 0.0}),
    "efficientnet_b5": Constructor(33, {"dropout": 0.0, "stochastic_depth": 0.0}, large=True),
    "efficientnet_b6": Constructor(33, {"dropout": 0.0, "stochastic_depth": 0.0}, large=True),
    "efficientnet_b7": Constructor(33, {"dropout": 0.0, "stochastic_depth": 0.0}, large=True),
    "efficientnet_v2_s": Constructor(33, {"dropout": 0.0, "stochastic_depth": 0.0}),
    "efficientnet_v2_m": Constructor(33, {"dropout": 0.0, "stochastic_depth": 0.0}, large=True),
    "efficientnet_v2_l": Constructor(33, {"dropout": 0.0, "stochastic_depth": 0.0}, large=True),
    "convnext_tiny": Constructor(still={"stochastic_depth": 0.0}),
    "convnext_small": Constructor(still={"stochastic_depth": 0.0}),
    "convnext_base": Constructor(still={"stochastic_depth": 0.0}, large=True),
    "convnext_large": Constructor(still={"stochastic_depth": 0.0}, large=True),
    "vit_b_16": Constructor(32, blocks=4),
    "vit_b_32": Constructor(64, blocks=1),
    "vit_l_16": Constructor(32, blocks=1),
    "vit_l_32": Constructor(64, blocks=1),
    "vit_h_14": Constructor(28, blocks=1),
    "swin_t": Constructor(57, {"stochastic_depth": 0.0}),
    "swin_s": Constructor(still={"stochastic_depth": 0.0}, large=True),
    "swin_b": Constructor(still={"stochastic_depth": 0.0}, large=True),
    "swin_v2_t": Constructor(69, {"stochastic_depth": 0.0}),
    "swin_v2_s": Constructor(still={"stochastic_depth": 0.0}, large=True),
    "swin_v2_b": Constructor(still={"stochastic_depth": 0.0}, large=True),
}


def make_module(name: str, case: Constructor) -> nn.Module:
    """Torchvision's network, of weights that keep the activations near one, without dropout."""
    module, hidden = case.module(name), case.hidden
    if hidden is not None:
        sizes = {0: (512 * 7 * 7, hidden), 3: (hidden, hidden), 6: (hidden, 1000)}
        for place, size in sizes.items():
            module.classifier[place] = nn.Linear(*size, device="meta")
    module = module.to(torch.float64).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for place, tensor in module.state_dict().items():
        last = place.rpartition(".")[2]
        if not tensor.is_floating_point():
            tensor.zero_()
        elif tensor.ndim > 1:  # batches of two make norms of few values: weights of one sign less
            width = (3 / tensor[0].numel()) ** 0.5
            tensor.uniform_(-width, width, generator=generator)
        elif last in ("weight", "running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.uniform_(-0.1, 0.1, generator=generator)
    for part in module.modules():
        if isinstance(part, (nn.Dropout, StochasticDepth)):
            part.p = 0.0
        if isinstance(part, ShiftedWindowAttention):
            part.define_relative_position_index()
        if isinstance(part, ShiftedWindowAttentionV2):
            part.define_relative_position_bias_table()
            part.to(torch.float64)
    return module


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_equals_torchvision(name, request):
    case = CONSTRUCTORS[name]
    module, model = make_module(name, case), case.model(name)
    params = model.from_torchvision(module)
    x = random.normal(KEY, (2, 3, case.size, case.size), dtype=torch.float64)
    with torch.no_grad():
        expected = module.eval()(x)
        torch.testing.assert_close(model.apply(params, x), expected, rtol=1e-6, atol=1e-6)
    assert expected.std() > 1e-3  # the networks say something about the image
    if case.large and not request.config.getoption("full"):
        return

    expected = module.train()(x)
    cotangent = random.normal(KEY, expected.shape, dtype=torch.float64)
    trainable, buffers = tree.partition(params)
    del params

    def loss(trainable):
        outputs, new = model.apply(tree.merge(trainable, buffers), x, train=True)
        return (outputs * cotangent).sum(), (outputs, new)

    gradients, (outputs, new) = grad(loss, has_aux=True)(trainable)
    torch.testing.assert_close(outputs, expected.detach(), rtol=1e-6, atol=1e-6)
    expected.backward(cotangent)
    for place, parameter in module.named_parameters():
        gradient = gradients[tuple(place.split("."))]
        # Relative to the largest: the sums that cancel leave what rounding left of them.
        scale = parameter.grad.abs().max().clamp(min=1e-12)
        error = (gradient - parameter.grad).abs().max()
        assert error <= 1e-6 * scale + 1e-9, f"{place}: {error} of {scale}"
    wanted = tree.from_state_dict(dict(module.named_buffers()))
    assert not tree.compare(new, wanted)
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6), new, wanted)


# Of the others, from_torchvision above compares all names and shapes.
@pytest.mark.parametrize("name", [n for n, c in CONSTRUCTORS.items() if c.hidden or c.blocks])
def test_has_as_many_parameters_as_torchvision(name):
    with torch.device("meta"):
        module = getattr(torchvision.models, name)()
    model = getattr(models, name)()
    params = model.init(random.key(0, device="meta"))
    assert not tree.compare(params, tree.from_module(module))
