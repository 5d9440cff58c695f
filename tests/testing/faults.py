"""Small wrong models, each with the property meant to find it; and right ones beside them."""

from __future__ import annotations

import random as python_random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from tensordict import TensorDict
from torch import nn

import funcnets
from funcnets import _torch, layers, random
from funcnets.testing import (
    booleans,
    causal,
    equivariant,
    floats,
    integers,
    lengths,
    padding,
    permutation,
)

X = floats("batch 3")


@dataclass(frozen=True)
class Planted:
    """A pair (init, apply), its inputs and options, and the property that must find it wrong."""

    finds: str
    apply: Callable[..., Any]
    init: Callable[..., Any]
    inputs: Any = X
    options: dict[str, Any] = field(default_factory=dict)


FAULTS: dict[str, Planted] = {}
RIGHT: dict[str, Planted] = {}


def linear_init(key, n=3, m=4, **more):
    keys = random.split(key, 2 + len(more)).unbind()
    parts = {"hidden": layers.init_linear(keys[0], n, 5), "out": layers.init_linear(keys[1], 5, m)}
    for k, (name, make) in zip(keys[2:], more.items(), strict=True):
        parts[name] = make(k)
    return TensorDict(parts)


def two_layers(params, x):
    return layers.linear(params["out"], layers.linear(params["hidden"], x).tanh())


def fault(finds, init=linear_init, inputs=X, **options):
    def note(apply):
        FAULTS[apply.__name__] = Planted(finds, apply, init, inputs, options)
        return apply

    return note


def right(init=linear_init, inputs=X, **options):
    def note(apply):
        RIGHT[apply.__name__] = Planted("", apply, init, inputs, options)
        return apply

    return note


def number_of(key):
    """What no vmap can take."""
    return key.view(torch.int64)[1].item() % 2**31


# Purity.


@fault("leaves_its_arguments_as_they_were")
def writes_to_a_parameter(params, x):
    with torch.no_grad():
        params["out", "bias"].add_(0.1)
    return two_layers(params, x)


@fault("leaves_its_arguments_as_they_were")
def writes_to_its_input(params, x):
    return two_layers(params, x.detach().mul_(2) if x.requires_grad else x.mul_(2))


@fault("leaves_its_arguments_as_they_were")
def puts_another_tensor_in_the_tree(params, x):
    params["out", "bias"] = params["out", "bias"] + 0.0
    return two_layers(params, x)


@fault("leaves_its_arguments_as_they_were")
def adds_a_name_to_the_tree(params, x):
    params["cache"] = x.mean()
    return two_layers(params, x)


CALLS = []


@fault("repeats_itself")
def remembers_how_often_it_was_called(params, x):
    CALLS.append(None)
    return two_layers(params, x) + 1e-3 * (len(CALLS) % 2)


@fault("uses_no_global_generator")
def draws_from_torch(params, x, train=False, key=None):
    if train:
        x = x * torch.rand(x.shape, dtype=x.dtype)
    y = two_layers(params, x)
    return (y, TensorDict({})) if train else y


@fault("uses_no_global_generator")
def draws_from_python(params, x, train=False, key=None):
    y = two_layers(params, x * (python_random.random() if train else 1.0))
    return (y, TensorDict({})) if train else y


def init_from_torch(key):
    with torch.no_grad():
        return TensorDict({"w": torch.randn(3, 2)})


@fault("uses_no_global_generator", init=init_from_torch)
def is_initialized_by_torch(params, x):
    return x @ params["w"]


# Keys.


def dropped(params, x, train, key, rate=0.5, scaled=True):
    if not train:
        return two_layers(params, x)
    hidden = layers.linear(params["hidden"], x).tanh()
    kept = random.bernoulli(key, hidden.shape, 1 - rate).to(hidden) / (1 - rate if scaled else 1)
    return layers.linear(params["out"], hidden * kept), TensorDict({})


@fault("draws_by_the_key", draws=True)
def draws_the_same_for_every_key(params, x, train=False, key=None):
    return dropped(params, x, train, random.key(0))


@fault("draws_by_the_key", draws=False)
def draws_though_it_should_not(params, x, train=False, key=None):
    return dropped(params, x, train, random.key(0) if key is None else key)


