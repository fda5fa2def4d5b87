"""What an answer is worth to training: right, well-formed, in the language of the question, and not long-winded.

R1 (arXiv 2501.12948, section 2.2 and 2.3) adds accuracy, format and language consistency; so does `Rewards`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from twelve.data.reasoning import split_reasoning
from twelve.tasks import Problem

TAG = r"</?(?:think|answer)>"
INSIDE = rf"\s*(?!{TAG})\S(?:(?!{TAG}).)*"
FORM = re.compile(rf"\s*<think>{INSIDE}</think>\s*<answer>{INSIDE}</answer>\s*", re.DOTALL)
# in no language: tags, quantities (3y, 6 km), and names of one letter (x, 점 A)
NEUTRAL = re.compile(rf"{TAG}|[0-9] ?[A-Za-z]{{1,3}}(?![^\W\d_])|(?<![^\W\d_])[A-Za-z](?![^\W\d_])")
WORD = re.compile(r"[^\W\d_]+")
HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3]")
LATIN = re.compile("^[A-Za-z\u00c0-\u024f]+$")
SCRIPTS = {"ko": HANGUL, "en": LATIN}


@dataclass(frozen=True)
class Rewards:
    """Weights of the parts of a reward."""

    accuracy: float = 1.0
    format: float = 0.0
    language: float = 0.0
    length: float = 0.0  # taken away from a right answer that uses all of its tokens, less from shorter ones

    def of(self, problem: Problem, text: str, score: float, tokens: int, max_tokens: int) -> float:
        """Of an answer of so many tokens with this score."""
        reward = self.accuracy * score
        if self.format:
            reward += self.format * well_formed(text)
        if self.language:
            reward += self.language * language_share(text, problem.language)
        if self.length and score == 1:
            reward -= self.length * tokens / max_tokens
        return reward


def well_formed(text: str) -> float:
    """1 for reasoning within <think> and then an answer within <answer>, both not empty, and nothing else; else 0."""
    return float(FORM.fullmatch(text) is not None)


def language_share(text: str, language: str) -> float:
    """The share of the reasoning's words that are in the script of the language; 1 where it has no words.

    A foreign word with a Korean particle is Korean. Without reasoning the whole text counts. 1 for languages other than
    "ko" and "en", too.
    """
    reasoning, answer = split_reasoning(text)
    words = WORD.findall(NEUTRAL.sub(" ", reasoning or answer))
    if not words or language not in SCRIPTS:
        return 1.0
    return sum(SCRIPTS[language].search(word) is not None for word in words) / len(words)
