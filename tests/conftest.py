"""Settings that must hold before torch and triton are imported."""
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")       # run the kernel in Triton's interpreter
torch.set_num_threads(1)        # tiny steps gain nothing from a second thread, and wait for it on a busy machine
