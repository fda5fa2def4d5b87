"""Shared by all tests: few threads, fixed seeds, and the optional real data."""

from pathlib import Path

import pytest
import torch

from twelve.data.tokenizer import Tokenizer

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it gives, and changes the order of sums
DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"


@pytest.fixture(autouse=True)
def _seed():
    """Every test draws from the same state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text, chats and tasks; not part of the project, so a test that wants it is skipped without."""
    if not DATA.is_dir():
        pytest.skip("real data is absent (no shared/data folder beside the repository)")
    return DATA.resolve()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """One that knows a little Korean and English."""
    texts = ["The ship sails at dawn, and the captain counts twelve.", "배 열두 척이 새벽에 떠나고 장군은 바다를 본다."]
    return Tokenizer.train(texts * 4, vocab_size=320)
