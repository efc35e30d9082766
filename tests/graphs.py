"""What CUDA graphs of a runner give, for tests on a GPU."""

import torch

from moetune.backends.base import FillsPart
from moetune.backends.reference import relative_error


def replayed_error(runner, tactic):
    """Returns the largest error of two draws' graphs, replayed in the other order, against what ran without graphs.

    Kernels that add with atomics differ between runs by their order, so a test says how much is allowed.
    """

    def filled(out, draw):
        return runner.filled(out, draw) if isinstance(runner, FillsPart) else out

    expected = [filled(runner.run(tactic, draw), draw).clone() for draw in (0, 1)]
    graphs, outs = [], []
    for draw in (0, 1):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs.append(runner.run(tactic, draw))
        graphs.append(graph)
    errors = []
    for draw in (1, 0):
        graphs[draw].replay()
        errors.append(relative_error(filled(outs[draw], draw), expected[draw].float()))
    return max(errors)
