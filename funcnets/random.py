"""Explicit randomness: every draw takes a key, and the same key draws the same numbers.

A key is a uint64 tensor of shape [2], a seed and an offset, as in ``torch.func._random``. It is
never advanced: derive as many keys as there are draws with `split` or `fold_in`. Every function
works under vmap (one key per member: the member draws what it would draw alone), grad and compile
(the numbers are those of eager), and none touches torch's global generator.

The numbers are those of the counter-based generator Philox4x32-10 (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"). Keys, integers and uniforms are bit for bit those of
``torch.func._random``, whose operators (private; ``aten._philox_*``, complete since torch 2.15)
draw them where torch has them; elsewhere the same arithmetic in plain tensor operations does.
Normals are computed here from those bits, in float64 whatever their dtype, and rounded once: so
they do not depend on the version of torch, and stay within 1e-6 of torch's own in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64, UInt64
from torch import Tensor

Key = UInt64[Tensor, "2"]

NATIVE = hasattr(torch.ops.aten, "_philox_randint_")


def key(seed: int, device: torch.device | str | None = None) -> Key:
    """The key of a seed (an integer; taken modulo 2**64).

    >>> key(42).tolist()
    [42, 0]
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
    return torch.tensor([seed % 2**64, 0], dtype=torch.uint64, device=device)


def split(key: Key, num: int = 2) -> UInt64[Tensor, "num 2"]:
    """``num`` independent keys derived from one.

    >>> first, second = split(key(0))
    >>> split(key(0), 3).shape
    torch.Size([3, 2])
    """
    check_key(key)
    if num < 1:
        raise ValueError(f"num: expected at least 1, got {num}")
    return torch.ops.funcnets.random_split(key, num)


def fold_in(key: Key, data: int | Tensor) -> Key:
    """The key derived from ``key`` and an integer: a step, the index of a layer or of a sample.

    Args:
        data: an int in [-2**63, 2**64), or an integer tensor of shape [], which may be batched
            under vmap. Taken modulo 2**64.

    ``fold_in(key, i)`` equals ``split(key, n)[i]`` for every ``n > i``.

    >>> bool((fold_in(key(0), 1) == split(key(0), 3)[1]).all())
    True
    """
    check_key(key)
    if isinstance(data, Tensor):
        if data.dtype.is_floating_point or data.dtype.is_complex or data.ndim:
            raise ValueError(
                f"data: expected an integer tensor of shape [], got {data.dtype}{list(data.shape)}"
            )
        data = data.to(device=key.device, dtype=torch.int64)
    else:
        if not isinstance(data, int):
            raise TypeError(f"data: expected an integer, got {type(data).__name__}")
        if not -(2**63) <= data < 2**64:
            raise ValueError(f"data: expected an integer in [-2**63, 2**64), got {data}")
        data = torch.tensor(data - 2**64 if data >= 2**63 else data, device=key.device)
    return torch.ops.funcnets.random_fold_in(key, data)


