"""What torch keeps private and funcnets needs, in one place. Written for torch 2.11 to 2.15.

Five things have no public name: whether a torch.func transform or a trace is under way, the
tensor below the wrappers of the transforms, sizes in a record that are known when it runs alone,
the way from a recorded graph to a compiler that does not have Dynamo read the Python code again,
and that the fused kernels of torch.optim take a gradient to lie in memory as its parameter does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._dynamo.guards import TensorGuards
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.backends.registry import lookup_backend
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import _get_current_dispatch_mode

# The conditional and the loops as one node of a graph.
cond_node = torch.ops.higher_order.cond
scan_node = torch.ops.higher_order.scan
while_node = torch.ops.higher_order.while_loop


def transforming() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) is under way."""
    return _functorch.peek_interpreter_stack() is not None


def vmapping() -> bool:
    """Whether a vmap is under way, at any depth of the transforms; so it may be under Dynamo."""
    return torch.compiler.is_dynamo_compiling() or _functorch.TransformType.Vmap in _transforms()


def first_order() -> bool:
    """Whether an operator with a first derivative alone will do: no jvp, at most one grad or vjp.

    Plain autograd does not tell beforehand that a second derivative will be taken, and Dynamo not
    what it will do with the graph: both are taken for first order.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    if forward_ad._current_level >= 0:
        return False
    found = _transforms()
    kinds = _functorch.TransformType
    return kinds.Jvp not in found and found.count(kinds.Grad) <= 1


def at_most_one_vmap() -> bool:
    """Whether nothing else is under way: no derivative, no recording, no second vmap."""
    if torch.compiler.is_dynamo_compiling() or abstract() or forward_ad._current_level >= 0:
        return False
    return _transforms() in ([], [_functorch.TransformType.Vmap])


def of_all_members(
    f: Callable[[int, list[Tensor]], list[Tensor]], tensors: list[Tensor]
) -> list[Tensor]:
    """Under the one vmap under way: f of the number of members and of the tensors of them all.

    The members are the first axis of the tensors, and have to be that of the results. An autograd
    Function with a rule for vmap does the same, and takes half a millisecond more.
    """
    interpreter: Any = retrieve_current_functorch_interpreter()
    level, members = interpreter.level(), interpreter.batch_size()
    pairs = [_functorch._unwrap_batched(tensor, level) for tensor in tensors]
    with interpreter.lower():
        given = [
            tensor.expand(members, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
            for tensor, axis in pairs
        ]
        results = f(members, given)
    return [_functorch._add_batch_dim(result, 0, level) for result in results]


def _transforms() -> list[Any]:
    """The kinds of the torch.func transforms under way, the outermost first."""
    return [interpreter.key() for interpreter in _functorch.get_interpreter_stack() or []]


def tracing() -> bool:
    """Whether `trace` records what runs."""
    return get_proxy_mode() is not None


def abstract() -> bool:
    """Whether tensors have shapes and no values: under tracing and under FakeTensorMode."""
    mode = _get_current_dispatch_mode()
    return isinstance(mode, FakeTensorMode) or tracing()


def inlining() -> bool:
    """Whether a compiled function must run as the plain one: something around it looks inside."""
    return (
        transforming()
        or _get_current_dispatch_mode() is not None
        or torch.compiler.is_dynamo_compiling()
    )


def computed_once(scalar: Tensor) -> Tensor:
    """The same number; in compiled code a buffer of its own.

    Inductor would compute it anew for every few elements of all that it meets, powers and cosines
    among it, for it keeps only what it takes for dear. What is reduced is kept, if it is not short.
    """
    if torch.compiler.is_dynamo_compiling() or tracing():
        return scalar.expand(16).amax(0)
    return scalar


def batched(tensor: Tensor) -> bool:
    """Whether the tensor holds one value per member of a vmap under way, at any depth."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def physical(tensor: Tensor) -> Tensor:
    """The tensor below all wrappers of the transforms under way, members and all."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def distinct(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Tensors that share no memory, as nodes of a graph want their operands.

    Every tensor once, copied where it shares the memory of an earlier one; and for each of the
    tensors given, its place among these.
    """
    places: dict[int, int] = {}
    storages: set[int] = set()
    apart: list[Tensor] = []
    for tensor in tensors:
        if id(tensor) in places:
            continue
        places[id(tensor)] = len(apart)
        storage = tensor.untyped_storage()._cdata
        apart.append(tensor.clone() if storage in storages else tensor)
        storages.add(storage)
    return apart, [places[id(tensor)] for tensor in tensors]


