"""A tokenizer that knows a little Korean and English."""

import pytest
import torch

from twelve.data.tokenizer import Tokenizer

TEXTS = ["The ship sails at dawn, and the captain counts twelve.", "배 열두 척이 새벽에 떠나고 장군은 바다를 본다."] * 4


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The models are too small to share among cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(TEXTS, vocab_size=320)
