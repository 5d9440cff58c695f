"""Forward and reverse mode agree, and second derivatives are symmetric."""

from __future__ import annotations

from torch import Tensor
from torch.func import grad, jvp, vjp

from funcnets import tree
from funcnets.testing.engine import Try, invariant
from funcnets.testing.invariants.places import (
    DIFFERENCES,
    At,
    closest_difference,
    direction,
    dot,
    in_training,
    size,
)
from funcnets.testing.subject import Violation, smooth


@invariant(examples=5)
def jvp_and_vjp_agree(trial: Try) -> None:
    """Forward and reverse mode give the same product of two directions with the Jacobian."""
    at, outputs = in_training(trial)

    def f(at: At) -> At:
        return {(str(i),): y for i, y in enumerate(smooth(outputs(at)))}

    along = direction(trial, 1, at)
    values, ahead = jvp(f, (at,), (along,))[:2]
    cotangent = direction(trial, 2, values)
    (pulled,) = vjp(f, at)[1](cotangent)
    forward, reverse = dot(ahead, cotangent), dot(pulled, along)
    if not abs(forward - reverse) <= trial.tolerance * (1 + size(pulled, along)):
        raise Violation("jvp", f"{reverse.item():.8g}, as vjp", f"{forward.item():.8g}")


def _named(at: At) -> dict[str, Tensor]:
    return {tree.join(path): x for path, x in at.items()}


@invariant(examples=5)
def hessian_products_are_right(trial: Try) -> None:
    """Hessian-vector products are symmetric, the same in both modes, and as differences say."""
    at, outputs = in_training(trial)

    def loss(at: At) -> Tensor:
        return trial.subject.loss(outputs(at))

    ways = direction(trial, 1, at), direction(trial, 2, at)
    first, second = (jvp(grad(loss), (at,), (way,))[1] for way in ways)
    one, other = dot(first, ways[1]), dot(second, ways[0])
    if not abs(one - other) <= trial.tolerance * (1 + size(first, ways[1])):
        raise Violation("hessian", f"{other.item():.8g}", f"{one.item():.8g}", "symmetry")
    reverse = grad(lambda at: dot(grad(loss)(at), ways[0]))(at)
    trial.close(_named(reverse), _named(first), "reverse over reverse mode", factor=100)
    found = closest_difference(
        lambda h: dot(grad(loss)({path: x + h * ways[0][path] for path, x in at.items()}), ways[1]),
        one.item(),
        at,
    )
    bound = DIFFERENCES[trial.subject.dtype] * (1 + size(first, ways[1]))
    if not abs(found - one) <= bound:
        got = f"{one.item():.8g}"
        raise Violation("hessian", f"{found:.8g}, by differences of gradients", got)
