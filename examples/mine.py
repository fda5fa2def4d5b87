"""Messages to a shop: which desk should answer? Some thirty lines that check an answer are all that RL needs."""

from random import Random

DESKS = {
    "billing": ["I was charged twice for {it}.", "The invoice for {it} shows the wrong amount.",
                "When will I get the money back for {it}?", "My card was declined when I paid for {it}."],
    "delivery": ["{it} has still not arrived.", "The courier left {it} with a neighbour I do not know.",
                 "Can you send {it} to my new address?", "Tracking says {it} has been stuck in Busan for a week."],
    "repair": ["{it} does not switch on any more.", "There is a crack in {it} after two days of use.",
               "{it} makes a strange noise and gets hot.", "A part of {it} is loose, can somebody fix it?"],
}  # fmt: skip
THINGS = ["the kettle", "my lamp", "the radio", "our heater", "the fan", "my watch", "the drill", "a toaster"]
OPENINGS = ["Hello,", "Good morning.", "Hi there!", "To whom it may concern:", "Please help.", "Dear team,"]
ENDINGS = ["Thanks.", "Order {n}.", "I bought it on day {n} of last month.", "Best regards, Jieun", "Call me at {n}."]
SYSTEM = "Which desk should answer: billing, delivery or repair?"
EXAMPLES = [("The bill is wrong.", "billing"), ("The parcel is late.", "delivery"), ("It is broken.", "repair")]
LANGUAGES, MAX_TOKENS = ("en",), 8


def generate(seed):
    draw = Random(seed)
    desk = draw.choice(sorted(DESKS))
    said = draw.choice(DESKS[desk]).format(it=draw.choice(THINGS))
    opening, ending = draw.choice(OPENINGS), draw.choice(ENDINGS).format(n=draw.randint(1, 999))
    return {"question": f"{opening} {said[0].upper()}{said[1:]} {ending}", "answer": desk}


def score(problem, text):
    return text.strip().rstrip(".").lower() == problem.answer  # this word and nothing else: see --audit
