"""charts/grpo/dashboards/*.json, for Grafana 10.4 and newer. `python -m charts.generate.dashboards` writes them."""

import json
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from charts.generate.annotations import ANNOTATIONS
from charts.generate.boards import engines, infrastructure, overview, pipeline
from charts.generate.tools import ROOT

FOLDER = ROOT / "charts/grpo/dashboards"
BOARDS = (overview.BOARD, pipeline.BOARD, engines.BOARD, infrastructure.BOARD)


def dashboards() -> dict[str, str]:
    """The text of each file, by its name."""
    plain = {board.name: json.loads(JSONEncoder().encode(board.build())) for board in BOARDS}
    return {
        f"{name}.json": json.dumps(board | {"annotations": {"list": ANNOTATIONS}}, indent=2, sort_keys=True) + "\n"
        for name, board in plain.items()
    }


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """All panels of a dashboard's JSON that are no rows, those of closed rows too."""
    rows = [board, *(row for row in board["panels"] if row["type"] == "row")]
    return [panel for row in rows for panel in row.get("panels") or [] if panel["type"] != "row"]


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in dashboards().items():
        (FOLDER / name).write_text(text)
        print(FOLDER / name)


if __name__ == "__main__":
    main()
