import collections
import re
from collections import OrderedDict

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.func import grad, vmap
from torch.utils import _pytree
from trees import nested, params, same, tensors

from funcnets import random, tree

Point = collections.namedtuple("Point", "x y")

ANY = st.recursive(
    st.none() | st.integers() | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(OrderedDict)
        | st.builds(Point, inner, inner)
        | params()
    ),
    max_leaves=10,
)


@given(ANY)
def test_unflatten_inverts_flatten(value):
    leaves, structure = tree.flatten(value)
    again, same_structure = tree.flatten(tree.unflatten(structure, leaves))
    assert structure == same_structure
    assert hash(structure) == hash(same_structure)
    assert all(a is b for a, b in zip(leaves, again, strict=True))


@given(ANY)
def test_unflatten_like_builds_what_unflatten_does(value):
    leaves, structure = tree.flatten(value)
    new = [object() for _ in leaves]
    again, same_structure = tree.flatten(tree.unflatten_like(value, new))
    expected, expected_structure = tree.flatten(tree.unflatten(structure, new))
    assert same_structure == expected_structure
    assert all(a is b is c for a, b, c in zip(new, again, expected, strict=True))
    assert all(a is b for a, b in zip(leaves, tree.leaves(value), strict=True))


PAIR = TensorDict({"n": TensorDict({"a": torch.zeros(1), "b": torch.ones(2)})})


@example({"x": 1, "y": 2}, Point(1, 2), None)
@example({0: 1, 1: 2}, (1, 2), None)
@example({"a": {"b": 1}}, {"a": 1}, None)
@example(PAIR, None, TensorDict.copy)
@example(PAIR.to_dict(), PAIR, None)
@given(ANY, ANY, st.sampled_from([None, dict, OrderedDict, list, tuple, TensorDict.copy]))
def test_leaves_like_are_those_that_map_with_path_meets(value, other, kind):
    """For trees of one structure, in another order or container, and for any two."""
    if kind is not None:
        other = reordered(value, kind)
    expected = []
    try:
        tree.map_with_path(lambda path, _, leaf: expected.append(leaf), other, value)
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            tree.leaves_like(value, other)
    else:
        found = tree.leaves_like(value, other)
        assert all(a is b for a, b in zip(found, expected, strict=True))


def reordered(value, kind):
    """The same names from the last to the first, and sequences in another container."""
    if isinstance(value, TensorDict):
        return backwards(value)
    if isinstance(value, dict):
        made = {name: reordered(child, kind) for name, child in reversed(list(value.items()))}
        return kind(made) if kind in (dict, OrderedDict) else made
    if type(value) in (list, tuple):
        children = [reordered(child, kind) for child in value]
        return kind(children) if kind in (list, tuple) else children
    return value


