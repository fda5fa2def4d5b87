"""Messages to a shop: which order is it about? Some thirty lines that check an answer are all that RL needs."""

from random import Random

from twelve.tasks.verify import is_equal

NAMES = ["order {n}", "order no. {n}", "my order with the number {n}", "the parcel of order {n}"]
MESSAGES = [
    "{order} has not arrived after {days} days.",
    "I paid {price} dollars for {order} and got only {pieces} pieces.",
    "Please call me at {phone} about {order}.",
    "{pieces} lamps were in {order}, but {days} are broken.",
    "On day {days} I sent {order} back, {price} dollars are still missing.",
    "My number is {phone}, and {order} was left in flat {price}.",
]
SYSTEM = "Which order is it about? Answer with its number only."
EXAMPLES = [("Order 2047 came too late.", "2047"), ("I have 3 questions about order no. 5518, call 7730.", "5518")]
LANGUAGES, MAX_TOKENS = ("en",), 10


def generate(seed):
    draw = Random(seed)
    number = draw.randint(1000, 9999)
    said = draw.choice(MESSAGES).format(
        order=draw.choice(NAMES).format(n=number), days=draw.randint(2, 29), price=draw.randint(10, 99),
        pieces=draw.randint(2, 9), phone=draw.randint(1000, 9999),
    )  # fmt: skip
    return {"question": said[0].upper() + said[1:], "answer": str(number)}


def score(problem, text):
    return is_equal(str(problem.answer), text)  # this number, however it is written, and nothing else
