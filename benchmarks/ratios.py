"""The ratios that are columns of tables."""

from benchmarks.runner import Ratio

JAX_OVER_OURS = Ratio("jax.nn / ours", ("jax.nn",), "ours")
TORCH_OVER_OURS = Ratio("torch / ours", ("torch",), "ours")
OURS_OVER_READ = Ratio("ours / read", ("ours",), "read")
MULTIPLY_ADDS_OVER_OURS = Ratio("multiply-adds / ours", ("multiply-adds",), "ours")
OURS_OVER_PLAIN = Ratio("ours / plain", ("ours",), "plain")
OURS_OVER_ADD = Ratio("ours / (x + 1)", ("ours",), "x + 1")

THREE_PASS = ("three_pass_recompute", "three_pass_reload")
BEST_OVER_TWO_PASS = Ratio("best three-pass / two_pass", THREE_PASS, "two_pass")
AUTO_OVER_READ_AND_COPY = Ratio("auto / (read + copy)", ("auto",), "read + copy")
RELOAD_OVER_AUTO = Ratio("reload / auto net of the call", ("three_pass_reload",), "auto", overhead="a call")
AUTO_OVER_COPY = Ratio("auto / copy", ("auto",), "non-temporal copy")
SPEED_UP = Ratio("1 thread / 2 threads", ("1 thread",), "2 threads")

ORT_OVER_OURS = Ratio("onnxruntime / ours", ("onnxruntime",), "ours")
OPENVINO_OVER_OURS = Ratio("openvino / ours", ("openvino",), "ours")
SCIPY_OVER_OURS = Ratio("scipy / ours", ("scipy",), "ours")
OVER_OURS = (JAX_OVER_OURS, TORCH_OVER_OURS, ORT_OVER_OURS, OPENVINO_OVER_OURS, SCIPY_OVER_OURS)

OURS_OVER_JITTED = Ratio("ours / ours in jit", ("ours",), "ours in jit")
JAX_OVER_PATCHED = Ratio("jax.nn / patched", ("jax.nn",), "patched")
JAX_OVER_OUR_LOSSES = Ratio("jax.nn / our losses", ("jax.nn",), "our losses")

CACHED_BYTES = 2.0**16
"""Temporary memory that lies in a first- or second-level cache is not worth a ratio."""

PATCHED_MEMORY = Ratio("patched / jax.nn", ("patched",), "jax.nn", least=CACHED_BYTES)
OUR_LOSSES_MEMORY = Ratio("our losses / jax.nn", ("our losses",), "jax.nn", least=CACHED_BYTES)

HEAP_BYTES = 2.0**25
"""glibc takes smaller blocks from its heap, which may have grown before, so that the process may not grow."""

PATCHED_GROWTH = PATCHED_MEMORY._replace(least=HEAP_BYTES)
