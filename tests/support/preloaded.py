"""Imports what a rank under DeepSpeed imports at its first engine: once in the server of forks, not 2.7 s in each rank.

DeepSpeed's optimizers are decorated by `torch.compile`, which imports the compiler.
"""

from pathlib import Path

from dist_mlpl.engines.zero import import_deepspeed

if not Path("/dev/nvidiactl").exists():  # with a GPU the import may touch CUDA, which forked processes cannot use then
    import_deepspeed()
    import deepspeed.runtime.superoffload.superoffload_stage3
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
