"""What must hold on a CUDA device, too: the numbers of the CPU, and all stays on the device."""

import pytest
import torch
from torch.func import grad, vmap

from funcnets import models, optim, random, tree
from funcnets.compile import compile
from funcnets.control import cond, route, scan, while_loop

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def both(f):
    """The result of a function of a key, on the CPU and moved there from the GPU."""
    on_gpu = f(random.key(7, device="cuda"))
    assert all(leaf.is_cuda for leaf in tree.leaves(on_gpu))
    return f(random.key(7)), tree.map(torch.Tensor.cpu, on_gpu)


@pytest.mark.parametrize(
    "draw",
    [
        lambda key: random.split(key, 3),
        lambda key: random.fold_in(key, 5),
        lambda key: random.uniform(key, (1001,)),
        lambda key: random.uniform(key, (1001,), -1.0, 3.0, torch.float64),
        lambda key: random.randint(key, (1001,), -5, 100),
        lambda key: random.bernoulli(key, (1001,), 0.3),
        lambda key: random.permutation(key, 1001),
        lambda key: vmap(lambda key: random.uniform(key, (7,)))(random.split(key, 5)),
    ],
)
def test_draws_are_those_of_the_cpu(draw):
    assert torch.equal(*both(draw))


@pytest.mark.parametrize("draw", [random.normal, random.truncated_normal, random.gumbel])
def test_normals_are_those_of_the_cpu_but_for_rounding(draw):
    torch.testing.assert_close(*both(lambda key: draw(key, (1001,))), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("model", "shape"), [(models.mlp(8, 3, norm="layer"), (5, 8)), (models.cnn(1, 3), (5, 1, 8, 8))]
)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_training_step_of_an_ensemble(model, shape, backend):
    optimizer = optim.adamw(1e-2)

    def step(params, state, x):
        def member(params, state):
            trainable, buffers = tree.partition(params)

            def loss(trainable):
                merged = tree.merge(trainable, buffers)
                return model.apply(merged, x, train=True)[0].square().mean()

            updates, state = optimizer.update(grad(loss)(trainable), state, trainable)
            return tree.merge(optim.apply_updates(trainable, updates), buffers), state

        return vmap(member)(params, state)

    def run(key):
        params = vmap(model.init)(random.split(key, 3))
        state = vmap(lambda params: optimizer.init(tree.partition(params)[0]))(params)
        x = random.normal(key, shape)
        run = step if key.device.type == "cpu" else compile(step, donate=0, backend=backend)
        return run(params, state, x)[0]

    for a, b in zip(*map(tree.leaves, both(run)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-2)  # Adam turns rounding into steps


@pytest.mark.parametrize("compiled", [False, True])
def test_control_flow(compiled):
    def f(key):
        x = random.normal(key, (6, 3))
        total, sums = scan(lambda c, row: (c + row, c.sum()), torch.zeros_like(x[0]), x)
        taken = cond(total.sum() > 0, torch.sin, torch.cos, (total,))
        (grown,) = while_loop(lambda y: y.sum() < 50, lambda y: (y * 2,), (x.abs() + 1,))
        routed = route(x[:, 0] > 0, [lambda _, x: x, lambda _, x: x * 3], None, x)
        return {"sums": sums, "taken": taken, "grown": grown, "routed": routed}

    f = compile(f, backend="aot_eager") if compiled else f
    for a, b in zip(*map(tree.leaves, both(f)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
