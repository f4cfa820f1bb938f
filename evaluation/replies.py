"""Where a reply to a published benchmark gives its answer: an option's letter, yes or no, a box, a text."""

import re

from reward import Box, answer_of, parse_box

LATEX = re.compile(r"\\[A-Za-z]+|[{}$]")
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]{0,99}\}){0,999})\}")
NOUN = r"(?:answer|(?:correct|right|best|final) (?:option|choice))"
ANSWER_IS = re.compile(rf"\b{NOUN}\b[\s*_]{{0,4}}(?:is\b|:)[\s:*]{{0,8}}", re.I)
# A letter outside words, abbreviations ("e.g.", "C++"), contractions ("I'm") and compounds ("A-frame").
BEFORE = r"(?<!\w)(?<!\w['’.+&/-])"
AFTER = r"(?!\w|[+#]|['’&/-]\w|\.[A-Za-z](?![A-Za-z]))"
# "A" and "I" must not be the article and the pronoun: of words, only a few follow them, as in "A is right".
WORD = r"[ \t]{1,9}(?!(?:is|was|and|or|but|because|since|as|for|in|on|which|seems)\b)\w"
LETTER = rf"{BEFORE}([B-HJ-Zb-hj-z]|[AaIi](?!{WORD})){AFTER}"
# A letter at the beginning, unless another one follows: "A or B" is no choice.
OTHER = r"[\s)*.]{0,9}(?:,|&|and\b|or\b)[\s(*]{0,9}[A-Z]\b"
LABEL = r"[\s*_\"'`(\[<:]{0,12}(?:(?:option|choice|answer)\b[\s:*(]{0,8})?"
LEADING = re.compile(rf"{LABEL}{LETTER}(?!{OTHER})", re.I)


def answer_parts(reply: str) -> list[str]:
    r"""Where the answer may be, the surest first: \boxed{…}, the line after "answer is", the whole answer.

    The whole answer is the answer block (the last of several), or else all but the thoughts. Thoughts that do
    not end hold no answer.
    """
    text = answer_of(reply)
    if text is None:
        after = reply.rpartition("</think>")[2]
        _, tag, block = after.rpartition("<answer>")
        text = block.partition("</answer>")[0] if tag else "" if "<think>" in after else after
    boxed = BOXED.match(text, max(0, text.rfind("\\boxed{")))
    stated = [line.partition("\n")[0] for line in ANSWER_IS.split(text)[1:][-1:]]
    return [*([boxed[1]] if boxed else []), *stated, text]


def choice_of(reply: str, options: dict[str, str]) -> str | None:
    """The chosen letter: leading, the only one, or that of the only option whose text occurs.

    The first of these three that decides counts, in the surest part of the reply that decides.
    """
    texts = {letter: " ".join(text.lower().split()) for letter, text in options.items()}
    names = "|".join(re.escape(text) for text in sorted(texts.values(), key=len, reverse=True) if text)
    named = re.compile(rf"(?<![\w-])(?<!\d[.,])(?:{names})(?!\w|[.,]\d|-\w)")
    for part in (LATEX.sub(" ", part) for part in answer_parts(reply)):
        leading = {match[1].upper() for match in [LEADING.match(part)] if match}
        letters = {letter.upper() for letter in re.findall(LETTER, part)}
        found = set(named.findall(" ".join(part.lower().split())))
        by_text = {letter for letter, text in texts.items() if text and text in found}
        for chosen in (leading & texts.keys(), letters & texts.keys(), by_text):
            if len(chosen) == 1:
                return chosen.pop()
    return None


def yes_no(reply: str) -> str | None:
    """ "yes" or "no": the first word of the answer, or the only one of the two that occurs in it."""
    for part in answer_parts(reply):
        words = re.findall(r"\w+", LATEX.sub(" ", part).lower())
        found = {"yes", "no"}.intersection(words[:1]) or {"yes", "no"}.intersection(words)
        if len(found) == 1:
            return found.pop()
    return None


def box_of(reply: str) -> Box | None:
    """The box of the answer block, or the last four numbers in brackets ("bbox_2d": [10, 20, 30, 40])."""
    lists = re.findall(r"\[[^][]{7,99}\]", answer_parts(reply)[-1])[::-1]
    boxes = map(parse_box, [reply, *(f"<answer>{numbers}</answer>" for numbers in lists)])
    return next(filter(None, boxes), None)


def contains(reply: str, answers: tuple[str, ...], category: str) -> bool:
    """OCRBench's rule: the reply contains an accepted answer; in formulas case counts and spaces do not."""
    is_formula = category == "Handwritten Mathematical Expression Recognition"
    forms = [text.strip().replace("\n", " ") for text in (reply, *answers)]
    forms = [text.replace(" ", "") if is_formula else text.lower() for text in forms]
    return any(form in forms[0] for form in forms[1:])
