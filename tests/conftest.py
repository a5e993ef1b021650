import hypothesis
import jax


# A library must not lean on implicit promotion: both are errors here.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline: the first example of every shape compiles. Derandomized, so that a
# failure is a change of the code and not of the dice.
hypothesis.settings.register_profile(
    "flashquinox", deadline=None, derandomize=True, max_examples=40
)
hypothesis.settings.load_profile("flashquinox")
