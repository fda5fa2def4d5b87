"""From messages to a prompt, for the server and the terminal alike."""

from dataclasses import dataclass

from twelve.data import chat


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    in_reasoning: bool  # the prompt itself opens the reasoning, as the templates of R1's distillations do

    def splitter(self) -> chat.StreamSplitter:
        """What separates the reasoning from the answer in the text that follows."""
        splitter = chat.StreamSplitter()
        if self.in_reasoning:
            splitter.feed("<think>")
        return splitter


def read_prompt(tokenizer, messages: list[dict[str, str]]) -> Prompt:
    """The prompt that asks for the next answer.

    A model without a chat template was not taught to answer: it continues the text of the last message, and sees
    nothing of those before it.
    """
    if tokenizer.chat_template is None:
        return Prompt(plain_prompt(tokenizer, messages[-1]["content"]), in_reasoning=False)
    text = chat.render(tokenizer, messages)
    return Prompt(tokenizer.encode(text), in_reasoning=text.rstrip().endswith("<think>"))


def plain_prompt(tokenizer, text: str) -> list[int]:
    """Text to continue, at the beginning of a document."""
    begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return ([] if begin is None else [begin]) + tokenizer.encode(text)
