"""The four dashboards: each module has BOARD, its rows of panels."""
