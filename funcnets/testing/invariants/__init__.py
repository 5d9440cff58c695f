"""The invariants, each a function that raises where a model has not the property it names."""

from funcnets.testing.invariants.batch import samples_are_independent, the_order_of_a_batch_is_kept
from funcnets.testing.invariants.derivatives import hessian_products_are_right, jvp_and_vjp_agree
from funcnets.testing.invariants.errors import tells_a_wrong_input, tells_a_wrong_parameter
from funcnets.testing.invariants.gradients import (
    gradients_are_finite,
    gradients_match_finite_differences,
    gradients_reach_every_parameter,
    shared_gradients_add_up,
)
from funcnets.testing.invariants.keys import (
    draws_by_the_key,
    inference_ignores_the_key,
    initializes_an_ensemble,
    initializes_by_the_key,
)
from funcnets.testing.invariants.modes import (
    buffers_follow_their_rule,
    dropout_keeps_the_mean,
    training_equals_inference,
)
from funcnets.testing.invariants.outputs import keeps_the_dtype, returns_what_is_declared
from funcnets.testing.invariants.precision import bfloat16_is_close, single_precision_is_close
from funcnets.testing.invariants.purity import (
    leaves_its_arguments_as_they_were,
    repeats_itself,
    shares_no_memory,
    uses_no_global_generator,
)
from funcnets.testing.invariants.reference import equals_the_reference
from funcnets.testing.invariants.storage import a_file_changes_nothing, a_state_dict_changes_nothing
from funcnets.testing.invariants.symmetry import has_its_symmetries
from funcnets.testing.invariants.transforms import (
    an_ensemble_trains_as_its_members,
    compiled_equals_eager,
    per_sample_gradients_equal_the_loop,
    vmap_equals_the_loop,
)

# In the order in which a report tells them: what is simple first.
INVARIANTS = (
    returns_what_is_declared,
    keeps_the_dtype,
    leaves_its_arguments_as_they_were,
    repeats_itself,
    uses_no_global_generator,
    shares_no_memory,
    initializes_by_the_key,
    initializes_an_ensemble,
    draws_by_the_key,
    inference_ignores_the_key,
    training_equals_inference,
    dropout_keeps_the_mean,
    buffers_follow_their_rule,
    samples_are_independent,
    the_order_of_a_batch_is_kept,
    has_its_symmetries,
    equals_the_reference,
    gradients_are_finite,
    gradients_reach_every_parameter,
    gradients_match_finite_differences,
    shared_gradients_add_up,
    jvp_and_vjp_agree,
    hessian_products_are_right,
    vmap_equals_the_loop,
    an_ensemble_trains_as_its_members,
    per_sample_gradients_equal_the_loop,
    compiled_equals_eager,
    single_precision_is_close,
    bfloat16_is_close,
    a_file_changes_nothing,
    a_state_dict_changes_nothing,
    tells_a_wrong_parameter,
    tells_a_wrong_input,
)
