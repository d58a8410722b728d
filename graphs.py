"""CUDA graphs: a step made of a thousand small kernels, recorded once and then replayed by one call.

A token of LlamaGen-XL at batch 8 is some thousand kernels, each a few microseconds of work on a large GPU,
and Python needs longer than that to start one: the GPU waits for us. A CUDA graph is the list of kernels of a
piece of code, with all their arguments. It can be started as a whole, and the GPU then walks through it on
its own. The price is that everything in it is frozen: the same memory, the same shapes, no decision that
depends on a number. So what changes from step to step (the last token, its position, the random stream) has
to live in tensors that the step itself updates, and shapes that grow grow in few, large strides: `places`.

On other devices, and with the environment variable CUDA_GRAPHS=0, a step is simply called. A recording that
fails ends the program: torch cannot take a half-made one back from its random streams and its memory, so no
draw behind it could be trusted. Source: "CUDA Graphs" in PyTorch's notes. Not yet tried on a GPU: there was
none where this was written. tests/test_model.py runs the step in strides on the CPU: same tokens.
"""
import os

import torch

from common.config import Fault

# Attention looks at 256 places, filled or not: one recording for a picture of 256 tokens. A recording waits
# for the GPU and tidies its memory, which we take to cost more than looking at empty places does.
STRIDE = {"cuda": 256}


def places(filled, most, device):
    """How many places of a buffer a step should look at, of which `filled` are in use: a few sizes only where
    steps are recorded, exactly these elsewhere."""
    stride = STRIDE.get(device.type, 1)
    return min(most, -(-filled // stride) * stride)


class Replay:
    """A function step(key), which returns nothing, called as often as you like. On a GPU the first call of a
    key runs it (and so warms it up), the second one records it, and from then on it is replayed."""

    def __init__(self, step, device, generator=None, record=True):
        """generator: the random stream that the step draws from, None for torch's own."""
        self.step, self.generator = step, generator
        self.record = record and device.type == "cuda" and os.environ.get("CUDA_GRAPHS") != "0"
        self.seen, self.graphs, self.pool = set(), {}, None

    def __call__(self, key):
        if not self.record or key not in self.seen:
            self.seen.add(key)
            return self.step(key)
        if key not in self.graphs:
            self._record(key)
        self.graphs[key].replay()

    def _record(self, key):
        """Recording runs nothing. Raises Fault if it fails."""
        try:
            graph = torch.cuda.CUDAGraph()
            if self.generator is not None:
                graph.register_generator_state(self.generator)
            # thread_local: other threads, NCCL's watchdog for one, may go on with what they do
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.step(key)
        except RuntimeError as error:
            raise Fault(f"the sampler's step could not be recorded as a CUDA graph "
                        f"({str(error).splitlines()[0]:.99}): set CUDA_GRAPHS=0 in the environment, and it "
                        f"runs without, and slower") from error
        self.graphs[key], self.pool = graph, graph.pool()       # they never run at once, so they share memory
