"""Stillhouse: run, shrink and sharpen R1-distilled reasoning models on one's own machine.

The map, from the ground up (imports run down only):

    r1/        everything special about R1-distilled models; imports no runtime
    backends/  token ids in, tokens out; knows nothing of HTTP, roles or <think>
    server/    HTTP; every JSON key lives here and nowhere else
    train/     supervised fine-tuning and reinforcement learning with rewards that can be checked
    quantize/  16-bit weights in, 4-bit files out, with the loss measured
"""

__version__ = "0.1.0"
