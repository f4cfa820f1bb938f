"""Where a reply to a published benchmark gives its answer: an option's letter, yes or no, a box, a text."""

import re
from unicodedata import normalize

from reward import Box, answer_of

LATEX = re.compile(r"\\[A-Za-z]+|[{}$_\ue000-\uf8ff]")  # and Markdown's _, and the marks of option_marks()
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]{0,99}\}){0,999})\}")
NOUN = r"(?:answer|letter|(?:correct|right|best|final) (?:option|choice))"
IS = r"(?:(?:is|should be|would be|must be)\b|:|(?<=\s)-\s)"
ANSWER_IS = re.compile(rf"\b{NOUN}\b[\s*_\"]{{0,4}}{IS}[\s:*]{{0,8}}", re.I)
# A letter outside words, units ("°C"), abbreviations ("e.g.", "C++"), "I'm" and compounds ("A-frame").
CHAR = r"[^\W\u3000-\u9fff]"  # of a word; Chinese has no spaces between words
BEFORE = rf"(?<!{CHAR}|°)(?<!{CHAR}['’.+&/-])"
AFTER = rf"(?!{CHAR}|[+#]|['’&/-]\w|\.[A-Za-z](?![A-Za-z]))"
# "A" and "I" must not be the article and the pronoun: of words, only a few follow them, as in "A is right".
WORD = r"[ \t]{1,9}(?!(?:is|are|was|seems|and|or|nor|but|because|since|as|for|in|on|not)\b)[\w\ue000-\uf8ff]"
LETTER = rf"{BEFORE}(?:[B-HJ-Zb-hj-z]|[AaIi](?!{WORD})){AFTER}"
# A letter at the beginning, unless another one follows: "A or B" is no choice.
OTHER = r"[\s)*.]{0,9}(?:,|&|and\b|or\b)[\s(*]{0,9}[A-Z]\b"
LABEL = r"[\s*_\"'`(\[<:]{0,12}(?:(?:option|choice|answer)\b[\s:*(]{0,8})?"
LEADING = re.compile(rf"\A{LABEL}({LETTER})(?!{OTHER})", re.I)
# A letter that the words before it choose; there, a capital "A" is no article but before an option's text.
KEYWORDS = "option|choice|answer|so|thus|hence|therefore|must be|should be|choose|pick|select|go with"
STATED = rf"(?-i:{BEFORE}A{AFTER}(?! ?[\ue000-\uf8ff]))|{LETTER}"
KEYWORD = rf"(?:(?<!\bor )\b(?:{KEYWORDS})\b|[选择项案是为])"
NAMED = re.compile(rf"{KEYWORD}[\s,:*(\"'\[]{{0,6}}({STATED})(?! or\b)", re.I)
# What a reply excludes ("not A", "neither A nor B", "C is wrong"), and what it lists ("A. red / B. blue").
MARK = r"[\ue000-\uf8ff]"
TOKEN = rf"(?:{LETTER}[)\"'*\]]{{0,3}}(?:[.:]?\s?{MARK})?|{MARK}[)\"'*\]]{{0,3}})"
ITEM = rf"(?<![(\"'*\[])(?:(?:option|choice|the|an?)\s){{0,2}}[(\"'*\[]{{0,3}}{TOKEN}"
AND = r"(?:,? (?:and|or|nor) |, (?=\S{1,9} (?:and|or|nor) ))"  # "not A, B or C", but "rather than A, B"
ITEMS = rf"{ITEM}(?:{AND}{ITEM}){{0,3}}"
NOT = r"(?:\b(?:not|neither|rather than|instead of|unlike)|n['’]t|(?<=\b[A-Z]\s)over|不[是选])"
WRONG = r"(?:n['’]t|\s(?:\w+ly\s)?(?:not|wrong|incorrect|false))\b"
EXCLUDED = re.compile(rf"{NOT}\s?(?:(?:be|choose)\s)?{ITEMS}|{ITEMS}\s?(?:is|are){WRONG}", re.I)
LISTED = re.compile(rf"(?:[(\[*]{{0,3}}{LETTER}[)\].:*]{{1,4}}\s?{MARK}(?:[\s,;/|.*-]|and\s){{0,9}}){{2,}}")
# "no" that is no answer, and both words as answers, which are none: "Yes/No", "Yes. No."
NO_ANSWER = re.compile(r"\bno (?:doubt|question)\b|\bnot (?:yes|no)\b|\b(?:yes|no)(?= (?:is|would be) wrong)")
BOTH = re.compile(r"\W*(yes|no)\W+(?:and\W+)?(?!\1)(?:yes|no)\b(?!\s+\w)")
# Four numbers ("[1, 2, 3, 4]", "x1=1, y1=2 …") or two pairs ("(1, 2) to (3, 4)") of at most nine digits.
NUMBER = r"(?:[\"']?[xy]\w{0,4}[\"']?\s?[:=]\s?)?([+-]?\d{1,9}(?:\.\d{0,9})?)(?!\d)"
GAP = r"[\s,;]{1,40}"
PAIR = rf"[(\[]\s?{NUMBER}{GAP}{NUMBER}\s?[)\]]"
FIRST, LAST = r"(?<![\w.+-])(?<!\d[,;\s])(?<!\d[,;]\s)", rf"(?!{GAP}\d)"  # of all the numbers there
FOUR_NUMBERS = re.compile(rf"{FIRST}{GAP.join([NUMBER] * 4)}{LAST}|{PAIR}\D{{1,30}}?{PAIR}")


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


