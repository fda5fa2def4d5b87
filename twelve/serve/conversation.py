"""From messages to a prompt, for the server and the terminal alike."""

from dataclasses import dataclass

from twelve.data import chat
from twelve.engine import ContextLengthError, Engine

SLACK = 2  # tokenizers may normalise a text, so that a token stands for more of it than it says


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    inside: bool = False  # the prompt itself opens the reasoning

    def splitter(self) -> chat.StreamSplitter:
        """What tells reasoning from answer in the text that follows."""
        return chat.StreamSplitter(self.inside)


def read_prompt(engine: Engine, messages: list[dict]) -> Prompt:
    """The prompt that asks for the next answer. ContextLengthError, before minutes go into encoding it, for a text that
    is far too long.

    A model without a chat template was not taught to answer: it continues the text of the last message, and sees
    nothing of those before it.
    """
    tokenizer = engine.tokenizer

    def check(text: str) -> None:
        least = len(text) // tokenizer.longest
        if least >= SLACK * engine.context:
            raise ContextLengthError(
                f"the prompt has at least {least:,} tokens, and the model's context is {engine.context:,}: shorten it"
            )

    if tokenizer.chat_template is None:
        check(messages[-1]["content"])
        return Prompt(plain_prompt(tokenizer, messages[-1]["content"]))
    ids = chat.encode_prompt(tokenizer, messages, check)
    return Prompt(ids, chat.opens_reasoning(tokenizer.decode(ids[-16:], skip_special=False)))


def plain_prompt(tokenizer, text: str) -> list[int]:
    """Text to continue, at the beginning of a document."""
    return tokenizer.start_ids + tokenizer.encode(text)