@fault("inference_ignores_the_key")
def drops_at_inference(params, x, train=False, key=None):
    hidden = layers.linear(params["hidden"], x).tanh()
    if key is not None:
        hidden = layers.dropout(key, hidden, 0.5)
    elif train:
        raise ValueError("key: expected a key")
    y = layers.linear(params["out"], hidden)
    return (y, TensorDict({})) if train else y


@fault("initializes_by_the_key", init=lambda key: linear_init(random.key(3)))
def begins_the_same_for_every_key(params, x):
    return two_layers(params, x)


@fault("dropout_keeps_the_mean", also=["dropout_keeps_the_mean"])
def drops_without_rescaling(params, x, train=False, key=None):
    return dropped(params, x, train, key, scaled=False)


@right(also=["dropout_keeps_the_mean"])
def drops_and_rescales(params, x, train=False, key=None):
    if train and key is None:
        raise ValueError("key: expected a key in training")
    return dropped(params, x, train, key)


# What is returned.


@fault("returns_what_is_declared", outputs=floats("batch 4"))
def returns_another_shape(params, x):
    return two_layers(params, x).mean(1)


@fault("returns_what_is_declared")
def forgets_the_buffers(params, x, train=False, key=None):
    return two_layers(params, x)


FLAGGED = (X, booleans(""))


def with_cond(params, x, flag, cast):
    h = layers.linear(params["hidden"], x).tanh()

    def deep(h):
        return cast(h.sin())

    h = funcnets.cond(flag, deep, lambda h: h.cos(), (h,))
    return layers.linear(params["out"], h)


@fault("keeps_the_dtype", inputs=FLAGGED)
def a_branch_of_another_dtype(params, x, flag):
    return with_cond(params, x, flag, lambda h: h.float())


@right(inputs=FLAGGED)
def branches_of_one_dtype(params, x, flag):
    return with_cond(params, x, flag, lambda h: h)


@fault("keeps_the_dtype")
def falls_back_to_single_precision(params, x):
    return two_layers(params, x).float()


# Batches.


def norm_init(key):
    return linear_init(key, norm=lambda k: layers.init_batch_norm(k, 5))


def normed(params, x, train, wrong=lambda new, old: new, at_inference="running"):
    hidden = layers.linear(params["hidden"], x)
    if train or at_inference == "batch":
        hidden, new = layers.batch_norm(params["norm"], hidden, train=True)
        new = wrong(new, params["norm"])
    else:
        hidden = layers.batch_norm(params["norm"], hidden)
    y = layers.linear(params["out"], hidden.tanh())
    return (y, TensorDict({"norm": new})) if train else y


@right(init=norm_init)
def normalizes_batches(params, x, train=False, key=None):
    return normed(params, x, train)


@fault("samples_are_independent", init=norm_init)
def batch_statistics_at_inference(params, x, train=False, key=None):
    return normed(params, x, train, at_inference="batch")


@fault("buffers_follow_their_rule", init=norm_init)
def counts_n_for_the_running_variance(params, x, train=False, key=None):
    def biased(new, old):
        n = x.shape[0]
        of_batch = (new["running_var"] - 0.9 * old["running_var"]) / 0.1 * (n - 1) / n
        return TensorDict(
            {
                "running_mean": new["running_mean"],
                "running_var": 0.9 * old["running_var"] + 0.1 * of_batch,
            }
        )

    return normed(params, x, train, biased)


@fault("buffers_follow_their_rule", init=norm_init)
def takes_momentum_the_other_way(params, x, train=False, key=None):
    def swapped(new, old):
        def turn(name):
            of_batch = (new[name] - 0.9 * old[name]) / 0.1
            return 0.1 * old[name] + 0.9 * of_batch

        return TensorDict({name: turn(name) for name in ("running_mean", "running_var")})

    return normed(params, x, train, swapped)


@fault("samples_are_independent")
def softmax_over_the_batch(params, x):
    return two_layers(params, x).softmax(0)


@fault("samples_are_independent")
def divides_by_the_size_of_the_batch(params, x):
    return two_layers(params, x) / x.shape[0]


@fault("the_order_of_a_batch_is_kept")
def adds_up_along_the_batch(params, x):
    return two_layers(params, x).cumsum(0)