@given(ANY, ANY, st.booleans())
def test_a_template_reads_and_builds_trees_of_its_structure_alone(one, other, alike):
    leaves, structure = tree.flatten(one)
    template = tree.Template(structure)
    again, same_structure = tree.flatten(template.unflatten(leaves))
    assert structure == same_structure
    assert all(a is b for a, b in zip(leaves, again, strict=True))
    if alike:
        other = tree.unflatten(structure, leaves)
    found, expected = template.flatten(other), tree.leaves(other)
    assert (found is None) == (structure != tree.flatten(other)[1])
    assert found is None or all(a is b for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("other", [None, [], (1,), {"c": 1}, TensorDict({"c": torch.ones(2)})])
def test_a_template_sees_a_tree_in_place_of_a_leaf(other):
    template = tree.Template(tree.flatten({"a": 1, "b": torch.ones(2)})[1])
    assert template.flatten({"a": 1, "b": 2}) == [1, 2]
    assert template.flatten({"a": other, "b": torch.ones(2)}) is None
    assert template.flatten({"a": 1, "b": other}) is None


@given(params(), st.data())
def test_a_template_sees_another_name_order_or_batch_size(tensordict, data):
    _, structure = tree.flatten(tensordict)
    other = data.draw(st.sampled_from([TensorDict.copy, backwards, renamed, within_batch]))(
        tensordict
    )
    found = tree.Template(structure).flatten(other)
    assert (found is None) == (structure != tree.flatten(other)[1])


def renamed(held):
    return TensorDict({f"{name}_": child for name, child in held.items()})


def within_batch(held):
    return TensorDict(tree.map(lambda leaf: leaf[None], held).to_dict(), batch_size=[1])


@given(ANY)
def test_same_leaves_in_the_same_order_as_torch(value):
    expected = [leaf for leaf in _pytree.tree_leaves(value) if leaf is not None]
    assert [id(leaf) for leaf in tree.leaves(value)] == [id(leaf) for leaf in expected]
    assert [id(leaf) for _, leaf in tree.leaves_with_path(value)] == [id(leaf) for leaf in expected]


@given(nested())
def test_paths_lead_to_their_leaves(entries):
    for path, leaf in tree.leaves_with_path(TensorDict(entries)):
        place = entries
        for name in path:
            place = place[name]
        assert place is leaf


def backwards(held):
    if isinstance(held, torch.Tensor):
        return held
    return TensorDict({name: backwards(child) for name, child in reversed(list(held.items()))})


@given(params())
def test_map_matches_by_name(first):
    shuffled = backwards(dict(first.items()))
    ids = tree.map(lambda a, b: a is b, first, shuffled)
    assert all(tree.leaves(ids))
    assert same(tree.map(lambda leaf: leaf.clone(), first), first)


def test_map_reads_another_kind_of_node_by_name():
    mapped = tree.map(torch.add, TensorDict({"a": torch.ones(2)}), {"a": torch.ones(2)})
    assert mapped["a"].tolist() == [2, 2]
    assert isinstance(mapped, TensorDict)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": {"b": 1}}, "a: expected the same names.*missing c, unexpected nothing"),
        ({"a": {"b": 1, "c": 2, "d": 3}}, "a: expected the same.*missing nothing, unexpected d"),
        ({"a": {"b": 1, "c": {"e": 2}}}, "a.c: expected a leaf, got dict"),
        ({"a": 1}, "a: expected dict, got int"),
        ([1], r"\(root\): expected dict, got list"),
    ],
)
def test_map_names_the_place_of_a_difference(other, message):
    with pytest.raises(ValueError, match=message):
        tree.map(lambda a, b: a, {"a": {"b": 1, "c": 2}}, other)


def test_unflatten_counts_its_leaves():
    leaves, structure = tree.flatten({"a": 1, "b": (2,)})
    with pytest.raises(ValueError, match="fewer leaves"):
        tree.unflatten(structure, leaves[:1])
    with pytest.raises(ValueError, match="1 more leaves"):
        tree.unflatten(structure, [*leaves, 3])
    with pytest.raises(ValueError, match="fewer leaves"):
        tree.unflatten(None, [])
    with pytest.raises(ValueError, match="unflatten_like: fewer leaves"):
        tree.unflatten_like({"a": 1, "b": (2,)}, leaves[:1])
    with pytest.raises(ValueError, match="unflatten_like: 1 more leaves"):
        tree.unflatten_like({"a": 1, "b": (2,)}, [*leaves, 3])


def test_batch_size():
    ensemble = vmap(lambda key: TensorDict({"a": {"w": random.normal(key, (2,))}}))(
        random.split(random.key(0), 3)
    )
    mapped = tree.map(lambda leaf: leaf + 1, ensemble)
    assert mapped.batch_size == mapped["a"].batch_size == (3,)
    assert tree.map(lambda leaf: leaf.sum(), ensemble).batch_size == ()


def test_leaves_that_are_no_tensors():
    assert tree.map(lambda leaf: "x", TensorDict({"a": torch.ones(1)})) == {"a": "x"}


def test_under_transforms():
    weights = TensorDict({"a": torch.ones(3), "b": {"c": torch.ones(3, 2)}})

    def loss(params):
        return sum(leaf.sum() for leaf in tree.leaves(tree.map(torch.square, params)))

    assert same(grad(loss)(weights), tree.map(lambda leaf: 2 * leaf, weights))
    ensemble = TensorDict(weights.to_dict(), batch_size=[3])
    assert same(vmap(grad(loss))(ensemble), tree.map(lambda leaf: 2 * leaf, ensemble))


def test_entries_of_other_containers():
    with pytest.raises(TypeError, match=r"layers\.0: expected a TensorDict, got list"):
        tree.entries([torch.ones(1)], ("layers", "0"))


@given(params())
def test_unflatten_makes_what_tensordict_itself_would_make(parameters):
    leaves, structure = tree.flatten(parameters)
    made = tree.unflatten(structure, leaves)
    own = TensorDict(parameters.to_dict())
    assert vars(made).keys() == vars(own).keys()
    for name, value in vars(own).items():
        assert type(vars(made)[name]) is type(value), name
    assert made.is_locked == own.is_locked
    assert made.lock_().is_locked
    assert made.to_dict().keys() == own.to_dict().keys()