def laid_out(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient with the strides of its (dense) parameter, as ``backward()`` leaves it.

    A gradient comes channels last where the images are so, or with strides of 0; the fused kernels
    of torch.optim go through memory as it lies, and do not look.
    """
    if gradient.stride() == like.stride():
        return gradient
    return torch.empty_like(like).copy_(gradient)


@contextlib.contextmanager
def shapes_only() -> Iterator[FakeTensorMode]:
    """Inside, operations compute shapes and dtypes, and no numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


class Recorded(NamedTuple):
    """A graph, the stand-ins for tensors that it was recorded with, and their mode."""

    graph: GraphModule
    inputs: list[Tensor]
    mode: FakeTensorMode
    ragged: bool  # whether it may hold sizes that are known when it runs and not before


class _Shapes(ShapeEnv):
    """The sizes of a record, and whether some may be known when it runs alone."""

    ragged: bool | None = None  # nobody has asked


class _Again(BaseException):
    """The record is to be made anew; no error, for which the function itself might have a use.

    Attributes:
        ragged: whether sizes may then be ragged.
    """

    def __init__(self, ragged: bool) -> None:
        self.ragged = ragged


def may_be_ragged(tensor: Tensor) -> bool:
    """Whether the record under way may hold sizes that are known when it runs and not before."""
    if torch.compiler.is_dynamo_compiling():
        return False
    tensor = physical(tensor)
    shapes = tensor.fake_mode.shape_env if isinstance(tensor, FakeTensor) else None
    if not isinstance(shapes, _Shapes):
        return False
    if shapes.ragged is None:
        raise _Again(ragged=True)
    return shapes.ragged


def not_ragged(size: int | torch.SymInt) -> None:
    """Where the size is ragged, the record is begun anew without such sizes."""
    if not isinstance(size, int):
        raise _Again(ragged=False)


def positive(size: int | torch.SymInt) -> None:
    """Says of a ragged size that it is never 0, to the record under way and to its compiler."""
    torch._check(size >= 1)
    torch.ops.aten.sym_constrain_range_for_size.default(size, min=1)


# In forward mode torch takes zeros without memory for tangents that are none. What it does with
# them on stand-ins (2.15) sends their device to meta, so a record has plain zeros.
_PLAIN_ZEROS = {torch.ops.aten._efficientzerotensor.default: torch.zeros}


def trace(f: Callable[..., Any], tensors: list[Tensor], ragged: bool | None = None) -> Recorded:
    """The operations that ``f(*tensors)`` carries out, transforms resolved.

    Whether sizes may be ragged is found out where it is not said: they may where f asks for them
    and all that it does can be recorded so.
    """
    shapes = _Shapes()
    shapes.ragged = ragged
    # A mode of our own, for make_fx's has no ShapeEnv, and a recorded while loop wants one.
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes, static_shapes=True)
    with mode:
        # Made anew, not by mode.from_tensor: that would give an argument and the same tensor closed
        # over one stand-in, and with it one memory.
        inputs = [
            torch.empty_strided(
                tensor.shape,
                tensor.stride(),
                dtype=tensor.dtype,
                device=tensor.device,
                requires_grad=tensor.requires_grad,
            )
            for tensor in tensors
        ]
    graph: GraphModule | None = None
    try:
        # Some operations know how to do with such sizes in Python alone.
        with mode, enable_python_dispatcher() if ragged else contextlib.nullcontext():
            graph = make_fx(f, _PLAIN_ZEROS)(*inputs)
    except _Again as again:
        ragged = again.ragged
    except Exception:
        if not ragged:
            raise
        ragged = False
    if graph is None:  # here, so that what f raises then is not said to come from handling this
        return trace(f, tensors, ragged)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return Recorded(graph, inputs, mode, bool(ragged))


def holds_loop(recorded: Recorded) -> bool:
    """Whether there is a while loop in the graph or in a branch of it.

    Its reverse derivative in torch (2.15) was found wrong for a loop whose length depends on data.
    """
    parts = [part for part in recorded.graph.modules() if isinstance(part, GraphModule)]
    return any(node.target is while_node for part in parts for node in part.graph.nodes)


def computes_channels_last(recorded: Recorded) -> bool:
    """Whether Inductor should compute the 2-d convolutions on a CPU with channels last.

    Their inputs and results gain by it and their weights lose, for oneDNN makes another order of
    those in each call: it pays where the former are more. Of a batch of unknown size torch (2.15)
    takes a convolution's result to be contiguous.
    """
    if recorded.ragged:
        return False
    values = weights = 0
    for node in _cpu_convolutions(recorded):
        values += node.args[0].meta["val"].numel() + node.meta["val"].numel()
        weights += node.args[1].meta["val"].numel()
    return bool(values > weights)


def channels_last_weights(recorded: Recorded) -> set[torch.Size]:
    """The shapes of the inputs that are weights of convolutions computed with channels last."""
    if not computes_channels_last(recorded):
        return set()
    inputs = {node for node in recorded.graph.graph.nodes if node.op == "placeholder"}
    shapes = set()
    for node in _cpu_convolutions(recorded):
        weight = node.args[1]
        if weight.target is torch.ops.aten._to_copy.default:  # by autocast
            weight = weight.args[0]
        if weight in inputs:
            shapes.add(weight.meta["val"].shape)
    return shapes


def _cpu_convolutions(recorded: Recorded) -> Iterator[Any]:
    """The nodes of 2-d convolutions on a CPU."""
    for node in recorded.graph.graph.nodes:
        if node.target is torch.ops.aten.convolution.default:
            value = node.args[1].meta["val"]
            if value.ndim == 4 and value.device.type == "cpu":
                yield node


def compile_graph(recorded: Recorded, backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """Hands a graph to a backend of torch.compile (a name or a function) as Dynamo would."""
    options: dict[str, Any] = {}
    if backend == "inductor" and (recorded.ragged or any(_cpu_convolutions(recorded))):
        options["config_patches"] = {"layout_optimization": computes_channels_last(recorded)}
    with torch._guards.tracing(torch._guards.TracingContext(recorded.mode)):
        return lookup_backend(backend)(recorded.graph, recorded.inputs, **options)


def guard(tensors: list[Tensor]) -> Callable[..., bool]:
    """A check that tensors have the shapes, strides, dtypes, devices, classes of these."""
    sizes: list[Any] = [list(tensor.shape) for tensor in tensors]
    strides: list[Any] = [list(tensor.stride()) for tensor in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
