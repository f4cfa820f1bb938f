"""A hundred thousand answers that nobody would give on purpose: none may raise, cheat or take long."""

import random
import time

from reward import format_reward, parse_box, reward

BOX = (100.0, 200.0, 300.0, 400.0)
TAGS = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<Answer>",
    "<answer >",
    "</ answer>",
    "<|im_end|>",
    "<answer",
]
NUMBERS = [
    "0",
    "100",
    "-1",
    "+7",
    "3.",
    ".5",
    "1e9",
    "nan",
    "inf",
    "1_0",
    "٣",
    "½",
    "0x1f",
    "9" * 30,
    "1.5.2",
    "−4",
]
MARKS = [
    "[",
    "]",
    "(",
    ")",
    "{",
    "}",
    ",",
    ";",
    ":",
    " ",
    "\t",
    "\n",
    "\r\n",
    "\u00a0",
    "\u2028",
    "\0",
    "'",
    '"',
    "\\",
]
SPACES = ["", " ", "\n", "\t", "\r\n", "  \n"]


def unicode_text(rng: random.Random) -> str:
    return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randint(0, 60)))


def near_miss(rng: random.Random) -> str:
    """Of the pieces that answers are made of, in an order that is almost right."""
    numbers = [rng.choice(NUMBERS) if rng.random() < 0.3 else str(rng.randint(-50, 1050)) for _ in range(4)]
    numbers = numbers[: rng.choice([4, 4, 4, 3])] + [rng.choice(NUMBERS)] * rng.choice([0, 0, 0, 1])
    box = rng.choice("[[[[({") + rng.choice([", ", ",", " ", ";"]).join(numbers) + rng.choice("]]]])}")
    parts = [
        "<think>",
        rng.choice(["", "red star", box, "<answer>"]),
        "</think>",
        "<answer>",
        box,
        "</answer>",
    ]
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        at = rng.randrange(len(parts))
        parts[at : at + rng.randint(0, 2)] = [rng.choice(rng.choice([TAGS, NUMBERS, MARKS, [box]]))]
    return "".join(parts)


def mutation(rng: random.Random) -> str:
    """A right answer with a few characters gone, doubled or exchanged."""
    text = list("<think>red star</think><answer>[100, 200, 300, 400]</answer>")
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(text) + 1)
        text[at : at + rng.randint(0, 3)] = rng.choice(["", "7", *MARKS, chr(rng.randrange(0x3000))])
    return "".join(text)


def box_by_hand(text: str) -> tuple | None:
    """The box in an answer by another way than the program's: no regular expressions."""
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    inside = text.partition("<answer>")[2]
    inside, end, _ = inside.partition("</answer>")
    inside = inside.strip()
    if not end or not (inside.startswith("[") and inside.endswith("]")):
        return None
    numbers = []
    for part in inside[1:-1].split(","):
        whole, _, rest = part.strip().partition(".")
        whole = whole[1:] if whole[:1] in ("+", "-") else whole
        digits = all(c in "0123456789" for c in whole + rest)
        if not (digits and 1 <= len(whole) <= 9 and len(rest) <= 9):
            return None
        numbers.append(float(part))
    if len(numbers) != 4 or numbers[0] >= numbers[2] or numbers[1] >= numbers[3]:
        return None
    return tuple(numbers)


def hostile(count: int):
    rng = random.Random("hostile answers")
    for i in range(count):
        yield (unicode_text, near_miss, mutation)[i % 3](rng)


def test_a_hundred_thousand_answers_never_raise_nor_score_above_one():
    parsed = structured = 0
    for text in hostile(100_000):
        result, box = reward(text, BOX), parse_box(text)
        assert 0 <= result.total <= 1 and 0 <= result.iou <= 1 and result.format in (0, 1)
        assert result.format == format_reward(text) and (box is not None or result.iou == 0)
        assert box == box_by_hand(text), repr(text)
        parsed += box is not None
        structured += result.format == 1
    assert 2000 < parsed < 60_000 and 2000 < structured < 60_000, "the generator makes both kinds"


def test_spaces_line_ends_and_decimals_change_nothing():
    rng = random.Random("layout")
    for _ in range(5000):
        x1, y1 = rng.randint(-50, 900), rng.randint(-50, 900)
        numbers = [x1, y1, x1 + rng.randint(-5, 300), y1 + rng.randint(-5, 300)]
        plain = f"<think>x</think><answer>[{', '.join(map(str, numbers))}]</answer>"
        some = [f"{n}{rng.choice(['', '.', '.0', '.000'])}" for n in numbers]
        inside = ",".join(rng.choice(SPACES) + n + rng.choice(SPACES) for n in some)
        gaps = [rng.choice(SPACES) for _ in range(5)]
        loose = f"{gaps[0]}<think>x</think>{gaps[1]}<answer>{gaps[2]}[{inside}]{gaps[3]}</answer>{gaps[4]}"
        assert reward(loose, BOX) == reward(plain, BOX), repr(loose)


def test_100_kb_of_every_kind_takes_under_50_ms():
    for text in hostile(90):
        long = (text or " ") * (100_000 // max(1, len(text)))
        for longer in (long, f"<answer>[{long}]</answer>", f"<answer>[1, 2, 3,{long}"):
            seconds = []
            for _ in range(3):  # the best of three: the machine may be busy
                began = time.perf_counter()
                reward(longer, BOX)
                seconds.append(time.perf_counter() - began)
            assert min(seconds) < 0.05