@fault("training_equals_inference")
def scales_in_training_alone(params, x, train=False, key=None):
    y = two_layers(params, x)
    return (1.5 * y, TensorDict({})) if train else y


# Attention and sequences.


def attention_init(key):
    return layers.init_attention(key, 4, 2)


TOKENS = floats("batch time 4")
SEQUENCES = {"outputs": floats("batch time 4"), "axes": {"time": (2, 5)}}


def attend(params, x, mask=None, scale=None, mix=False):
    q, k, v = F.linear(x, params["in_proj_weight"], params["in_proj_bias"]).chunk(3, -1)
    pattern = "b t (h d) -> b h t d"
    if mix:  # heads of one sample among those of another
        b, t = x.shape[:2]
        q, k, v = (y.reshape(2, b, t, 2).transpose(0, 1) for y in (q, k, v))
    else:
        q, k, v = (rearrange(y, pattern, h=2) for y in (q, k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    y = rearrange(scores.softmax(-1) @ v, "b h t d -> b t (h d)")
    return layers.linear(params["out_proj"], y)


class Attention(nn.Module):
    """torch.nn's, with one input."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            inner = nn.MultiheadAttention(4, 2, batch_first=True)
        self.in_proj_weight, self.in_proj_bias = inner.in_proj_weight, inner.in_proj_bias
        self.out_proj = inner.out_proj

    def forward(self, x):
        return F.multi_head_attention_forward(
            *3 * (x.transpose(0, 1),),
            4,
            2,
            self.in_proj_weight,
            self.in_proj_bias,
            None,
            None,
            False,
            0.0,
            self.out_proj.weight,
            self.out_proj.bias,
            need_weights=False,
        )[0].transpose(0, 1)


def triangle(x, diagonal=0):
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(diagonal)


@fault(
    "has_its_symmetries", attention_init, TOKENS, symmetries={"causal": causal("time")}, **SEQUENCES
)
def a_mask_off_by_one(params, x):
    return attend(params, x, triangle(x, 1))


@right(attention_init, TOKENS, symmetries={"causal": causal("time")}, **SEQUENCES)
def causal_attention(params, x):
    return attend(params, x, triangle(x))


@fault("equals_the_reference", attention_init, TOKENS, reference=Attention())
def scores_over_d(params, x):
    return attend(params, x, scale=1 / 2)


@right(
    attention_init,
    TOKENS,
    reference=Attention(),
    symmetries={"order": permutation("time")},
    **SEQUENCES,
)
def plain_attention(params, x):
    return attend(params, x)


@fault("samples_are_independent", attention_init, TOKENS)
def mixes_batch_and_heads(params, x):
    return attend(params, x, mix=True)


@fault(
    "has_its_symmetries",
    attention_init,
    TOKENS,
    symmetries={"order": permutation("time")},
    **SEQUENCES,
)
def knows_the_places(params, x):
    return attend(params, x + torch.arange(x.shape[1])[:, None].to(x))


def pooled(params, x, ends, real):
    h = layers.linear(params["hidden"], x).tanh()
    inside = (torch.arange(x.shape[1]) < ends[:, None]).to(x)
    weights = inside if real else torch.ones_like(inside)
    return layers.linear(params["out"], (h * weights[..., None]).sum(1) / weights.sum(1)[:, None])


LENGTHS = (floats("batch time 3"), lengths("batch", of="time"))
PADDED = {"symmetries": {"padding": padding("time", 1)}, "outputs": floats("batch 4")}


@fault("has_its_symmetries", inputs=LENGTHS, **PADDED, axes={"time": (2, 5)})
def averages_the_padding(params, x, ends):
    return pooled(params, x, ends, real=False)


@right(inputs=LENGTHS, **PADDED, axes={"time": (2, 5)})
def averages_what_is_real(params, x, ends):
    return pooled(params, x, ends, real=True)


# Gradients.


@fault(
    "gradients_reach_every_parameter",
    init=lambda key: linear_init(key, spare=lambda k: layers.init_linear(k, 3, 4)),
)
def never_uses_a_layer(params, x):
    return two_layers(params, x)


@fault("gradients_reach_every_parameter")
def detaches_a_branch(params, x):
    return x.sum() + layers.linear(
        params["out"], layers.linear(params["hidden"], x).tanh().detach()
    )


@fault("gradients_match_finite_differences")
def detaches_half_a_product(params, x):
    h = layers.linear(params["hidden"], x)
    return layers.linear(params["out"], h * h.detach().sigmoid())


@fault("gradients_are_finite")
def hides_nan_behind_where(params, x):
    h = layers.linear(params["hidden"], x)
    return layers.linear(params["out"], torch.where(h > 0, h.sqrt(), 0.0))


@fault("gradients_are_finite")
def divides_by_a_norm(params, x):
    x = x / x.norm(dim=-1, keepdim=True)
    return two_layers(params, x)


@fault("gradients_are_finite")
def exponentials_without_their_maximum(params, x):
    y = (10 * layers.linear(params["hidden"], x)).exp()
    return y / y.sum(-1, keepdim=True)


class WrongBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.tanh()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y)


@fault("gradients_match_finite_differences")
def a_backward_of_its_own(params, x):
    return layers.linear(params["out"], WrongBackward.apply(layers.linear(params["hidden"], x)))


class WrongForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return x * t


@fault("jvp_and_vjp_agree")
def a_forward_mode_of_its_own(params, x):
    h = WrongForwardMode.apply(layers.linear(params["hidden"], x))
    return layers.linear(params["out"], h)


class LopsidedProduct(torch.autograd.Function):
    """Right in value; its derivatives are those of no function at all."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a, b):
        return a * b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return g * b, g * (a + a * a)

    @staticmethod
    def jvp(ctx, s, t):
        a, b = ctx.saved_tensors
        return s * b + t * (a + a * a)


@fault("hessian_products_are_right")
def a_product_with_lopsided_derivatives(params, x):
    h = layers.linear(params["hidden"], x)
    return LopsidedProduct.apply(h[:, :2], h[:, 2:4])


class SquareOfOneDerivative(WrongForwardMode):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * g

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return 2 * x * t


@fault("hessian_products_are_right")
def cuts_off_its_second_derivative(params, x):
    h = SquareOfOneDerivative.apply(layers.linear(params["hidden"], x))
    return layers.linear(params["out"], h)


# Sharing.


def twins(params, x, y):
    return (two_layers(params["first"], x) * two_layers(params["second"], y)).sum(-1)


def twin_init(key):
    one = linear_init(key)
    return TensorDict({"first": one, "second": one.clone()})


@fault("shared_gradients_add_up", twin_init, (X, X), shared={"first": 2})
def two_copies_of_an_encoder(params, x, y):
    return twins(params, x, y)


@fault(
    "has_its_symmetries",
    twin_init,
    (X, X),
    symmetries={"either way round": equivariant(lambda x, y: (y, x))},
)
def two_copies_are_not_symmetric(params, x, y):
    return twins(params, x, y)


@right(
    lambda key: TensorDict({"encoder": linear_init(key)}),
    (X, X),
    shared={"encoder": 2},
    symmetries={"either way round": equivariant(lambda x, y: (y, x))},
)
def one_encoder_read_twice(params, x, y):
    both = {"first": params["encoder"], "second": params["encoder"]}
    return twins(both, x, y)


# Transforms.


@fault("vmap_equals_the_loop")
def looks_at_numbers(params, x):
    y = two_layers(params, x)
    return y if y.detach().sum().item() > 0 else 2 * y


@fault("vmap_equals_the_loop")
def writes_into_a_tensor_that_is_not_batched(params, x):
    y = torch.zeros(x.shape[0], 4, dtype=x.dtype)
    y[:] = two_layers(params, x)
    return y


@fault("an_ensemble_trains_as_its_members", draws=True)
def makes_a_number_of_the_key(params, x, train=False, key=None):
    y = two_layers(params, x)
    if not train:
        return y
    return y * random.uniform(random.key(number_of(key)), y.shape, dtype=y.dtype), TensorDict({})


@right(init=norm_init)
def torchs_own_batch_norm_on_copies(params, x, train=False, key=None):
    norm = params["norm"]
    mean, var = norm["running_mean"].clone(), norm["running_var"].clone()
    hidden = F.batch_norm(
        layers.linear(params["hidden"], x), mean, var, norm["weight"], norm["bias"], train
    )
    y = layers.linear(params["out"], hidden.tanh())
    new = TensorDict({"norm": TensorDict({"running_mean": mean, "running_var": var})})
    return (y, new) if train else y


@fault("per_sample_gradients_equal_the_loop")
def cannot_take_one_sample_under_vmap(params, x):
    y = two_layers(params, x)
    return y if (y.detach() > 10).sum() == 0 else 2 * y


@fault("compiled_equals_eager")
def leaves_torch_for_numpy(params, x):
    scale = float(params["out", "bias"].detach().numpy().sum())
    return two_layers(params, x) * scale


@fault("compiled_equals_eager", init=norm_init)
def another_momentum_where_it_is_compiled(params, x, train=False, key=None):
    def halved(new, old):
        return TensorDict({name: new[name] / 2 for name in ("running_mean", "running_var")})

    return normed(params, x, train, *([halved] if _torch.tracing() else []))


# Precision and places.


@fault("single_precision_is_close")
def a_variance_by_subtraction(params, x):
    mean, square = x.mean(-1, keepdim=True), x.square().mean(-1, keepdim=True)
    return two_layers(params, (x - mean) / ((square - mean.square()).abs() + 1e-6).sqrt())


@right()
def a_variance_of_deviations(params, x):
    away = x - x.mean(-1, keepdim=True)
    return two_layers(params, away / (away.square().mean(-1, keepdim=True) + 1e-6).sqrt())


@fault("bfloat16_is_close")
def adds_up_in_low_precision(params, x):
    h = two_layers(params, x)
    total = 1000 * torch.ones_like(h)
    for _ in range(200):
        total = total + h / 100
    return total - 1000


@fault(
    "equals_the_reference",
    init=lambda key: TensorDict(
        {"weight": random.normal(key, (3, 3)), "bias": random.normal(key, (3,))}
    ),
    reference=nn.utils.skip_init(nn.Linear, 3, 3),
)
def a_transposed_weight_that_fits(params, x):
    return x @ params["weight"] + params["bias"]


@fault(
    "tells_a_wrong_parameter",
    init=lambda key: TensorDict({"scale": random.normal(key, (3,))}),
    checks_shapes=True,
)
def broadcasts_what_does_not_fit(params, x):
    return x * params["scale"]


@fault(
    "a_state_dict_changes_nothing",
    init=lambda key: {"0": layers.init_linear(key, 3, 4), "extra": (random.normal(key, (4,)),)},
)
def keeps_parameters_where_no_file_has_names(params, x):
    return layers.linear(params["0"], x) * params["extra"][0]


@fault("a_file_changes_nothing", init=lambda key: TensorDict({"a.b": random.normal(key, (3,))}))
def names_that_no_file_can_tell_apart(params, x):
    return x * params["a.b"]


@fault("tells_a_wrong_input", checks_shapes=True)
def takes_inputs_of_any_width(params, x):
    return two_layers(params, x[:, :3])


@fault("shares_no_memory", also=["shares_no_memory"])
def returns_its_input(params, x):
    return {"outputs": two_layers(params, x), "inputs": x}


def init_by_a_generator(key):
    generator = torch.Generator().manual_seed(number_of(key))
    return TensorDict({"w": torch.randn(3, 2, generator=generator)})


@fault("initializes_an_ensemble", init=init_by_a_generator)
def makes_a_generator_of_the_key(params, x):
    return x @ params["w"]


# Right ones that look suspicious.


@right(inputs=integers("batch time", 7), init=lambda key: layers.init_embedding(key, 7, 3))
def an_embedding(params, tokens):
    return layers.embedding(params, tokens).mean(1)


@right(inputs={"x": X, "flag": floats("batch", 0.0, 1.0)})
def inputs_by_name(params, inputs):
    return {"y": two_layers(params, inputs["x"]) * inputs["flag"][:, None]}


@right()
def max_and_relu(params, x):
    return layers.linear(params["out"], layers.linear(params["hidden"], x).relu()).amax(-1)


@right(init=lambda key: layers.init_conv(key, 2, 3, 3), inputs=floats("batch 2 height width"))
def a_convolution(params, x):
    return layers.conv(params, x, padding=1).tanh()


@right(inputs=floats("time 3"))
def no_batch_at_all(params, x):
    return two_layers(params, x).logsumexp(0)
