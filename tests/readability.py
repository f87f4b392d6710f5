"""Words per sentence of each page: mean, longest, and how many have more than 30. A report; nothing fails on it.

    python tests/readability.py [PAGE ...] [-v]        # -v: the sentences of more than 30 words themselves

Left out: code blocks, tables, headings and the addresses of links. A span of code counts as one word.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "LOG.md"]


def sentences(text: str) -> list[str]:
    text = re.sub(r"^(    |\||#).*$", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]+`", "CODE", text))
    text = re.sub(r"^(\* )?\*\*[^*]+[.:]\*\*", "", text, flags=re.M)  # what stands bold in front is a heading
    parts = re.split(r"\n\s*\n|\n(?=\* )|\n(?=\d+\. )", text)  # a paragraph or an item of a list ends a sentence
    whole = [" ".join(part.replace("**", "").split()).removeprefix("* ") for part in parts]
    return [line for part in whole for line in re.split(r"(?<=[.!?])\)? (?=[A-Z\"\[(\d])", part) if line]


if __name__ == "__main__":
    asked = [Path(arg) for arg in sys.argv[1:] if arg != "-v"] or PAGES
    print(f"{'page':24} {'sentences':>9} {'mean':>5} {'longest':>7} {'over 30':>7}")
    for page in asked:
        found = sorted(sentences(page.read_text()), key=lambda line: -len(line.split()))
        count = [len(line.split()) for line in found]
        mean, longest = sum(count) / max(len(count), 1), max(count, default=0)
        print(f"{page.name:24} {len(count):9} {mean:5.1f} {longest:7} {sum(n > 30 for n in count):7}")
        for line in found if "-v" in sys.argv else []:
            if len(line.split()) > 30:
                print(f"    {len(line.split())}: {line}")
