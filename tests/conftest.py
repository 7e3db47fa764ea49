"""Settings that must hold before torch and triton are imported."""
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")       # run the kernel in Triton's interpreter
torch.set_num_threads(1)        # tiny steps gain nothing from a second thread, and wait for it on a busy machine


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """A run of all tests is shared by two processes where pytest-xdist is installed (-n 0: by none)."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.usepdb
    worker = hasattr(config, "workerinput")              # is told the same options, and must start none of its own
    if whole and not worker and getattr(config.option, "numprocesses", 0) is None:
        config.option.numprocesses, config.option.dist = 2, "worksteal"
