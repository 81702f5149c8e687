"""VLMEvalKit (`ms-vlmeval`), in a process of its own, and in an environment of its own if it has one.

Importing it switches the checks of TLS certificates off, and gradients: nothing but that process imports it. `evaluate`
starts the process, whose entry is `__main__` and whose model is `model`; they share `Outcome`'s file.
"""

NAME = "vlmevalkit"
DISTRIBUTION = "ms-vlmeval"
MODULE = "vlmeval"
