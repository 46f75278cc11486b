"""docs/architecture.md shows the house as it is: its floors, each room's sentence, files that exist."""

import ast
import re

from tests.test_layers import FLOORS, ROOT

PAGE = (ROOT.parent / "docs" / "architecture.md").read_text()


def sentence(room: str) -> str:
    """The first sentence of a room's docstring."""
    if room == "grpo":
        return "The version of the program, in `grpo/__init__.py`."
    path = ROOT / room / "__init__.py" if (ROOT / room).is_dir() else ROOT / f"{room}.py"
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", text)[0]


def table() -> str:
    """The table of the page, the highest floor first."""
    rows = [
        f"| {floor} | `{room}` | {sentence(room)} |"
        for floor, rooms in reversed(list(enumerate(FLOORS)))
        for room in sorted(rooms)
    ]
    return "\n".join(["| floor | room | what it is |", "|---|---|---|", *rows])


def test_the_page_has_the_floors_and_each_rooms_sentence() -> None:
    shown = re.search(r"^\| floor \| room \|.*?(?=\n\n)", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert shown and shown[0] == table(), f"put this table into docs/architecture.md:\n{table()}"


def test_every_room_has_one_sentence_that_fits_a_row() -> None:
    told = {room: sentence(room) for rooms in FLOORS for room in rooms}
    assert [room for room, text in told.items() if not text.endswith(".") or not 20 <= len(text) <= 120] == []
    assert len(set(told.values())) == len(told)


def test_files_that_the_page_names_exist() -> None:
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", PAGE))
    assert len(named) > 10
    assert [name for name in named if not ((ROOT / name).is_file() or (ROOT.parent / name).is_file())] == []
