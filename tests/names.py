"""Prints the names in the seven root files and checks that a reader need not stop at them.

    python tests/names.py

Counts every lower-case variable, parameter and field once. Exit code 1 if they are too short on average, if
too few of them are made of several words, or if one of them says nothing (VAGUE).
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SEVEN = ("reward", "data", "prompts", "models", "policy", "locus_mini", "eval")
MIN_MEAN_LENGTH = 7.0  # letters
MIN_SHARE_OF_SEVERAL_WORDS = 0.35
VAGUE_WORDS = """
ways how some said begun known one less more few about there chances alive landed tools forbidden whole attend
see look looking kinds living chosen keep spread cut gap fall roll hold shown answered demand four journal
recall
"""
VAGUE = set(VAGUE_WORDS.split())


def names_in(source: str) -> set[str]:
    """The lower-case variables and parameters in the code of a module, and the fields of its classes."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return {name for name in names if name.islower()} - {"self", "cls"}


def check_names(names: set[str]) -> list[str]:
    """One sentence for each rule that the names break."""
    mean_length = sum(map(len, names)) / len(names)
    share = sum("_" in name for name in names) / len(names)
    problems = [f"{name} says nothing: give it a name of the field" for name in sorted(names & VAGUE)]
    if mean_length < MIN_MEAN_LENGTH:
        problems.append(f"names have {mean_length:.2f} letters on average, not {MIN_MEAN_LENGTH}")
    if share < MIN_SHARE_OF_SEVERAL_WORDS:
        problems.append(f"{share:.0%} of the names have several words, not {MIN_SHARE_OF_SEVERAL_WORDS:.0%}")
    return problems


def main() -> None:
    by_file = {name: names_in((ROOT / f"{name}.py").read_text(encoding="utf-8")) for name in SEVEN}
    for name, names in by_file.items():
        print(f"{name}.py: {', '.join(sorted(names))}\n")
    names = set().union(*by_file.values())
    mean_length, share = sum(map(len, names)) / len(names), sum("_" in name for name in names) / len(names)
    print(f"{len(names)} names, {mean_length:.2f} letters on average, {share:.0%} of several words")
    problems = check_names(names)
    print("\n".join(problems) or "no problem")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
