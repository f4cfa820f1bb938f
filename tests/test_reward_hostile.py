"""A hundred thousand hostile completions: none raises, scores more than it should or takes long."""

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
    """An almost correct completion, made of the pieces of a correct one."""
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
        start = rng.randrange(len(parts))
        parts[start : start + rng.randint(0, 2)] = [rng.choice(rng.choice([TAGS, NUMBERS, MARKS, [box]]))]
    return "".join(parts)


def mutation(rng: random.Random) -> str:
    """A correct completion with a few characters removed, added or replaced."""
    text = list("<think>red star</think><answer>[100, 200, 300, 400]</answer>")
    for _ in range(rng.randint(1, 6)):
        start = rng.randrange(len(text) + 1)
        text[start : start + rng.randint(0, 3)] = rng.choice(["", "7", *MARKS, chr(rng.randrange(0x3000))])
    return "".join(text)


def parse_box_without_regex(text: str) -> tuple | None:
    """What parse_box should return, computed without regular expressions."""
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    inside, closing_tag, _ = text.partition("<answer>")[2].partition("</answer>")
    inside = inside.strip()
    if not closing_tag or not (inside.startswith("[") and inside.endswith("]")):
        return None
    numbers = []
    for part in inside[1:-1].split(","):
        integer, _, decimals = part.strip().partition(".")
        integer = integer[1:] if integer[:1] in ("+", "-") else integer
        only_digits = all(character in "0123456789" for character in integer + decimals)
        if not (only_digits and 1 <= len(integer) <= 9 and len(decimals) <= 9):
            return None
        numbers.append(float(part))
    if len(numbers) != 4 or numbers[0] >= numbers[2] or numbers[1] >= numbers[3]:
        return None
    return tuple(numbers)


def hostile(count: int):
    rng = random.Random("hostile answers")
    for i in range(count):
        yield (unicode_text, near_miss, mutation)[i % 3](rng)


def test_hostile_completions_never_raise_and_score_as_they_should():
    num_parsed = num_formatted = 0
    for text in hostile(100_000):
        result, box = reward(text, BOX), parse_box(text)
        assert 0 <= result.total <= 1 and 0 <= result.iou <= 1 and result.format in (0, 1)
        assert result.format == format_reward(text) and (box is not None or result.iou == 0)
        assert box == parse_box_without_regex(text), repr(text)
        num_parsed += box is not None
        num_formatted += result.format == 1
    assert 2000 < num_parsed < 60_000 and 2000 < num_formatted < 60_000, (
        "the generator makes valid and invalid completions"
    )


def test_spaces_line_breaks_and_decimal_zeros_change_nothing():
    rng = random.Random("layout")
    for _ in range(5000):
        x1, y1 = rng.randint(-50, 900), rng.randint(-50, 900)
        numbers = [x1, y1, x1 + rng.randint(-5, 300), y1 + rng.randint(-5, 300)]
        plain = f"<think>x</think><answer>[{', '.join(map(str, numbers))}]</answer>"
        with_zeros = [f"{number}{rng.choice(['', '.', '.0', '.000'])}" for number in numbers]
        inside = ",".join(rng.choice(SPACES) + number + rng.choice(SPACES) for number in with_zeros)
        a, b, c, d, e = (rng.choice(SPACES) for _ in range(5))
        spaced = f"{a}<think>x</think>{b}<answer>{c}[{inside}]{d}</answer>{e}"
        assert reward(spaced, BOX) == reward(plain, BOX), repr(spaced)


def test_100_kb_of_hostile_text_take_under_50_ms():
    for text in hostile(90):
        repeated = (text or " ") * (100_000 // max(1, len(text)))
        for long_text in (repeated, f"<answer>[{repeated}]</answer>", f"<answer>[1, 2, 3,{repeated}"):
            seconds = []
            for _ in range(3):  # the best of three: the machine may be busy
                start = time.perf_counter()
                reward(long_text, BOX)
                seconds.append(time.perf_counter() - start)
            assert min(seconds) < 0.05
