"""charts/grpo/dashboards/*.json, for Grafana 10.4 and newer. `python -m charts.generate.dashboards` writes them."""

import json

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from charts.generate.boards import engines, infrastructure, overview, pipeline
from charts.generate.tools import ROOT

FOLDER = ROOT / "charts/grpo/dashboards"
BOARDS = (overview.BOARD, pipeline.BOARD, engines.BOARD, infrastructure.BOARD)


def dashboards() -> dict[str, str]:
    """The text of each file, by its name."""
    texts = {board.name: JSONEncoder(sort_keys=True).encode(board.build()) for board in BOARDS}
    return {
        f"{name}.json": json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n" for name, text in texts.items()
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in dashboards().items():
        (FOLDER / name).write_text(text)
        print(FOLDER / name)


if __name__ == "__main__":
    main()
