"""How good a model is: bits per byte of text, and the share of checkable tasks that it solves, with its error."""

from twelve.evaluate.accuracy import Accuracy, task_accuracy
from twelve.evaluate.bits import BitsPerByte, bits_per_byte

__all__ = ["Accuracy", "BitsPerByte", "bits_per_byte", "task_accuracy"]
