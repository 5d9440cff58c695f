"""Parameter trees: what can be done with a nested TensorDict, without changing it."""

from funcnets.tree.arithmetic import cast, count, ema, global_norm, lerp, stack, unstack
from funcnets.tree.convert import (
    from_module,
    from_state_dict,
    to_module,
    to_state_dict,
    transfer,
)
from funcnets.tree.flatten import (
    Structure,
    Template,
    describe,
    entries,
    flatten,
    join,
    leaves,
    leaves_with_path,
    map,
    map_with_path,
    unflatten,
    unflatten_like,
)
from funcnets.tree.report import Differences, Spec, check, compare, specs, summary
from funcnets.tree.select import is_trainable, matcher, merge, partition

__all__ = [
    "Differences",
    "Spec",
    "Structure",
    "Template",
    "cast",
    "check",
    "compare",
    "count",
    "describe",
    "ema",
    "entries",
    "flatten",
    "from_module",
    "from_state_dict",
    "global_norm",
    "is_trainable",
    "join",
    "leaves",
    "leaves_with_path",
    "lerp",
    "map",
    "map_with_path",
    "matcher",
    "merge",
    "partition",
    "specs",
    "stack",
    "summary",
    "to_module",
    "to_state_dict",
    "transfer",
    "unflatten",
    "unflatten_like",
    "unstack",
]