def plain(text: str) -> str:
    """A text as options and replies are compared: full-width letters as ASCII, single spaces."""
    return re.sub(r"[ \t]+", " ", LATEX.sub(" ", normalize("NFKC", text))).strip()


def mark_options(text: str, options: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The text with a mark in place of each option's text, so that "Gate B" holds no letter; mark: letters.

    A mark has several letters where options share their text. A text that is an option's letter stays.
    Options that are only listed ("A. red / B. blue") are removed.
    """
    forms, letters = [], {}
    for letter, option in options.items():
        words = plain(option).lower().split()
        if words and (key := "".join(words)).upper() not in options:
            letters[key] = letters.get(key, "") + letter
            form = re.sub(r"(\d) ?(?=[a-z°%])", r"\1 ?", " ".join(map(re.escape, words)))  # "5 cm" is "5cm"
            forms.append(form.replace(" ", r"\s"))
    marks = {key: chr(0xE000 + i) for i, key in enumerate(letters)}
    names = "|".join(sorted(forms, key=len, reverse=True)) or "(?!)"  # of "red" and "red car" the longer
    named = re.compile(rf"(?:(?<!{CHAR}|-)|(?<=\b[A-Z]-))(?<!\d[.,])(?:{names})(?!{CHAR}|[.,]\d|-\w)", re.I)
    text = named.sub(lambda match: marks.get("".join(match[0].lower().split()), match[0]), text)
    return LISTED.sub(" ", text), {marks[key]: letter for key, letter in letters.items()}


def choice_of(reply: str, options: dict[str, str]) -> str | None:
    """The chosen letter: leading, named, the only one, or that of the only option whose text occurs.

    The first of these four that decides counts, in the surest part of the reply that decides. Options that
    are only listed or excluded do not count.
    """
    for part in map(plain, answer_parts(reply)):
        marked, letters_of_mark = mark_options(part, options)
        kept = EXCLUDED.sub(" ", marked)
        # A letter that is no option says nothing, and neither does what it excludes.
        if any(letter.isupper() and letter not in options for letter in re.findall(LETTER, kept)):
            kept = marked
        by_text = "".join(letters_of_mark.get(mark, "") for mark in re.findall(MARK, kept))
        for letters in (LEADING.findall(kept), NAMED.findall(kept)[-1:], re.findall(LETTER, kept), by_text):
            chosen = {letter.upper() for letter in letters} & options.keys()
            if len(chosen) == 1:
                return chosen.pop()
    return None


def yes_no(reply: str) -> str | None:
    """ "yes" or "no": the first word of the answer, or the only one of the two that is an answer in it.

    Before a noun "no" is an answer only where nothing else is: "No doubt, yes." is a yes.
    """
    for part in answer_parts(reply):
        text = NO_ANSWER.sub(" ", plain(part).lower())
        if BOTH.match(text):
            return None
        patterns = (r"\A\W*(yes\b|no\b(?!\s+\w))", r"\byes\b|\bno\b(?!\s+\w)", r"\bno\b")
        found = next((set(words) for words in (re.findall(p, text) for p in patterns) if words), set())
        if len(found) == 1:
            return found.pop()
    return None


def box_of(reply: str) -> Box | None:
    """The last box in the answer, the first of a list: four numbers, or two pairs in brackets.

    >>> box_of('[{"bbox_2d": [10, 20, 30, 40]}, {"bbox_2d": [1, 2, 3, 4]}]')
    (10.0, 20.0, 30.0, 40.0)
    """
    text, boxes, previous_end = answer_parts(reply)[-1], [], 0
    for match in FOUR_NUMBERS.finditer(text):
        x1, y1, x2, y2 = (float(number) for number in match.groups() if number)
        between = re.sub(r"\"[^\"]*\"", "", text[previous_end : match.start()])
        in_list = boxes and re.fullmatch(r"[\s,:()[\]{}]*,[\s,:()[\]{}]*", between)
        if x1 < x2 and y1 < y2 and not in_list:
            boxes.append((x1, y1, x2, y2))
        previous_end = match.end()
    return boxes[-1] if boxes else None


def contains(reply: str, answers: tuple[str, ...], category: str) -> bool:
    """OCRBench's rule: the reply contains an accepted answer; in formulas case counts and spaces do not."""
    is_formula = category == "Handwritten Mathematical Expression Recognition"
    forms = [text.strip().replace("\n", " ") for text in (reply, *answers)]
    forms = [text.replace(" ", "") if is_formula else text.lower() for text in forms]
    return any(form in forms[0] for form in forms[1:])
