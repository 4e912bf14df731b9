"""What the tests of whole runs share."""

import pytest


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of coloured images."""
    import training

    return training.images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory):
    """A run that nothing interrupts: its folder and its result."""
    import torch
    import training

    from deit.train import train

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in training.py: sums in another order would be other bits
    out = tmp_path_factory.mktemp("whole")
    try:
        return out, train(training.options(data, out))
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def one_thread():
    """The bits of a run depend on the number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
