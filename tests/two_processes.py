"""Trains as one of several processes; run by torchrun's environment variables. Arguments: folder, kind."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed

sys.path.insert(0, str(Path(__file__).parent))

from test_train import X, config_of
from vesalius.dictionaries import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for kind in sys.argv[2].split(","):
        train(X, config_of(kind, dead_after=100), Path(sys.argv[1]) / kind)
    torch.distributed.destroy_process_group()