def uniform(
    key: Key,
    shape: Sequence[int] = (),
    low: float = 0.0,
    high: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*shape"]:
    """Uniform numbers in [low, high), on the key's device.

    >>> uniform(key(42), (2,))
    tensor([0.9177, 0.9581])
    """
    check_key(key)
    _check_floating(dtype)
    if not 0 <= high - low <= torch.finfo(dtype).max:
        raise ValueError(f"uniform: expected low <= high, both finite, got low={low}, high={high}")
    return torch.ops.funcnets.random_uniform(key, _sizes(shape), low, high, dtype)


def normal(
    key: Key,
    shape: Sequence[int] = (),
    mean: float = 0.0,
    std: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*shape"]:
    """Normally distributed numbers (Box and Muller 1958).

    >>> normal(key(0), (1000,)).std()
    tensor(0.9874)
    """
    check_key(key)
    _check_floating(dtype)
    if not std >= 0:
        raise ValueError(f"normal: expected std >= 0, got {std}")
    return torch.ops.funcnets.random_normal(key, _sizes(shape), mean, std, dtype)


def truncated_normal(
    key: Key,
    shape: Sequence[int] = (),
    lower: float = -2.0,
    upper: float = 2.0,
    mean: float = 0.0,
    std: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*shape"]:
    """Normal numbers given that the standardised value lies in [lower, upper].

    Computed by inverting the distribution function. The result lies within
    ``[mean + std * lower, mean + std * upper]``; note that
    ``torch.nn.init.trunc_normal_`` takes absolute bounds instead.

    >>> bool(truncated_normal(key(0), (1000,)).abs().max() <= 2)
    True
    """
    check_key(key)
    _check_floating(dtype)
    if not lower < upper:
        raise ValueError(f"truncated_normal: expected lower < upper, got {lower} and {upper}")
    if not std >= 0:
        raise ValueError(f"truncated_normal: expected std >= 0, got {std}")
    if math.erfc(max(lower, -upper) / math.sqrt(2)) == 0:
        raise ValueError(f"truncated_normal: the probability of [{lower}, {upper}] rounds to 0")
    return torch.ops.funcnets.random_truncated_normal(
        key, _sizes(shape), lower, upper, mean, std, dtype
    )


def gumbel(
    key: Key, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*shape"]:
    """Standard Gumbel numbers, ``-log(-log(u))``: what turns an argmax into a categorical draw."""
    check_key(key)
    _check_floating(dtype)
    return torch.ops.funcnets.random_gumbel(key, _sizes(shape), dtype)


def bernoulli(
    key: Key, shape: Sequence[int] = (), p: float | Tensor = 0.5
) -> Bool[Tensor, "*shape"]:
    """True with probability ``p``, a number or a tensor that broadcasts to ``shape``.

    >>> bernoulli(key(0), (4,), p=1.0)
    tensor([True, True, True, True])
    """
    if not isinstance(p, Tensor) and not 0 <= p <= 1:
        raise ValueError(f"bernoulli: expected p between 0 and 1, got {p}")
    return uniform(key, shape) < p


def randint(
    key: Key, shape: Sequence[int], low: int, high: int, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Integers in [low, high), drawn at 64 bits (the bias is below (high - low) / 2**64).

    >>> randint(key(0), (5,), 0, 2).unique().tolist()
    [0, 1]
    """
    check_key(key)
    if dtype.is_floating_point or dtype.is_complex or dtype is torch.bool:
        raise TypeError(f"randint: expected an integer dtype, got {dtype}")
    bounds = torch.iinfo(dtype)
    if not low < high:
        raise ValueError(f"randint: expected low < high, got low={low}, high={high}")
    if low < bounds.min or high - 1 > min(bounds.max, 2**63 - 2) or high - low >= 2**63:
        raise ValueError(f"randint: [{low}, {high}) does not fit into {dtype}")
    return torch.ops.funcnets.random_randint(key, _sizes(shape), low, high).to(dtype)


def permutation(key: Key, n: int) -> Int64[Tensor, " n"]:
    """The numbers 0 to n - 1 in random order; ``x[permutation(key, len(x))]`` shuffles x.

    >>> permutation(key(0), 5).sort().values.tolist()
    [0, 1, 2, 3, 4]
    """
    check_key(key)
    if n < 0:
        raise ValueError(f"permutation: expected n >= 0, got {n}")
    return torch.ops.funcnets.random_permutation(key, n)


def categorical(
    key: Key, shape: Sequence[int], logits: Float[Tensor, "*batch categories"]
) -> Int64[Tensor, "*shape"]:
    """Category indices drawn with probabilities ``softmax(logits, -1)``.

    Args:
        shape: of the result; ``logits.shape[:-1]`` must broadcast to it.
        logits: unnormalised log-probabilities; ``-inf`` is never drawn.

    >>> categorical(key(0), (3,), torch.tensor([float("-inf"), 0.0]))
    tensor([1, 1, 1])
    """
    shape = tuple(_sizes(shape))
    try:
        fits = torch.broadcast_shapes(logits.shape[:-1], shape) == shape
    except RuntimeError:
        fits = False
    if not fits or not logits.ndim or not logits.shape[-1]:
        raise ValueError(
            f"logits: expected [..., categories], the leading part broadcasting to {list(shape)}, "
            f"got {list(logits.shape)}"
        )
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (logits + gumbel(key, (*shape, logits.shape[-1]), dtype)).argmax(-1)


def check_key(key: Tensor) -> None:
    """Raises a TypeError or a ValueError where this is no key."""
    if not isinstance(key, Tensor):
        raise TypeError(f"key: expected a uint64 tensor of shape [2], got {type(key).__name__}")
    if key.dtype != torch.uint64 or key.shape != (2,):
        hint = "; map over several keys with vmap" if key.ndim > 1 else ""
        raise ValueError(
            f"key: expected uint64[2], got "
            f"{str(key.dtype).removeprefix('torch.')}{list(key.shape)}{hint}"
        )


def _check_floating(dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")


def _sizes(shape: Sequence[int]) -> list[int]:
    if isinstance(shape, int):
        raise TypeError(f"shape: expected a sequence of sizes, got {shape}; write ({shape},)")
    if any(size < 0 for size in shape):
        raise ValueError(f"shape: expected sizes of at least 0, got {list(shape)}")
    return list(shape)


# The operators. Each takes keys of shape [*batch, 2] and puts the batch first in its result, so
# that one rule serves vmap at any depth. They are opaque to the compilers: no compiler can contract
# or reorder their arithmetic, hence equal bits in eager and compiled code.


def _pure_bits(key: Tensor, count: int) -> Tensor:
    """``count`` random 32-bit words per key, in int64: [*batch, 2] to [*batch, count]."""
    blocks = torch.arange((count + 3) // 4, device=key.device)
    return _philox(key.unsqueeze(-2), blocks).flatten(-2)[..., :count]


def _philox(key: Tensor, offset: Tensor) -> Tensor:
    """Philox4x32-10: keys [*b, 2], added offsets [*b] (broadcast) to int64 words [*b, 4]."""
    mask = 0xFFFFFFFF
    seed, start = key.view(torch.int64).unbind(-1)
    counter = start + offset
    k0, k1 = seed & mask, (seed >> 32) & mask
    c0, c1 = counter & mask, (counter >> 32) & mask
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2**64, as it should
        c0, c1, c2, c3 = (
            ((p1 >> 32) & mask) ^ c1 ^ k0,
            p1 & mask,
            ((p0 >> 32) & mask) ^ c3 ^ k1,
            p0 & mask,
        )
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)


def _pure_keys(key: Tensor, offset: Tensor) -> Tensor:
    words = _philox(key, offset)
    derived = words[..., 0::2] | (words[..., 1::2] << 32)
    return derived.view(torch.uint64)


def _words(key: Tensor, count: int) -> Tensor:
    """``count`` random 32-bit words per key, as int64."""
    if not NATIVE:
        return _pure_bits(key, count)
    words = key.new_empty((*key.shape[:-1], count), dtype=torch.uint32)
    torch.ops.aten._philox_randint_(words, _aligned(key, 1), 0, None)
    return words.to(torch.int64)


def _pairs(words: Tensor) -> Tensor:
    """Two 32-bit words at a time as one of 64, the high half first."""
    return (words[..., 0::2] << 32) | words[..., 1::2]


def _aligned(key: Tensor, sample_ndim: int) -> Tensor:
    """Keys [*batch, 2] as the native operators want them: [*batch, 1, ..., 1, 2]."""
    if key.ndim == 1:
        return key
    return key.reshape(*key.shape[:-1], *[1] * sample_ndim, 2)


def _split(key: Tensor, num: int) -> Tensor:
    if NATIVE:
        return torch.ops.aten._philox_key_split(key, num).movedim(0, -2).contiguous()
    return _pure_keys(key.unsqueeze(-2), torch.arange(num, device=key.device))


def _fold_in(key: Tensor, data: Tensor) -> Tensor:
    if NATIVE and data.ndim == 0:
        return torch.ops.aten._philox_key_fold_in.Tensor(key, data.view(torch.uint64))
    return _pure_keys(key, data)


def _uniform(key: Tensor, shape: list[int], low: float, high: float, dtype: torch.dtype) -> Tensor:
    if NATIVE:
        result = key.new_empty((*key.shape[:-1], *shape), dtype=dtype)
        return torch.ops.aten._philox_uniform_(result, _aligned(key, len(shape)), low, high)
    return _pure_uniform(key, shape, low, high, dtype)


def _pure_uniform(
    key: Tensor, shape: list[int], low: float, high: float, dtype: torch.dtype
) -> Tensor:
    count = math.prod(shape)
    if dtype == torch.float64:
        bits = _pairs(_pure_bits(key, 2 * count)) & (2**53 - 1)
        unit = bits.to(torch.float64) * 2.0**-53
    else:
        digits = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[dtype]
        unit = (_pure_bits(key, count) & (2**digits - 1)).to(torch.float32) * 2.0**-digits
    # The bounds are rounded to the dtype, the rest is computed in at least float32, as in torch.
    start, stop = (torch.tensor(bound, dtype=dtype, device=key.device) for bound in (low, high))
    scaled = unit * (stop - start).to(unit.dtype) + start.to(unit.dtype)
    return scaled.to(dtype).reshape((*key.shape[:-1], *shape))


def _open_uniform(key: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """``count`` uniforms per key in the open interval (0, 1), in float64: [*batch, count].

    Of 64 random bits where float64 is asked for, of 32 otherwise.
    """
    if dtype == torch.float64:
        words = _words(key, 2 * count).to(torch.float64)
        return (words[..., 0::2] + (words[..., 1::2] + 0.5) * 2.0**-32) * 2.0**-32
    return (_words(key, count).to(torch.float64) + 0.5) * 2.0**-32


def _normal(key: Tensor, shape: list[int], mean: float, std: float, dtype: torch.dtype) -> Tensor:
    count = math.prod(shape)
    pairs = _open_uniform(key, count + count % 2, dtype)
    radius = pairs[..., 0::2].log().mul_(-2).sqrt_()
    angle = pairs[..., 1::2] * (2 * math.pi)
    both = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(-2)[..., :count]
    return both.mul_(std).add_(mean).to(dtype).reshape((*key.shape[:-1], *shape))


def _truncated_normal(
    key: Tensor,
    shape: list[int],
    lower: float,
    upper: float,
    mean: float,
    std: float,
    dtype: torch.dtype,
) -> Tensor:
    if lower > 0:  # the left tail is where the distribution function keeps its precision
        return -_truncated_normal(key, shape, -upper, -lower, -mean, std, dtype)
    low, high = (0.5 * math.erfc(-bound / math.sqrt(2)) for bound in (lower, upper))
    unit = _open_uniform(key, math.prod(shape), dtype) * (high - low) + low
    standard = torch.special.ndtri(unit).clamp(lower, upper)
    return (standard * std + mean).to(dtype).reshape((*key.shape[:-1], *shape))


def _gumbel(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    unit = _open_uniform(key, math.prod(shape), dtype)
    return -(-unit.log()).log().to(dtype).reshape((*key.shape[:-1], *shape))


def _randint(key: Tensor, shape: list[int], low: int, high: int) -> Tensor:
    if NATIVE:
        result = key.new_empty((*key.shape[:-1], *shape), dtype=torch.int64)
        return torch.ops.aten._philox_randint_(result, _aligned(key, len(shape)), low, high)
    return _pure_randint(key, shape, low, high)


def _pure_randint(key: Tensor, shape: list[int], low: int, high: int) -> Tensor:
    value = _pairs(_pure_bits(key, 2 * math.prod(shape)))
    # The remainder of an unsigned number in signed arithmetic: halve, divide, correct.
    span = high - low
    half = (value >> 1) & (2**63 - 1)
    remainder = value - ((half // span) << 1) * span
    remainder = torch.where((remainder < 0) | (remainder >= span), remainder - span, remainder)
    return (remainder + low).reshape((*key.shape[:-1], *shape))


def _permutation(key: Tensor, n: int) -> Tensor:
    return _pairs(_words(key, 2 * n)).argsort(dim=-1, stable=True)


def _register() -> None:
    """Defines ``torch.ops.funcnets.random_*``: schema, kernel, shape rule and vmap rule of each."""
    sample = "SymInt[] shape"

    def define(name, schema, kernel, fake):  # type: ignore[no-untyped-def]
        op = f"funcnets::random_{name}"
        torch.library.define(op, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(op, "CompositeExplicitAutograd")(kernel)
        torch.library.register_fake(op)(fake)

        def batched(info, in_dims, key, *arguments):  # type: ignore[no-untyped-def]
            if in_dims[0] is None:
                key = key.expand(info.batch_size, *key.shape)
            else:
                key = key.movedim(in_dims[0], 0)
            if name == "fold_in":  # the only one whose other argument is a tensor
                data = arguments[0]
                arguments = (
                    data.unsqueeze(0) if in_dims[1] is None else data.movedim(in_dims[1], 0),
                )
            return getattr(torch.ops.funcnets, f"random_{name}")(key, *arguments), 0

        torch.library.register_vmap(op, batched)

    def shaped(key, shape, *rest):  # type: ignore[no-untyped-def]
        return key.new_empty((*key.shape[:-1], *shape), dtype=rest[-1])

    define(
        "split",
        "(Tensor key, SymInt num) -> Tensor",
        _split,
        lambda key, num: key.new_empty((*key.shape[:-1], num, 2)),
    )
    define(
        "fold_in",
        "(Tensor key, Tensor data) -> Tensor",
        _fold_in,
        lambda key, data: key.new_empty(key.shape),
    )
    define(
        "uniform",
        f"(Tensor key, {sample}, float low, float high, ScalarType dtype) -> Tensor",
        _uniform,
        shaped,
    )
    define(
        "normal",
        f"(Tensor key, {sample}, float mean, float std, ScalarType dtype) -> Tensor",
        _normal,
        shaped,
    )
    define(
        "truncated_normal",
        f"(Tensor key, {sample}, float lower, float upper, float mean, float std, "
        "ScalarType dtype) -> Tensor",
        _truncated_normal,
        shaped,
    )
    define("gumbel", f"(Tensor key, {sample}, ScalarType dtype) -> Tensor", _gumbel, shaped)
    define(
        "randint",
        f"(Tensor key, {sample}, int low, int high) -> Tensor",
        _randint,
        lambda key, shape, low, high: shaped(key, shape, torch.int64),
    )
    define(
        "permutation",
        "(Tensor key, SymInt n) -> Tensor",
        _permutation,
        lambda key, n: shaped(key, [n], torch.int64),
    )


_register()
