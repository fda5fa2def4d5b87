"""What runs a model: requests of token ids in, text and token ids out."""

from twelve.engine.engine import ContextLengthError, Engine, make_engine
from twelve.engine.request import Completion, Delta, Request, sub_seed

__all__ = ["Completion", "ContextLengthError", "Delta", "Engine", "Request", "make_engine", "sub_seed"]
