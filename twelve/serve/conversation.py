"""From messages to a prompt, for the server and the terminal alike."""

from dataclasses import dataclass

from twelve.data import chat


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    inside: bool = False  # the prompt itself opens the reasoning

    def splitter(self) -> chat.StreamSplitter:
        """What tells reasoning from answer in the text that follows."""
        return chat.StreamSplitter(self.inside)


def read_prompt(tokenizer, messages: list[dict]) -> Prompt:
    """The prompt that asks for the next answer.

    A model without a chat template was not taught to answer: it continues the text of the last message, and sees
    nothing of those before it.
    """
    if tokenizer.chat_template is None:
        return Prompt(plain_prompt(tokenizer, messages[-1]["content"]))
    ids = chat.encode_prompt(tokenizer, messages)
    return Prompt(ids, chat.opens_reasoning(tokenizer.decode(ids[-16:], skip_special=False)))


def plain_prompt(tokenizer, text: str) -> list[int]:
    """Text to continue, at the beginning of a document."""
    return tokenizer.start_ids + tokenizer.encode(text)
