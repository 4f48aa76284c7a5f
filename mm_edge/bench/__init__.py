"""The measuring harness: a worker runs on the device, a transport reaches it, a session asks and checks the answers.

The harness knows nothing of PyTorch, of models or of pruning. This module imports nothing.
"""

MINIMUM_PAIRS = 200  # interleaved pairs of runs behind a reported latency
